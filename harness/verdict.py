"""The words of a comparison: verdicts, findings, and the evidence that a comparator may look at."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch

if TYPE_CHECKING:
    from cases.case import Case
    from harness.operation import Operation, Tensors

Verdict = Literal[
    "match",
    "tie",
    "mismatch",
    "both-reject",
    "oracle-error",
    "candidate-error",
    "crash",
    "timeout",
    "out-of-memory",
    "known-divergence",
]
HOLDS: frozenset[Verdict] = frozenset({"match", "tie", "both-reject", "known-divergence"})
"""Verdicts under which parity holds; every other one fails the gate."""


NON_FINITE = "non-finite"
"""`output` of a finding that lies only in images whose deciding quantities or oracle's results are not finite."""

DTYPE = "dtype"
"""`output` of a finding that the values agree and only a dtype differs."""


@dataclass(frozen=True)
class Finding:
    """What a comparator found; `error` and `gradient_error` are the worst errors as shares of their budgets."""

    verdict: Verdict
    detail: str = ""
    output: str = ""
    error: float | None = None
    decisions: int = 0
    tied: int = 0
    gradient_error: float | None = None


@dataclass(frozen=True)
class Inquiry:
    """What a comparator may ask upstream for, beyond the results at hand.

    `evaluate(tensors, assignment)` runs the operation again, gradients included; with an assignment, an assigner
    inside it answers that. `quantities(operation, tensors, settings)` asks public functions for deciding quantities,
    `assigner(tensors)` for what a total hands to the assigners inside it and what they answer, `era(operation)` for
    the settings of this version. Without an oracle (two answers of one subject, in a relation) there is no `evaluate`.
    """

    evaluate: Callable[..., Tensors] | None
    quantities: Callable[[str, Tensors, Mapping[str, Any]], Tensors]
    assigner: Callable[[Tensors], Any]
    era: Callable[[str], dict[str, Any]]
    memory: dict[Any, Any] = field(default_factory=dict)
    """Answers that are dear and the same for every candidate of a case."""


@dataclass(frozen=True)
class Evidence:
    """All that a comparator may look at.

    `oracle` ran in the case's dtype, `truth` is the oracle in float64 on the same inputs (None where it
    could not run so, for the reason `no_truth`). Gradients stand among the outputs.
    """

    operation: Operation
    case: Case
    oracle: Tensors
    truth: Tensors | None
    candidate: Tensors
    ask: Inquiry
    no_truth: str = ""

    def quantities(self, tensors: Tensors) -> Tensors:
        """Deciding quantities of this operation on other tensors."""
        return self.ask.quantities(self.operation.name, tensors, self.case.settings)

    def evaluate(self, tensors: Tensors, assignment: Tensors | None = None) -> Tensors:
        """Upstream's results on other tensors."""
        return self.ask.evaluate(tensors, assignment)

    @property
    def era(self) -> dict[str, Any]:
        """Settings under which a candidate must behave like this oracle."""
        return self.ask.era(self.operation.name)


def finite(operation: Operation, outputs: Tensors) -> bool:
    """Whether every number and gradient is finite; a decision may copy what padding holds."""
    decisions = {output.name for output in operation.outputs if output.decision}
    return all(bool(value.isfinite().all()) for name, value in outputs.items() if name not in decisions)


def worst(error: torch.Tensor, budget: torch.Tensor) -> tuple[float, tuple[int, ...]]:
    """Largest error as a share of its budget, and its coordinates; NaN in `error` counts as infinite."""
    if error.numel() == 0:
        return 0.0, ()
    share = torch.where(error == 0, torch.zeros_like(error), error / budget)
    share = torch.where(share.isnan(), torch.full_like(share, math.inf), share)
    flat = int(share.argmax())
    return float(share.flatten()[flat]), tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), share.shape))
