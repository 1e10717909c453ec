"""Bars on mutants."""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness.bars.bar import Bar, thresholds
from reports.mutation import score

if TYPE_CHECKING:
    import pandas as pd

SEMANTIC = "semantic"


def bars(frame: pd.DataFrame) -> list[Bar]:
    """Most mutants are found, every semantic one is, and the list of equivalents is up to date."""
    limits = thresholds()["mutation"]
    found = []
    semantic = frame[frame["kind"] == SEMANTIC]
    for name, rows, limit in (
        ("mutants found", frame, limits["killed"]),
        ("semantic mutants found", semantic, limits["semantic"]),
    ):
        own = score(rows)
        if own.judged:
            reason = f"{own.survived} of {own.judged} survived"
            found.append(Bar(name, limit, own.share, own.share >= limit, reason))
    stale = frame[frame["verdict"] == "stale"]
    said = "; ".join(f"{row['file']}: {row['after']}" for row in stale.head(3).to_dict("records"))
    reason = said or "what is listed as equivalent is"
    found.append(Bar("stale equivalents", limits["stale"], len(stale), len(stale) <= limits["stale"], reason))
    return found


def sentence(frame: pd.DataFrame) -> str:
    """What the frame shows, in a sentence."""
    own = score(frame)
    if not own.judged:
        return "No mutant was judged."
    sampled = f" ({own.interval} with 95% confidence)" if own.population > own.tried else ""
    of = f"{own.killed} of {own.judged} mutants are found, {own.share:.1%}{sampled}"
    tried = f"; a sample of {own.tried} of {own.population}" if own.population > own.tried else ""
    return f"{of}{tried}; {own.survived} survive, {own.equivalent} are equivalent."
