"""Faults that no pattern expresses: named textual patches, declared in `patches.toml`."""

from __future__ import annotations

import functools
import tomllib
from dataclasses import dataclass
from pathlib import Path

FILE = Path(__file__).parent.parent / "patches.toml"


@dataclass(frozen=True)
class Patch:
    """One fault: in `file` the text `find`, which must occur exactly once, becomes `replace`, because of `reason`."""

    operator: str
    file: str
    find: str
    replace: str
    reason: str

    def apply(self, source: str) -> str:
        """The whole text with the fault in it; ValueError where `find` does not occur exactly once."""
        found = source.count(self.find)
        if found != 1:
            raise ValueError(f"patches.toml: {self.file} holds {self.find!r} {found} times instead of once")
        return source.replace(self.find, self.replace)


@functools.cache
def patches() -> tuple[Patch, ...]:
    """Every declared patch."""
    return tuple(Patch(**entry) for entry in tomllib.loads(FILE.read_text())["patch"])
