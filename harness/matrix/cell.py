"""One cell of the matrix: an operation against a version, judged under that version's settings and the newest ones."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.bars.versions import controlled
from harness.matrix.eras import NEWEST, changed, spelled
from harness.parity import Shard
from harness.verdict import HOLDS

if TYPE_CHECKING:
    from cases.case import Case


@dataclass
class Kept:
    """Stands for the run folder of a shard: verdicts of single cases are not the matrix's rows, files are kept."""

    failures: Path
    rows: list[dict[str, Any]] = field(default_factory=list)

    def append(self, journal: str, rows: list[dict[str, Any]]) -> None:
        """Keep the rows here."""
        self.rows += rows


@dataclass
class Sized(Shard):
    """A shard that keeps its rows to itself, knows how large a case is and what its smallest failures say."""

    smallest: dict[tuple[str, str, str], dict[str, Any]] = field(default_factory=dict)

    def worth_shrinking(self, key: tuple[str, str, str]) -> bool:
        """Whether a kind of failure, (candidate, verdict, output), is shrunk."""
        return True

    def judged(self, candidate: str) -> list[dict[str, Any]]:
        """The rows of one candidate."""
        return [row for (_, name), row in self.done.items() if name == candidate]

    def _row(self, case: Case, row: dict[str, Any], seconds: float, index: int) -> dict[str, Any]:
        size = sum(tensor.nbytes for tensor in case.tensors.values())
        return {**super()._row(case, row, seconds, index), "bytes": size, "shapes": shapes(case)}

    def _shrink(self, key: tuple[str, str, str]) -> tuple[Case, dict[str, Any]] | None:
        found = super()._shrink(key) if self.worth_shrinking(key) else None
        if found and found[1]["replay"]:
            case, row = found
            self.smallest[key] = {**self._row(case, row, 0.0, 0), "case": case.digest, "origin": case.origin}
        return found


@dataclass
class Cell(Sized):
    """All cases of one operation against one version; `own` and `newest` are the era settings of both."""

    own: dict[str, Any] = field(default_factory=dict)
    newest: dict[str, Any] = field(default_factory=dict)

    @property
    def candidates(self) -> tuple[str, ...]:
        """The candidates, and each under the newest era's settings where those are others."""
        bases = self.bases
        return bases if self.own == self.newest else (*bases, *(f"{base}/{NEWEST}" for base in bases))

    @property
    def bases(self) -> tuple[str, ...]:
        """The candidates under the version's own settings."""
        return self.plan.candidates_of(self.operation)

    def rows(self) -> list[dict[str, Any]]:
        """The cell's row of the journal for each candidate, once `run` is through."""
        return [self._cell(base) for base in self.bases]

    def _cell(self, base: str) -> dict[str, Any]:
        judged = self.judged(base)
        row = {
            "operation": self.operation,
            "oracle": self.oracle,
            "candidate": base,
            "verdict": "equal",
            "settings": "",
            "cases": len(judged),
            "ties": sum(row["verdict"] == "tie" for row in judged),
            "detail": "",
            "replay": "",
        }
        fell = [row for row in judged if row["verdict"] not in HOLDS]
        if not judged:
            return {**row, "verdict": "differs", "detail": "no case was tried"}
        if fell:
            shrunk = [row for (candidate, *_), row in self.smallest.items() if candidate == base]
            worst = shrunk[0] if shrunk else least(fell)
            verdict = "control" if controlled(self.oracle, self.operation) else "differs"
            detail = f"{len(fell)} of {len(judged)} cases; the smallest: {said(worst)}"
            return {**row, "verdict": verdict, "detail": detail, "replay": self._command(worst)}
        if self.own == self.newest:
            return row
        settings, others = spelled(changed(self.own, self.newest)), self.judged(f"{base}/{NEWEST}")
        fell = [row for row in others if row["verdict"] not in HOLDS]
        if not fell:
            return {**row, "detail": f"so with the newest settings; the version's own are {settings}"}
        worst = least(fell)
        detail = f"with the newest settings {len(fell)} of {len(others)} cases differ; the smallest: {said(worst)}"
        return {**row, "verdict": "settings", "settings": settings, "detail": detail}

    def _command(self, row: dict[str, Any]) -> str:
        """What replays a saved case, from the run folder."""
        command = ["python", "-m", "harness", "replay", row["replay"], "--oracles", self.oracle]
        target = self.plan.candidates[row["candidate"]]
        return shlex.join(command + (["--candidate", f"{row['candidate']}={target}"] if target else []))

    def _save(self, case: Case, candidate: str) -> str:
        # Under other settings than the version's own a case is meant to differ: nothing to replay.
        return "" if "/" in candidate else super()._save(case, candidate)

    def worth_shrinking(self, key: tuple[str, str, str]) -> bool:
        """The first kind of failure of each candidate."""
        return "/" not in key[0] and key[0] not in {candidate for candidate, *_ in self.smallest}


def shapes(case: Case) -> str:
    """`name (2, 3), name (1,)` of a case's tensors, and its dtype."""
    return f"{case.dtype}, " + ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in case.tensors.items())


def least(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The row of the smallest case."""
    return min(rows, key=lambda row: row["bytes"])


def said(row: dict[str, Any]) -> str:
    """A failure in words: what, where, on which shapes, and where the case is from."""
    where = f" in {row['output']}" if row["output"] else ""
    return f"{row['verdict']}{where}: {row['detail']} [{row['shapes']}; {row['origin']}]"
