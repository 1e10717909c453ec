"""Relations in a run: which cases of a shard they are tried on, and what is journaled and saved."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

from harness.drawing import Fails, explore
from harness.operations import operation as declaration
from harness.pool import WorkerLost
from harness.relations import BROKEN, FINDING, TRIED, UPSTREAM

if TYPE_CHECKING:
    from cases.case import Case
    from harness.parity import Shard

SHRINK_SECONDS = 2.0
"""Spent on a smaller case of each relation that a subject breaks."""
SPARE = 60
"""Cases drawn where those of the run are no examples of a relation."""
LARGEST = 100_000
"""Numbers in a case above which it is left to parity: a relation asks several times."""


def try_relations(shard: Shard) -> None:
    """Upstream under the shard's oracle, and the candidates where it is the first oracle of the operation."""
    first = next(oracle for name, oracle in shard.plan.pairs() if name == shard.operation)
    subjects = [UPSTREAM, *(shard.candidates if shard.oracle == first else ())]
    for subject in subjects:
        _Tried(shard, subject).run()


def spare(operation: str, allowed: Mapping[str, Any]) -> Iterator[Case]:
    """Other cases, the same every time: for relations of which a run's own cases are no examples."""
    strategy = import_module(f"cases.{operation}").cases(dtypes=("float32", "float64"), **allowed)
    found: list[Case] = []

    def one(case: Case) -> None:
        found.append(replace(case, origin=f"drawn:{operation}, spare"))

    explore(strategy, one, seed=0, examples=SPARE, shrink=False)
    # Hypothesis begins with the simplest, which show least.
    yield from (case for case in reversed(found) if _fit(case))


