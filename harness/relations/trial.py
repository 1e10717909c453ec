"""One case under relations: whom to ask, what was answered, and whether two answers are the same."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from cases.case import Case
from harness.equality import FLOOR_ULPS, coarsest, ulp
from harness.execute import Result
from harness.judge import with_gradients
from harness.operation import AUTOCAST, Operation
from harness.relations.declaration import Relations
from harness.verdict import HOLDS, NON_FINITE, Evidence, Inquiry

ULPS = 64
"""Units in the last place of the largest number of an output, by which a sum in another order may end otherwise."""
STIR = 1e-3
"""By which share of its size, and of its tensor's, a number is moved where nothing may tie."""

Ask = Callable[[Case], Result]


class Rejected(Exception):  # noqa: N818 - an answer, not a mistake
    """The subject does not take the case itself."""


class Broken(Exception):  # noqa: N818 - an answer, not a mistake
    """The relation does not hold, for the reason given."""


@dataclass
class Trial:
    """A case, and the subject that is asked about it and about what relations make of it."""

    operation: Operation
    case: Case
    ask: Ask
    era: Mapping[str, Any] = field(default_factory=dict)
    """Settings of the subject's era."""
    _known: dict[str, Result] = field(default_factory=dict)

    @property
    def declared(self) -> Relations:
        """What is said of the operation."""
        return self.operation.relations

    def generator(self, salt: str = "") -> torch.Generator:
        """Random numbers that the case alone decides, so that it can be replayed."""
        return torch.Generator().manual_seed(zlib.crc32((self.case.digest + salt).encode()))

    def own(self) -> Mapping[str, Tensor]:
        """What the subject answers on the case itself; Rejected where it does not."""
        result = self._known.get(self.case.digest) or self.ask(self.case)
        self._known[self.case.digest] = result
        if result.error:
            raise Rejected(result.error.text)
        return self.dense(self.case, result)

    def raw(self) -> Mapping[str, Tensor]:
        """As `own`, as the subject gave it."""
        self.own()
        return self._known[self.case.digest].outputs

    def of(self, case: Case) -> Mapping[str, Tensor]:
        """What it answers on a case that follows from the first; Broken where it rejects that one alone."""
        result = self.ask(case)
        if result.error:
            raise Broken(f"the case that follows is rejected: {result.error.text}")
        return self.dense(case, result)

    def dense(self, case: Case, result: Result) -> Mapping[str, Tensor]:
        """The result in a form in which positions can be moved."""
        return self.declared.dense(case, with_gradients(self.operation, case, result.outputs))

    def stirred(self) -> Trial:
        """The same with predictions and boxes moved a little, in float32 at least, so that nothing ties."""
        generator, tensors = self.generator("stirred"), dict(self.case.tensors)
        for name in self.declared.free:
            if name in tensors and tensors[name].is_floating_point():
                tensors[name] = _stirred(tensors[name], generator)
        half = (torch.float16, torch.bfloat16)
        tensors = {name: value.float() if value.dtype in half else value for name, value in tensors.items()}
        return replace(self, case=replace(self.case, tensors=tensors), _known={})

    def precision(self, *values: Tensor) -> torch.dtype:
        """The coarsest dtype that a computation of the case passes through."""
        names = self.operation.precision, self.declared.cancels, self.case.settings.get(AUTOCAST), self.case.dtype
        return coarsest(*(getattr(torch, name) for name in names if name), *(value.dtype for value in values))

    def same(
        self, expected: Mapping[str, Tensor], got: Mapping[str, Tensor], *, through: tuple[torch.dtype, ...] = ()
    ) -> None:
        """Broken unless all that is expected was got: decisions exactly, numbers but for the order of their sums."""
        scale = self.scale(expected)
        for name, value in expected.items():
            if name not in got:
                raise Broken(f"{name} is missing")
            problem = self.difference(value, got[name], through, scale(name))
            if problem:
                raise Broken(f"{name}{problem}")

    def scale(self, outputs: Mapping[str, Tensor]) -> Callable[[str], float]:
        """The least size at which an output is rounded.

        One backward pass makes all gradients, which are differences of numbers of the size of the largest, and in
        float64, where nothing hides, of that of the losses.
        """
        gradients = [value for name, value in outputs.items() if name.startswith("gradient of ")]
        every = list(outputs.values()) if self.precision() == torch.float64 else gradients
        floor = max(map(_largest, every), default=0.0)
        return lambda name: floor if name.startswith("gradient of ") else 0.0

    def by_margins(self, following: Case, expected: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> None:
        """Broken unless the operation's comparator finds both answers to `following` the same, or legal ties."""
        margins = self.declared.margins

        def quantities(name: str, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Mapping[str, Tensor]:
            return margins.quantities(tensors)

        ask = Inquiry(None, quantities, None, lambda name: {**margins.era, **self.era})
        one, other = (margins.restore(following, outputs) for outputs in (expected, got))
        finding = self.operation.compare(Evidence(self.operation, following, one, None, other, ask))
        numbers = {output.name for output in self.operation.outputs if not output.decision}
        # The comparator's floor is for rounding beside an oracle's own error, and neither answer is an oracle's.
        if finding.output in numbers and (finding.error or 0) <= ULPS / FLOOR_ULPS:
            return
        if finding.verdict not in HOLDS and finding.output != NON_FINITE:
            raise Broken(finding.detail.replace("oracle", "expected").replace("candidate", "got"))

    def by_cost(self, expected: Mapping[str, Tensor], got: Mapping[str, Tensor]) -> None:
        """As `same`; but where other decisions are taken, only the first output, the total, must be what is expected.

        Two queries above two targets cost as much crosswise, whatever is stirred: distances add up to the same.
        """
        decided = [name for name, value in expected.items() if not value.is_floating_point()]
        if not all(name in got and torch.equal(expected[name], got[name]) for name in decided):
            total = self.operation.outputs[0].name
            expected = {total: expected[total]}
        self.same(expected, got)

    def difference(
        self, expected: Tensor, got: Tensor, through: tuple[torch.dtype, ...] = (), floor: float = 0.0
    ) -> str:
        """How two tensors differ, or nothing."""
        if expected.shape != got.shape:
            return f" has shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
        if not expected.is_floating_point():
            wrong = expected != got
            return _place(wrong, expected, got) if bool(wrong.any()) else ""
        a, b = expected.double(), got.double()
        finite = a.isfinite() & b.isfinite()
        alike = (a == b) | (a.isnan() & b.isnan())
        scale = torch.where(finite, a.abs(), torch.zeros_like(a))
        dtype = coarsest(self.precision(expected, got), *through)
        unit = ulp(scale.max().clamp(min=floor), dtype) if scale.numel() else torch.zeros(())
        wrong = ~alike & ~(finite & ((a - b).abs() <= ULPS * unit))
        return _place(wrong, a, b) if bool(wrong.any()) else ""


def _largest(value: Tensor) -> float:
    if not value.is_floating_point() or not value.numel():
        return 0.0
    return float(value.double().abs().nan_to_num(0.0, posinf=0.0).max())


def _stirred(value: Tensor, generator: torch.Generator) -> Tensor:
    wide = value.double()
    size = wide[wide.isfinite()].abs().mean() if bool(wide.isfinite().any()) else torch.ones(())
    noise = 2 * torch.rand(value.shape, generator=generator, dtype=torch.float64) - 1
    moved = wide + STIR * noise * (wide.abs() + size)
    return moved.to(torch.promote_types(value.dtype, torch.float32))


def _place(wrong: Tensor, expected: Tensor, got: Tensor) -> str:
    place = tuple(wrong.nonzero()[0].tolist())
    at = f"[{', '.join(map(str, place))}]" if place else ""
    more = int(wrong.sum()) - 1
    others = f", and {more} more" if more else ""
    return f"{at} is {got[place].item():.9g}, expected {expected[place].item():.9g}{others}"
