"""The section of the report on relations: counts a relation, what candidates break, findings about upstream."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from reports import text
from reports.tables import BAD, GOOD, QUIET, WARN, Cell, Column, Group, Table

if TYPE_CHECKING:
    import pandas as pd

TITLE = "Relations"
LEDE = (
    "A case is turned into another (images, ground truths, anchors, levels or classes in another order, a batch split, "
    "padding added, lengths doubled, the call repeated), and the answers to both must fit each other. No oracle is "
    "asked, so upstream is held to them too: what it breaks is a finding and fails nothing."
)
UPSTREAM = "upstream"
COUNTED = {"holds": GOOD, "broken": BAD, "finding": WARN, "rejected": QUIET}


def tables(frame: pd.DataFrame) -> tuple[Table, ...]:
    """The tables of the section: those without rows are left out."""
    broken = _smallest(frame[frame["verdict"] == "broken"])
    found = _smallest(frame[frame["verdict"] == "finding"])
    tables = [
        _cases("relations-broken", "Relations that a candidate breaks", broken, "subject", "Candidate"),
        _cases("relations-findings", "Findings about upstream", found, "oracle", "Oracle"),
        _counts(frame),
    ]
    return tuple(table for table in tables if table.rows)


def _smallest(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """A row for each relation that a subject breaks, the one whose case was saved, and how many cases broke it."""
    if not len(rows):
        return []
    key = ["operation", "oracle", "subject", "relation"]
    counts = rows.groupby(key).size()
    first = rows.assign(unsaved=rows["replay"] == "").sort_values("unsaved", kind="stable").drop_duplicates(key)
    found = first.sort_values(key, kind="stable").to_dict("records")
    return [{**row, "cases": int(counts[tuple(row[name] for name in key)])} for row in found]


def _cases(name: str, caption: str, rows: list[dict[str, Any]], who: str, label: str) -> Table:
    columns = (
        Column("operation", "Operation"),
        Column(who, label),
        Column("relation", "Relation"),
        Column("cases", "Cases", "number", "tried cases that break it"),
        Column("dtype", "Dtype", hint="of the smallest case"),
        Column("detail", "What differs", "prose", "on the smallest case"),
        Column("replay", "Smallest case", hint="python -m harness replay FILE, in the run folder"),
    )
    keys = [column.key for column in columns]
    cells = tuple(
        {key: Cell(f"{row[key]:,}", row[key]) if key == "cases" else Cell(text.clean(str(row[key]))) for key in keys}
        for row in rows
    )
    return Table(name, caption, columns, (Group("", cells),))


def _counts(frame: pd.DataFrame) -> Table:
    columns = (
        Column("operation", "Operation"),
        Column("relation", "Relation"),
        Column("subject", "Subject", hint="a candidate, or upstream's code at one version"),
        *(Column(verdict, verdict.capitalize(), "number") for verdict in COUNTED),
    )
    named = frame.assign(who=frame["subject"].where(frame["subject"] != UPSTREAM, frame["oracle"]))
    counts = named.groupby(["operation", "relation", "who", "verdict"]).size().unstack(fill_value=0)
    rows = []
    for (operation, relation, who), row in counts.iterrows():
        cells = {"operation": Cell(operation), "relation": Cell(relation), "subject": Cell(text.clean(who))}
        for verdict, tone in COUNTED.items():
            count = int(row.get(verdict, 0))
            cells[verdict] = Cell(f"{count:,}", count, tone if count and verdict != "holds" else "")
        rows.append(cells)
    return Table("relations", "Cases a relation, by verdict", columns, (Group("", tuple(rows)),))
