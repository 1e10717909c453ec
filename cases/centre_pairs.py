"""Pairs of boxes in centre form by kind: what an overlap of matched boxes must get right, from a seed."""

from collections.abc import Callable

import numpy as np

Rng = np.random.Generator


def _ordinary(rng: Rng, box: np.ndarray) -> np.ndarray:
    return box * (1 + rng.normal(0, 0.2, 4)) + np.append(rng.normal(0, 0.2, 2) * box[2:], (0, 0))


def _far(rng: Rng, box: np.ndarray) -> np.ndarray:
    return box + np.append(box[2:] * rng.uniform(1.1, 4, 2) * rng.choice((-1, 1), 2), (0, 0))


def _touching(rng: Rng, box: np.ndarray) -> np.ndarray:
    other = box.copy()
    axis = rng.integers(2)
    other[axis] += box[2 + axis]
    return other


def _contained(rng: Rng, box: np.ndarray) -> np.ndarray:
    return np.append(box[:2], box[2:] * rng.choice((0.25, 0.5, 0.75), 2))


def _shared_edge(rng: Rng, box: np.ndarray) -> np.ndarray:
    """The left edge stays, the right one moves."""
    width = box[2] * rng.choice((0.5, 1.5))
    return np.array([box[0] + (width - box[2]) / 2, box[1], width, box[3]])


def _flat(rng: Rng, box: np.ndarray) -> np.ndarray:
    return np.append(box[:2], np.where(rng.permutation((True, rng.random() < 0.5)), 0, box[2:]))


def _inverted(rng: Rng, box: np.ndarray) -> np.ndarray:
    return np.append(box[:2], box[2:] * rng.choice(((-0.5, 1), (1, -0.5), (-0.5, -0.5))))


def _thin(rng: Rng, box: np.ndarray) -> np.ndarray:
    return np.append(box[:2], box[2:] * rng.permutation((rng.uniform(0.02, 0.1), rng.uniform(1, 8))))


def _identical(_: Rng, box: np.ndarray) -> np.ndarray:
    return box.copy()


#: How the other box of a pair is made from the first, and the kind's weight.
KINDS: dict[str, tuple[Callable[[Rng, np.ndarray], np.ndarray], int]] = {
    "ordinary": (_ordinary, 6),
    "far": (_far, 3),
    "touching": (_touching, 2),
    "contained": (_contained, 2),
    "shared-edge": (_shared_edge, 2),
    "identical": (_identical, 2),
    "flat": (_flat, 2),
    "thin": (_thin, 2),
    "inverted": (_inverted, 1),
}
#: Their edges meet, which rounded coordinates do not keep: in float32 they overlap, in float64 not.
_WHOLE_ONLY = ("touching", "shared-edge")
_FLAT_FIRST = 0.12


def pairs(seed: int, count: int, *, size: float, whole: bool) -> tuple[np.ndarray, np.ndarray, set[str]]:
    """Two arrays (count, 4) of boxes of about `size` pixels, centre form, and the kinds of their pairs.

    With `whole` coordinates are whole and sides even, so that edges meet exactly in every dtype.
    """
    rng = np.random.default_rng(seed)
    names = [name for name, (_, share) in KINDS.items() for _ in range(share) if whole or name not in _WHOLE_ONLY]
    first, second, seen = np.zeros((count, 4)), np.zeros((count, 4)), set()
    for row in range(count):
        box = np.append(rng.uniform(0, 2 * size, 2), rng.uniform(size / 20, size, 2))
        if whole:
            box = np.append(np.round(box[:2]), 4 * np.ceil(box[2:] / 4))
        kind = names[rng.integers(len(names))]
        other = KINDS[kind][0](rng, box)
        if whole:
            other = np.append(np.round(other[:2]), np.round(other[2:]))
        if rng.random() < _FLAT_FIRST:
            box[2 + rng.integers(2)] = 0
            kind = "flat-target"
        first[row], second[row] = box, other
        seen.add(kind)
    swap = rng.random(count) < 0.5
    first[swap], second[swap] = second[swap], first[swap].copy()
    return first, second, seen
