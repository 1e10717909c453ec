"""The section of the report on mutation score: by file and operator, what survived, what is equivalent."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from reports import text
from reports.tables import BAD, GOOD, QUIET, WARN, Cell, Column, Group, Table

if TYPE_CHECKING:
    import pandas as pd

TITLE = "Mutation score"
LEDE = (
    "Faults were planted in the library, one at a time: semantic ones, written for this field, and syntactic ones, by "
    "the operators of mutmut. A mutant is found by parity (a case that reaches its line is no longer judged to hold), "
    "by a relation, or by a test; or it does not import, crashes, or does not end. What nothing finds survives; what "
    "means the same as the original is listed as equivalent, with the reason, and counts neither way."
)
SURE = 1.959963984540054
"""Standard normal quantile of a two-sided 95% interval."""
BY = ("parity", "relation", "test", "import", "crash", "timeout")
GOOD_SHARE = 0.95


@dataclass(frozen=True)
class Score:
    """Counts of mutants, and the share that is found among those that are not equivalent, with its 95% interval.

    Of a sample the share is an estimate: each kind counts as much as there are of it, not as much as was tried.
    """

    killed: int
    survived: int
    equivalent: int
    population: int
    """All mutants that there are, of which those tried may be a sample."""
    share: float
    """NaN where none was judged."""
    low: float
    high: float
    """Both are the share itself where all were tried."""

    @property
    def judged(self) -> int:
        """Those that count."""
        return self.killed + self.survived

    @property
    def tried(self) -> int:
        """Those that were run."""
        return self.judged + self.equivalent

    @property
    def interval(self) -> str:
        """The bounds as text."""
        return f"{self.low:.1%} to {self.high:.1%}"


def score(rows: pd.DataFrame) -> Score:
    """The score of some rows; each kind's population stands in its rows."""
    kinds = [_of_kind(own) for _, own in rows.groupby("kind")]
    judged = [own for own in kinds if own.judged]
    population = sum(own.population for own in judged)
    weights = [own.population / population for own in judged]
    share, centre = (
        sum(weight * value for weight, value in zip(weights, values, strict=True)) if judged else math.nan
        for values in ([own.share for own in judged], [(own.low + own.high) / 2 for own in judged])
    )
    half = math.hypot(*(weight * (own.high - own.low) / 2 for weight, own in zip(weights, judged, strict=True)))
    counts = (sum(getattr(own, name) for own in kinds) for name in ("killed", "survived", "equivalent", "population"))
    return Score(*counts, share, centre - half, centre + half)


def _of_kind(rows: pd.DataFrame) -> Score:
    count = rows["verdict"].value_counts()
    killed, survived, equivalent = (int(count.get(name, 0)) for name in ("killed", "survived", "equivalent"))
    judged, tried = killed + survived, killed + survived + equivalent
    population = max(tried, int(rows["population"].max())) if "population" in rows and tried else tried
    share = killed / judged if judged else math.nan
    bounds = _wilson(share, judged) if judged and population > tried else (share, share)
    return Score(killed, survived, equivalent, population, share, *bounds)


def _wilson(share: float, judged: int) -> tuple[float, float]:
    square = SURE**2 / judged
    centre = (share + square / 2) / (1 + square)
    half = SURE * math.sqrt(share * (1 - share) / judged + square / judged / 4) / (1 + square)
    return max(0.0, centre - half), min(1.0, centre + half)


def tables(frame: pd.DataFrame) -> tuple[Table, ...]:
    """The tables of the section: those without rows are left out."""
    tables = [
        _kinds(frame),
        _listed(frame, "survived", "mutants-survived", "Survivors: a case, a relation or an assertion is missing"),
        _listed(frame, "stale", "mutants-stale", "Entries of the list of equivalents that are no longer so"),
        _shares(frame, "file", "mutants-files", "Mutants by file"),
        _shares(frame, "operator", "mutants-operators", "Mutants by operator"),
        _listed(frame, "equivalent", "mutants-equivalent", "Equivalent mutants, with the reason of each"),
    ]
    return tuple(table for table in tables if table.rows)


