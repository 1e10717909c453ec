"""Mutants that mean the same as the original although nothing says so: `equivalent.toml`, with the reason of each."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from harness.mutation.mutant import Mutant
from harness.plan import RequestError

LIST = Path(__file__).with_name("equivalent.toml")


@dataclass(frozen=True)
class Equivalent:
    """One entry: mutants are known by text, so that lines may move. `operator` is "*" for any.

    `after` is "*" for a line on which no answer depends, such as how many rows are taken at a time: whatever survives
    there is equivalent, and some of it may be found.
    """

    file: str
    before: str
    after: str
    reason: str
    operator: str = "*"

    def fits(self, mutant: Mutant) -> bool:
        """Whether this is the mutant, or one of those with the same text."""
        same = (self.file, self.before) == (mutant.file, mutant.before) and self.after in ("*", mutant.after)
        return same and self.operator in ("*", mutant.operator)

    @property
    def text(self) -> str:
        """The entry on one line."""
        return f"{self.file}: {self.before} -> {self.after}"


def equivalents(path: Path = LIST) -> tuple[Equivalent, ...]:
    """The entries of the list; RequestError names the one that is malformed."""
    try:
        rows = tomllib.loads(path.read_text()).get("equivalent", [])
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise RequestError(f"{path}: {error}") from error
    found = []
    for number, row in enumerate(rows, 1):
        try:
            found.append(Equivalent(**row))
        except TypeError as error:
            raise RequestError(f"{path.name}: entry {number}: {error}") from error
        if not found[-1].reason.strip():
            raise RequestError(f"{path.name}: entry {number}: no reason")
    return tuple(found)


def entry_of(mutant: Mutant, entries: Iterable[Equivalent]) -> Equivalent | None:
    """The first entry that fits a mutant."""
    return next((entry for entry in entries if entry.fits(mutant)), None)


def unmatched(entries: Iterable[Equivalent], mutants: list[Mutant], files: set[str]) -> list[Equivalent]:
    """Entries of these files that no mutant fits any more, and those of files that are gone."""
    return [
        entry
        for entry in entries
        if (entry.file in files or not files) and not any(entry.fits(mutant) for mutant in mutants)
    ]
