"""`harness mutate`: its options, and what it prints."""

from __future__ import annotations

import argparse
import math
import os
import sys
from pathlib import Path
from typing import Any

from harness.mutation.mutant import KINDS
from harness.mutation.plan import EXAMPLES, MutationPlan, Population, default_oracles, mutants_of
from harness.mutation.sources import Sources
from harness.plan import Plan, RequestError, parse_operations
from harness.progress import Progress
from harness.runfolder import RunFolder

SETTINGS = "mutation"
"""Where `run.json` holds the plan."""
MOST_WORKERS = 2
SHOWN = 20


def options(parser: argparse.ArgumentParser, count: Any) -> None:
    """The command's options; `count` reads a number."""
    parser.add_argument("--files", default="*", metavar="GLOB", help="files of cleanroom/, such as '*/tal.py'")
    parser.add_argument("--ops", metavar="LIST", help="operations whose cases look for mutants (default: all)")
    parser.add_argument("--kind", choices=KINDS, help="semantic or syntactic (default: both)")
    parser.add_argument("--ids", metavar="LIST", help="these mutants alone")
    parser.add_argument("--sample", type=count, default=0, metavar="N", help="judge so many, spread over all")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the sample and the drawn cases")
    text = f"cases drawn for an operation and oracle, beside the pinned ones (default {EXAMPLES})"
    parser.add_argument("--examples", type=count, default=EXAMPLES, metavar="N", help=text)
    parser.add_argument("--no-tests", action="store_true", help="leave the project's own tests out of the gate")
    parser.add_argument("--workers", type=count, metavar="N", help="mutants judged at a time, at most two")
    text = "begin no mutant after so long; what was judged is the sample"
    parser.add_argument("--minutes", type=count, metavar="N", help=text)
    parser.add_argument("--out", type=Path, metavar="DIR", help="a new run folder (default: runs/TIME)")
    parser.add_argument("--into", type=Path, metavar="DIR", help="a run folder: its mutants continued, or added to it")
    parser.add_argument("--again", action="store_true", help="with --into: judge what survived once more")
    parser.add_argument("--show", metavar="ID", help="print the difference that a mutant is, and judge nothing")


def mutate(arguments: argparse.Namespace) -> int:
    """Run the command; returns its exit code."""
    try:
        import mutmut.mutation.mutators  # noqa: F401 - asked for here, so that its absence is said at once
    except ImportError as error:
        raise RequestError(f"harness mutate needs mutmut: {error}; pip install 'cleanroom[dev]'") from error
    from harness.mutation.run import execute

    if arguments.show:
        return _show(arguments.show, arguments.files)
    if arguments.into and arguments.out:
        raise RequestError("--out and --into: give one of them")
    if arguments.again and not arguments.into:
        raise RequestError("--again goes with --into DIR only")
    plan = _plan(arguments)
    population = Population(Sources(), plan)
    # All that may be wrong with the request is said before there is a folder.
    count = len(population.tried) + len(population.unmatched)
    if not count:
        raise RequestError(f"--kind {arguments.kind}: --files {plan.files!r} has no such mutant")
    folder, run = _opened(arguments, plan)
    progress, seconds = Progress(), math.inf if arguments.minutes is None else 60.0 * arguments.minutes
    try:
        whole = Plan.from_json(run["settings"]) if run.get("kind", "run") == "run" else None
        summary = execute(population, folder, whole, progress, again=arguments.again, seconds=seconds)
        _tell(folder)
    finally:
        progress.stop()
        folder.close()
    for bar in summary["gate"]:
        if not bar["ok"]:
            sys.stdout.write(f"fell: {bar['bar']}: {bar['value']:.4g}, bar {bar['limit']:g}\n")
    sys.stdout.write(f"{summary['sentence']}\nreport: {folder.path / 'report.html'}\n")
    return summary["exit_code"]


def _plan(arguments: argparse.Namespace) -> MutationPlan:
    workers = arguments.workers or min(os.cpu_count() or 1, MOST_WORKERS)
    if workers > MOST_WORKERS:
        raise RequestError(f"--workers {workers}: at most {MOST_WORKERS}, each takes a process an oracle")
    return MutationPlan(
        oracles=default_oracles(),
        operations=parse_operations(arguments.ops),
        files=arguments.files,
        kinds=(arguments.kind,) if arguments.kind else KINDS,
        ids=tuple(part.strip() for part in (arguments.ids or "").split(",") if part.strip()),
        sample=arguments.sample,
        seed=arguments.seed,
        examples=arguments.examples,
        tests=not arguments.no_tests,
        workers=workers,
    )


def _opened(arguments: argparse.Namespace, plan: MutationPlan) -> tuple[RunFolder, dict[str, Any]]:
    from harness.run import default_out, provenance

    if not arguments.into:
        described = provenance(plan, arguments.argv)
        run = {**described, "kind": "mutate", "command": "python -m harness mutate", SETTINGS: plan.as_json()}
        return RunFolder.create(arguments.out or default_out(), run), run
    folder, run = RunFolder.resume(arguments.into)
    folder.mend()
    folder.write_json("run.json", {**run, SETTINGS: plan.as_json()})
    return folder, run


def _show(wanted: str, files: str) -> int:
    from harness.gate import HOLDS_ALL

    sources = Sources()
    for mutant in mutants_of(sources, files):
        if mutant.id == wanted:
            sys.stdout.write(mutant.diff(sources.texts[mutant.file]))
            sys.stdout.write(f"before = {mutant.before!r}\nafter  = {mutant.after!r}\n")
            return HOLDS_ALL
    raise RequestError(f"--show {wanted}: no such mutant of the present text")


def _tell(folder: RunFolder) -> None:
    """The survivors, a line each."""
    frame = folder.frame("mutants")
    if not len(frame):
        return
    survivors = frame[frame["verdict"].isin(["survived", "stale"])]
    for row in survivors.head(SHOWN).to_dict("records"):
        sys.stdout.write(f"{row['verdict']}: {row['id']} {row['file']}:{row['line']} {row['operator']}\n")
        sys.stdout.write(f"  - {row['before']}\n  + {row['after']}\n")
    if len(survivors) > SHOWN:
        sys.stdout.write(f"and {len(survivors) - SHOWN} more\n")