def _kinds(frame: pd.DataFrame) -> Table:
    columns = (
        Column("kind", "Kind"),
        Column("population", "Mutants", "number", "all that there are in the files asked for"),
        Column("tried", "Tried", "number", "all of them, or a sample that stands for them"),
        Column("killed", "Found", "number"),
        Column("survived", "Survived", "number"),
        Column("equivalent", "Equivalent", "number"),
        Column("share", "Share found", "number", "of those that are not equivalent"),
        Column(
            "interval",
            "95% interval",
            "text",
            "Wilson's, of a sample; none where all were tried; for all, each kind by how many there are",
        ),
        *(Column(by, f"By {by}", "number") for by in BY),
        Column("seconds", "Seconds each", "number", "mean, on this machine as busy as it was"),
    )
    rows = []
    groups = [(kind, frame[frame["kind"] == kind]) for kind in sorted(set(frame["kind"]))]
    for name, own in [*groups, ("all", frame)] if len(groups) > 1 else groups:
        counted, killed = score(own), own[own["verdict"] == "killed"]["by"].value_counts()
        whole = counted.population <= counted.tried
        cells = {
            "kind": Cell(str(name)),
            **{key: _number(getattr(counted, key)) for key in ("population", "tried", "killed", "survived")},
            "equivalent": _number(counted.equivalent),
            "share": _share(counted),
            "interval": Cell(text.NOTHING if whole or not counted.judged else counted.interval),
            **{by: _number(int(killed.get(by, 0))) for by in BY},
            "seconds": Cell(text.significant(float(own["seconds"].mean())), float(own["seconds"].mean())),
        }
        rows.append(cells)
    return Table("mutants", "Mutants found, by kind", columns, (Group("", tuple(rows)),))


def _shares(frame: pd.DataFrame, key: str, name: str, caption: str) -> Table:
    columns = (
        Column("kind", "Kind"),
        Column(key, key.capitalize()),
        Column("killed", "Found", "number"),
        Column("survived", "Survived", "number"),
        Column("equivalent", "Equivalent", "number"),
        Column("share", "Share found", "number", "of those that are not equivalent"),
    )
    rows = []
    for (kind, own), group in frame[frame["verdict"] != "stale"].groupby(["kind", key], sort=True):
        counted = score(group)
        counts = {column: _number(getattr(counted, column)) for column in ("killed", "survived", "equivalent")}
        rows.append({"kind": Cell(str(kind)), key: Cell(text.clean(str(own))), **counts, "share": _share(counted)})
    return Table(name, caption, columns, (Group("", tuple(rows)),))


def _listed(frame: pd.DataFrame, verdict: str, name: str, caption: str) -> Table:
    columns = (
        Column("id", "Mutant", hint="python -m harness mutate --show ID"),
        Column("place", "Line"),
        Column("operator", "Operator"),
        Column("before", "Before", "prose"),
        Column("after", "After", "prose"),
        Column("detail", "Reason" if verdict == "equivalent" else "Tried", "prose"),
    )
    rows = frame[frame["verdict"] == verdict].sort_values(["file", "line", "id"], kind="stable")
    cells = []
    for row in rows.to_dict("records"):
        given = {**row, "place": f"{row['file']}:{row['line']:.0f}", "operator": f"{row['kind']}: {row['operator']}"}
        cells.append({column.key: Cell(text.clean(str(given[column.key]))) for column in columns})
    return Table(name, caption, columns, (Group("", tuple(cells)),))


def _number(value: int) -> Cell:
    return Cell(f"{value:,}", value)


def _share(counted: Score) -> Cell:
    if not counted.judged:
        return Cell(text.NOTHING, None, QUIET)
    tone = GOOD if counted.share == 1 else WARN if counted.share >= GOOD_SHARE else BAD
    return Cell(f"{counted.share:.1%}", counted.share, tone, counted.share)
