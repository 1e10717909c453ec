"""The table of a matrix in the terminal: operations by versions, what the letters stand for, what differs."""

from __future__ import annotations

import string
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from harness.bars.versions import CELLS

if TYPE_CHECKING:
    import pandas as pd

SHOWN_DETAIL = 400
"""Characters of a detail in the terminal; the report has all of it."""


def grid(frame: pd.DataFrame) -> str:
    """One line an operation and candidate, one column a version; settings are spelled beneath."""
    rows = [row for row in frame.to_dict("records") if row["verdict"] in CELLS]
    if not rows:
        return ""
    versions = list(dict.fromkeys(row["oracle"] for row in rows))
    versions.sort(key=lambda oracle: oracle.partition("=")[0])
    settings = list(dict.fromkeys(row["settings"] for row in rows if row["verdict"] == "settings"))
    letters = dict(zip(settings, _letters(len(settings)), strict=True))
    cells: dict[str, dict[str, str]] = {}
    several = len({row["candidate"] for row in rows}) > 1
    for row in rows:
        label = f"{row['operation']} {row['candidate']}" if several else row["operation"]
        said = f"equal with {letters[row['settings']]}" if row["verdict"] == "settings" else row["verdict"]
        cells.setdefault(label, {})[row["oracle"]] = said
    lines = []
    for package in dict.fromkeys(oracle.partition("=")[0] for oracle in versions):
        own = [oracle for oracle in versions if oracle.partition("=")[0] == package]
        heads = [oracle.partition("=")[2].lstrip("=") for oracle in own]
        body = [[label, *(of.get(oracle, "-") for oracle in own)] for label, of in cells.items() if set(own) & set(of)]
        lines += [*_columns([[package, *heads], *body]), ""]
    lines += [f"{letter}: {what}" for what, letter in letters.items()]
    return "\n".join(lines).rstrip() + "\n"


def differing(frame: pd.DataFrame, folder: str) -> str:
    """Each cell that differs, each control and each name that the list is wrong about, with its replay command."""
    lines = []
    for row in frame.to_dict("records"):
        if row["verdict"] in {"differs", "unlisted", "stale"}:
            lines.append(
                f"{row['verdict']}: {row['operation']}, {row['candidate']}, {row['oracle']}: "
                f"{row['detail'][:SHOWN_DETAIL]}"
            )
            if row["replay"]:
                lines.append(f"  cd {folder} && {row['replay']}")
    return "".join(f"{line}\n" for line in lines)


def uncovered(frame: pd.DataFrame) -> str:
    """Public names without counterpart, by reason."""
    reasons: dict[str, list[str]] = {}
    for row in frame.to_dict("records"):
        if row["verdict"] == "uncovered":
            reasons.setdefault(row["detail"], []).append(row["candidate"].rpartition(".")[2])
    if not reasons:
        return ""
    lines = [f"  {', '.join(dict.fromkeys(names))}: {reason}" for reason, names in reasons.items()]
    return "public names of upstream without counterpart:\n" + "".join(f"{line}\n" for line in lines)


def _letters(count: int) -> Iterable[str]:
    """[a] to [z], then [aa] and on."""
    for number in range(count):
        more, last = divmod(number, 26)
        yield f"[{string.ascii_lowercase[more - 1] if more else ''}{string.ascii_lowercase[last]}]"


def _columns(rows: list[list[Any]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
