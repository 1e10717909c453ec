"""`python -m harness`: run, list, show, replay, report, gate, doctor. Exit codes as in `harness/gate.py`."""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from harness.gate import FELL, HOLDS_ALL, INCOMPLETE, INTERRUPTED, WRONG_REQUEST

SHOWN_DETAIL = 400
"""Characters of a failure's detail in the terminal; the report has all of it."""
BASELINE_HELP = "what timings are held against: a file of `harness baseline`, or none (default: the project's own)"
BACKENDS_HELP = "built-in candidates: torch, triton (default: all on CUDA, else torch; none with --candidate)"


def main(argv: list[str] | None = None) -> int:
    """Run one command; errors of the request are one line on standard error and exit code 4."""
    from cases.case import CaseError
    from cases.labels import LabelError
    from harness.baseline import BaselineError
    from harness.operations import UnknownOperation
    from harness.plan import RequestError
    from harness.runfolder import RunFolderError, WriteError
    from reference import OracleError
    from reference import RequestError as OracleRequestError
    from reports import ReportError

    arguments = _parser().parse_args(argv)
    arguments.argv = sys.argv[1:] if argv is None else argv
    try:
        return arguments.command(arguments)
    except KeyboardInterrupt:
        return INTERRUPTED
    except WriteError as error:
        sys.stderr.write(f"harness: {error}; what was judged and measured before stands, continue with --resume\n")
        return INCOMPLETE
    except (
        RequestError,
        BaselineError,
        RunFolderError,
        UnknownOperation,
        CaseError,
        LabelError,
        OracleRequestError,
        OracleError,
        ReportError,
    ) as error:
        sys.stderr.write(f"harness: {error}\n")
        return WRONG_REQUEST


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="python -m harness", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, function: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(command=function)
        return added

    _run_options(command("run", _run, "draw cases, compare candidates with upstream, measure, report, gate"))
    from harness.matrix import command as versions

    grid = command("matrix", versions.matrix, "every operation against every pinned version; what a new release moved")
    versions.options(grid, _count, _positive)
    from harness.mutation import command as mutation

    faults = command("mutate", mutation.mutate, "plant faults in cleanroom/, one at a time: how many the gate finds")
    mutation.options(faults, _count)
    command("list", _list, "operations, oracles, workloads and profiles")
    command("show", _show, "inputs, settings, outputs and calling convention of an operation").add_argument("op")
    look = command("audit", _audit, "compare cleanroom/ with upstream's sources by runs of equal tokens")
    look.add_argument("--shown", type=_count, default=20, metavar="N", help="runs that are listed (default 20)")
    pack = command("bundle", _bundle, "pack what a run needs into one archive, for a host without network")
    pack.add_argument("--out", type=Path, default=Path("cleanroom-bundle.tar.gz"), metavar="FILE")
    pack.add_argument("--python", default="3.12", metavar="VERSION", help="of the host (default 3.12)")
    pack.add_argument(
        "--have",
        nargs="*",
        default=[],
        metavar="NAMES",
        help="packages of the host: names, or a file that `pip freeze` wrote there",
    )
    replay = command("replay", _replay, "judge one stored case again and print everything about it")
    replay.add_argument("file", type=Path)
    replay.add_argument("--oracles", metavar="LIST", help="oracles to ask (default: every pin that fits)")
    replay.add_argument("--backends", metavar="LIST", help=BACKENDS_HELP)
    replay.add_argument("--candidate", action="append", default=[], metavar="NAME=MODULE:ATTRIBUTE")
    replay.add_argument("--device", default="cpu", metavar="cpu|cuda|auto")
    replay.add_argument("--time-limit", type=_positive, default=60.0, metavar="SECONDS")
    report = command("report", _report, "write report.html, junit.xml and summary.md of a run folder again")
    report.add_argument("folder", type=Path)
    gate = command("gate", _gate, "hold a finished run folder against the bars and exit with its code")
    gate.add_argument("folder", type=Path)
    gate.add_argument("--baseline", metavar="FILE", help=BASELINE_HELP)
    store = command("baseline", _baseline, "store the timings of a finished run as what later ones are held against")
    store.add_argument("folder", type=Path)
    store.add_argument("--file", type=Path, help="where (default: the project's own, harness/baseline.json)")
    command("doctor", _doctor, "versions, devices and oracles present")
    return parser


