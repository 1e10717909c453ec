"""The words of a comparison: verdicts, findings, and the evidence that a comparator may look at."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

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
    """What a comparator found; `error` is the worst error as a share of its budget."""

    verdict: Verdict
    detail: str = ""
    output: str = ""
    error: float | None = None
    decisions: int = 0
    tied: int = 0


@dataclass(frozen=True)
class Evidence:
    """All that a comparator may look at.

    `oracle` ran in the case's dtype, `truth` is the oracle in float64 on the same inputs (None where it
    could not run so). `quantities` asks upstream's public functions for the deciding quantities of tensors.
    """

    operation: Operation
    case: Case
    oracle: Tensors
    truth: Tensors | None
    candidate: Tensors
    quantities: Callable[[Tensors], Tensors]
    era: dict[str, object] = field(default_factory=dict)


def finite(operation: Operation, outputs: Tensors) -> bool:
    """Whether every number among the outputs is finite; a decision may copy what padding holds."""
    numbers = [outputs[output.name] for output in operation.outputs if not output.decision]
    return all(bool(value.isfinite().all()) for value in numbers)


def worst(error: torch.Tensor, budget: torch.Tensor) -> tuple[float, tuple[int, ...]]:
    """Largest error as a share of its budget, and its coordinates; NaN in `error` counts as infinite."""
    if error.numel() == 0:
        return 0.0, ()
    share = torch.where(error == 0, torch.zeros_like(error), error / budget)
    share = torch.where(share.isnan(), torch.full_like(share, math.inf), share)
    flat = int(share.argmax())
    return float(share.flatten()[flat]), tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), share.shape))
