"""`harness replay FILE`: one stored case, judged again against each oracle, with everything about it."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path

from cases.case import Case
from harness.gate import FELL, HOLDS_ALL, NOTHING_TRIED
from harness.operations import operation
from harness.oracles import package
from harness.parity import options
from harness.pool import Worker, WorkerLost
from harness.relations import BROKEN, NAMES, UPSTREAM
from harness.relations import HOLDS as HELD
from harness.verdict import HOLDS
from harness.worker import WorkerSettings

SHOWN = 12
"""Largest number of rows of a tensor that is printed whole."""


def replay(
    file: Path, oracles: tuple[str, ...], candidates: dict[str, str], device: str, time_limit: float
) -> tuple[str, int]:
    """(text, exit code): 0 parity holds on every oracle, 1 it does not, 5 no oracle has the operation."""
    case = Case.load(file)
    declared = operation(case.operation).candidates
    lines = [
        f"{case.operation}, {case.dtype}, {case.origin}",
        f"tags: {', '.join(sorted(case.tags)) or 'none'}",
    ]
    lines += [f"{name} = {value!r}" for name, value in case.settings.items()]
    for name, tensor in case.tensors.items():
        small = tensor.dim() > 0 and max(tensor.shape) <= SHOWN
        lines.append(f"{name} {tuple(tensor.shape)} {tensor.dtype}" + (f" = {tensor.tolist()}" if small else ""))
    code = NOTHING_TRIED
    for oracle in oracles:
        if not _fits(case, oracle):
            continue
        code = HOLDS_ALL if code == NOTHING_TRIED else code
        worker = Worker(WorkerSettings(oracle, candidates, 1, device), time_limit)
        for candidate, target in candidates.items():
            if not target and candidate not in declared:
                continue
            try:
                row = worker.request("judge", case.operation, case.to_bytes(), (candidate,))[0]
            except WorkerLost as lost:
                row = {"verdict": lost.verdict, "detail": str(lost), "error": None, "gradient_error": None}
            shares = {"value": row["error"], "gradient": row["gradient_error"]}
            said = [
                f", worst {kind} error {share:.3g} of its budget" for kind, share in shares.items() if share is not None
            ]
            lines.append(f"{candidate} against {oracle}: {row['verdict']}{''.join(said)}")
            lines += [f"  {part}" for part in row["detail"].split("; ") if part]
            if row["verdict"] not in HOLDS:
                code = FELL
        said, broken = _relations(worker, case, [UPSTREAM, *candidates], declared, targets=candidates)
        lines += [f"relations of {line}" for line in said]
        code = FELL if broken else code
        worker.close()
    if code == NOTHING_TRIED:
        lines.append(f"none of {', '.join(oracles)} has {case.operation}")
    return "\n".join(lines) + "\n", code


def _relations(
    worker: Worker, case: Case, subjects: list[str], declared: Mapping[str, object], targets: Mapping[str, str]
) -> tuple[list[str], bool]:
    """A line a subject and broken relation, and whether a candidate breaks one."""
    lines, fell = [], False
    for subject in subjects:
        if subject != UPSTREAM and not targets[subject] and subject not in declared:
            continue
        try:
            rows = worker.request("relate", case.operation, case.to_bytes(), subject, NAMES)
        except WorkerLost as lost:
            rows = [{"relation": lost.stage, "verdict": BROKEN, "detail": str(lost)}]
        broken = [row for row in rows if row["verdict"] == BROKEN]
        held = sum(row["verdict"] == HELD for row in rows)
        lines.append(f"{subject} against nothing but itself: {held} hold, {len(broken)} are broken")
        lines += [f"{subject}, {row['relation']}: {row['detail']}" for row in broken]
        fell = fell or (subject != UPSTREAM and bool(broken))
    return lines, fell


def _fits(case: Case, oracle: str) -> bool:
    """Whether an oracle has the operation, and this version of it takes this case."""
    if package(oracle) not in operation(case.operation).upstreams:
        return False
    return import_module(f"cases.{case.operation}").allows(case, **options(case.operation, oracle))
