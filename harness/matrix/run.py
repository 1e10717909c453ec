"""A matrix: every cell on a worker of its version, what upstream has against the list, then table and report."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import closing
from typing import Any

from harness import oracles
from harness.matrix.cell import Cell, Kept
from harness.matrix.coverage import coverage
from harness.matrix.eras import newest
from harness.matrix.plan import MatrixPlan
from harness.operations import operation as declaration
from harness.parallel import in_parallel
from harness.plan import Plan
from harness.pool import Staff, Worker, WorkerFailed
from harness.progress import Progress
from harness.run import finish
from harness.runfolder import RunFolder

JOURNAL = "versions"
NAMES = "public names"
"""What stands in the operation's place in rows on upstream's public names."""

Found = dict[str, Any]


def execute(plan: MatrixPlan, folder: RunFolder, run_plan: Plan | None, progress: Progress) -> dict[str, Any]:
    """Judge the cells that the folder does not hold yet, then write frames, summary and report."""
    done = {(row["operation"], row["oracle"]) for row in folder.rows(JOURNAL)}
    pairs = [pair for pair in plan.pairs() if pair not in done]
    interrupted, lost = False, []
    try:
        progress.start("matrix", len(pairs) * plan.examples)
        found: dict[str, Found] = {}

        def one(pair: tuple[str, str], staff: Staff, stopped: Callable[[], bool]) -> None:
            oracle = pair[1]
            with staff.worker(oracle) as worker:
                if oracle not in found:
                    found[oracle] = names_of(oracle, worker)
                folder.append(JOURNAL, cell(plan, folder, pair, found[oracle], worker, stopped, progress))

        lost = in_parallel(plan, sorted(pairs, key=lambda pair: pair[1]), one)
        found |= listed(plan, {oracle for _, oracle in plan.pairs()} - set(found))
        folder.append(JOURNAL, list(name_rows({oracle: found[oracle] for oracle in plan.oracles if oracle in found})))
    except KeyboardInterrupt:
        interrupted = True
    except WorkerFailed as error:
        lost = [str(error)]
    return finish(run_plan, folder, interrupted=interrupted, lost=tuple(lost))


def listed(plan: MatrixPlan, versions: Iterable[str]) -> dict[str, Found]:
    """The public names that each version has, asked of a worker of its own."""
    found = {}
    for oracle in versions:
        worker = Worker(plan.worker(oracle, 1), plan.time_limit)
        with closing(worker):
            found[oracle] = names_of(oracle, worker)
    return found


def names_of(oracle: str, worker: Worker) -> Found:
    """The public names that a version has."""
    return worker.request("names", coverage().of_package(oracles.package(oracle)))


def cell(
    plan: MatrixPlan,
    folder: RunFolder,
    pair: tuple[str, str],
    found: Found,
    worker: Worker,
    stopped: Callable[[], bool] = bool,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """The rows of one cell, (operation, version), one a candidate."""
    operation, oracle = pair
    missing = lacks(operation, oracles.package(oracle), oracles.version(oracle), found)
    if missing:
        return [absent(operation, oracle, base, missing) for base in plan.candidates_of(operation)]
    shard = Cell(
        plan,
        operation,
        oracle,
        Kept(folder.failures),
        {},
        progress=lambda: progress and progress.step(f"{operation} {oracle}"),
        stopped=stopped,
        own=worker.request("era", operation),
        newest=newest(operation, oracles.package(oracle)),
    )
    shard.run(worker)
    return shard.rows()


def lacks(operation: str, package: str, version: str, found: Found) -> str:
    """Why a version does not have an operation at all, or nothing."""
    names = coverage().counterparts(operation)
    if not set(names) & set(found["names"]):
        unread = "".join(f"; {module} cannot be imported here: {why}" for module, why in found["unread"].items())
        return f"it has no public {' or '.join(name.rpartition('.')[2] for name in names)}{unread}"
    if not declaration(operation).upstreams[package].has(version):
        return "its declaration is of later versions"
    return ""


def absent(operation: str, oracle: str, candidate: str, why: str) -> dict[str, Any]:
    """The row of a cell whose version has no such thing."""
    empty = {"settings": "", "cases": 0, "ties": 0, "replay": ""}
    return {
        "operation": operation,
        "oracle": oracle,
        "candidate": candidate,
        "verdict": "absent",
        "detail": why,
        **empty,
    }


def name_rows(found: dict[str, Found]) -> Iterable[dict[str, Any]]:
    """What upstream has against the list: a row a name without counterpart, not listed, or listed in vain.

    That an entry is stale is only said where every pin of its package was looked at.
    """
    import reference

    known, holders = coverage(), {}
    for oracle, version in found.items():
        for name in version["names"]:
            holders.setdefault(name, []).append(oracle)
        for name in known.unlisted(version):
            yield _named("unlisted", name, oracle, "in no list of harness/coverage.toml")
    for name, oracles_ in holders.items():
        entry = known.entries.get(name)
        if entry and entry.absent:
            yield _named("uncovered", name, ", ".join(oracles_), entry.absent)
    looked = {pin.name for pin in reference.read_pins().values()}
    looked -= {pin.name for key, pin in reference.read_pins().items() if key not in found}
    for name in known.stale(found.values(), looked):
        yield _named("stale", name, "every pin", "no pinned version has it: its entry has outlived it")


def _named(verdict: str, name: str, oracle: str, detail: str) -> dict[str, Any]:
    empty = {"settings": "", "cases": 0, "ties": 0, "replay": ""}
    return {"operation": NAMES, "oracle": oracle, "candidate": name, "verdict": verdict, "detail": detail, **empty}
