"""Parity of one operation against one oracle: stored, real-label and generated cases."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

from harness import oracles
from harness.divergences import covers
from harness.operations import operation as declaration
from harness.pool import Worker, WorkerLost
from harness.runfolder import RunFolder, WriteError
from harness.verdict import HOLDS

if TYPE_CHECKING:
    from cases.case import Case
    from harness.plan import Plan

LABEL_BATCH = 8
STAGES = ("early", "mid", "late")
MOST_LOSSES = 3
"""Every loss of a worker costs a restart or a whole time limit: a candidate that loses it so often is not tried
again in this shard, and each remaining case says so in its verdict."""
SPARE = 1.5
"""Hypothesis repeats itself now and then; so many more draws are allowed to reach the number of cases."""


class Interrupted(RuntimeError):  # noqa: N818 - a request, not a mistake
    """The run was asked to stop."""


@dataclass
class Shard:
    """All cases of one (operation, oracle) pair."""

    plan: Plan
    operation: str
    oracle: str
    folder: RunFolder
    done: dict[tuple[str, str], dict[str, Any]]
    """Rows already judged, by (case digest, candidate): what a resumed run need not judge again."""
    progress: Callable[[], None] = lambda: None
    stopped: Callable[[], bool] = lambda: False
    worker: Worker | None = None
    pool: list[Case] = field(default_factory=list)
    """Cases that were judged, among which those for relations are chosen."""
    _seen: set[str] = field(default_factory=set)
    _losses: Counter[str] = field(default_factory=Counter)
    _lost: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def candidates(self) -> tuple[str, ...]:
        """Whom the cases are judged for."""
        return self.plan.candidates_of(self.operation)

    @property
    def allowed(self) -> dict[str, Any]:
        """What the case strategies may use: what the oracle takes."""
        return options(self.operation, self.oracle)

    @property
    def release(self) -> str:
        """The oracle as NAME==VERSION, wherever its code is from."""
        return f"{oracles.package(self.oracle)}=={oracles.version(self.oracle)}"

    def run(self, worker: Worker) -> None:
        """Judge every case once and save a shrunk counterexample of each kind of failure."""
        self.worker = worker
        for case in self._stored():
            self._record(case)
        failing = self._generated()
        if self.plan.shrink_seconds:
            for key in failing:
                self._shrink(key)
        if self.plan.relations:
            from harness.relations.trying import try_relations

            try_relations(self)

    def _stored(self) -> Iterator[Case]:
        from cases.pinned import pinned

        yield from pinned(self.operation, **self.allowed)
        if self.plan.labels:
            yield from label_cases(self.operation, self.plan, self.allowed)

    def _generated(self) -> list[tuple[str, str, str]]:
        """Judge the generated cases; returns the kinds of failure seen, in order."""
        failing: dict[tuple[str, str, str], None] = {}
        wanted, drawn = self.plan.examples, 0
        if not wanted:
            return []

        def one(case: Case) -> None:
            nonlocal drawn
            if drawn >= wanted or case.digest in self._seen:
                return
            drawn += 1
            for row in self._record(replace(case, origin=self._origin(drawn - 1))):
                if row["verdict"] not in HOLDS:
                    failing[row["candidate"], row["verdict"], row["output"]] = None

        self.explore(one, shrink=False)
        return list(failing)

    def explore(self, visit: Callable[[Case], None], *, shrink: bool) -> None:
        """Call `visit` on the cases that the seed draws."""
        from harness.drawing import explore

        strategy = import_module(f"cases.{self.operation}").cases(dtypes=self.plan.dtypes, **self.allowed)
        explore(strategy, visit, seed=self.plan.seed, examples=int(self.plan.examples * SPARE), shrink=shrink)

    def _origin(self, index: int) -> str:
        version = import_module(f"cases.{self.operation}").STRATEGY_VERSION
        return f"drawn:{self.operation} strategy {version}, seed {self.plan.seed}, case {index}"

    def _record(self, case: Case) -> list[dict[str, Any]]:
        """Judge a case with every candidate and append the rows, unless an earlier run has."""
        if case.digest in self._seen:
            return []
        self._seen.add(case.digest)
        self.pool.append(case)
        missing = [name for name in self.candidates if (case.digest, name) not in self.done]
        if missing:
            started = time.monotonic()
            rows = self._judge(case, tuple(missing))
            seconds = time.monotonic() - started
            rows = [self._row(case, row, seconds, len(self._seen) - 1) for row in rows]
            for row in rows:
                if row["verdict"] not in HOLDS:
                    row["replay"] = self._save(case, row["candidate"])
            self.folder.append("verdicts", rows)
            self.done.update({(case.digest, row["candidate"]): row for row in rows})
        self.progress()
        return [self.done[case.digest, name] for name in self.candidates]

    def _judge(self, case: Case, candidates: tuple[str, ...]) -> list[dict[str, Any]]:
        """Rows of verdicts; whoever takes the worker down gets the verdict, the rest are judged again."""
        if self.stopped():
            raise Interrupted
        stored = case.to_bytes()
        rows = [self._lost[name] for name in candidates if self._losses[name] >= MOST_LOSSES]
        candidates = tuple(name for name in candidates if self._losses[name] < MOST_LOSSES)
        while candidates:
            try:
                rows += self.worker.request("judge", self.operation, stored, candidates)
                break
            except WorkerLost as lost:
                kind, _, name = lost.stage.partition(" ")
                guilty = (name,) if kind in {"candidate", "compare"} else candidates
                for name in guilty:
                    rows.append(_lost(name, lost.verdict, f"{lost.stage}: {lost.reason}"))
                    self._losses[name] += 1
                    repeated = f"not tried again after {MOST_LOSSES} losses of the worker, the last at {lost.stage}"
                    self._lost[name] = _lost(name, lost.verdict, f"{repeated}: {lost.reason}")
                candidates = tuple(name for name in candidates if name not in guilty)
        return [self._strict(case, row, self.release) for row in rows]

    @staticmethod
    def _strict(case: Case, row: dict[str, Any], release: str = "") -> dict[str, Any]:
        """Stored cases say what they expect: a tie only where tagged, a divergence of this release still diverging."""
        listed = [tag.partition(":")[2] for tag in case.tags if tag.startswith("divergence:")]
        expected = [identifier for identifier in listed if not release or covers(identifier, release)]
        if not case.origin.startswith("pinned:"):
            return row
        if expected and row["divergence"] not in expected and row["verdict"] in HOLDS:
            detail = f"listed divergence {', '.join(expected)} no longer diverges ({row['verdict']})"
            return {**row, "verdict": "mismatch", "detail": detail, "output": "divergence list"}
        if row["verdict"] == "tie" and "tie" not in case.tags:
            return {**row, "verdict": "mismatch", "detail": f"stored case allows no tie: {row['detail']}"}
        return row

    def _row(self, case: Case, row: dict[str, Any], seconds: float, index: int) -> dict[str, Any]:
        return {
            "operation": self.operation,
            "oracle": self.oracle,
            "device": self.plan.device,
            "dtype": case.dtype,
            "case": case.digest,
            "origin": case.origin,
            "tags": " ".join(sorted(case.tags)),
            "replay": "",
            "seconds": seconds,
            "index": index,
            **row,
        }

    def _save(self, case: Case, candidate: str) -> str:
        from cases.case import CaseError

        oracle, own = ("".join(c if c.isalnum() or c in ".=-" else "_" for c in s) for s in (self.oracle, candidate))
        name = f"{self.operation}-{oracle}-{own}-{case.digest}.safetensors"
        try:
            case.save(self.folder.failures / name)
        except CaseError as error:
            raise WriteError(str(error)) from error
        return f"failures/{name}"

    def _shrink(self, key: tuple[str, str, str]) -> tuple[Case, dict[str, Any]] | None:
        """Let Hypothesis shrink the first case that fails as `key` says, and save the smallest seen.

        Returns the case and how it fell then, with `replay`: at the edge of a budget it may fall otherwise next time.
        """
        from harness.drawing import Fails

        candidate, verdict, _ = key
        first = next(
            row
            for row in self.done.values()
            if (row["candidate"], row["verdict"], row["output"]) == key and row["operation"] == self.operation
        )
        if first.get("shrunk") or verdict in {"timeout", "crash"}:
            # Every step would cost a restart or the whole limit; the case as drawn is saved already.
            return None
        # Past the limit every new case passes: decisions already taken stand, so nothing is flaky.
        known: dict[str, dict[str, Any] | None] = {
            digest: row for (digest, name), row in self.done.items() if name == candidate
        }
        smallest: list[tuple[Case, dict[str, Any]]] = []
        end = time.monotonic() + self.plan.shrink_seconds

        def one(case: Case) -> None:
            if case.digest not in known:
                expired = time.monotonic() > end
                known[case.digest] = None if expired else self._judge(case, (candidate,))[0]
            row = known[case.digest]
            if row is not None and self._fails(row, key):
                smallest[:] = [(case, row)]
                raise Fails

        self.explore(one, shrink=True)
        if not smallest:
            return None
        case, row = smallest[0]
        case = replace(case, origin=f"shrunk:from {first['case']}")
        replay = self._save(case, candidate)
        self.folder.append("verdicts", [{**first, "replay": replay, "shrunk": case.digest}])
        return case, {**row, "replay": replay}

    @staticmethod
    def _fails(row: dict[str, Any], key: tuple[str, str, str]) -> bool:
        return (row["candidate"], row["verdict"], row["output"]) == key


def options(operation: str, oracle: str) -> dict[str, Any]:
    """What the case strategies may use with this oracle."""
    upstream = declaration(operation).upstreams[oracles.package(oracle)]
    return upstream.options(oracles.version(oracle))


def label_cases(operation: str, plan: Plan, allowed: dict[str, Any]) -> Iterator[Case]:
    """Real labels in batches, each with predictions simulated at three stages of training."""
    from cases.labels import read_labels

    images = read_labels(plan.labels).images
    build = import_module(f"cases.{operation}").from_labels
    dtype = "float32" if "float32" in plan.dtypes else plan.dtypes[0]
    for start in range(0, len(images), LABEL_BATCH):
        for offset, stage in enumerate(STAGES):
            seed = plan.seed + len(STAGES) * start + offset
            yield build(images[start : start + LABEL_BATCH], stage, seed, dtype, **allowed)


def _lost(candidate: str, verdict: str, detail: str) -> dict[str, Any]:
    return {
        "candidate": candidate,
        "verdict": verdict,
        "detail": detail,
        "output": detail.partition(":")[0],
        "error": None,
        "gradient_error": None,
        "decisions": 0,
        "tied_decisions": 0,
        "divergence": "",
    }
