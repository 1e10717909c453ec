"""summary.md: the verdict on one screen, for a step summary or a comment on a pull request."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from reports import headline, sections, tables, text
from reports.failures import failures

if TYPE_CHECKING:
    from reports.frames import Run

SHOWN = 10
"""Failing cases that a summary lists; report.html and junit.xml have more."""

_PUNCTUATION = re.compile(r"([\\`*_\[\]|~#!])")
_ENTITIES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;", "@": "&#64;"})


def escape(value: str) -> str:
    """Text on one line that Markdown prints as it is, inside a table too."""
    line = " ".join(text.clean(value).split())
    return _PUNCTUATION.sub(r"\\\1", line.translate(_ENTITIES))


def render(run: Run) -> str:
    """The whole document: sentence, parity, speed and memory, bars that fell, failures to replay."""
    word, _ = headline.state(run)
    parts = [f"## Cleanroom: {escape(word)}", escape(" ".join((headline.sentence(run), *headline.notes(run))))]
    parity = tables.parity(run)
    if parity.rows:
        parts += ["### Parity", _of(parity)]
    frame = tables.measured(run)
    if frame is not None:
        parts += ["### Time and memory of one call", _measurements(frame.to_dict("records"))]
    for section in sections.sections(run):
        own = [table for table in section.tables if table.rows]
        if own:
            parts += [f"### {section.title}", *(part for table in own for part in (escape(table.caption), _of(table)))]
    fell = [row for row in tables.gate(run).rows if row["state"].tone == tables.BAD]
    if fell:
        columns = {"Bar": "bar", "Limit": "limit", "Value": "value", "Reason": "reason"}
        cells = [[row[key].text for key in columns.values()] for row in fell]
        parts += ["### Bars that fell", _table(list(columns), cells)]
    parts += _failures(run)
    return "\n\n".join(parts) + "\n"


def _of(table: tables.Table) -> str:
    numbers = {index for index, column in enumerate(table.columns) if column.kind == "number"}
    cells = [[row[column.key].text for column in table.columns] for row in table.rows]
    return _table([column.label for column in table.columns], cells, numbers)


def _measurements(rows: list[Mapping[str, Any]]) -> str:
    heads = [
        "Operation",
        "Oracle",
        "Candidate",
        "Workload",
        "Direction",
        "Speedup",
        "99% interval",
        "Verdict",
    ]
    heads += ["Upstream peak", "Candidate peak"]
    cells = [
        [row[key] for key in ("operation", "oracle", "candidate", "workload", "direction")]
        + [text.ratio(row["speedup"]), tables.interval(row), row["verdict"]]
        + [text.size(row["peak_bytes_oracle"]), text.size(row["peak_bytes_candidate"])]
        for row in rows
    ]
    return _table(heads, cells, {5, 6, 8, 9})


def _failures(run: Run) -> list[str]:
    found = failures(run)
    if not found:
        return []
    said = [
        f"- {escape(f'{f.verdict}: {f.operation}, {f.oracle}, {f.candidate}: {_first(f.detail)}')}"
        for f in found[:SHOWN]
    ]
    if len(found) > SHOWN:
        said.append(f"- and {len(found) - SHOWN:,} more in report.html")
    parts = ["### Failing cases", "\n".join(said)]
    commands = "\n".join(" ".join(f.command.split("\n")) for f in found[:SHOWN] if f.command)
    return [*parts, _fenced(commands)] if commands else parts


def _first(detail: str) -> str:
    line = detail.split("\n", 1)[0]
    return line if len(line) <= 200 else f"{line[:200]}…"


def _fenced(code: str) -> str:
    """Code between fences longer than any run of backticks in it."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", code)), default=0))
    return f"{fence}sh\n{code}\n{fence}"


def _table(heads: list[str], rows: Iterable[list[str]], numbers: set[int] = frozenset()) -> str:
    rule = ["---:" if index in numbers else "---" for index in range(len(heads))]
    lines = [heads, rule, *([escape(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
