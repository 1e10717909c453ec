"""The worker process: holds one oracle version and the candidates, runs and times them on demand.

One process an oracle version, so that upstream's versions never meet. The parent (`harness/pool.py`) sends
one request at a time; the worker says which stage it enters before it enters it, so that whoever crashes or
hangs can be named.
"""

from __future__ import annotations

import importlib
import os
import resource
import signal
import sys
from collections import defaultdict
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

FORWARD, BOTH_WAYS = "forward", "forward+backward"
"""What a measurement times; the first without any graph, as in validation, the second as in a training step."""
ONE_PAIR = {"budget_seconds": 0.0, "min_pairs": 1, "max_pairs": 1, "warmups": 1}
"""Limits of the timing in which a candidate's answer is looked at."""


@dataclass(frozen=True)
class WorkerSettings:
    """What a worker needs to know at its start."""

    oracle: str
    candidates: Mapping[str, str]
    """Name to "MODULE:ATTRIBUTE", or to "" for a built-in one."""
    threads: int
    device: str = "cpu"
    memory_limit: float | None = None
    """Gigabytes of data of the process; what asks for more fails there, instead of taking the machine down."""
    search_path: tuple[str, ...] = field(default_factory=lambda: tuple(sys.path))

    def open(self, connection: Connection) -> Session:
        """What answers requests; settings of a command that asks more of its workers open a session of its own."""
        return Session(connection, self)


def serve(connection: Connection, settings: WorkerSettings) -> None:
    """Answer requests until the parent closes the connection."""
    # Ctrl-C goes to the whole process group; the parent decides when workers end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if settings.memory_limit:
        most = int(settings.memory_limit * 1e9)
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    sys.path[:] = [path for path in settings.search_path if path] + [str(Path.cwd())]
    with Path(os.devnull).open("w") as nowhere:
        # Upstream prints banners; standard output belongs to the run's own lines.
        os.dup2(nowhere.fileno(), 1)
    try:
        session = settings.open(connection)
    except Exception as error:  # said to the parent, which ends the run with it
        connection.send(("failed", f"{type(error).__name__}: {error}"))
        return
    connection.send(("ready", session.provenance))
    while True:
        try:
            kind, payload = connection.recv()
        except EOFError:
            return
        try:
            answer = getattr(session, kind)(*payload)
        except Exception as error:  # said to the parent, as above; the worker lives on
            connection.send(("failed", f"{type(error).__name__}: {error}"))
        else:
            connection.send(("done", answer))


