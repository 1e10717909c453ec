"""The sections that only some reports have: relations, mutation score, matrix of versions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from reports import mutation, relations, versions

if TYPE_CHECKING:
    from reports.frames import Run
    from reports.tables import Table


@dataclass(frozen=True)
class Section:
    """A titled section of tables; `lede` says in a few sentences what they show and how to read them."""

    name: str
    title: str
    lede: str
    tables: tuple[Table, ...]


SOURCES = {"relations": relations, "mutants": mutation, "versions": versions}
"""Optional frame -> the module with TITLE, LEDE and `tables(frame)`."""


def sections(run: Run) -> list[Section]:
    """The sections of the optional frames that the run has."""
    return [
        Section(name, source.TITLE, source.LEDE, source.tables(run.frames[name]))
        for name, source in SOURCES.items()
        if name in run.frames
    ]
