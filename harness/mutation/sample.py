"""A sample of mutants that stands for all of them, and stays the same where the text does."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from fnmatch import fnmatchcase

from harness.mutation.mutant import KINDS, Mutant


def chosen(
    mutants: Iterable[Mutant], *, files: str = "*", kinds: tuple[str, ...] = KINDS, ids: tuple[str, ...] = ()
) -> list[Mutant]:
    """The mutants that the options name; `ids` alone decide where there are any."""
    found = [mutant for mutant in mutants if mutant.kind in kinds and fnmatchcase(mutant.file, files)]
    return [mutant for mutant in found if not ids or mutant.id in ids]


def sampled(mutants: list[Mutant], size: int, seed: int) -> list[Mutant]:
    """`size` mutants, half of them of each kind as far as there are so many; all of them where `size` is 0.

    Each mutant of a kind has the same chance, by a hash of its own lines: where a file is changed, what is taken of the
    others stays, and with it what was found out about them. The same seed takes the same ones.
    """
    by_kind = {kind: [mutant for mutant in mutants if mutant.kind == kind] for kind in KINDS}
    if not size or size >= len(mutants):
        return [mutant for kind in KINDS for mutant in by_kind[kind]]
    semantic, syntactic = (len(by_kind[kind]) for kind in KINDS)
    own = min(semantic, max(size // 2, size - syntactic))
    return [*_first(by_kind[KINDS[0]], own, seed), *_first(by_kind[KINDS[1]], size - own, seed)]


def _first(mutants: list[Mutant], size: int, seed: int) -> list[Mutant]:
    def chance(mutant: Mutant) -> tuple[bytes, int]:
        text = "\0".join((str(seed), mutant.file, mutant.operator, mutant.before, mutant.after))
        return hashlib.sha256(text.encode()).digest(), mutant.line

    return sorted(sorted(mutants, key=chance)[:size], key=lambda mutant: (mutant.file, mutant.line, mutant.id))
