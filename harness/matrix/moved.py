"""What moved between two releases: the same cases through both, and the candidate against the new one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from harness.matrix.cell import Sized, least, said
from harness.matrix.eras import NEWEST, combinations
from harness.matrix.session import UPSTREAM
from harness.operation import gradient_name
from harness.operations import operation as declaration
from harness.parity import options
from harness.pool import Worker, WorkerLost
from harness.verdict import DTYPE, HOLDS, NON_FINITE

if TYPE_CHECKING:
    from cases.case import Case

AGREES = frozenset({"match", "tie", "both-reject"})
"""Verdicts of two releases that do the same; a listed divergence between them is a move."""
REJECTIONS, CRASHES = "rejections", "crashes"
KINDS = {"rejection": REJECTIONS, "structure": "structure", DTYPE: "dtypes", NON_FINITE: "finiteness"}
AT_ONCE = 32
"""Combinations of settings that are judged in one request."""
SURVIVORS = 8
"""Combinations that are tried on cases beyond those that the newest settings fail."""


@dataclass
class Comparison(Sized):
    """All cases of one operation: `oracle`, the new release, against the release `base`, and candidates against it.

    `spec` is how workers and options know the new release. Candidates are judged under the newest era's settings.
    """

    spec: str = ""
    base: str = ""
    other: Worker | None = None
    """Holds `base`; None where it lacks the operation."""
    _tried: dict[str, Case] = field(default_factory=dict)

    @property
    def allowed(self) -> dict[str, Any]:
        """What both releases take."""
        own, theirs = options(self.operation, self.spec), options(self.operation, self.base)
        return {name: value and theirs.get(name) if isinstance(value, bool) else value for name, value in own.items()}

    @property
    def release(self) -> str:
        """The new release, which no pin tells apart from others."""
        return self.oracle

    @property
    def bases(self) -> tuple[str, ...]:
        """The candidates by their own names."""
        return self.plan.candidates_of(self.operation)

    @property
    def candidates(self) -> tuple[str, ...]:
        """The former release first, then the candidates under the newest settings."""
        return (*((UPSTREAM,) if self.other else ()), *(f"{base}/{NEWEST}" for base in self.bases))

    def worth_shrinking(self, key: tuple[str, str, str]) -> bool:
        """Each kind of move, and the first kind of failure of each candidate."""
        return key[0] == UPSTREAM or key[0] not in {candidate for candidate, *_ in self.smallest}

    def rows(self) -> list[dict[str, Any]]:
        """Rows of the journal, once `run` is through: moves by kind, and a cell a candidate."""
        moves = [*self._moves()] if self.other else [self._line(self.base, "moved", settings="appeared")]
        return [*moves, *(self._cell(base) for base in self.bases)]

    def compare(self, case: Case) -> list[dict[str, Any]]:
        """The rows of one case, kept nowhere."""
        return self._judge(case, self.candidates)

    def _moves(self) -> list[dict[str, Any]]:
        judged = self.judged(UPSTREAM)
        fell: dict[str, list[dict[str, Any]]] = {}
        for row in judged:
            if row["verdict"] not in HOLDS:
                fell.setdefault(row["output"], []).append(row)
        if not fell:
            return [self._line(self.base, "unmoved", cases=len(judged))]
        return [
            self._line(
                # One row a kind: the kind is part of what tells rows of the journal apart.
                f"{self.base} ({kind})",
                "moved",
                settings=kind,
                cases=len(judged),
                detail=f"{len(rows)} of {len(judged)} cases; the smallest: {said(self._least(UPSTREAM, rows))}",
                replay=self.command(self._least(UPSTREAM, rows)),
            )
            for kind, rows in fell.items()
        ]

    def _cell(self, base: str) -> dict[str, Any]:
        judged = self.judged(f"{base}/{NEWEST}")
        cases, ties = len(judged), sum(row["verdict"] == "tie" for row in judged)
        fell = [row for row in judged if row["verdict"] not in HOLDS]
        if not judged:
            return self._line(base, "differs", detail="no case was tried")
        if not fell:
            return self._line(base, "equal", cases=cases, ties=ties)
        worst = self._least(f"{base}/{NEWEST}", fell)
        detail = f"with the newest settings {len(fell)} of {cases} cases differ; the smallest: {said(worst)}"
        found = {"cases": cases, "ties": ties, "detail": detail, "replay": self.command(worst)}
        fitting = self.fitting(base, [self._tried[row["case"]] for row in sorted(fell, key=lambda row: row["bytes"])])
        if fitting:
            return self._line(base, "settings", settings=fitting, **found)
        return self._line(base, "differs", **found)

    def fitting(self, base: str, fallen: list[Case]) -> str:
        """The combination of known era settings nearest to the newest under which every case tried holds, or ""."""
        left = list(combinations(self.operation, package_of(self.spec)))
        for case in fallen:
            left = self._holding(base, left, case)
        left = left[:SURVIVORS]
        for case in self._tried.values():
            left = self._holding(base, left, case)
        return left[0] if left else ""

    def _holding(self, base: str, names: list[str], case: Case) -> list[str]:
        stored, found = case.to_bytes(), []
        for start in range(0, len(names), AT_ONCE):
            asked = {f"{base}/{name}": name for name in names[start : start + AT_ONCE]}
            limit = self.plan.time_limit * len(asked)
            try:
                rows = self.worker.request("judge", self.operation, stored, tuple(asked), time_limit=limit)
            except WorkerLost:
                continue
            found += [asked[row["candidate"]] for row in rows if row["verdict"] in HOLDS]
        return found

    def _least(self, candidate: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
        """The shrunk case of these failures, or the smallest as drawn."""
        kinds = {(candidate, row["verdict"], row["output"]) for row in rows}
        shrunk = [row for key, row in self.smallest.items() if key in kinds]
        return least(shrunk or rows)

    def _line(self, candidate: str, verdict: str, **more: Any) -> dict[str, Any]:
        empty = {"settings": "", "cases": 0, "ties": 0, "detail": "", "replay": ""}
        return {
            "operation": self.operation,
            "oracle": self.oracle,
            "candidate": candidate,
            "verdict": verdict,
            **empty,
            **more,
        }

    def command(self, row: dict[str, Any]) -> str:
        """What compares on a saved case again, from the run folder."""
        return f"python -m harness matrix --add {self.oracle} --against {self.base} --case {row['replay']}"

    def _judge(self, case: Case, candidates: tuple[str, ...]) -> list[dict[str, Any]]:
        self._tried.setdefault(case.digest, case)
        rows = [self._compared(case)] if UPSTREAM in candidates else []
        rest = tuple(name for name in candidates if name != UPSTREAM)
        return rows + (super()._judge(case, rest) if rest else [])

    def _compared(self, case: Case) -> dict[str, Any]:
        """The row of the new release in the candidate's place: `output` is the kind of move."""
        stored = case.to_bytes()
        try:
            old, new = (worker.request("answer", self.operation, stored) for worker in (self.other, self.worker))
            if "error" in old and "error" in new:
                return _row("both-reject", "", old["error"])
            if "error" in old or "error" in new:
                accepts, rejects = (self.oracle, self.base) if "error" in old else (self.base, self.oracle)
                error = old.get("error") or new.get("error")
                return _row("mismatch", REJECTIONS, f"{accepts} accepts, {rejects} rejects ({error})")
            if old["outputs"] == new["outputs"]:
                return _row("match")
            row = self.other.request("compare", self.operation, stored, new["outputs"])
        except WorkerLost as lost:
            return _row("mismatch", CRASHES, f"{lost.stage}: {lost.reason}")
        if row["verdict"] in AGREES:
            return row
        kind, detail = self._kind(row["output"], row["detail"]), row["detail"]
        for ours, theirs in (("candidate", self.oracle), ("the oracle's", f"{self.base}'s"), ("oracle", self.base)):
            detail = detail.replace(ours, theirs)
        return {**row, "verdict": "mismatch", "output": kind, "detail": detail}

    def _kind(self, output: str, detail: str) -> str:
        outputs = {item.name: item.decision for item in declaration(self.operation).outputs}
        if output.startswith(gradient_name("")) or detail.startswith(f"output {gradient_name('')}"):
            return "gradients"
        if output == "structure" and "has dtype" in detail:
            return "dtypes"
        if output == "invariants" or any(outputs.get(name) for name in output.split(", ")):
            return "decisions"
        return KINDS.get(output, "values")

    def _save(self, case: Case, candidate: str) -> str:
        return super()._save(case, candidate.partition("/")[0])


def package_of(spec: str) -> str:
    """The package of an oracle, pinned or not."""
    return spec.partition("=")[0]


def _row(verdict: str, output: str = "", detail: str = "") -> dict[str, Any]:
    empty = {"error": None, "gradient_error": None, "decisions": 0, "tied_decisions": 0, "divergence": ""}
    return {"candidate": UPSTREAM, "verdict": verdict, "output": output, "detail": detail, **empty}
