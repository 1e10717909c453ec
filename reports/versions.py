"""The section of the report on versions: the matrix, what is behind its cells, what moved, what has no counterpart."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from reports import text
from reports.tables import BAD, GOOD, QUIET, WARN, Cell, Column, Group, Table

if TYPE_CHECKING:
    import pandas as pd

TITLE = "Versions"
LEDE = (
    "Every operation against every pinned version, judged under the settings of that version's era. Equal: so with the "
    "newest era's settings too, on the cases drawn. Equal with settings: under the newest ones some cases differ. "
    "Control: a release that is pinned for being wrong, caught. Absent: the version has no such public thing."
)

TONES = {"equal": GOOD, "settings": GOOD, "control": GOOD, "absent": QUIET, "differs": BAD}
"""How a cell of the matrix looks; rows of other verdicts are no cells."""
NAMES = {"unlisted": BAD, "stale": BAD, "uncovered": QUIET}
MOVED = {"moved": WARN, "unmoved": GOOD}

Row = Mapping[str, Any]


def tables(frame: pd.DataFrame) -> tuple[Table, ...]:
    """The tables of the section."""
    rows = frame.to_dict("records")
    cells = [row for row in rows if row["verdict"] in TONES]
    packages = dict.fromkeys(_package(row["oracle"]) for row in cells)
    return (
        *(_matrix(package, [row for row in cells if _package(row["oracle"]) == package]) for package in packages),
        _behind([row for row in cells if row["detail"] and row["verdict"] != "absent"]),
        _moved([row for row in rows if row["verdict"] in MOVED]),
        _names(
            sorted((row for row in rows if row["verdict"] in NAMES), key=lambda row: list(NAMES).index(row["verdict"]))
        ),
    )


def _matrix(package: str, rows: list[Row]) -> Table:
    """A row an operation and candidate, a column a version."""
    versions = list(dict.fromkeys(row["oracle"] for row in rows))
    several = len({row["candidate"] for row in rows}) > 1
    columns = (
        Column("operation", "Operation"),
        *((Column("candidate", "Candidate", hint="the implementation under test"),) if several else ()),
        *(Column(oracle, oracle.partition("=")[2].lstrip("="), "era") for oracle in versions),
    )
    found: dict[tuple[str, str], dict[str, Cell]] = {}
    for row in rows:
        key = (row["operation"], row["candidate"])
        line = found.setdefault(key, {"operation": Cell(key[0]), "candidate": Cell(key[1])})
        said = f"equal with {row['settings']}" if row["verdict"] == "settings" else row["verdict"]
        line[row["oracle"]] = Cell(said, tone=TONES[row["verdict"]])
    nothing = dict.fromkeys(versions, Cell(text.NOTHING))
    lines = tuple({**nothing, **line} for line in found.values())
    return Table(f"versions-{package}", f"Versions of {package}", columns, (Group("", lines),))


def _behind(rows: list[Row]) -> Table:
    columns = (
        Column("operation", "Operation"),
        Column("oracle", "Oracle"),
        Column("candidate", "Candidate"),
        Column("verdict", "Verdict", "status"),
        Column("cases", "Cases", "number"),
        Column("ties", "Ties", "number"),
        Column("detail", "Smallest case", "prose"),
        Column("replay", "Replay, in the run folder", "prose"),
    )
    rows = sorted(rows, key=lambda row: TONES[row["verdict"]] != BAD)
    return _listed("versions-behind", "Cells that need settings, or differ", columns, rows, TONES)


def _moved(rows: list[Row]) -> Table:
    columns = (
        Column("operation", "Operation"),
        Column("oracle", "Release"),
        Column("candidate", "Compared with"),
        Column("verdict", "Verdict", "status"),
        Column("settings", "What", hint="decisions, values, gradients, rejections, dtypes or structure of the outputs"),
        Column("cases", "Cases", "number"),
        Column("detail", "Smallest case", "prose"),
        Column("replay", "Replay, in the run folder", "prose"),
    )
    return _listed("versions-moved", "What a new release moved", columns, rows, MOVED)


def _names(rows: list[Row]) -> Table:
    columns = (
        Column("candidate", "Public name"),
        Column("verdict", "Verdict", "status"),
        Column("oracle", "Versions", "prose"),
        Column("detail", "Why", "prose"),
    )
    caption = "Public assigners, losses, codecs and overlaps of upstream without counterpart"
    return _listed("versions-names", caption, columns, rows, NAMES)


def _listed(
    name: str, caption: str, columns: tuple[Column, ...], rows: Iterable[Row], tones: Mapping[str, str]
) -> Table:
    lines = tuple({column.key: _cell(column.key, row, tones) for column in columns} for row in rows)
    return Table(name, caption, columns, (Group("", lines),))


def _cell(key: str, row: Row, tones: Mapping[str, str]) -> Cell:
    if key in {"cases", "ties"}:
        return Cell(text.count(row[key]), row[key])
    return Cell(row[key], tone=tones[row["verdict"]] if key == "verdict" else "")


def _package(oracle: str) -> str:
    return oracle.partition("=")[0]
