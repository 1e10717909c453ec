"""`harness matrix --add NAME==VERSION`: fetch a release, run it, say what moved, print its line for the pins."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.matrix import release, table
from harness.matrix.cell import Kept
from harness.matrix.command import opened, requested, told, whole_plan
from harness.matrix.eras import NEWEST, combinations, newest, releases
from harness.matrix.moved import Comparison
from harness.matrix.plan import MatrixPlan
from harness.matrix.run import JOURNAL, absent, lacks, name_rows, names_of
from harness.matrix.session import UPSTREAM, MatrixSettings
from harness.operations import operation as declaration
from harness.parallel import in_parallel
from harness.plan import Plan, RequestError, check_pairs
from harness.pool import Staff, Worker, WorkerFailed
from harness.progress import Progress
from harness.run import finish
from harness.runfolder import RunFolder
from reference import Pin, pins

SETTINGS = "added"
"""Where `run.json` holds the plan of a release that was added."""


@dataclass(frozen=True)
class AddPlan(MatrixPlan):
    """The plan of a release against the pin in `oracles`; the last three fields are the release's pin to be."""

    added: str = ""
    archive: str = ""
    sha256: str = ""

    @property
    def pin(self) -> Pin:
        """The release."""
        name, _, version = self.added.partition("==")
        return Pin(name, version, self.archive, self.sha256)

    @property
    def base(self) -> str:
        """The pin that it is compared with."""
        return self.oracles[0]

    def worker(self, oracle: str, threads: int) -> MatrixSettings:
        """How a worker of the release, or of the pin, is started: it knows every combination of era settings."""
        package = self.pin.name
        own = [name for name in self.operations if package in declaration(name).upstreams]
        variants = {name: {NEWEST: newest(name, package), **combinations(name, package)} for name in own}
        spec = release.spec(self.pin) if oracle == self.added else oracle
        return MatrixSettings(spec, self.candidates, threads, self.device, self.memory_limit, variants=variants)


def add(arguments: argparse.Namespace) -> int:
    """Run the command; returns its exit code."""
    name, version = release.parse(arguments.add)
    base = _base(arguments, name)
    if arguments.oracles or arguments.oracle:
        raise RequestError("--oracles goes without --add: a release is compared with one pin, --against")
    if arguments.case and (arguments.out or arguments.into):
        raise RequestError("--case writes no run folder: leave out --out and --into")
    _plan(arguments, base, None)  # the request is checked before anything is fetched
    pin = release.obtain(name, version, arguments.archive)
    if arguments.case:
        return _one_case(arguments, _plan(arguments, base, pin))
    folder, run, plan = opened(arguments, lambda: _plan(arguments, base, pin), SETTINGS, AddPlan)
    try:
        if (plan.added, plan.sha256) != (str(pin), pin.sha256):
            raise RequestError(f"--into {folder.path}: it compares {plan.added} of another archive or release")
        _describe(folder, pin)
        progress = Progress()
        try:
            summary = _execute(plan, folder, whole_plan(run), progress)
        finally:
            progress.stop()
        _tell(plan, folder)
        code = told(summary, folder)
    finally:
        folder.close()
    sys.stdout.write(f"reference/{pins.PINS_FILE.name}:\n{release.line(pin)}\n")
    if arguments.write:
        release.write(pin, pins.PINS_FILE)
    return code


def _base(arguments: argparse.Namespace, package: str) -> str:
    if arguments.against is None:
        return f"{package}=={releases(package)[0]}"
    found = pins.find_pin(arguments.against)
    if found.name != package:
        raise RequestError(f"--against {arguments.against}: not a pin of {package}")
    return str(found)


def _plan(arguments: argparse.Namespace, base: str, pin: Pin | None) -> AddPlan:
    plan = requested(arguments, (base,))
    package = base.partition("==")[0]
    if arguments.ops is None:
        own = tuple(name for name in plan.operations if package in declaration(name).upstreams)
        plan = MatrixPlan.from_json({**plan.as_json(), "operations": own})
    check_pairs(plan)
    added = {} if pin is None else {"added": str(pin), "archive": pin.archive, "sha256": pin.sha256}
    return AddPlan.from_json({**plan.as_json(), **added})


def _describe(folder: RunFolder, pin: Pin) -> None:
    """The release among the oracles of `run.json`."""
    run = folder.read_json("run.json")
    own = {"oracle": str(pin), "name": pin.name, "version": pin.version, "source": pin.archive, "sha256": pin.sha256}
    if own not in run["oracles"]:
        folder.write_json("run.json", {**run, "oracles": [*run["oracles"], own]})