def _run_options(run: argparse.ArgumentParser) -> None:
    run.add_argument("--ops", metavar="LIST", help="operations (default: all)")
    run.add_argument("--oracles", metavar="LIST", help="pins such as yolox==0.3.0 (default: every default pin)")
    run.add_argument(
        "--oracle",
        action="append",
        default=[],
        metavar="NAME=WHERE",
        help="a local checkout (yolox=DIR) or the environment's version (ultralytics=installed); repeatable",
    )
    run.add_argument("--backends", metavar="LIST", help=BACKENDS_HELP)
    run.add_argument(
        "--candidate",
        action="append",
        default=[],
        metavar="NAME=MODULE:ATTRIBUTE",
        help="an implementation of your own; repeatable",
    )
    run.add_argument("--device", default="auto", metavar="cpu|cuda|auto")
    run.add_argument("--dtypes", metavar="LIST", help="float32,float64,bfloat16,float16")
    run.add_argument("--profile", default="quick", help="quick (default), ci or full")
    run.add_argument("--examples", type=_count, metavar="N", help="cases an operation and oracle")
    run.add_argument("--seed", type=int, metavar="N", help="seed of the generated cases (default 0; full: fresh)")
    run.add_argument("--labels", metavar="PATH", help="COCO JSON or YOLO folder: real labels as cases and workload")
    run.add_argument("--workloads", metavar="LIST", help="workloads to measure")
    run.add_argument("--out", type=Path, metavar="DIR", help="run folder (default: runs/TIME)")
    run.add_argument("--resume", type=Path, metavar="DIR", help="continue a run that was cut off")
    run.add_argument("--workers", type=_count, metavar="N", help="worker processes for parity (default: cores)")
    run.add_argument("--time-limit", type=_positive, default=30.0, metavar="SECONDS", help="for one case")
    run.add_argument(
        "--memory-limit", type=_positive, metavar="GB", help="memory that one worker may take (default: no limit)"
    )
    run.add_argument("--row-seconds", type=_positive, metavar="SECONDS", help="spent on timing a row")
    run.add_argument("--shrink-seconds", type=_count, metavar="N", help="spent on shrinking a kind of failure")
    run.add_argument("--baseline", metavar="FILE", help=BASELINE_HELP)
    run.add_argument("--relations", metavar="LIST", help="relations without an oracle (default: all)")
    run.add_argument("--no-relations", action="store_true", help="no relations without an oracle")
    run.add_argument("--no-bench", action="store_true", help="no measurements")
    run.add_argument("--no-parity", action="store_true", help="no cases, measurements only")


class _Parser(argparse.ArgumentParser):
    """argparse ends with 2 on a wrong request; here 2 means interrupted."""

    def error(self, message: str) -> None:
        self.print_usage(sys.stderr)
        self.exit(WRONG_REQUEST, f"harness: {message}\n")


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


def _positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def _run(arguments: argparse.Namespace) -> int:
    from harness.plan import Plan, RequestError, check_candidates
    from harness.progress import Progress
    from harness.run import default_out, execute_plan, provenance
    from harness.runfolder import RunFolder

    if arguments.resume:
        folder, run = RunFolder.resume(arguments.resume)
        if (kind := run.get("kind", "run")) != "run":
            folder.close()
            raise RequestError(f"--resume {arguments.resume}: it holds a {kind}; continue with: harness {kind} --into")
        folder.mend()
        folder.check_journals()
        plan = Plan.from_json(run["settings"])
        check_candidates(plan.candidates, plan.device)
    else:
        plan = _plan(arguments)
        folder = RunFolder.create(arguments.out or default_out(), provenance(plan, arguments.argv))
    progress = Progress()
    try:
        summary = execute_plan(plan, folder, progress)
    finally:
        progress.stop()
        folder.close()
    _print_summary(summary, folder.path, folder.read_json("run.json")["settings"]["candidates"])
    return summary["exit_code"]


