"""What the codecs between boxes and distances are tried on: points, distances, and shapes that broadcast."""

from dataclasses import dataclass

import numpy as np

from cases.boxes import Picker

#: Distances a kind: those of a network mostly; whole ones; inverted and degenerate boxes; none; far beyond any map.
KINDS = ("network",) * 5 + ("whole", "whole", "negative", "zero", "huge")
_SPOILED = ("",) * 27 + ("nan", "inf", "minus-inf")
_SPECIAL = {"nan": np.nan, "inf": np.inf, "minus-inf": -np.inf}
_COUNTS = (*range(1, 13), *range(1, 13), 40, 0)
#: How points and distances meet: shapes of both without the coordinates, from B images and N anchors.
LAYOUTS = {
    "shared-points": lambda b, n: ((n,), (b, n)),
    "own-points": lambda b, n: ((b, n), (b, n)),
    "one-box": lambda b, n: ((), ()),
    "one-box-many-points": lambda b, n: ((n,), (1,)),
    "one-point-many-boxes": lambda b, n: ((1, 1), (b, n)),
    "more-dims-of-points": lambda b, n: ((b, n), (n,)),
}
_LAYOUTS = ("shared-points",) * 5 + tuple(LAYOUTS)[1:]


@dataclass(frozen=True)
class Sides:
    """`points` (..., 2) and `distances` (..., 4) to left, top, right, bottom, float64, of shapes that broadcast."""

    points: np.ndarray
    distances: np.ndarray
    tags: frozenset[str]


def draw_sides(pick: Picker, dtype: str) -> Sides:
    """Draw a layout, and numbers from a drawn seed; float16 stays within its range."""
    layout, kind, spoiled = pick.choice(_LAYOUTS), pick.choice(KINDS), pick.choice(_SPOILED)
    batch, count = pick.choice((1, 2, 3, 1, 2, 3, 0)), pick.choice(_COUNTS)
    rng = np.random.default_rng(pick.integer(0, 2**16 - 1))
    points, boxes = LAYOUTS[layout](batch, count)
    distances = _distances(rng, kind, (*boxes, 4), 1e3 if dtype == "float16" else 1e5)
    tags = {layout, f"distances-{kind}"}
    if not distances.size or 0 in points:
        tags.add("empty")
    elif spoiled:
        distances[tuple(rng.integers(0, distances.shape))] = _SPECIAL[spoiled]
        tags |= {"non-finite", spoiled}
    return Sides(rng.integers(0, 80, (*points, 2)) + 0.5, distances, frozenset(tags))


def _distances(rng: np.random.Generator, kind: str, shape: tuple[int, ...], huge: float) -> np.ndarray:
    if kind == "zero":
        return np.zeros(shape)
    if kind == "whole":
        return rng.integers(0, 16, shape).astype(np.float64)
    values = rng.gamma(2.0, 2.0, shape)
    return (
        values
        * {"network": 1.0, "negative": -1.0, "huge": huge}[kind]
        * (rng.choice((-1, 1), shape, p=(0.05, 0.95)) if kind == "network" else 1)
    )
