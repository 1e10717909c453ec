"""A run: parity in parallel, then measurements alone, then frames, summary and report."""

from __future__ import annotations

import datetime
import os
import platform
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harness import oracles
from harness.bundle import commit
from harness.gate import summarise
from harness.parallel import in_parallel
from harness.parity import Shard
from harness.plan import Plan
from harness.pool import Staff, Worker, WorkerFailed
from harness.progress import Progress
from harness.runfolder import RunFolder, WriteError
from harness.timing import measure_all, missing

VERSIONED = ("torch", "numpy", "scipy", "pandas", "hypothesis", "safetensors", "triton")


def provenance(plan: Plan, argv: list[str]) -> dict[str, Any]:
    """What `run.json` says of where, when and on what the run was made."""
    import torch

    head, dirty = commit()
    return {
        "started": _now(),
        "finished": None,
        "command": "python -m harness run",
        "argv": argv,
        "profile": plan.profile,
        "seed": plan.seed,
        "examples": plan.examples,
        "device": plan.device,
        "device_name": torch.cuda.get_device_name() if plan.device == "cuda" else _processor(),
        "driver": _driver() if plan.device == "cuda" else None,
        "threads": torch.get_num_threads(),
        "cpu": os.cpu_count(),
        "python": platform.python_version(),
        "platform": platform.system(),
        "commit": head,
        "dirty": dirty,
        "versions": package_versions(),
        "oracles": [oracles.describe(oracle) for oracle in dict.fromkeys(own for _, own in plan.pairs())],
        "settings": plan.as_json(),
    }


def execute_plan(plan: Plan, folder: RunFolder, progress: Progress) -> dict[str, Any]:
    """Do what the folder does not hold yet, then write frames, summary and report; returns the summary."""
    interrupted, lost = False, []
    try:
        with _terminated_as_interrupted():
            if plan.parity:
                lost = _parity(plan, folder, progress)
            if plan.bench:
                _bench(plan, folder, progress)
    except KeyboardInterrupt:
        interrupted = True
    except WorkerFailed as error:
        lost = [*lost, str(error)]
    return finish(plan, folder, interrupted=interrupted, lost=tuple(lost))


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """Let SIGTERM, with which schedulers and CI end a run, end it as Ctrl-C does: with a report, and to be resumed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def finish(plan: Plan, folder: RunFolder, *, interrupted: bool = False, lost: tuple[str, ...] = ()) -> dict[str, Any]:
    """Frames, `summary.json` and the report files from the journal."""
    from reports import write

    run = folder.read_json("run.json")
    folder.write_json("run.json", {**run, "finished": None if interrupted else _now()})
    folder.write_frames({"commit": run["commit"], "torch": run["versions"].get("torch"), "run_threads": run["threads"]})
    summary = summarise(folder, plan, interrupted=interrupted, lost=lost)
    folder.write_json("summary.json", summary)
    try:
        write(folder.path)
    except OSError as error:
        raise WriteError(f"{folder.path}: {error.strerror}") from error
    return summary


def _parity(plan: Plan, folder: RunFolder, progress: Progress) -> list[str]:
    """Every shard on its own worker; returns why shards were lost. Ctrl-C stops them after their case."""
    stored: dict[tuple[str, str], dict] = {}
    for row in folder.rows("verdicts"):
        stored.setdefault((row["operation"], row["oracle"]), {})[row["case"], row["candidate"]] = row

    def one(pair: tuple[str, str], staff: Staff, stopped: Callable[[], bool]) -> None:
        label = " ".join(pair)
        with staff.worker(pair[1]) as worker:
            Shard(
                plan, *pair, folder, stored.get(pair, {}), progress=lambda: progress.step(label), stopped=stopped
            ).run(worker)

    pairs = sorted(plan.pairs(), key=lambda pair: pair[1])
    progress.start("parity", len(pairs) * plan.examples)
    return in_parallel(plan, pairs, one)


def _bench(plan: Plan, folder: RunFolder, progress: Progress) -> None:
    import torch

    threads = torch.get_num_threads()
    progress.start("timing", len(missing(plan, folder)))
    measure_all(
        plan,
        folder,
        lambda oracle: Worker(plan.worker(oracle, threads), plan.time_limit),
        threads,
        lambda row: progress.step(f"{row.operation} {row.workload} {row.oracle}"),
    )


def package_versions() -> dict[str, str]:
    """Versions of what decides a result, as installed."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"cleanroom": "0.1.0"}
    for name in ("cleanroom", *VERSIONED):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    """Model name of the processor; `platform.processor()` is empty on most Linux systems."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _driver() -> str | None:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def default_out() -> Path:
    """`runs/<time>` in the working folder, never one that exists."""
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    out, number = Path("runs") / stamp, 1
    while out.exists():
        number += 1
        out = Path("runs") / f"{stamp}-{number}"
    return out