def _plan(arguments: argparse.Namespace):
    import os

    from cases.labels import read_labels
    from cases.workloads import WORKLOADS
    from harness import baseline, plan
    from harness.candidates import interprets
    from harness.relations import NAMES

    profile = plan.profile(arguments.profile)
    seed = arguments.seed
    if seed is None:
        seed = random.SystemRandom().randrange(2**31) if profile["randomized"] else 0
    device = plan.resolve_device(arguments.device)
    candidates = plan.parse_candidates(arguments.backends, arguments.candidate, device)
    plan.check_candidates(candidates, device)
    interpreted = interprets(candidates, device)
    if arguments.labels:
        read_labels(arguments.labels)
    baseline.chosen(arguments.baseline or baseline.STORED)
    wanted = arguments.workloads if arguments.workloads is not None else ",".join(profile["workloads"])
    built = plan.Plan(
        operations=plan.parse_operations(arguments.ops),
        oracles=plan.parse_oracles(arguments.oracles, arguments.oracle),
        candidates=candidates,
        device=device,
        dtypes=plan.names(arguments.dtypes, tuple(profile["dtypes"]), "--dtypes"),
        profile=arguments.profile,
        examples=profile["examples"] if arguments.examples is None else arguments.examples,
        seed=seed,
        workloads=plan.names(wanted, tuple(WORKLOADS), "--workloads"),
        labels=arguments.labels and str(Path(arguments.labels).resolve()),
        parity=not arguments.no_parity,
        bench=not arguments.no_bench and not interpreted,
        workers=arguments.workers or os.cpu_count() or 1,
        time_limit=arguments.time_limit,
        memory_limit=arguments.memory_limit,
        row_seconds=arguments.row_seconds or profile["row_seconds"],
        shrink_seconds=profile["shrink_seconds"] if arguments.shrink_seconds is None else arguments.shrink_seconds,
        baseline=arguments.baseline or baseline.STORED,
        relations=() if arguments.no_relations else plan.names(arguments.relations, NAMES, "--relations"),
        relation_cases=profile["relation_cases"],
    )
    if arguments.ops is None:
        built = replace(built, operations=tuple(name for name in built.operations if built.candidates_of(name)))
    plan.check_pairs(built)
    if interpreted:
        sys.stderr.write("triton kernels run under the interpreter on the CPU: no timings are taken\n")
    return built


def _print_summary(summary: dict, path: Path, candidates: dict[str, str]) -> None:
    from reports.failures import replay_command

    out = sys.stdout.write
    rows = summary["operations"] + summary["measurements"]
    widths = {key: max([len(row[key]) for row in rows], default=0) for key in ("operation", "oracle", "candidate")}

    def who(row: dict) -> str:
        return " ".join(f"{row[key]:<{width}}" for key, width in widths.items())

    for row in summary["operations"]:
        out(
            f"{who(row)} {row['cases']:>5} cases: "
            f"{row['match']} match, {row['tie']} tie ({row['tie_share']:.1%}), {row['mismatch']} mismatch, "
            f"{row['other']} other\n"
        )
    for row in summary["measurements"]:
        if row["speedup"] is not None:
            out(
                f"{who(row)} {row['workload']:<9} {row['direction']:<16} {row['speedup']:.1f}x {_interval(row)}, "
                f"peak memory {row['peak_bytes_candidate'] / 1e6:.1f} MB for {row['peak_bytes_oracle'] / 1e6:.1f} MB\n"
            )
    for bar in summary["gate"]:
        if not bar["ok"]:
            out(f"fell: {bar['bar']}: {bar['value']:.4g}, bar {bar['limit']:g} ({bar['reason']})\n")
    for row in summary["failures"]:
        out(f"{row['verdict']} of {row['operation']} on {row['oracle']}, {row['candidate']}, {row['cases']} cases: ")
        target = candidates.get(row["candidate"], "")
        out(f"{row['detail'][:SHOWN_DETAIL]}\n  {replay_command(path, row['replay'], row['candidate'], target)}\n")
    out(f"{summary['sentence']}\nreport: {path / 'report.html'}\n")
    out(f"{summary['passed']} passed, {summary['failed']} failed\n")


