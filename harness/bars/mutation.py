"""Bars on mutants."""

from __future__ import annotations

from typing import TYPE_CHECKING

from harness.bars.bar import Bar

if TYPE_CHECKING:
    import pandas as pd


def bars(frame: pd.DataFrame) -> list[Bar]:
    """The bars of a frame that has rows."""
    return []


def sentence(frame: pd.DataFrame) -> str:
    """What the frame shows, in a sentence."""
    return f"{len(frame)} rows of mutants."
