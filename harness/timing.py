"""The measuring part of a run: one row a (workload, oracle, candidate), nothing else running beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from harness import accelerator
from harness.bars.bar import thresholds
from harness.operations import operation as declaration
from harness.parity import options
from harness.pool import Worker, WorkerFailed, WorkerLost
from harness.statistics import paired_ratio
from harness.worker import BOTH_WAYS, FORWARD

if TYPE_CHECKING:
    from cases.case import Case
    from harness.plan import Plan
    from harness.runfolder import RunFolder

MAX_PAIRS = 500
"""More say nothing new: the interval of a call of a millisecond is then a few percent wide on a noisy machine."""
ROW_LIMIT = 600.0
"""Seconds after which a row is given up: a slow oracle may take seconds a call, with warm-up and profiler."""
LABELS_WORKLOAD = "labels-b16"


@dataclass(frozen=True)
class Row:
    """What identifies a measurement."""

    operation: str
    oracle: str
    candidate: str
    workload: str
    direction: str

    def matches(self, stored: dict[str, Any]) -> bool:
        """Whether a journal row is this one's."""
        return all(stored[name] == value for name, value in vars(self).items())


def rows(plan: Plan) -> Iterator[Row]:
    """Every measurement of a plan, in order."""
    for operation, oracle in plan.pairs():
        for workload in workloads(plan, operation):
            for candidate in plan.candidates_of(operation):
                for direction in directions(operation):
                    yield Row(operation, oracle, candidate, workload, direction)


def directions(operation: str) -> tuple[str, ...]:
    """An assigner runs without gradient; a loss both in validation and in training."""
    return (FORWARD, BOTH_WAYS) if declaration(operation).gradients else (FORWARD,)


def workloads(plan: Plan, operation: str) -> tuple[str, ...]:
    """Workloads of an operation that the plan asks for, real labels last."""
    declared = declaration(operation).workloads
    chosen = declared if plan.workloads is None else tuple(name for name in declared if name in plan.workloads)
    return chosen + ((LABELS_WORKLOAD,) if plan.labels else ())


def build_case(plan: Plan, row: Row, *, fresh: bool = False) -> Case | None:
    """The fixed case of a workload, float32; `fresh`: with other values, which real labels do not have."""
    from cases.labels import read_labels
    from cases.workloads import labels_case, workload_case

    allowed = options(row.operation, row.oracle)
    if row.workload == LABELS_WORKLOAD:
        return None if fresh else labels_case(read_labels(plan.labels), row.operation, "float32", **allowed)
    return workload_case(row.workload, row.operation, "float32", fresh=fresh, **allowed)


def take(plan: Plan, row: Row, folder: RunFolder, worker: Worker, threads: int) -> None:
    """Measure one row and append its samples and its line; a lost worker is a line too, with the reason."""
    identity = {**vars(row), "device": plan.device}
    limits = {"budget_seconds": plan.row_seconds, "max_pairs": MAX_PAIRS, "seed": plan.seed}
    case, other = build_case(plan, row), build_case(plan, row, fresh=True) if plan.candidates[row.candidate] else None
    same_shapes = other is not None and other.settings == case.settings
    stored, fresh = case.to_bytes(), other.to_bytes() if same_shapes else None
    try:
        answer = worker.request(
            "measure", row.operation, stored, row.candidate, row.direction, limits, fresh, time_limit=ROW_LIMIT
        )
    except (WorkerLost, WorkerFailed) as lost:
        # One candidate that raises or crashes must not cost the other rows; the gate falls on a row without pairs.
        folder.append("measurements", [{**identity, **_nothing(), "note": str(lost), "threads": threads}])
        return
    samples, oracle, candidate = (answer.pop(name) for name in ("samples", "oracle", "candidate"))
    if min(*oracle, *candidate) <= 0:
        # Nothing that such a clock said can be used, and the rows that follow must be measured all the same.
        reasons = "a call took no time or less: the clock stood still or was set back", answer["dishonest"]
        note = {"note": "; ".join(filter(None, reasons)), "dishonest": answer["dishonest"], "threads": threads}
        folder.append("measurements", [{**identity, **_nothing(), **note}])
        return
    judged = thresholds()["timing"]
    ratio = paired_ratio(
        oracle, candidate, confidence=judged["confidence"], dead_band=judged["dead_band"], seed=plan.seed
    )
    folder.append("samples", [{**identity, **sample} for sample in samples])
    line = {
        "pairs": ratio.pairs,
        "oracle_ns": float(median(oracle)),
        "candidate_ns": float(median(candidate)),
        "speedup": ratio.speedup,
        "speedup_low": ratio.low,
        "speedup_high": ratio.high,
        "verdict": ratio.verdict,
        "threads": threads,
    }
    if answer["other_cores"] > judged["other_cores"]:
        # Nothing was found out about the code: shown, and judged by no bar.
        line["verdict"] = "disturbed"
        answer["note"] = f"other processes used {answer['other_cores']:.1f} cores. {answer['note']}".rstrip(" .")
    folder.append("measurements", [{**identity, **line, **answer}])


def missing(plan: Plan, folder: RunFolder) -> list[Row]:
    """Rows that the journal does not hold yet."""
    done = list(folder.rows("measurements"))
    return [row for row in rows(plan) if not any(row.matches(stored) for stored in done)]


def measure_all(
    plan: Plan,
    folder: RunFolder,
    open_worker: Callable[[str], Worker],
    threads: int,
    progress: Callable[[Row], None],
) -> None:
    """Measure every missing row, one worker at a time."""
    worker: Worker | None = None
    oracle = None
    try:
        for row in missing(plan, folder):
            if worker is None or row.oracle != oracle:
                if worker:
                    worker.close()
                worker, oracle = open_worker(row.oracle), row.oracle
            take(plan, row, folder, worker, threads)
            progress(row)
    finally:
        if worker:
            worker.close()


def _nothing() -> dict[str, Any]:
    numbers = ("oracle_ns", "candidate_ns", "speedup", "speedup_low", "speedup_high")
    sizes = ("other_cores", "peak_bytes_oracle", "peak_bytes_candidate", "output_bytes", "minimum_bytes")
    return {
        "pairs": 0,
        "verdict": "too-few-pairs",
        "dishonest": "",
        **dict.fromkeys((*numbers, *sizes, *accelerator.COLUMNS)),
    }
