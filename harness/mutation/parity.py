"""Parity as what finds mutants: cases of every operation, on every path that it takes, judged by the real judge.

The unmutated library is judged once, and which lines each case runs is recorded; a mutant runs the cases that reach
its line, the cheapest first, and the judge is asked only where an answer is not bitwise the unmutated one.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from importlib import import_module
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from harness.mutation import overlay
from harness.mutation.reach import Reach
from harness.mutation.zygote import stage
from harness.parity import SPARE, Shard, options
from harness.verdict import HOLDS
from harness.watch import bits
from harness.worker import Session, WorkerSettings, as_outputs

if TYPE_CHECKING:
    from cases.case import Case
    from harness.execute import Result
    from harness.operation import Operation

DTYPES = ("float32", "float64", "bfloat16", "float16")
KERNELS = "triton"
KERNEL_CASES = 12
"""Drawn cases that the interpreter runs, which takes a thousand times as long as a GPU."""
KERNEL_BUDGET = 60.0
"""Seconds after which no more cases of an operation are recorded for it."""
LEAST_SECONDS, MOST_TIMES = 3.0, 20
"""Processor time that a case may take on a mutant: so many seconds, and so many times what it takes unmutated."""


def prepare(oracle: str, subject: str, operations: str) -> None:
    """What a zygote imports once: the oracle, and all that judging a case of each of the operations imports.

    A child tries that, for nothing of `cleanroom`, nor what imports it, may be imported here.
    """
    import hypothesis  # noqa: F401 - so that children need not import it
    import scipy.optimize  # noqa: F401 - as above
    import triton  # noqa: F401 - as above

    import reference
    from harness import drawing, execute, judge, numeric, total, watch  # noqa: F401 - as above

    torch.set_num_threads(1)
    reference.load(reference.OracleSpec.parse(oracle))
    ours, theirs = Pipe(duplex=False)
    child = os.fork()
    if child == 0:
        try:
            theirs.send(_needed(oracle, subject, operations.split(",")))
        finally:
            os._exit(0)
    theirs.close()
    with suppress(EOFError):  # a child that failed: its siblings import for themselves, and say why
        for name in ours.recv():
            with suppress(ImportError):
                import_module(name)
    os.waitpid(child, 0)


def _needed(oracle: str, subject: str, operations: list[str]) -> list[str]:
    """Modules that judging a pinned case of each operation imports, in order."""
    from cases.pinned import pinned
    from harness.operations import operation as declaration

    before = set(sys.modules)
    overlay.lay(Path(subject))
    bench = Bench(oracle)
    for name in operations:
        for case in pinned(name, **options(name, oracle))[:1]:
            with suppress(Exception):
                bench.answer(declaration(name), case, "torch")
                bench.verdict(case, "torch")
    rooms = ("cleanroom", "harness", "__main__")
    return [name for name in sys.modules if name not in before and name.partition(".")[0] not in rooms]


class Bench(Session):
    """A session whose candidates are the paths of the built-in ones."""

    def __init__(self, oracle: str) -> None:
        class Nobody:
            def send(self, message: Any) -> None:
                """Nobody needs to know the stage: the bench says which case it is at."""

        super().__init__(Nobody(), WorkerSettings(oracle, {}, 1))

    def _candidate(self, operation: Operation, name: str) -> Callable[..., Any]:
        return paths(operation)[name]

    def answer(self, operation: Operation, case: Case, candidate: str) -> Result:
        """What a candidate answers, as the judge would see it."""
        from harness.execute import execute
        from harness.operation import AUTOCAST

        settings = {key: value for key, value in case.settings.items() if key != AUTOCAST}
        given, call = {**settings, **self._era(operation)}, self._candidate(operation, candidate)
        return execute(
            lambda tensors: as_outputs(call(**tensors, **given)),
            case.tensors,
            track=True,
            gradients=operation.carries_gradient(case.tensors),
            autocast=case.settings.get(AUTOCAST),
        )

    def verdict(self, case: Case, candidate: str) -> dict[str, Any]:
        """The row of the judge, as strict with stored cases as a run is."""
        [row] = self.judge(case.operation, case.to_bytes(), (candidate,))
        return Shard._strict(case, row)


def paths(operation: Operation) -> dict[str, Callable[..., Any]]:
    """The candidates of an operation by name: on the CPU, with fixed shapes, and as kernels where there are any."""
    from harness.candidates import _OnPath
    from harness.operation import DropIn

    found = {"torch": operation.candidates["torch"]}
    inner = found["torch"].bind if isinstance(found["torch"], DropIn) else found["torch"]
    if isinstance(inner, _OnPath):
        if inner.on_device == "static":
            found["static"] = partial(found["torch"], path="static")
        found[KERNELS] = operation.candidates[KERNELS]
    return found


def drawn(operation: str, oracle: str, examples: int, seed: int) -> Iterator[Case]:
    """Pinned cases, then generated ones, as a run draws them; none twice."""
    from cases.pinned import pinned
    from harness.drawing import explore

    allowed, found = options(operation, oracle), {}
    stored = {case.digest: case for case in pinned(operation, **allowed)}

    def keep(case: Case) -> None:
        if case.digest not in stored:
            found.setdefault(case.digest, replace(case, origin=f"drawn:{len(found)}"))

    strategy = import_module(f"cases.{operation}").cases(dtypes=DTYPES, **allowed)
    explore(strategy, keep, seed=seed, examples=int(examples * SPARE), shrink=False)
    yield from stored.values()
    yield from list(found.values())[:examples]


def record(
    connection: Connection,
    oracle: str,
    operation: str,
    kernels: bool,
    examples: int,
    seed: int,
    subject: str,
    folder: str,
) -> list[dict[str, Any]]:
    """What the unmutated library answers to an operation's cases: a row a case and path, with the lines it reaches.

    `kernels` asks for the kernels alone, else they are left out. The cases are saved into `folder`.
    """
    from harness.operations import operation as declaration

    overlay.lay(Path(subject))
    declared, bench, reach, rows = declaration(operation), Bench(oracle), Reach(Path(subject)), []
    chosen = [name for name in paths(declared) if (name == KERNELS) == kernels]
    began = time.monotonic()
    for case in drawn(operation, oracle, min(examples, KERNEL_CASES) if kernels else examples, seed) if chosen else ():
        if kernels and (case.dtype == "float64" or time.monotonic() - began > KERNEL_BUDGET):
            continue
        file = Path(folder) / f"{case.digest}.safetensors"
        if not file.exists():
            case.save(file)
        for candidate in chosen:
            stage(connection, f"{operation}, {candidate}, {case.origin}", 600.0)
            with reach.recording():
                fingerprint = _fingerprint(bench.answer(declared, case, candidate))
            started = time.process_time()
            again = _fingerprint(bench.answer(declared, case, candidate))
            rows.append(
                {
                    "operation": operation,
                    "oracle": oracle,
                    "candidate": candidate,
                    "case": case.digest,
                    "origin": case.origin,
                    "fingerprint": fingerprint if fingerprint == again else "",
                    "seconds": time.process_time() - started,
                    "lines": reach.take(),
                }
            )
    return rows


def holds(connection: Connection, oracle: str, row: dict[str, Any], subject: str, folder: str) -> bool:
    """Whether the unmutated library passes a case: one that fails anyway finds no mutant."""
    overlay.lay(Path(subject))
    stage(connection, where(oracle, row), 600.0)
    return Bench(oracle).verdict(load(folder, row), row["candidate"])["verdict"] in HOLDS


def kill(
    connection: Connection, oracle: str, rows: list[dict[str, Any]], subject: str, module: str, file: str, folder: str
) -> dict[str, Any] | None:
    """What finds the mutant `module`, whose text is in `file`: {by, detail}, or None where all of `rows` hold.

    By parity, `row` is the case that did.
    """
    from harness.operations import operation as declaration

    overlay.lay(Path(subject), module, Path(file))
    stage(connection, "import", 60.0)
    try:
        # Also where no operation imports it at its start: an import error must not look like a wrong answer.
        import_module(module)
        declared = {row["operation"]: declaration(row["operation"]) for row in rows}
    except Exception as error:  # whatever the mutant raises
        return {"by": "import", "detail": f"{type(error).__name__}: {error}"[:300]}
    bench = Bench(oracle)
    for row in rows:
        at = where(oracle, row)
        stage(connection, at, LEAST_SECONDS + MOST_TIMES * row["seconds"])
        case = load(folder, row)
        answer = bench.answer(declared[row["operation"]], case, row["candidate"])
        if row["fingerprint"] and _fingerprint(answer) == row["fingerprint"]:
            continue
        # The judge evaluates upstream many times where it has to know how far rounding may go.
        stage(connection, at, 120.0 + MOST_TIMES * row["seconds"])
        judged = bench.verdict(case, row["candidate"])
        if judged["verdict"] not in HOLDS:
            return {"by": "parity", "row": row, "detail": f"{at}: {judged['verdict']}: {judged['detail']}"[:300]}
    return None


def where(oracle: str, row: dict[str, Any]) -> str:
    """What a row is about, for people."""
    return f"{row['operation']} on {oracle}, {row['candidate']}, {row['origin']} ({row['case']})"


def load(folder: str, row: dict[str, Any]) -> Case:
    """The case of a row, under its own origin."""
    from cases.case import Case

    return replace(Case.load(Path(folder) / f"{row['case']}.safetensors"), origin=row["origin"])


def _fingerprint(result: Result) -> str:
    """A hash of all that a judge may see of a result."""
    content = hashlib.sha256()
    error = result.error.text if result.error else None
    content.update(json.dumps([error, list(result.side_effects)]).encode())
    for name, value in sorted(result.outputs.items()):
        content.update(f"\0{name}\0".encode())
        if not isinstance(value, torch.Tensor):
            content.update(repr(value).encode())
            continue
        content.update(f"{value.dtype} {tuple(value.shape)}".encode())
        if value.numel():
            content.update(bits(value).numpy())
    return content.hexdigest()[:16]
