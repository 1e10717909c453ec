"""Faults of this field, planted one at a time: operators over the syntax tree, and patches of what no pattern says.

Each operator is a function of a module here whose docstring says which real fault it stands for. An edit changes one
segment and leaves the rest of the text as it is.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

from harness.mutation.mutant import Mutant, changed, distinct
from harness.mutation.semantic import choices, shapes, values
from harness.mutation.semantic.patches import patches
from harness.mutation.semantic.registry import OPERATORS
from harness.mutation.semantic.source import Edit, Source

__all__ = ["OPERATORS", "choices", "mutants", "patches", "shapes", "values"]

IN_A_FILE = {"constant": 2, "count": 2, "tie": 2}
"""Most mutants of an operator in a file, else 1: large files and common operators would drown the rest."""


def mutants(file: str, source: str) -> Iterator[Mutant]:
    """The semantic mutants of a file, whose path is that from the project's root; in an order that stays.

    Each compiles, and each means something else than the original and than the others.
    """
    yield from distinct(_mutants(file, source), source)


def _mutants(file: str, source: str) -> Iterator[Mutant]:
    text = Source(file, source)
    texts = [(patch.operator, patch.apply(source)) for patch in patches() if patch.file == file]
    for name, operator in OPERATORS.items():
        texts += [(name, text.apply(edit)) for edit in _bounded(text, operator(text), IN_A_FILE.get(name, 1))]
    for name, mutated in texts:
        yield Mutant("semantic", name, file, *changed(source, mutated), mutated)


def _bounded(source: Source, edits: Iterator[Edit], most: int) -> list[Edit]:
    """Of the edits of a line the first, and of those at most so many, by a hash: others may move, these stay."""
    by_line: dict[int, Edit] = {}
    for edit in edits:
        by_line.setdefault(source.line_of(edit.start), edit)
    kept = sorted(by_line.values(), key=lambda edit: _rank(source, edit))[:most]
    return sorted(kept, key=lambda edit: edit.start)


def _rank(source: Source, edit: Edit) -> str:
    """A number that depends on the file and on the text of the line with the edit in it alone."""
    line = source.apply(edit).splitlines()[source.line_of(edit.start) - 1].strip()
    return hashlib.sha256(f"{source.file}\0{line}".encode()).hexdigest()
