"""The comparator of numbers: every output and gradient, element by element, within a budget around the truth.

The budget of an element is twice the oracle's own error, a floor of units in the last place, and, asked for only
where these do not suffice, the truth's own sensitivity to inputs that cannot be told apart (`design.md`, equality).
The oracle's own error counts up to a limit: beyond it the oracle contradicts its own float64 run, and what it then
excuses would be anything.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from harness.equality import BUDGET, FLOOR_ULPS, MOVES, SAFETY, coarsest, in_float64, moved, moved_alike, ulp
from harness.operation import AUTOCAST, Tensors, gradient_name
from harness.verdict import NON_FINITE, Evidence, Finding, worst

OWN_ULPS = BUDGET["own_ulps"]
"""Units in the last place of an output's scale, up to which the oracle's own error widens the budget of an element
without the truth's sensitivity."""
RUNGS = MOVES, 4 * MOVES, 16 * MOVES
"""Moves of the inputs that are made: some at once, more where these do not suffice."""
WITHOUT_TRUTH_ULPS = BUDGET["without_truth_ulps"]
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
        # Of the largest element: where one all but cancels, its own units say nothing of how upstream rounds.
        scale = unit.max() if unit.numel() else unit
        allowed = BUDGET["oracle_factor"] * torch.minimum(own, OWN_ULPS * scale + slack) + self.floor * unit + slack
        # The truth rounds too, less by the ratio of the roundings: it is no better where it all but cancels.
        allowed = allowed + SAFETY * own * (torch.finfo(torch.float64).eps / torch.finfo(self.dtype).eps)
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
    for kind, quantity in _quantities(evidence):
        share, place = quantity.share()
        if share > 1:
            # Only now the dear part: how much the truth itself moves when inputs move by one ulp.
            memory = evidence.ask.memory
            sensitivity = memory[_Sensitivity] = memory.get(_Sensitivity) or _Sensitivity(evidence)
            for rung in range(1, len(RUNGS) + 1):
                sensitivity.more(rung)
                share, place = quantity.share(sensitivity.of(quantity.name))
                if share <= 1:
                    break
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
            # In float64 the oracle is its own truth: its error looks like 0 and is not, so the floor is twice as wide.
            exact = FLOOR_ULPS * (2 if case.dtype == "float64" else 1)
            floor = WITHOUT_TRUTH_ULPS if evidence.truth is None else exact
            dtype = coarsest(*inputs, ours.dtype)
            yield kind, Quantity(name, ours.double(), theirs.double(), truth, dtype, floor)


def _through(evidence: Evidence) -> tuple[torch.dtype, ...]:
    """Dtypes that upstream's computation passes through whatever the inputs are."""
    names = evidence.operation.precision, evidence.case.settings.get(AUTOCAST)
    return tuple(getattr(torch, name) for name in names if name)


def _evaluated(evidence: Evidence, given: Tensors, exact: bool) -> Tensors:
    narrow = {name: value.to(evidence.case.tensors[name].dtype) for name, value in given.items()}
    return evidence.evaluate(given if exact else narrow)


class _Sensitivity:
    """The largest change of every number over inputs moved by one unit in the last place, times SAFETY.

    Few moves settle nearly every case; a number that they do not is asked about with more.
    """

    def __init__(self, evidence: Evidence) -> None:
        case, operation = evidence.case, evidence.operation
        self._evidence = evidence
        self._names = tuple(
            name
            for name in operation.moved or operation.gradients
            if name in case.tensors and case.tensors[name].is_floating_point()
        )
        self._exact = evidence.truth is not None
        self._base = evidence.truth if self._exact else evidence.evaluate(case.tensors)
        self._change = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in self._base.items()}
        self._moves = moved(case.tensors, self._names, through=_through(evidence), moves=RUNGS[-1])
        self._rung = 0

    def more(self, rung: int) -> None:
        """See that as many moves were made as `rung` says."""
        while self._rung < rung:
            before = RUNGS[self._rung - 1] if self._rung else 0
            for given in itertools.islice(self._moves, RUNGS[self._rung] - before):
                self._widen(self._after(given))
            self._rung += 1
            if self._rung == len(RUNGS) and self._evidence.case.dtype in ("float32", "float64"):
                self._widen(self._limited(_rounding(self._evidence, self._names)))

    def of(self, name: str) -> Tensor:
        """The sensitivity of an output or gradient, as far as it was asked for."""
        return SAFETY * self._change[name]

    def _after(self, given: Tensors) -> Tensors:
        try:
            other = _evaluated(self._evidence, given, self._exact)
        except RuntimeError:
            # Moved out of what upstream takes: a box without area was turned inside out.
            alike = moved_alike(given, self._evidence.case.tensors, self._names)
            other = _evaluated(self._evidence, alike, self._exact)
        return {
            name: (value.double() - self._base[name].double()).abs().nan_to_num(0.0, posinf=0.0)
            for name, value in other.items()
        }

    def _limited(self, errors: Tensors) -> Tensors:
        """Errors of rounding up to OWN_ULPS of an output's largest number: more would be a contradiction.

        In float64 the oracle cannot contradict itself, and its error is taken as it is.
        """
        if self._evidence.case.dtype == "float64":
            return errors
        dtype = getattr(torch, self._evidence.case.dtype)
        base = {name: value.double().nan_to_num(0.0, 0.0, 0.0) for name, value in self._base.items()}
        return {
            name: value.clamp(max=OWN_ULPS * float(ulp(base[name], dtype).max()))
            for name, value in errors.items()
            if value.numel()
        }

    def _widen(self, change: Tensors) -> None:
        for name, value in change.items():
            self._change[name] = torch.maximum(self._change[name], value)


def _in_both(evidence: Evidence, given: Tensors) -> tuple[Tensors, Tensors]:
    """The oracle in float32 and in float64 on the same float32 numbers."""
    rough = {name: value.float() if value.is_floating_point() else value for name, value in given.items()}
    return evidence.evaluate(rough), evidence.evaluate(in_float64(rough))


def _rounding(evidence: Evidence, names: tuple[str, ...]) -> dict[str, Tensor]:
    """The oracle's own error near the case, in float32, or in proportion in float64, where it is its own truth.

    On the case itself it may be small by luck: where a difference all but cancels, one rounding of an operand decides.
    """
    wide = torch.finfo(torch.float64 if evidence.case.dtype == "float64" else torch.float32)
    ratio = wide.eps / torch.finfo(torch.float32).eps
    single = {
        name: value.float() if value.is_floating_point() else value for name, value in evidence.case.tensors.items()
    }
    found: dict[str, Tensor] = {}
    # Moved by units of float16: by less, every draw would round alike.
    for given in moved(single, names, through=(torch.float16,), moves=4 * MOVES):
        try:
            pair = _in_both(evidence, given)
        except RuntimeError:
            try:
                pair = _in_both(evidence, moved_alike(given, single, names))
            except RuntimeError:
                continue  # float32 is rejected, or moved out of what upstream takes
        for name in pair[0]:
            error = (pair[0][name].double() - pair[1][name].double()).abs().nan_to_num(0.0, posinf=0.0)
            error *= 2 * SAFETY * ratio  # another draw of the rounding, not its bound
            found[name] = torch.maximum(found.get(name, torch.zeros_like(error)), error)
    return found