def chosen(pool: list[Case], count: int) -> list[Case]:
    """Cases in the order in which they are tried: drawn ones from all over the draw, then pinned ones.

    Invalid ones would only be rejected, of empty ones everything holds, and each is asked about several times.
    """
    fit = [case for case in pool if _fit(case)]
    drawn = [case for case in fit if case.origin.startswith("drawn:")]
    step = max(1, len(drawn) // max(1, 2 * count))
    return drawn[step - 1 :: step] + [case for case in fit if not case.origin.startswith("drawn:")]


class _Tried:
    """One subject of a shard under all relations asked for."""

    def __init__(self, shard: Shard, subject: str) -> None:
        self._shard, self._subject = shard, subject
        self._oracle = shard.oracle if subject == UPSTREAM else ""
        self._names = tuple(
            name for name in declaration(shard.operation).relations.declared() if name in shard.plan.relations
        )
        self._done = {
            (row["case"], row["relation"]): row
            for row in shard.folder.rows("relations")
            if (row["operation"], row["oracle"], row["subject"]) == (shard.operation, self._oracle, subject)
        }

    def run(self) -> None:
        """Try each relation on as many cases as the plan says, then save the smallest case of each broken one."""
        wanted = dict.fromkeys(self._names, self._shard.plan.relation_cases)
        broken: dict[str, list[tuple[Case, dict[str, Any]]]] = {}
        for case in chosen(self._shard.pool, self._shard.plan.relation_cases):
            self._try(case, wanted, broken)
        # One case is enough of what the run's own cases leave out.
        never = {name: 1 for name, count in wanted.items() if count == self._shard.plan.relation_cases}
        if never:
            for case in spare(self._shard.operation, self._shard.allowed):
                self._try(case, never, broken)
        for name, found in broken.items():
            if not any(row["replay"] for _, row in found):
                self._keep(name, found)

    def _try(self, case: Case, wanted: dict[str, int], broken: dict[str, list[tuple[Case, dict[str, Any]]]]) -> None:
        """The relations of which more cases are wanted, on one case."""
        names = tuple(name for name, count in wanted.items() if count > 0)
        if names:
            rows = self._on(case, names)
            for row in rows:
                if row["verdict"] in TRIED:
                    wanted[row["relation"]] -= 1
                if row["verdict"] in (BROKEN, FINDING):
                    broken.setdefault(row["relation"], []).append((case, row))

    def _on(self, case: Case, names: tuple[str, ...]) -> list[dict[str, Any]]:
        """Rows of a case, journaled before or now."""
        known = [self._done[case.digest, name] for name in names if (case.digest, name) in self._done]
        missing = tuple(name for name in names if (case.digest, name) not in self._done)
        rows = [self._row(case, row) for row in self._ask(case, missing)]
        if rows:
            self._shard.folder.append("relations", rows)
        return known + rows

    def _ask(self, case: Case, names: tuple[str, ...]) -> list[dict[str, Any]]:
        """The worker's rows; a relation that takes it down is broken, and the others are asked about again."""
        from harness.parity import Interrupted

        rows = []
        while names:
            if self._shard.stopped():
                raise Interrupted
            try:
                return rows + self._shard.worker.request(
                    "relate", self._shard.operation, case.to_bytes(), self._subject, names
                )
            except WorkerLost as lost:
                kind, _, name = lost.stage.partition(" ")
                guilty = (name,) if kind == "relation" else names
                rows += [
                    {"relation": name, "verdict": BROKEN, "detail": f"{lost.verdict}: {lost.reason}"} for name in guilty
                ]
                names = names[names.index(guilty[-1]) + 1 :]
        return rows

    def _row(self, case: Case, row: dict[str, Any]) -> dict[str, Any]:
        verdict = FINDING if row["verdict"] == BROKEN and self._subject == UPSTREAM else row["verdict"]
        return {
            "operation": self._shard.operation,
            "oracle": self._oracle,
            "subject": self._subject,
            "device": self._shard.plan.device,
            "relation": row["relation"],
            "dtype": case.dtype,
            "case": case.digest,
            "origin": case.origin,
            "verdict": verdict,
            "detail": row["detail"],
            "replay": "",
        }

    def _keep(self, name: str, found: list[tuple[Case, dict[str, Any]]]) -> None:
        """Save the smallest case that breaks a relation: of those tried, or what Hypothesis makes of them."""
        case, row = min(found, key=lambda item: _size(item[0]))
        smaller = self._shrunk(name, _size(case)) if self._shard.plan.shrink_seconds else None
        if smaller:
            case, row = replace(smaller[0], origin=f"shrunk:from {row['case']}"), smaller[1]
            row = {**self._row(case, row), "case": case.digest}
        row["replay"] = self._shard._save(case, f"{self._subject}-{name.replace(' ', '-')}")
        self._shard.folder.append("relations", [row])

    def _shrunk(self, name: str, size: int) -> tuple[Case, dict[str, Any]] | None:
        """A case smaller than `size` numbers that breaks the relation too, or None."""
        end = time.monotonic() + min(SHRINK_SECONDS, self._shard.plan.shrink_seconds)
        smallest: list[tuple[Case, dict[str, Any]]] = []
        known: dict[str, bool] = {}

        def one(case: Case) -> None:
            if case.digest not in known:
                rows = [] if time.monotonic() > end or "invalid" in case.tags else self._ask(case, (name,))
                known[case.digest] = any(row["verdict"] == BROKEN for row in rows)
                if known[case.digest] and _size(case) < min(size, *(_size(some) for some, _ in smallest), size):
                    smallest[:] = [(case, rows[0])]
            if known[case.digest]:
                raise Fails

        self._shard.explore(one, shrink=True)
        return smallest[0] if smallest else None


def _fit(case: Case) -> bool:
    """A case of ordinary size that is meant to be taken, with something in it."""
    names = declaration(case.operation).predictions
    empty = any(case.tensors[name].numel() == 0 for name in names if name in case.tensors)
    return not empty and "invalid" not in case.tags and _size(case) <= LARGEST


def _size(case: Case) -> int:
    return sum(value.numel() for value in case.tensors.values())
