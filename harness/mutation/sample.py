"""A sample of mutants that stands for all of them: every k-th along files and operators."""

from __future__ import annotations

import random
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

    Each kind is laid out by file and operator, at random within these, and every k-th is taken: each file and operator
    has its share, and each mutant of a kind the same chance. The same seed takes the same ones.
    """
    by_kind = {kind: [mutant for mutant in mutants if mutant.kind == kind] for kind in KINDS}
    if not size or size >= len(mutants):
        return [mutant for kind in KINDS for mutant in by_kind[kind]]
    semantic, syntactic = (len(by_kind[kind]) for kind in KINDS)
    own = min(semantic, max(size // 2, size - syntactic))
    return [*_every(by_kind[KINDS[0]], own, seed), *_every(by_kind[KINDS[1]], size - own, seed)]


def _every(mutants: list[Mutant], size: int, seed: int) -> list[Mutant]:
    if not size:
        return []
    generator = random.Random(seed)
    laid = sorted(mutants, key=lambda mutant: mutant.id)
    generator.shuffle(laid)
    laid.sort(key=lambda mutant: (mutant.file, mutant.operator))
    step, start = len(laid) / size, generator.random()
    return [laid[int((start + place) * step)] for place in range(size)]
