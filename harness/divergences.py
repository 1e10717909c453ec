"""Known divergences: where the candidate deliberately does better than upstream, each with reason and expiry.

The list is `cases/divergences.toml`. An entry excuses a verdict only where its predicate holds on the
evidence itself: what the oracle did, what the candidate did instead, and that the result is sound. Stored
cases that name an entry (tag `divergence:ID`) fail when they no longer diverge.
"""

from __future__ import annotations

import datetime
import re
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import cases
from harness.verdict import DTYPE, NON_FINITE, Finding, finite

if TYPE_CHECKING:
    from cases.case import Case
    from harness.execute import Result
    from harness.operation import Operation

LIST = Path(cases.__file__).parent / "divergences.toml"


@dataclass(frozen=True)
class Divergence:
    """One entry of the list."""

    id: str
    operation: str
    oracles: str
    """Regular expression that "NAME==VERSION" of the oracle must match in full."""
    when: str
    """Name of a predicate in `PREDICATES`."""
    reason: str
    expires: datetime.date
    message: str = ""
    """Regular expression that must be found in the oracle's error text (`oracle-rejects`) or in the finding."""


@dataclass(frozen=True)
class Dispute:
    """A finding that does not hold, and all that a predicate may look at."""

    operation: Operation
    case: Case
    oracle: Result
    candidate: Result
    finding: Finding


def _oracle_rejects(entry: Divergence, dispute: Dispute) -> bool:
    error = dispute.oracle.error
    return error is not None and bool(re.search(entry.message, error.text))


def _oracle_non_finite(entry: Divergence, dispute: Dispute) -> bool:
    """Nothing but images in which the oracle's numbers are not finite differs."""
    return dispute.oracle.error is None and dispute.finding.output == NON_FINITE


def _input_non_finite(entry: Divergence, dispute: Dispute) -> bool:
    """As above, and a NaN or infinite prediction is the reason."""
    return _oracle_non_finite(entry, dispute) and _spoilt(dispute)


def _half_non_finite(entry: Divergence, dispute: Dispute) -> bool:
    """As `_oracle_non_finite`, in a half dtype only: what overflows there is a number in float32."""
    return _oracle_non_finite(entry, dispute) and dispute.case.dtype in ("bfloat16", "float16")


def _oracle_rejects_non_finite(entry: Divergence, dispute: Dispute) -> bool:
    """The oracle raises on a NaN or infinite prediction."""
    return _oracle_rejects(entry, dispute) and _spoilt(dispute)


def _spoilt(dispute: Dispute) -> bool:
    tensors = dispute.case.tensors
    predictions = (tensors[name] for name in dispute.operation.predictions if name in tensors)
    return any(not bool(value.isfinite().all()) for value in predictions)


def _dtype_differs(entry: Divergence, dispute: Dispute) -> bool:
    """The values agree, and an output has another dtype than upstream's."""
    return dispute.finding.output == DTYPE and bool(re.search(entry.message, dispute.finding.detail))


PREDICATES: dict[str, Callable[[Divergence, Dispute], bool]] = {
    "oracle-rejects": _oracle_rejects,
    "oracle-non-finite": _oracle_non_finite,
    "half-non-finite": _half_non_finite,
    "dtype-differs": _dtype_differs,
    "input-non-finite": _input_non_finite,
    "oracle-rejects-non-finite": _oracle_rejects_non_finite,
}
SPREADING = ("input-non-finite", "half-non-finite", "oracle-rejects-non-finite")
"""Predicates under which a loss may be NaN."""


def _sound(entry: Divergence, dispute: Dispute) -> bool:
    """The candidate did the finite, documented thing.

    A loss of a prediction that is NaN may be NaN: the comparator has seen to it that it is not where upstream's is
    finite. An assigner has no excuse.
    """
    operation, candidate = dispute.operation, dispute.candidate
    spread = entry.when in SPREADING and bool(operation.gradients)
    return (
        candidate.error is None
        and not candidate.side_effects
        and (spread or finite(operation, candidate.outputs))
        and operation.invariants(dispute.case, candidate.outputs) is None
    )


@cache
def entries(path: Path = LIST) -> tuple[Divergence, ...]:
    """All entries of the list; raises ValueError naming the entry that is malformed."""
    found = []
    for index, row in enumerate(tomllib.loads(path.read_text()).get("divergence", [])):
        try:
            entry = Divergence(**row)
        except TypeError as error:
            raise ValueError(f"{path.name}: entry {index} ({row.get('id', 'no id')}): {error}") from error
        if entry.when not in PREDICATES:
            raise ValueError(f"{path.name}: entry {entry.id}: unknown predicate {entry.when!r}")
        found.append(entry)
    return tuple(found)


def covers(identifier: str, oracle_name: str) -> bool:
    """Whether the entry of that id speaks of that oracle; one that the list does not have speaks of all."""
    return all(re.fullmatch(entry.oracles, oracle_name) for entry in entries() if entry.id == identifier)


def excuse(dispute: Dispute, oracle_name: str, *, today: datetime.date | None = None) -> Divergence | None:
    """The unexpired entry that explains a finding that does not hold, or None."""
    today = today or datetime.date.today()
    for entry in entries():
        if (
            entry.operation == dispute.operation.name
            and entry.expires >= today
            and re.fullmatch(entry.oracles, oracle_name)
            and PREDICATES[entry.when](entry, dispute)
            and _sound(entry, dispute)
        ):
            return entry
    return None
