"""The comparator of numbers: every output and gradient, element by element, within a budget around the truth.

The budget of an element is twice the oracle's own error, a floor of units in the last place, and, asked for only
where these do not suffice, the truth's own sensitivity to inputs that cannot be told apart (`design.md`, equality).
The oracle's own error counts up to a limit: beyond it the oracle contradicts its own float64 run, and what it then
excuses would be anything.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.equality import FLOOR_ULPS, MOVES, SAFETY, coarsest, moved, moved_alike, ulp
from harness.operation import AUTOCAST, Tensors, gradient_name
from harness.verdict import NON_FINITE, Evidence, Finding, worst

OWN_ULPS = 256
"""Units in the last place up to which the oracle's own error widens the budget without the truth's sensitivity."""
WITHOUT_TRUTH_ULPS = 64
"""The stated tolerance where upstream cannot run in float64: two roundings of sums, one of them upstream's."""


@dataclass(frozen=True)
class Quantity:
    """One output or gradient on its way through the comparison; all float64, `dtype` is the coarsest that it saw."""

    name: str
    ours: Tensor
    theirs: Tensor
    truth: Tensor
    dtype: torch.dtype
    floor: int

    def share(self, sensitivity: Tensor | None = None) -> tuple[float, tuple[int, ...]]:
        """The worst error as a share of its budget, and where; infinite where only the candidate is not finite.

        The oracle's own bits are parity whatever the truth says.
        """
        unit = ulp(self.truth.nan_to_num(0.0, 0.0, 0.0), self.dtype)
        slack = torch.zeros_like(self.truth) if sensitivity is None else sensitivity
        own = (self.theirs - self.truth).abs().nan_to_num(0.0, posinf=0.0)
        allowed = 2 * torch.minimum(own, OWN_ULPS * unit + slack) + self.floor * unit + slack
        allowed = allowed + torch.finfo(self.dtype).smallest_normal
        truth = torch.where(self.truth.isfinite(), self.truth, self.theirs)
        error = (self.ours - truth).abs()
        settled = self.alike | (~self.theirs.isfinite() & ~self.truth.isfinite())
        return worst(torch.where(settled, torch.zeros_like(error), error), allowed)

    @property
    def alike(self) -> Tensor:
        """Equal, NaN and infinity included."""
        return (self.ours == self.theirs) | (self.ours.isnan() & self.theirs.isnan())

    @property
    def disputed(self) -> Tensor:
        """Where upstream is not finite and the candidate says something else."""
        return ~self.theirs.isfinite() & ~self.alike

    def describe(self, place: tuple[int, ...], share: float) -> str:
        """Worst element, its coordinates, all values, and the error in budgets."""
        at = f"[{', '.join(map(str, place))}]" if place else ""
        values = (f"{said} {value[place].item():.9g}" for said, value in zip(SAID, self.values, strict=True))
        return f"{self.name}{at}: {', '.join(values)}; {share:.3g} times the budget"

    @property
    def values(self) -> tuple[Tensor, Tensor, Tensor]:
        """Candidate, oracle, truth."""
        return self.ours, self.theirs, self.truth


SAID = ("candidate", "oracle", "truth")


def compare(evidence: Evidence) -> Finding:
    """Judge all numbers of an operation; decisions among its outputs are for its own comparator."""
    if evidence.truth is None and evidence.operation.float64:
        return Finding("mismatch", f"the oracle fails in float64, so there is no truth: {evidence.no_truth}", "truth")
    errors, disputed = {"value": None, "gradient": None}, ""
    sensitivity: dict[str, Tensor] | None = None
    for kind, quantity in _quantities(evidence):
        share, place = quantity.share()
        if share > 1:
            # Only now the dear part: how much the truth itself moves when inputs move by one ulp.
            if sensitivity is None:
                sensitivity = evidence.ask.memory.get(_sensitivity) or _sensitivity(evidence)
                evidence.ask.memory[_sensitivity] = sensitivity
            share, place = quantity.share(sensitivity[quantity.name])
        errors[kind] = max(share, errors[kind] or 0.0)
        if share > 1:
            detail = quantity.describe(place, share)
            return Finding("mismatch", detail, quantity.name, errors["value"], gradient_error=errors["gradient"])
        if not disputed and bool(quantity.disputed.any()):
            place = tuple(quantity.disputed.nonzero()[0].tolist())
            disputed = quantity.describe(place, share)
    if disputed:
        return Finding("mismatch", disputed, NON_FINITE, errors["value"], gradient_error=errors["gradient"])
    return Finding("match", "", "", errors["value"], gradient_error=errors["gradient"])


def _quantities(evidence: Evidence) -> Iterator[tuple[str, Quantity]]:
    operation, case = evidence.operation, evidence.case
    numbers = [output.name for output in operation.outputs if not output.decision]
    gradients = [gradient_name(name) for name in operation.carries_gradient(case.tensors)]
    inputs = [value.dtype for value in case.tensors.values() if value.is_floating_point()]
    inputs += _through(evidence)
    for kind, names in (("value", numbers), ("gradient", gradients)):
        for name in names:
            ours, theirs = evidence.candidate[name], evidence.oracle[name]
            truth = theirs.double() if evidence.truth is None else evidence.truth[name].double()
            floor = WITHOUT_TRUTH_ULPS if evidence.truth is None else FLOOR_ULPS
            dtype = coarsest(*inputs, ours.dtype)
            yield kind, Quantity(name, ours.double(), theirs.double(), truth, dtype, floor)


def _through(evidence: Evidence) -> tuple[torch.dtype, ...]:
    """Dtypes that upstream's computation passes through whatever the inputs are."""
    names = evidence.operation.precision, evidence.case.settings.get(AUTOCAST)
    return tuple(getattr(torch, name) for name in names if name)


def _evaluated(evidence: Evidence, given: Tensors, exact: bool) -> Tensors:
    narrow = {name: value.to(evidence.case.tensors[name].dtype) for name, value in given.items()}
    return evidence.evaluate(given if exact else narrow)


def _sensitivity(evidence: Evidence) -> dict[str, Tensor]:
    """The largest change of every number over inputs moved by one unit in the last place, times SAFETY."""
    case, operation = evidence.case, evidence.operation
    names = tuple(
        name
        for name in operation.moved or operation.gradients
        if name in case.tensors and case.tensors[name].is_floating_point()
    )
    exact = evidence.truth is not None
    base = evidence.truth if exact else evidence.evaluate(case.tensors)
    change = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in base.items()}
    # In float64 the truth rounds as the oracle does, and that rounding shows only in some directions.
    moves = MOVES if case.dtype != "float64" else 4 * MOVES
    for given in moved(case.tensors, names, through=_through(evidence), moves=moves):
        try:
            other = _evaluated(evidence, given, exact)
        except RuntimeError:
            # Moved out of what upstream takes: a box without area was turned inside out.
            other = _evaluated(evidence, moved_alike(given, case.tensors, names), exact)
        for name, value in other.items():
            difference = (value.double() - base[name].double()).abs().nan_to_num(0.0, posinf=0.0)
            change[name] = torch.maximum(change[name], difference)
    return {name: SAFETY * value for name, value in change.items()}
