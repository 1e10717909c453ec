"""A run of `harness mutate`: every mutant judged once, each verdict on disk as it comes."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import closing
from itertools import zip_longest
from typing import Any

from harness.mutation import equivalents
from harness.mutation.gate import Gate
from harness.mutation.mutant import Mutant
from harness.mutation.plan import Population
from harness.mutation.zygote import ZygoteFailed
from harness.plan import Plan
from harness.progress import Progress
from harness.run import finish
from harness.runfolder import RETRACTED, RunFolder

JOURNAL = "mutants"


def execute(
    population: Population,
    folder: RunFolder,
    run_plan: Plan | None,
    progress: Progress,
    *,
    again: bool = False,
    seconds: float = math.inf,
) -> dict[str, Any]:
    """Judge what the folder has no verdict of (with `again`, survivors too), then write frames, summary and report.

    After `seconds` no further mutant is begun: what was judged is the sample.
    """
    interrupted, lost = False, ()
    try:
        _judge(population, folder, progress, again, time.monotonic() + seconds)
    except KeyboardInterrupt:
        interrupted = True
    except ZygoteFailed as error:
        lost = (str(error),)
    return finish(run_plan, folder, interrupted=interrupted, lost=lost)


def _judge(population: Population, folder: RunFolder, progress: Progress, again: bool, end: float) -> None:
    plan, listed = population.plan, equivalents.equivalents()
    if gone := population.gone(folder.rows(JOURNAL)):
        folder.append(JOURNAL, [{**row, "verdict": RETRACTED} for row in gone])
    done = settled(folder.rows(JOURNAL), again)
    waiting = _spread([mutant for mutant in population.tried if mutant.id not in done], plan.workers)
    counts = {kind: sum(mutant.kind == kind for mutant in population.all) for kind in plan.kinds}
    stale = [_unmatched(entry) for entry in population.unmatched]
    if stale:
        folder.append(JOURNAL, stale)
    if not waiting:
        return
    progress.start(JOURNAL, len(waiting))
    stop = threading.Event()
    with closing(Gate(plan, population.sources, folder.path, {mutant.file for mutant in waiting})) as gate:

        def one(mutant: Mutant) -> None:
            if stop.is_set() or time.monotonic() > end:
                return
            try:
                found = gate.judge(mutant)
            except (ZygoteFailed, OSError):
                if stop.is_set():
                    return  # its processes were ended under it
                raise
            row = _row(mutant, found, equivalents.entry_of(mutant, listed), counts[mutant.kind])
            folder.append(JOURNAL, [row])
            progress.step(f"{mutant.file} {row['verdict']}")

        with ThreadPoolExecutor(plan.workers) as pool:
            futures = [pool.submit(one, mutant) for mutant in waiting]
            try:
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
            except BaseException:
                stop.set()
                for future in futures:
                    future.cancel()
                gate.close()
                raise


def settled(rows: Iterable[dict[str, Any]], again: bool) -> set[str]:
    """Ids of mutants that need no further look, by their last rows: a text that came back is judged anew."""
    last = {row["id"]: row["verdict"] for row in rows}
    return {key for key, verdict in last.items() if verdict == "killed" or not (again or verdict == RETRACTED)}


def _spread(mutants: list[Mutant], workers: int) -> list[Mutant]:
    """Another part of the list for each worker: those that are at the same file wait for the same recordings."""
    length = -(-len(mutants) // workers)
    parts = [mutants[first : first + length] for first in range(0, len(mutants), length or 1)]
    return [mutant for row in zip_longest(*parts) for mutant in row if mutant is not None]


def _row(
    mutant: Mutant, found: dict[str, Any], entry: equivalents.Equivalent | None, population: int
) -> dict[str, Any]:
    """The journal's row: a survivor that is listed is equivalent, a listed one that was found makes its entry stale."""
    verdict = found["verdict"]
    if entry and verdict == "survived":
        found = {**found, "verdict": "equivalent", "detail": entry.reason}
    elif entry and entry.after != "*":
        found = {**found, "verdict": "stale", "detail": f"listed as equivalent, and found: {found['detail']}"}
    return {
        "id": mutant.id,
        "kind": mutant.kind,
        "operator": mutant.operator,
        "file": mutant.file,
        "line": mutant.line,
        "before": mutant.before,
        "after": mutant.after,
        "population": population,
        **found,
    }


def _unmatched(entry: equivalents.Equivalent) -> dict[str, Any]:
    """A row for an entry of the list that stands for nothing any more."""
    found = {
        "verdict": "stale",
        "by": "",
        "detail": "listed as equivalent, and no mutant is it any more",
        "seconds": 0.0,
    }
    mutant = Mutant("syntactic", entry.operator, entry.file, 0, entry.before, entry.after, "")
    return _row(mutant, found, None, 0)
