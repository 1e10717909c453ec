"""Upstream's public names against the operations: each has a counterpart or a reason for none (`coverage.toml`)."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from harness.operations import NAMES

FILE = Path(__file__).parent.parent / "coverage.toml"


class CoverageError(ValueError):
    """An entry of the list that is malformed, by name."""


@dataclass(frozen=True)
class Entry:
    """One public name: the operations that are its counterpart, or why there is none."""

    operations: tuple[str, ...]
    absent: str


@dataclass(frozen=True)
class Coverage:
    """The list: places to look for names, the entries by MODULE.NAME, and modules that cannot be imported here."""

    places: dict[str, dict[str, Any]]
    entries: dict[str, Entry]
    unread: dict[str, str]

    def of_package(self, package: str) -> dict[str, dict[str, Any]]:
        """The places of one package."""
        return {module: place for module, place in self.places.items() if module.split(".")[0] == package}

    def counterparts(self, operation: str) -> tuple[str, ...]:
        """The public names whose counterpart an operation is."""
        return tuple(name for name, entry in self.entries.items() if operation in entry.operations)

    def unlisted(self, found: Mapping[str, Any]) -> list[str]:
        """What one version has (`public_names`) that the list does not know; unread modules too, with the reason."""
        unread = {module: why for module, why in found["unread"].items() if module not in self.unread}
        names = [name for name in found["names"] if name not in self.entries]
        return names + [f"{module} (cannot be imported: {why})" for module, why in unread.items()]

    def stale(self, found: Iterable[Mapping[str, Any]], packages: Iterable[str]) -> list[str]:
        """Entries of the packages that none of the versions has."""
        found, packages = list(found), set(packages)
        there = {name for version in found for name in (*version["names"], *version["unread"])}
        return [name for name in (*self.entries, *self.unread) if name.split(".")[0] in packages and name not in there]


@cache
def coverage(file: Path = FILE) -> Coverage:
    """The list as it stands in a file; CoverageError names what is malformed."""
    table = tomllib.loads(file.read_text())
    entries = {}
    for module, names in table["names"].items():
        for name, row in names.items():
            entries[f"{module}.{name}"] = _entry(f"{file.name}: {module}.{name}", row)
    return Coverage(table["modules"], entries, table.get("unread", {}))


def _entry(where: str, row: dict[str, Any]) -> Entry:
    if len(row) != 1 or not set(row) <= {"operation", "absent"}:
        raise CoverageError(f"{where}: must have either `operation` or `absent`")
    if "absent" in row:
        if not str(row["absent"]).strip():
            raise CoverageError(f"{where}: `absent` must say why there is no counterpart")
        return Entry((), row["absent"])
    operations = (row["operation"],) if isinstance(row["operation"], str) else tuple(row["operation"])
    unknown = [name for name in operations if name not in NAMES]
    if unknown or not operations:
        raise CoverageError(f"{where}: no operation {', '.join(unknown) or 'is named'}")
    return Entry(operations, "")
