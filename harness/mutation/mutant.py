"""A mutant: one fault planted in one file of `cleanroom/`."""

from __future__ import annotations

import ast
import difflib
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

Kind = Literal["semantic", "syntactic"]
KINDS: tuple[Kind, ...] = ("semantic", "syntactic")


@dataclass(frozen=True)
class Mutant:
    """One file of `cleanroom/` with one fault in it.

    `file` is relative to the project, "cleanroom/assign/tal.py"; `line` is the first one that differs, as it is
    numbered in the original; `before` and `after` are short texts of what was changed, by which
    `equivalent.toml` knows a mutant wherever its lines move; `source` is the whole text of the mutated file.
    """

    kind: Kind
    operator: str
    file: str
    line: int
    before: str
    after: str
    source: str

    @cached_property
    def id(self) -> str:
        """Ten hexadecimal digits; another one as soon as anything in the file is another."""
        content = "\0".join((self.kind, self.operator, self.file, str(self.line), self.before, self.after, self.source))
        return hashlib.sha256(content.encode()).hexdigest()[:10]

    def diff(self, original: str) -> str:
        """Unified diff against the original text of the file."""
        lines = (text.splitlines(keepends=True) for text in (original, self.source))
        return "".join(difflib.unified_diff(*lines, self.file, f"{self.file} ({self.kind}: {self.operator})"))


def changed(original: str, mutated: str) -> tuple[int, str, str]:
    """(line, before, after): the first line that differs, counted from 1, and the lines that differ, on one line each.

    Where a side has no line of its own, the line before stands in both.
    """
    one, other = original.splitlines(), mutated.splitlines()
    start, tail = _alike(one, other)
    first = start if start < min(len(one), len(other)) - tail else max(start - 1, 0)
    before, after = (" ".join(" ".join(lines[first : len(lines) - tail]).split()) for lines in (one, other))
    return start + 1, before, after


def distinct(mutants: Iterable[Mutant], source: str) -> Iterator[Mutant]:
    """The mutants that compile and mean something else than the original and than each other."""
    lines, seen = source.splitlines(), set()
    starts = [1]
    for node in ast.parse(source).body:
        starts.append(min([node.lineno, *(at.lineno for at in getattr(node, "decorator_list", ()))]))
    for mutant in mutants:
        # Only the statements of the module that hold the change: whole files would take minutes.
        others = mutant.source.splitlines()
        start, tail = _alike(lines, others)
        first = max(at for at in starts if at <= start + 1) - 1
        rest = len(lines) + 1 - min((at for at in starts if at > len(lines) - tail), default=len(lines) + 1)
        own, meaning = (_meaning(text[first : len(text) - rest]) for text in (lines, others))
        if meaning is not None and meaning != own and (first, meaning) not in seen:
            seen.add((first, meaning))
            yield mutant


def _alike(one: list[str], other: list[str]) -> tuple[int, int]:
    """How many lines two texts have in common at their start, and after that at their end."""
    most = min(len(one), len(other))
    start = next((at for at in range(most) if one[at] != other[at]), most)
    most -= start
    return start, next((at for at in range(most) if one[-1 - at] != other[-1 - at]), most)


def _meaning(lines: list[str]) -> str | None:
    """The syntax tree without positions, or None for what does not compile."""
    try:
        tree = ast.parse("\n".join(lines))
        compile(tree, "mutant", "exec", dont_inherit=True)
    except (SyntaxError, ValueError):
        return None
    return ast.dump(tree)
