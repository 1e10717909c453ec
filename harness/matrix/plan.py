"""What a matrix will do: a plan of cases without measurements, whose workers know the newest era."""

from __future__ import annotations

from dataclasses import dataclass

import reference
from harness import oracles
from harness import plan as requests
from harness.matrix.eras import NEWEST, newest
from harness.matrix.session import MatrixSettings
from harness.operations import operation as declaration
from harness.plan import Plan

EXAMPLES = 32
"""Cases drawn for an operation and version unless told otherwise: with the pinned ones, all of it in minutes."""
SHRINK_SECONDS = 10.0
TIME_LIMIT = 30.0


@dataclass(frozen=True)
class MatrixPlan(Plan):
    """A plan whose pairs are the cells of the table."""

    def pairs(self) -> list[tuple[str, str]]:
        """(operation, version) of every cell: also where the version lacks the operation, which the table says."""
        return [
            (name, oracle)
            for name in self.operations
            for oracle in self.oracles
            if oracles.package(oracle) in declaration(name).upstreams and self.candidates_of(name)
        ]

    def worker(self, oracle: str, threads: int) -> MatrixSettings:
        """How a worker for one version is started."""
        package = oracles.package(oracle)
        own = [name for name in self.operations if package in declaration(name).upstreams]
        variants = {name: {NEWEST: newest(name, package)} for name in own}
        return MatrixSettings(oracle, self.candidates, threads, self.device, self.memory_limit, variants=variants)


def build(
    *,
    operations: str | None = None,
    oracles: tuple[str, ...] | None = None,
    candidates: list[str] = (),
    dtypes: str | None = None,
    examples: int | None = None,
    seed: int | None = None,
    workers: int = 1,
    time_limit: float = TIME_LIMIT,
    shrink_seconds: float | None = None,
) -> MatrixPlan:
    """The plan of a request, on the CPU; all pins, controls included, unless `oracles` says otherwise."""
    profile = requests.profile("quick")
    chosen = requests.parse_candidates(None, list(candidates), "cpu")
    requests.check_candidates(chosen, "cpu")
    return MatrixPlan(
        operations=requests.parse_operations(operations),
        oracles=oracles or tuple(reference.read_pins()),
        candidates=chosen,
        device="cpu",
        dtypes=requests.names(dtypes, tuple(profile["dtypes"]), "--dtypes"),
        profile="matrix",
        examples=EXAMPLES if examples is None else examples,
        seed=seed or 0,
        workloads=None,
        labels=None,
        parity=True,
        bench=False,
        workers=workers,
        time_limit=time_limit,
        memory_limit=None,
        row_seconds=0.0,
        shrink_seconds=SHRINK_SECONDS if shrink_seconds is None else shrink_seconds,
    )