def _interval(row: dict) -> str:
    """The 99% interval, which one pair of samples does not have."""
    if row["speedup_low"] is None:
        return "[one pair]"
    return f"[{row['speedup_low']:.1f}, {row['speedup_high']:.1f}]"


def _list(arguments: argparse.Namespace) -> int:
    from harness.describe import listing

    sys.stdout.write(listing())
    return HOLDS_ALL


def _show(arguments: argparse.Namespace) -> int:
    from harness.describe import show
    from harness.operations import operation

    sys.stdout.write(show(operation(arguments.op)))
    return HOLDS_ALL


def _audit(arguments: argparse.Namespace) -> int:
    from harness import oracles
    from harness.audit import audit

    text, clean = audit(oracles.pins(), arguments.shown)
    sys.stdout.write(text)
    return HOLDS_ALL if clean else FELL


def _bundle(arguments: argparse.Namespace) -> int:
    from harness import oracles
    from harness.bundle import bundle

    have = arguments.have
    if len(have) == 1 and Path(have[0]).is_file():
        have = [line.partition("==")[0] for line in Path(have[0]).read_text().split()]
    names = [name for part in have for name in part.split(",") if name]
    sys.stdout.write(bundle(arguments.out, arguments.python, names, oracles.pins()))
    return HOLDS_ALL


def _replay(arguments: argparse.Namespace) -> int:
    from harness import plan
    from harness.replay import replay

    oracles = plan.parse_oracles(arguments.oracles, [])
    device = plan.resolve_device(arguments.device)
    candidates = plan.parse_candidates(arguments.backends, arguments.candidate, device)
    plan.check_candidates(candidates, device)
    text, code = replay(arguments.file, oracles, candidates, device, arguments.time_limit)
    sys.stdout.write(text)
    return code


def _report(arguments: argparse.Namespace) -> int:
    from reports import write

    sys.stdout.write(f"{write(arguments.folder)}\n")
    return HOLDS_ALL


def _gate(arguments: argparse.Namespace) -> int:
    from harness.gate import summarise
    from harness.plan import Plan
    from harness.runfolder import RunFolder

    folder, run = RunFolder.resume(arguments.folder)
    # A folder of `mutate` or `matrix` alone has no cases and measurements whose bars count.
    plan = Plan.from_json(run["settings"]) if run.get("kind", "run") == "run" else None
    if plan:
        folder.check_frames()
    if plan and arguments.baseline:
        plan = replace(plan, baseline=arguments.baseline)
    summary = summarise(folder, plan, interrupted=run.get("finished") is None)
    _print_summary(summary, folder.path, folder.read_json("run.json")["settings"]["candidates"])
    return summary["exit_code"]


def _baseline(arguments: argparse.Namespace) -> int:
    from harness import baseline
    from harness.runfolder import RunFolder

    folder, _ = RunFolder.resume(arguments.folder)
    sys.stdout.write(baseline.store(folder, arguments.file or baseline.FILE))
    return HOLDS_ALL


def _doctor(arguments: argparse.Namespace) -> int:
    from harness.doctor import doctor

    sys.stdout.write(doctor())
    return HOLDS_ALL


if __name__ == "__main__":
    sys.exit(main())
