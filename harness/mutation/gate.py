"""What judges a mutant: parity, then relations, then tests, each asked only about what reaches the mutated line."""

from __future__ import annotations

import json
import shutil
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from harness.mutation import relation
from harness.mutation.mutant import Mutant
from harness.mutation.plan import MutationPlan
from harness.mutation.sources import Sources, module_name, statement
from harness.mutation.zygote import Died, Zygote

LIMIT = 1800.0
"""Seconds of the clock that one request may take, beside the processor time of each case and test."""
RECORD_LIMIT = 3600.0
TEST_SECONDS, KERNEL_TEST_SECONDS = 60.0, 900.0
"""Recorded seconds of tests that a mutant is given, the cheapest first; `detail` says where there were more. Those of
kernels are long, as the interpreter is recorded too; nothing else finds what only one scene shows."""
COMPILING = "compil"
"""In the name of a test that compiles."""
KERNELS = "cleanroom/kernels/"
OWN_TESTS, KERNEL_TESTS = "tests/cleanroom", "tests/kernels"


class Gate:
    """Judges mutants, from several threads at once; what the unmutated library does is recorded when first needed,
    and kept in the run folder."""

    def __init__(self, plan: MutationPlan, sources: Sources, folder: Path, files: set[str]) -> None:
        self._plan, self._sources, self._records = plan, sources, folder / "mutation"
        self._cases = self._records / "cases"
        self._cases.mkdir(parents=True, exist_ok=True)
        self._scratch = Path(tempfile.mkdtemp(prefix="mutate-"))
        self._subject = self._scratch / "subject"
        sources.copy(self._subject)
        self._all = plan.pairs()
        self._needed = {pair for file in files for pair in self._pairs(file)}
        self._zygotes: dict[str, Zygote] = {}
        self._known: dict[str, Any] = {}
        self._sound: dict[tuple, bool] = {}
        self._locks: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        self._lock = threading.Lock()

    def close(self) -> None:
        """End all processes and remove the temporary folder."""
        with self._lock:
            for zygote in self._zygotes.values():
                zygote.close()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def judge(self, mutant: Mutant) -> dict[str, Any]:
        """The columns `verdict`, `by`, `detail` and `seconds` of a mutant."""
        started = time.monotonic()
        place = self._scratch / "mutants" / mutant.id
        file = place / mutant.file
        file.parent.mkdir(parents=True)
        file.write_text(mutant.source)
        try:
            found, tried = self._found(mutant, file)
        finally:
            shutil.rmtree(place, ignore_errors=True)
        verdict = {"verdict": "killed", **found} if found else {"verdict": "survived", "by": "", "detail": tried}
        return {**verdict, "seconds": time.monotonic() - started}

    def _found(self, mutant: Mutant, file: Path) -> tuple[dict[str, str] | None, str]:
        """What found the mutant, if anything did, and what was tried."""
        lines = statement(self._sources.texts[mutant.file], mutant.line)
        own = {"subject": str(self._subject), "module": module_name(mutant.file), "file": str(file)}
        tried: list[str] = []
        try:
            cases = []
            for oracle, rows in self._reaching_cases(mutant, lines):
                cases.append((oracle, rows))
                if found := self._by_cases("parity", oracle, rows, own):
                    return found, ""
            tried.append(f"{sum(len(rows) for _, rows in cases)} cases")
            for oracle, rows in self._for_relations(cases):
                if found := self._by_cases("relation", oracle, rows, own):
                    return found, ""
            if self._plan.tests:
                rows, more = self._reaching_tests(mutant, lines, any(rows for _, rows in cases))
                if found := self._by_tests(rows, own):
                    return {"by": found["by"], "detail": found["detail"]}, ""
                tried.append(f"{len(rows)} of {len(rows) + more} tests" if more else f"{len(rows)} tests")
        except Died as died:
            return {"by": died.by, "detail": str(died)[:300]}, ""
        return None, f"passed {' and '.join(tried)} that reach the line"

    def _by_cases(self, by: str, oracle: str, rows: list[dict], own: dict[str, str]) -> dict[str, str] | None:
        """What one oracle's cases find. A case that the unmutated library fails too is no case."""
        rows = list(rows)
        task = f"harness.mutation.{by}"
        common = {"oracle": oracle, "folder": str(self._cases)}
        while rows:
            slim = [{key: value for key, value in row.items() if key != "lines"} for row in rows]
            found = self._zygote(oracle).ask(f"{task}:kill", LIMIT, rows=slim, **common, **own)
            if not found or "row" not in found:
                return found
            row = found["row"]
            more = {"relation": found["relation"]} if by == "relation" else {}
            key = (by, oracle, row["operation"], row["candidate"], row["case"], *more.values())
            if key not in self._sound:
                asked = {"row": row, "subject": str(self._subject), **common, **more}
                self._sound[key] = self._zygote(oracle).ask(f"{task}:holds", LIMIT, **asked)
            if self._sound[key]:
                return {"by": by, "detail": found["detail"]}
            rows = [other for other in rows if (other["case"], other["candidate"]) != (row["case"], row["candidate"])]
        return None

    def _by_tests(self, rows: list[dict], own: dict[str, str]) -> dict[str, str] | None:
        """What tests find. One that fails the unmutated library, or the mutant only after others, which may leave
        something behind, is none.
        """
        while rows:
            found = self._suite("kill", rows=rows, **own)
            if not found or "test" not in found:
                return found
            test = found["test"]
            if ("test", test) not in self._sound:
                self._sound["test", test] = self._suite("holds", test=test, subject=str(self._subject))
            alone = [row for row in rows if row["test"] == test]
            if self._sound["test", test] and (rows == alone or self._suite("kill", rows=alone, **own)):
                return found
            rows = [row for row in rows if row["test"] != test]
        return None

    def _for_relations(self, cases: list[tuple[str, list[dict]]]) -> Iterator[tuple[str, list[dict]]]:
        """A few cases of each operation and path, on the first oracle that has them: relations need none."""
        seen: dict[tuple[str, str], int] = defaultdict(int)
        for oracle, rows in cases:
            fresh = {(row["operation"], row["candidate"]) for row in rows} - set(seen)
            few = []
            for row in rows:
                key = row["operation"], row["candidate"]
                if key in fresh and seen[key] < relation.CASES:
                    seen[key] += 1
                    few.append(row)
            if few:
                yield oracle, few

    def _reaching_cases(self, mutant: Mutant, lines: frozenset[int]) -> Iterator[tuple[str, list[dict]]]:
        """Rows of cases that run the mutated statement, an oracle at a time, the cheapest first.

        Kernels are asked under one oracle an operation: they are dear, and know nothing of versions.
        """
        kernels = mutant.file.startswith(KERNELS)
        pairs = self._pairs(mutant.file)
        if kernels:
            pairs = [(oracle, name) for name, oracle in {name: own for own, name in reversed(pairs)}.items()]
        first = next(
            ((oracle, rows) for oracle, name in pairs if (rows := self._rows(mutant, lines, oracle, [name], kernels))),
            None,
        )
        if first is None:
            return
        yield first
        seen = {(row["operation"], first[0]) for row in first[1]}
        for oracle in self._plan.oracles:
            names = [name for own, name in pairs if own == oracle and (name, own) not in seen]
            if rows := self._rows(mutant, lines, oracle, names, kernels):
                yield oracle, rows

    def _rows(
        self, mutant: Mutant, lines: frozenset[int], oracle: str, names: list[str], kernels: bool
    ) -> list[dict[str, Any]]:
        rows = [row for name in names for row in self._recorded(oracle, name, kernels)]
        return _reaching(rows, mutant.file, lines)

    def _pairs(self, file: str) -> list[tuple[str, str]]:
        """(oracle, operation) pairs whose operation imports the file, those that import little else first."""
        declared = {name: f"harness/operations/{name}.py" for name, _ in self._all}
        closures = {name: self._sources.closure(own) for name, own in declared.items()}
        found = [(oracle, name) for name, oracle in self._all if file in closures[name]]
        return sorted(found, key=lambda pair: len(closures[pair[1]]))

    def _reaching_tests(self, mutant: Mutant, lines: frozenset[int], reached: bool) -> tuple[list[dict], int]:
        """Rows of tests that run the mutated statement, the cheapest first, and how many more there are.

        Tests of kernels are dear: they are asked about kernels, and about what nothing else reaches.
        """
        found, seen = [], []
        own = mutant.file.startswith(KERNELS)
        for room in (KERNEL_TESTS, OWN_TESTS) if own else (OWN_TESTS, KERNEL_TESTS):
            if room == KERNEL_TESTS and not own and (found or reached):
                continue
            folder = self._sources.project / room
            files = [path.relative_to(self._sources.project).as_posix() for path in sorted(folder.glob("test_*.py"))]
            for file in self._sources.importers(mutant.file, files):
                seen += self._recorded_tests(file)
                found += _reaching(self._recorded_tests(file), mutant.file, lines)
        if not reached:
            # What runs under torch.compile alone is traced, not run: nobody sees its lines.
            unseen = [row for row in seen if COMPILING in row["test"] or (not found and mutant.file in row["lines"])]
            found += [row for row in unseen if row not in found]
        found.sort(key=lambda row: row["seconds"])
        spent, rows, most = 0.0, [], KERNEL_TEST_SECONDS if own else TEST_SECONDS
        for row in found:
            spent += row["seconds"]
            if spent <= most or not rows:
                rows.append({"test": row["test"], "seconds": row["seconds"]})
        return rows, len(found) - len(rows)

    def _recorded(self, oracle: str, operation: str, kernels: bool) -> list[dict[str, Any]]:
        files = self._sources.closure(f"harness/operations/{operation}.py") | self._sources.closure(
            f"cases/{operation}.py"
        )
        more = oracle, operation, str(kernels), str(self._plan.examples), str(self._plan.seed), self._pinned(operation)
        key = self._sources.digest(files, *more)
        return self._kept(
            f"{operation}-{oracle}-{'kernels' if kernels else 'paths'}",
            key,
            lambda: self._zygote(oracle).ask(
                "harness.mutation.parity:record",
                RECORD_LIMIT,
                oracle=oracle,
                operation=operation,
                kernels=kernels,
                examples=self._plan.examples,
                seed=self._plan.seed,
                subject=str(self._subject),
                folder=str(self._cases),
            ),
        )

    def _pinned(self, operation: str) -> str:
        return " ".join(sorted(file.name for file in (self._sources.project / "cases/pinned").glob(f"{operation}-*")))

    def _recorded_tests(self, file: str) -> list[dict[str, Any]]:
        key = self._sources.digest(self._sources.closure(file), file)
        return self._kept(
            file.replace("/", "-"),
            key,
            lambda: self._suite("record", file=file, subject=str(self._subject)),
        )

    def _kept(self, name: str, key: str, make: Any) -> list[dict[str, Any]]:
        """Rows of the run folder if they are of the same text, else made now; by one thread, others wait for it."""
        with self._lock:
            lock = self._locks[name]
        with lock:
            if name not in self._known:
                file = self._records / f"{name}.json"
                stored = json.loads(file.read_text()) if file.exists() else {}
                if stored.get("key") != key:
                    stored = {"key": key, "rows": make()}
                    part = file.with_name(f"{file.name}.part")
                    part.write_text(json.dumps(stored))
                    part.replace(file)
                self._known[name] = stored["rows"]
            return self._known[name]

    def _suite(self, task: str, **request: Any) -> Any:
        limit = RECORD_LIMIT if task == "record" else LIMIT
        scratch = self._scratch / "pytest"
        scratch.mkdir(exist_ok=True)
        return self._zygote("").ask(f"harness.mutation.suite:{task}", limit, scratch=str(scratch), **request)

    def _zygote(self, oracle: str) -> Zygote:
        """The zygote that holds an oracle; "" is the one of the tests."""
        with self._lock:
            if oracle not in self._zygotes:
                self._zygotes[oracle] = self._start(oracle)
            return self._zygotes[oracle]

    def _start(self, oracle: str) -> Zygote:
        number = str(len(self._zygotes))
        if not oracle:
            return Zygote("harness.mutation.suite:prepare", folder=self._scratch, name=number)
        names = [name for name, own in self._all if own == oracle and (own, name) in self._needed]
        arguments = oracle, str(self._subject), ",".join(names)
        return Zygote("harness.mutation.parity:prepare", *arguments, folder=self._scratch, name=number)


def _reaching(rows: list[dict[str, Any]], file: str, lines: frozenset[int]) -> list[dict[str, Any]]:
    """Rows that run a statement; where it runs at the import, those that run anything of the file first."""
    if lines:
        found = [row for row in rows if lines.intersection(row["lines"].get(file, ()))]
        return sorted(found, key=lambda row: row["seconds"])
    return sorted(rows, key=lambda row: (file not in row["lines"], row["seconds"]))