class Session:
    """What a worker answers: a method a request."""

    def __init__(self, connection: Connection, settings: WorkerSettings) -> None:
        import torch

        import reference
        from harness.guard import Guard
        from harness.watch import Watch

        torch.set_num_threads(settings.threads)
        self._connection = connection
        self._settings = settings
        self._device = settings.device
        self._oracle = reference.load(reference.OracleSpec.parse(settings.oracle))
        self._watches: defaultdict[tuple[str, str], Watch] = defaultdict(Watch)
        self._guard = Guard(self._oracle.root)
        self._plugged, self._imported = {}, {}
        for name, target in settings.candidates.items():
            if target:
                self._plugged[name] = plug_in(target)
                self._imported[name] = tuple(f"{said} on import" for said in self._guard.replaced())

    @property
    def provenance(self) -> dict[str, Any]:
        """Which oracle it holds."""
        return {
            "name": self._oracle.name,
            "version": self._oracle.version,
            "source": str(self._oracle.source),
        }

    def _stage(self, name: str) -> None:
        self._connection.send(("stage", name))

    def _candidate(self, operation, name: str):
        return self._plugged[name] if name in self._plugged else operation.candidates[name]

    def judge(self, name: str, stored: bytes, candidates: tuple[str, ...]) -> list[dict[str, Any]]:
        """One row a candidate: its verdict on the case."""
        import torch

        from cases.case import Case
        from harness.equality import in_float64
        from harness.execute import autocasting, execute
        from harness.judge import judge, with_gradients
        from harness.operation import AUTOCAST
        from harness.operations import operation as declaration
        from harness.verdict import Inquiry

        operation, case = declaration(name), Case.from_bytes(stored).to(self._device)
        # A checkout or an installed package diverges as the release of its version does.
        release = f"{self._oracle.name}=={self._oracle.version}"
        settings = {key: value for key, value in case.settings.items() if key != AUTOCAST}
        autocast, gradients = case.settings.get(AUTOCAST), operation.carries_gradient(case.tensors)

        def upstream(tensors, assignment=None, autocast=None):
            def call(given):
                bound = self._bind(operation.name, given, settings, assignment)
                return bound.translate(bound())

            return execute(call, tensors, track=False, gradients=gradients, autocast=autocast)

        def evaluate(tensors, assignment=None):
            narrow = any(tensors[name].dtype != torch.float64 for name in gradients)
            result = upstream(tensors, assignment, autocast if narrow else None)
            if result.error:
                raise RuntimeError(f"the oracle fails on inputs near the case: {result.error.text}")
            return with_gradients(operation, replace(case, tensors=dict(tensors)), result.outputs)

        def assigner(tensors):
            with autocasting(tensors, autocast):
                return self._oracle.assigner_inputs(operation.name, tensors, settings)

        ask = Inquiry(
            evaluate,
            quantities=self._oracle.quantities,
            assigner=assigner,
            era=lambda name: self._era(declaration(name)),
        )
        era, results = self._era(operation), {}
        # Candidates first, and first those that nobody here wrote: when they run, no right answer lies about.
        for candidate in sorted(candidates, key=lambda name: name not in self._plugged):
            implementation = self._candidate(operation, candidate)
            self._stage(f"candidate {candidate}")
            with self._guard.watching() if candidate in self._plugged else nullcontext([]) as caught:
                ours = execute(
                    lambda t, f=implementation: as_outputs(f(**t, **settings, **era)),
                    case.tensors,
                    track=True,
                    gradients=gradients,
                    autocast=autocast,
                )
            effects = (*ours.side_effects, *self._imported.get(candidate, ()), *caught)
            results[candidate] = self._watches[operation.name, candidate].hold(replace(ours, side_effects=effects))
        self._stage("oracle")
        oracle = upstream(case.tensors, autocast=autocast)
        truth = upstream(in_float64(case.tensors))
        rows = []
        for candidate in candidates:
            held = results[candidate]
            self._stage(f"compare {candidate}")
            finding, divergence = judge(operation, case, oracle, truth, held.settled(), ask, release)
            rows.append(
                {
                    "candidate": candidate,
                    "verdict": finding.verdict,
                    "detail": finding.detail,
                    "output": finding.output,
                    "error": finding.error,
                    "gradient_error": finding.gradient_error,
                    "decisions": finding.decisions,
                    "tied_decisions": finding.tied,
                    "divergence": divergence,
                }
            )
        return rows

    def relate(self, name: str, stored: bytes, subject: str, relations: tuple[str, ...]) -> list[dict[str, Any]]:
        """Rows of the relations that speak of a case; the subject is a candidate, or upstream."""
        from cases.case import Case
        from harness.operations import operation as declaration
        from harness.relations import UPSTREAM, check

        operation, case = declaration(name), Case.from_bytes(stored).to(self._device)
        era = self._era(operation)

        def upstream(tensors, settings):
            bound = self._bind(name, tensors, settings)
            return bound.translate(bound())

        def candidate(tensors, settings):
            try:
                return as_outputs(self._candidate(operation, subject)(**tensors, **settings, **era))
            finally:
                self._guard.replaced()

        call = upstream if subject == UPSTREAM else candidate
        return check(operation, case, call, relations, era, lambda relation: self._stage(f"relation {relation}"))

    def _era(self, operation) -> dict[str, Any]:
        return operation.upstreams[self._oracle.name].era(self._oracle.era(operation.name))

    def _bind(self, name, tensors, settings, assignment=None):
        if assignment is None:
            return self._oracle.bind(name, tensors, settings)
        return self._oracle.bind(name, tensors, settings, assignment)

    def measure(
        self,
        name: str,
        stored: bytes,
        candidate: str,
        direction: str,
        limits: dict[str, Any],
        other: bytes | None = None,
    ) -> dict[str, Any]:
        """Samples and peaks of the oracle and one candidate on one workload, forward or forward and backward.

        `other` is a case of the same shapes with other values: a candidate that is plugged in must answer on it as
        upstream does, and its timed call, when these values are put where the workload's were, as its untimed one.
        """
        from cases.case import Case
        from harness import accelerator, disturbance
        from harness.directions import Step
        from harness.meter import keep_freed_memory, measure, peak_bytes, tensor_bytes
        from harness.operation import AUTOCAST, DropIn
        from harness.operations import operation as declaration
        from harness.watch import disagreement

        operation, case = declaration(name), Case.from_bytes(stored).to(self._device)
        era, implementation = self._era(operation), self._candidate(operation, candidate)
        settings = {key: value for key, value in case.settings.items() if key != AUTOCAST}
        gradients = operation.carries_gradient(case.tensors) if direction == BOTH_WAYS else ()

        inputs = []

        def prepared(bind):
            # Each side has its own copies: upstream changes some of its arguments in place.
            tensors = {key: value.clone() for key, value in case.tensors.items()}
            inputs.append(tensors)
            leaves = [tensors[key].requires_grad_() for key in gradients]
            return Step(*bind(tensors), leaves, track=direction == BOTH_WAYS or not operation.gradients)

        def upstream(tensors):
            bound = self._oracle.bind(operation.name, tensors, settings)
            return bound, bound.losses or bound.translate

        def own(tensors):
            given = {**tensors, **settings, **era}
            if isinstance(implementation, DropIn):
                return implementation.bind(**given)
            return partial(implementation, **given), as_outputs

        theirs, ours = prepared(upstream), prepared(own)
        self._stage("timing")
        keep_freed_memory()
        before = disturbance.read()
        measured = measure(theirs, ours, device=self._device, **limits)
        tampered = "; ".join(self._guard.replaced()) if candidate in self._plugged else ""
        others = disturbance.other_cores(before, disturbance.read())
        self._stage("memory of oracle")
        peak_oracle = peak_bytes(theirs, device=self._device)
        self._stage(f"memory of candidate {candidate}")
        peak_candidate = peak_bytes(ours, device=self._device)
        self._stage(f"launches of candidate {candidate}")
        on_device = accelerator.describe(theirs, ours, self._device)
        outputs = ours.outputs()
        dishonest = tampered
        if other is not None and candidate in self._plugged and not tampered:
            self._stage(f"honesty of candidate {candidate}")
            dishonest, judged = self._judged(name, other, candidate, inputs[1], gradients)
            if judged is not None:
                # Under the same frames as those that timed it, or a look at the stack would tell them apart.
                ours.keep = True
                measure(theirs, ours, device=self._device, **{**limits, **ONE_PAIR})
                dishonest = disagreement(ours.kept(gradients), judged)
        written = tensor_bytes([case.tensors[key] for key in gradients])
        return {
            "samples": [asdict(sample) for sample in measured.samples],
            "oracle": measured.nanoseconds("oracle"),
            "candidate": measured.nanoseconds("candidate"),
            "note": measured.note,
            "other_cores": others,
            "peak_bytes_oracle": peak_oracle.allocated,
            "peak_bytes_candidate": peak_candidate.allocated,
            "output_bytes": tensor_bytes(outputs) + written,
            "minimum_bytes": operation.minimum_bytes(case, outputs) + written,
            "dishonest": dishonest,
            **on_device,
        }

    def _judged(self, name, stored, candidate, inputs, gradients) -> tuple[str, dict[str, Any] | None]:
        """Why a candidate cannot be believed on other values, or nothing, and what it answers when it is judged.

        The other values then lie where the timed call has its inputs; None where they have another shape.
        """
        from cases.case import Case
        from harness.execute import execute
        from harness.operation import AUTOCAST
        from harness.operations import operation as declaration
        from harness.verdict import HOLDS

        [row] = self.judge(name, stored, (candidate,))
        if row["verdict"] not in HOLDS:
            return f"other values of the workload's shapes: {row['verdict']}, {row['detail'][:200]}", None
        case = Case.from_bytes(stored).to(self._device)
        if {key: value.shape for key, value in case.tensors.items()} != {k: v.shape for k, v in inputs.items()}:
            return "", None
        settings = {key: value for key, value in case.settings.items() if key != AUTOCAST}
        given, call = {**settings, **self._era(declaration(name))}, self._plugged[candidate]
        judged = execute(lambda t: as_outputs(call(**t, **given)), case.tensors, track=False, gradients=gradients)
        for key, value in inputs.items():
            value.data.copy_(case.tensors[key])
        return "", judged.outputs


def plug_in(target: str) -> Any:
    """The callable at "MODULE:ATTRIBUTE"; ValueError says what is wrong with it."""
    module, _, attribute = target.partition(":")
    if not module or not attribute:
        raise ValueError(f"--candidate {target!r}: expected NAME=MODULE:ATTRIBUTE")
    try:
        value: Any = importlib.import_module(module)
        for part in attribute.split("."):
            value = getattr(value, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--candidate {target!r}: {error}") from error
    if not callable(value):
        raise ValueError(f"--candidate {target!r}: {type(value).__name__} is not callable")
    return value


def as_outputs(value: Any) -> dict[str, Any]:
    """The outputs by name, of a mapping or a named tuple."""
    if hasattr(value, "_asdict"):
        return value._asdict()
    if isinstance(value, Mapping):
        return dict(value)
    raise TypeError(f"a candidate returns a mapping or a named tuple of outputs, not {type(value).__name__}")