def _execute(plan: AddPlan, folder: RunFolder, run_plan: Plan | None, progress: Progress) -> dict[str, Any]:
    done = {row["operation"] for row in folder.rows(JOURNAL) if row["oracle"] == plan.added}
    left = [name for name, _ in plan.pairs() if name not in done]
    found: dict[str, Any] = {}
    interrupted, lost = False, []
    progress.start("matrix", len(left) * plan.examples)
    try:
        with closing(Staff(plan)) as former:

            def one(pair: tuple[str, str], staff: Staff, stopped: Callable[[], bool]) -> None:
                with staff.worker(plan.added) as worker, former.worker(plan.base) as other:
                    for oracle, holder in ((plan.added, worker), (plan.base, other)):
                        if oracle not in found:
                            found[oracle] = names_of(plan.base, holder)
                    folder.append(JOURNAL, _rows(plan, pair[0], found, folder, worker, other, stopped, progress))

            lost = in_parallel(plan, [(name, plan.added) for name in left], one)
        if plan.added in found:
            folder.append(JOURNAL, list(name_rows({plan.added: found[plan.added]})))
    except KeyboardInterrupt:
        interrupted = True
    except WorkerFailed as error:
        lost = [str(error)]
    return finish(run_plan, folder, interrupted=interrupted, lost=tuple(lost))


def _rows(
    plan: AddPlan,
    operation: str,
    found: dict[str, Any],
    folder: RunFolder,
    worker: Worker,
    other: Worker,
    stopped: Callable[[], bool],
    progress: Progress,
) -> list[dict[str, Any]]:
    """What moved in one operation, and how the candidates stand with the release."""
    missing = {oracle: _lacks(operation, oracle, found) for oracle in found}
    if missing[plan.added]:
        bases = plan.candidates_of(operation)
        rows = [absent(operation, plan.added, base, missing[plan.added]) for base in bases]
        gone = {**rows[0], "candidate": plan.base, "verdict": "moved", "settings": "gone"}
        return [*rows, *([] if missing[plan.base] else [gone])]
    shard = _comparison(plan, operation, folder.failures, None if missing[plan.base] else other)
    shard.stopped, shard.progress = stopped, lambda: progress.step(f"{operation} {plan.added}")
    shard.run(worker)
    return shard.rows()


def _lacks(operation: str, oracle: str, found: dict[str, Any]) -> str:
    package, _, version = oracle.partition("==")
    return lacks(operation, package, version, found[oracle])


def _comparison(plan: AddPlan, operation: str, failures: Path, other: Worker | None) -> Comparison:
    spec = release.spec(plan.pin)
    return Comparison(plan, operation, plan.added, Kept(failures), {}, spec=spec, base=plan.base, other=other)


def _tell(plan: AddPlan, folder: RunFolder) -> None:
    """What moved, kind by kind, and how the candidate stands with the release."""
    out, rows = (
        sys.stdout.write,
        [row for row in folder.frame(JOURNAL).to_dict("records") if row["oracle"] == plan.added],
    )
    out(f"{plan.added} against {plan.base}\n")
    unmoved = [row["operation"] for row in rows if row["verdict"] == "unmoved"]
    for row in rows:
        if row["verdict"] == "moved":
            out(f"moved: {row['operation']}, {row['settings']}: {row['detail'][: table.SHOWN_DETAIL]}\n")
            out(f"  (cd {folder.path} && {row['replay']})\n" if row["replay"] else "")
    out(f"unmoved: {', '.join(unmoved) or 'nothing'}\n")
    for row in rows:
        if row["verdict"] == "settings":
            out(f"{row['candidate']}: {row['operation']} is equal with {row['settings']}\n")
    equal = [row["operation"] for row in rows if row["verdict"] == "equal"]
    out(f"equal with the newest settings: {', '.join(dict.fromkeys(equal)) or 'nothing'}\n")
    missing = [row["operation"] for row in rows if row["verdict"] == "absent"]
    out(f"absent: {', '.join(dict.fromkeys(missing))}\n" if missing else "")
    out(table.differing(folder.frame(JOURNAL), str(folder.path)))


def _one_case(arguments: argparse.Namespace, plan: AddPlan) -> int:
    """Compare on one saved case and print everything about it; no run folder."""
    from cases.case import Case
    from harness.gate import FELL, HOLDS_ALL
    from harness.matrix.cell import shapes
    from harness.verdict import HOLDS

    case = Case.load(arguments.case)
    if plan.pin.name not in declaration(case.operation).upstreams:
        raise RequestError(f"--case {arguments.case}: {plan.pin.name} has no {case.operation}")
    plan = AddPlan.from_json({**plan.as_json(), "operations": (case.operation,)})
    workers = {oracle: Worker(plan.worker(oracle, 1), plan.time_limit) for oracle in (plan.added, plan.base)}
    try:
        shard = _comparison(plan, case.operation, arguments.case.parent, workers[plan.base])
        shard.worker = workers[plan.added]
        rows = shard.compare(case)
        out = [f"{case.operation}, {shapes(case)}, {case.origin}"]
        out += [f"{name} = {value!r}" for name, value in case.settings.items()]
        code = HOLDS_ALL
        for row in rows:
            who = plan.base if row["candidate"] == UPSTREAM else row["candidate"]
            holds = row["verdict"] in HOLDS
            out.append(f"{plan.added} and {who}: {row['verdict']} {row['output']}".rstrip())
            out += [f"  {part}" for part in row["detail"].split("; ") if part]
            if not holds:
                code = FELL
                if row["candidate"] != UPSTREAM:
                    fitting = shard.fitting(row["candidate"].partition("/")[0], [case])
                    out.append(f"  equal with {fitting}" if fitting else "  equal with no known settings")
    finally:
        for worker in workers.values():
            worker.close()
    sys.stdout.write("\n".join(out) + "\n")
    return code
