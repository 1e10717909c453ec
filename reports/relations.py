"""The section of the report on relations."""

from __future__ import annotations

from typing import TYPE_CHECKING

from reports.tables import Table

if TYPE_CHECKING:
    import pandas as pd

TITLE = "Relations"
LEDE = ""


def tables(frame: pd.DataFrame) -> tuple[Table, ...]:
    """The tables of the section."""
    return ()
