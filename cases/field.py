"""What went wrong in the field, and what covers it here: the rows of `field.toml`."""

import re
import tomllib
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path

LIST = Path(__file__).with_name("field.toml")


@dataclass(frozen=True)
class Row:
    """A fault that was reported, and its cover: at least one of cases, targets, relations and controls.

    `id` is the first place where it was reported, `also` are the others. `fact` is what went wrong, in our words.
    """

    id: str
    fact: str
    operations: tuple[str, ...] = ()
    """Operations that could have the fault."""
    also: tuple[str, ...] = ()
    cases: tuple[str, ...] = ()
    """Names of pinned cases."""
    targets: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Tags that the strategy of an operation must reach, by operation."""
    relations: tuple[str, ...] = ()
    """Names of relations that need no oracle."""
    controls: tuple[str, ...] = ()
    """Pins that must fall, or tests that hold the fault against the harness, as "tests/FILE.py"."""
    device: str = ""
    """What only a GPU can show; "" where nothing is."""

    @property
    def tag(self) -> str:
        """The tag of its pinned cases."""
        return f"field:{self.id}"

    @property
    def slugs(self) -> tuple[str, ...]:
        """What the names of its pinned cases start with, behind the operation: a slug of each place."""
        return tuple(f"field-{slug(place)}-" for place in (self.id, *self.also))


def slug(place: str) -> str:
    """ "paddledetection-5710" of "PaddleDetection#5710"."""
    return re.sub("[^a-z0-9.]+", "-", place.lower())


@cache
def rows(path: Path = LIST) -> tuple[Row, ...]:
    """All rows of the list; raises ValueError naming the row that is malformed or covered by nothing."""
    found = []
    for index, entry in enumerate(tomllib.loads(path.read_text()).get("row", [])):
        told = f"{path.name}: row {index} ({entry.get('id', 'no id')})"
        unknown = sorted(set(entry) - {known.name for known in fields(Row)})
        if unknown:
            raise ValueError(f"{told}: unknown key {', '.join(unknown)}")
        value = {key: tuple(item) if isinstance(item, list) else item for key, item in entry.items()}
        value["targets"] = {name: tuple(tags) for name, tags in entry.get("targets", {}).items()}
        try:
            row = Row(**value)
        except TypeError as error:
            raise ValueError(f"{told}: {error}") from error
        if not (row.cases or row.targets or row.relations or row.controls):
            raise ValueError(f"{told}: nothing covers it")
        found.append(row)
    return tuple(found)


def rows_of(operation: str) -> list[Row]:
    """The rows that concern an operation."""
    return [row for row in rows() if operation in row.operations]
