"""Bars on relations that need no oracle."""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness.bars.bar import Bar, thresholds
from harness.relations import BROKEN, FINDING, HOLDS, REJECTED, TRIED, UPSTREAM

if TYPE_CHECKING:
    import pandas as pd

    from harness.plan import Plan

SHOWN = 200
"""Characters of what differs; the report has all of it."""


def bars(frame: pd.DataFrame) -> list[Bar]:
    """No candidate breaks a relation; what upstream breaks is a finding and fails nothing."""
    most = thresholds()["relations"]["broken"]
    broken = frame[frame["verdict"] == BROKEN].sort_values("replay", kind="stable")
    found = []
    for (operation, subject, relation), rows in broken.groupby(["operation", "subject", "relation"]):
        last = rows.iloc[-1]  # the one whose case was saved, if any
        reason = f"{last['detail'][:SHOWN]}; {last['replay']}"
        found.append(Bar(f"{relation} of {operation}, {subject}", most, len(rows), len(rows) <= most, reason))
    return found or [Bar("relations broken by candidates", most, 0, True, "an answer that contradicts another")]


def untried(frame: pd.DataFrame, plan: Plan) -> list[Bar]:
    """Every relation that a candidate's operation has was tried on some case: none is kept by never being asked."""
    from harness.operations import operation

    fewest = thresholds()["relations"]["fewest_cases"]
    tried = {}
    if len(frame):
        rows = frame[frame["verdict"].isin(TRIED) & (frame["subject"] != UPSTREAM)]
        tried = rows.groupby(["operation", "subject", "relation"]).size().to_dict()
    least = {
        (name, candidate, relation): tried.get((name, candidate, relation), 0)
        for name in dict.fromkeys(name for name, _ in plan.pairs())
        for candidate in plan.candidates_of(name)
        for relation in operation(name).relations.declared()
        if relation in plan.relations
    }
    short = [(key, count) for key, count in least.items() if count < fewest]
    if not short:
        return [Bar("cases of a relation", fewest, min(least.values()), True, "")] if least else []
    reason = "a relation that is never tried cannot be broken"
    return [Bar(f"cases of {' '.join(key)}", fewest, count, False, reason) for key, count in short]


def sentence(frame: pd.DataFrame) -> str:
    """What the frame shows, in a sentence."""
    candidates = frame[frame["subject"] != UPSTREAM]["verdict"]
    broken, held = (int((candidates == verdict).sum()) for verdict in (BROKEN, HOLDS))
    rejected = int((frame["verdict"] == REJECTED).sum())
    found = frame[frame["verdict"] == FINDING][["operation", "oracle", "relation"]].drop_duplicates()
    said = f"Relations without an oracle: {held} hold, {broken} are broken by a candidate"
    return f"{said}, {rejected} cases are rejected; {len(found)} findings about upstream."
