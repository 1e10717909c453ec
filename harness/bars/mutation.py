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
            sampled = f"; a sample, {own.interval}" if own.population > own.tried else ""
            reason = f"{own.survived} of {own.judged} survived{sampled}"
            # Ambiguous as long as the interval of a sample reaches the bar; of all mutants it is the share itself.
            found.append(Bar(name, limit, own.share, own.high >= limit, reason))
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
    tried = f"; a sample of {own.tried} of {own.population}" if own.population > own.tried else ""
    says = "is estimated at" if tried else "is"
    of = f"{own.killed} of {own.judged} mutants are found; the mutation score {says} {own.share:.1%}{sampled}"
    return f"{of}{tried}; {own.survived} survive, {own.equivalent} are equivalent."
