"""`harness matrix`: the table of operations by versions, or with `--add` what a new release moved."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import reference
from harness import oracles
from harness.matrix import plan as plans
from harness.matrix import table
from harness.matrix.plan import MatrixPlan
from harness.plan import Plan, RequestError, check_pairs, parse_oracles
from harness.progress import Progress
from harness.runfolder import RunFolder

SETTINGS = "matrix"
"""Where `run.json` holds the plan of the matrix."""
KIND = "matrix"


def matrix(arguments: argparse.Namespace) -> int:
    """Run the command; returns its exit code."""
    if arguments.add:
        from harness.matrix.add import add

        return add(arguments)
    for option in ("archive", "against", "write", "case"):
        if getattr(arguments, option):
            raise RequestError(f"--{option} goes with --add NAME==VERSION only")
    folder, run, plan = opened(arguments, lambda: _requested(arguments))
    try:
        return finish(folder, plan, whole_plan(run))
    finally:
        folder.close()


def finish(folder: RunFolder, plan: MatrixPlan, run_plan: Plan | None) -> int:
    """Do what is left to do, print the table, return the exit code."""
    from harness.matrix.run import execute

    progress = Progress()
    try:
        summary = execute(plan, folder, run_plan, progress)
    finally:
        progress.stop()
    frame = folder.frame("versions")
    sys.stdout.write(table.grid(frame) + table.uncovered(frame) + table.differing(frame, str(folder.path)))
    return told(summary, folder)


def told(summary: dict[str, Any], folder: RunFolder) -> int:
    """The last lines of the command: bars that fell, the sentence, where the report is."""
    for bar in summary["gate"]:
        if not bar["ok"]:
            sys.stdout.write(f"fell: {bar['bar']}: {bar['value']:.4g}, bar {bar['limit']:g}\n")
    sys.stdout.write(f"{summary['sentence']}\nreport: {folder.path / 'report.html'}\n")
    sys.stdout.write(f"{summary['passed']} passed, {summary['failed']} failed\n")
    return summary["exit_code"]


def opened(
    arguments: argparse.Namespace, build: Any, key: str = SETTINGS, kind: type[MatrixPlan] = MatrixPlan
) -> tuple[RunFolder, dict[str, Any], Any]:
    """(folder, run.json, plan): a new folder, or an existing one, whose plan counts if it holds one already."""
    from harness.run import default_out, provenance

    if arguments.into and arguments.out:
        raise RequestError("--out and --into: give one of them")
    if not arguments.into:
        plan = build()
        described = provenance(plan, arguments.argv)
        run = {**described, "kind": KIND, "command": "python -m harness matrix", key: plan.as_json()}
        return RunFolder.create(arguments.out or default_out(), run), run, plan
    folder, run = RunFolder.resume(arguments.into)
    try:
        folder.mend()
        if key in run:
            plan = kind.from_json(run[key])
        else:
            plan = build()
            there = {row["oracle"] for row in run["oracles"]}
            more = [oracles.describe(own) for own in dict.fromkeys(own for _, own in plan.pairs()) if own not in there]
            run = {**run, "oracles": [*run["oracles"], *more], key: plan.as_json()}
            folder.write_json("run.json", run)
    except BaseException:
        folder.close()
        raise
    return folder, run, plan


def whole_plan(run: dict[str, Any]) -> Plan | None:
    """The plan of the `harness run` that the folder holds, if it does: its bars still count."""
    return Plan.from_json(run["settings"]) if run.get("kind", "run") == "run" else None


def _requested(arguments: argparse.Namespace) -> MatrixPlan:
    listed = arguments.oracles
    if listed is None and not arguments.oracle:
        listed = ",".join(reference.read_pins())
    plan = requested(arguments, parse_oracles(listed, arguments.oracle))
    check_pairs(plan)
    return plan


def requested(arguments: argparse.Namespace, chosen: tuple[str, ...]) -> MatrixPlan:
    """The plan of the command line's options, for these versions."""
    return plans.build(
        operations=arguments.ops,
        oracles=chosen,
        candidates=arguments.candidate,
        dtypes=arguments.dtypes,
        examples=arguments.examples,
        seed=arguments.seed,
        workers=arguments.workers or os.cpu_count() or 1,
        time_limit=arguments.time_limit,
        shrink_seconds=arguments.shrink_seconds,
    )


def options(parser: argparse.ArgumentParser, count: Any, positive: Any) -> None:
    """The command's options; `count` and `positive` read numbers."""
    parser.add_argument("--ops", metavar="LIST", help="operations (default: all)")
    parser.add_argument("--oracles", metavar="LIST", help="pins such as yolox==0.3.0 (default: all, controls too)")
    parser.add_argument("--oracle", action="append", default=[], metavar="NAME=WHERE", help="a checkout; repeatable")
    parser.add_argument(
        "--candidate",
        action="append",
        default=[],
        metavar="NAME=MODULE:ATTRIBUTE",
        help="an implementation of your own in place of the built-in one; repeatable",
    )
    parser.add_argument("--dtypes", metavar="LIST", help="float32,float64,bfloat16,float16")
    text = f"cases drawn for an operation and version, beside the pinned ones (default {plans.EXAMPLES})"
    parser.add_argument("--examples", type=count, metavar="N", help=text)
    parser.add_argument("--seed", type=int, metavar="N", help="seed of the drawn cases (default 0)")
    parser.add_argument("--workers", type=count, metavar="N", help="worker processes (default: cores)")
    parser.add_argument("--time-limit", type=positive, default=plans.TIME_LIMIT, metavar="SECONDS", help="for a case")
    parser.add_argument("--shrink-seconds", type=count, metavar="N", help="spent on shrinking a cell's failure")
    parser.add_argument("--out", type=Path, metavar="DIR", help="a new run folder (default: runs/TIME)")
    parser.add_argument("--into", type=Path, metavar="DIR", help="a run folder: its matrix continued, or added to it")
    parser.add_argument("--add", metavar="NAME==VERSION", help="fetch this release and say what it moved")
    parser.add_argument("--archive", type=Path, metavar="FILE", help="with --add: the release's archive")
    parser.add_argument("--against", metavar="PIN", help="with --add: the pin it is compared with (default: newest)")
    parser.add_argument("--case", type=Path, metavar="FILE", help="with --add: compare on this saved case alone")
    parser.add_argument("--write", action="store_true", help="with --add: add the release to reference/pins.toml")
