"""Bars on the matrix of versions: no cell differs, every control is caught, no public name goes unlisted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import reference
from harness.bars.bar import Bar, thresholds, tied_cases

if TYPE_CHECKING:
    import pandas as pd

CELLS = ("equal", "settings", "differs", "control", "absent")
"""Verdicts of cells; a row has another one where it is on public names (`unlisted`, `stale`, `uncovered`) or on what
moved between two releases (`moved`, `unmoved`)."""
HOLDS = {"equal", "settings", "absent", "control"}
REASONS = {
    "unlisted": "what upstream adds is given a counterpart, or a reason for none",
    "stale": "an entry that no version has says nothing, and hides that",
}


def bars(frame: pd.DataFrame) -> list[Bar]:
    """A bar a cell, a control and a public name that the list is wrong about."""
    rows = frame.to_dict("records")
    cells = [row for row in rows if row["verdict"] in CELLS]
    found = [_cell(row) for row in cells]
    found += [bar for row in cells if row["verdict"] != "absent" for bar in _tied(row)]
    found += _controls(cells)
    for verdict, reason in REASONS.items():
        found += [
            Bar(f"public name {row['candidate']}, {row['oracle']}", 0, 1, False, f"{row['detail']}: {reason}")
            for row in rows
            if row["verdict"] == verdict
        ]
    return found


def _cell(row: dict[str, Any]) -> Bar:
    ok = row["verdict"] in HOLDS
    reason = "a version that differs under its own settings is not understood" if ok else row["detail"]
    where = f"versions: {row['operation']}, {row['candidate']} against {row['oracle']}"
    return Bar(where, 0, float(not ok), ok, reason)


def _tied(row: dict[str, Any]) -> list[Bar]:
    """Share of ties where there are cases enough; the operation's widest cap, as the dtypes are mixed."""
    if row["cases"] < thresholds()["versions"]["fewest_for_a_share"]:
        return []
    cap, share = max(tied_cases(row["operation"]).values(), default=0.0), row["ties"] / row["cases"]
    where = f"versions: ties of {row['operation']}, {row['candidate']} against {row['oracle']}"
    return [Bar(where, cap, share, share <= cap, "a comparator that calls everything a tie excuses everything")]


def _controls(cells: list[dict[str, Any]]) -> list[Bar]:
    """Every control that was tried on an operation that it is wrong in was caught there."""
    controls, found = {key for key, pin in reference.read_pins().items() if pin.control}, []
    for oracle in dict.fromkeys(row["oracle"] for row in cells if row["oracle"] in controls):
        tried = [row for row in cells if row["oracle"] == oracle and controlled(oracle, row["operation"])]
        tried = [row for row in tried if row["verdict"] != "absent"]
        caught = sum(row["verdict"] == "control" for row in tried)
        if tried:
            reason = f"known to be wrong ({reference.read_pins()[oracle].control}): a table that passes it is broken"
            found.append(Bar(f"versions: control {oracle}", len(tried), caught, caught == len(tried), reason))
    return found


def controlled(oracle: str, operation: str) -> bool:
    """Whether a version is pinned for being wrong in that operation."""
    return operation in thresholds()["versions"]["controls"].get(oracle, ())


def sentence(frame: pd.DataFrame) -> str:
    """What the frame shows, in a sentence."""
    count = frame["verdict"].value_counts()
    cells = {verdict: int(count.get(verdict, 0)) for verdict in CELLS}
    said = (
        f"{sum(cells.values())} pairs of operation and version: {cells['equal']} equal, {cells['settings']} equal with "
        f"settings, {cells['absent']} absent, {cells['control']} of controls caught, {cells['differs']} differ"
    )
    moved = frame[frame["verdict"] == "moved"]
    if len(moved):
        said += f"; {', '.join(sorted(set(moved['operation'])))} moved between the releases"
    names = {verdict: int(count.get(verdict, 0)) for verdict in ("uncovered", *REASONS)}
    said += f"; {names['uncovered']} public names of upstream without counterpart"
    wrong = [f"{names[verdict]} {verdict}" for verdict in REASONS if names[verdict]]
    return f"{said}{', ' + ' and '.join(wrong) if wrong else ''}."
