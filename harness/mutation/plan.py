"""What a run of `harness mutate` tries, spelled out; `run.json` holds it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import reference
from harness import oracles
from harness.mutation import equivalents, sample
from harness.mutation.mutant import KINDS, Mutant
from harness.mutation.sources import SUBJECT, Sources
from harness.operations import NAMES
from harness.operations import operation as declaration
from harness.plan import RequestError

EXAMPLES = 30
"""Cases drawn for an operation and oracle, beside the pinned ones."""


@dataclass(frozen=True)
class MutationPlan:
    """Which mutants are judged, and by how much of the gate."""

    oracles: tuple[str, ...]
    operations: tuple[str, ...] = NAMES
    files: str = "*"
    kinds: tuple[str, ...] = KINDS
    ids: tuple[str, ...] = ()
    sample: int = 0
    seed: int = 0
    examples: int = EXAMPLES
    tests: bool = True
    workers: int = 2
    device: str = "cpu"
    profile: str = "mutate"

    def as_json(self) -> dict[str, Any]:
        """A JSON object that `from_json` turns back."""
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> MutationPlan:
        """The plan of a stored run; RequestError where its fields are not a plan's."""
        try:
            return cls(**{key: tuple(item) if isinstance(item, list) else item for key, item in value.items()})
        except TypeError as error:
            raise RequestError(f"run.json: mutation: {error}") from error

    def pairs(self) -> list[tuple[str, str]]:
        """(operation, oracle) pairs in which the oracle has the operation."""
        packages = {oracle: reference.OracleSpec.parse(oracle).name for oracle in self.oracles}
        return [
            (name, own)
            for own in self.oracles
            for name in self.operations
            if packages[own] in declaration(name).upstreams
        ]


@dataclass(frozen=True)
class Population:
    """All mutants that there are in the files asked for, and those that are tried."""

    sources: Sources
    plan: MutationPlan

    @cached_property
    def all(self) -> list[Mutant]:
        """The mutants that the options name, sampled or not; RequestError where there are none."""
        found = sample.chosen(
            mutants_of(self.sources, self.plan.files, self.plan.kinds),
            files=self.plan.files, kinds=self.plan.kinds, ids=self.plan.ids,
        )  # fmt: skip
        if missing := sorted(set(self.plan.ids) - {mutant.id for mutant in found}):
            raise RequestError(f"--ids {', '.join(missing)}: no such mutant of the present text")
        return found

    @cached_property
    def tried(self) -> list[Mutant]:
        """Those that are judged: the semantic ones first."""
        return sample.sampled(self.all, self.plan.sample, self.plan.seed)

    def gone(self, rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """Rows of a journal that stand for nothing in the present text: it was changed, or its list of equivalents."""
        present = {mutant.id for mutant in self.all}
        unknown = {row["id"]: row for row in rows if row["id"] not in present}
        files = {row["file"] for row in unknown.values()} & set(self.sources.texts)
        present = {mutant.id for file in files for mutant in mutants_of(self.sources, file)}
        return [row for key, row in unknown.items() if key not in present]

    @cached_property
    def unmatched(self) -> list[equivalents.Equivalent]:
        """Entries of the list of equivalents that no mutant fits; known only of whole files."""
        if self.plan.ids or set(self.plan.kinds) != set(KINDS):
            return []
        files = {file for file in self.sources.texts if sample.fnmatchcase(file, self.plan.files)}
        return equivalents.unmatched(equivalents.equivalents(), self.all, files)


def mutants_of(sources: Sources, files: str = "*", kinds: tuple[str, ...] = KINDS) -> list[Mutant]:
    """Every mutant of the files that a pattern names; RequestError where it names none."""
    from harness.mutation import semantic, syntactic

    makers = {"semantic": semantic.mutants, "syntactic": syntactic.mutants}
    named = [file for file in sources.texts if sample.fnmatchcase(file, files)]
    if not named:
        raise RequestError(f"--files {files!r}: no file of {SUBJECT}/ is called so")
    return [mutant for file in named for kind in kinds for mutant in makers[kind](file, sources.texts[file])]


def default_oracles() -> tuple[str, ...]:
    """The pins that a run uses; each must be present."""
    found = tuple(oracles.pins())
    for oracle in found:
        oracles.locate(oracle)
    return found
