"""Box kinds as data: each a few lines that place one box, from drawn numbers or from a seeded generator."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from hypothesis import strategies as st

from cases.frame import Frame

#: Left, top, right and bottom in pixels.
Box = tuple[float, float, float, float]
T = TypeVar("T")


class Picker:
    """Where everything that varies in a case is taken from: `numbers` are drawn by Hypothesis or come from a seed.

    `readable` coordinates are whole pixels, or whole pixels and a simple fraction, and shrink to whole ones.
    """

    # Halves and quarters are exact in every dtype; the others round corners, as edges on anchors need.
    FRACTIONS = (0.0, 0.0, 0.0, 0.5, 0.25, 0.001, 1 / 3, 0.22970962)

    def __init__(self, numbers: random.Random, readable: bool = False):
        self._numbers = numbers
        self._readable = readable

    def integer(self, low: int, high: int) -> int:
        """Return an integer in [low, high]."""
        return self._numbers.randint(low, high)

    def coordinate(self, low: int, high: int) -> float:
        """Return a coordinate or length in [low, high]."""
        if not self._readable:
            return self._numbers.uniform(low, high)
        # The fraction is the leading digit, so that a smaller draw is first of all a whole number.
        span = high - low + 1
        fraction, whole = divmod(self.integer(0, len(self.FRACTIONS) * span - 1), span)
        return low + whole + (self.FRACTIONS[fraction] if low + whole < high else 0.0)

    def choice(self, options: Sequence[T]) -> T:
        """Return one of `options`."""
        return options[self.integer(0, len(options) - 1)]


# One strategy for a whole case, and not a strategy a number: Hypothesis mutates cases by copying one draw of
# a strategy over another, out-of-range copies become the simplest value, and six of ten cases had no box.
_NUMBERS = st.randoms(use_true_random=False)


def drawn(draw: st.DrawFn) -> Picker:
    """The picker of a case that Hypothesis draws number by number, and shrinks."""
    return Picker(draw(_NUMBERS), readable=True)


def seeded(seed: int) -> Picker:
    """The picker of scenes that are too large to be drawn number by number."""
    return Picker(random.Random(seed))


@dataclass(frozen=True)
class BoxKind:
    """A named way to place one box in a frame, given the boxes that the image already has.

    `share` is its weight among the kinds. `parents` selects the earlier boxes that the kind builds on; where
    there is none, an ordinary box takes its place.
    """

    name: str
    place: Callable[[Picker, Frame, Sequence[Box]], Box]
    share: int = 2
    parents: Callable[[Box], bool] | None = None


def _has_area(box: Box) -> bool:
    return box[2] > box[0] and box[3] > box[1]


def _side(pick: Picker, frame: Frame, length: int) -> float:
    shortest = max(1, min(frame.strides[0], length // 2))
    return pick.coordinate(shortest, max(shortest, length * 3 // 4))


def _inside(pick: Picker, frame: Frame, width: float, height: float) -> Box:
    """A box of the given sides somewhere in the image."""
    left = pick.coordinate(0, max(0, int(frame.width - width)))
    top = pick.coordinate(0, max(0, int(frame.height - height)))
    return left, top, left + width, top + height


def _ordinary(pick: Picker, frame: Frame, _: Sequence[Box]) -> Box:
    return _inside(pick, frame, _side(pick, frame, frame.width), _side(pick, frame, frame.height))


def _tiny(pick: Picker, frame: Frame, _: Sequence[Box]) -> Box:
    longest = min(frame.strides) - 1
    return _inside(pick, frame, pick.coordinate(1, longest), pick.coordinate(1, longest))


def _huge(pick: Picker, frame: Frame, _: Sequence[Box]) -> Box:
    overhang = 4
    low_x, low_y = (pick.coordinate(-overhang, side // 16) for side in (frame.width, frame.height))
    high_x, high_y = (pick.coordinate(side - side // 16, side + overhang) for side in (frame.width, frame.height))
    return low_x, low_y, high_x, high_y


def _thin(pick: Picker, frame: Frame, _: Sequence[Box]) -> Box:
    if pick.integer(0, 1):
        return _inside(pick, frame, pick.coordinate(1, 2), pick.coordinate(frame.height // 2, frame.height))
    return _inside(pick, frame, pick.coordinate(frame.width // 2, frame.width), pick.coordinate(1, 2))


def _zero_area(pick: Picker, frame: Frame, _: Sequence[Box]) -> Box:
    flat = pick.integer(0, 2)
    width = 0.0 if flat != 1 else _side(pick, frame, frame.width)
    height = 0.0 if flat != 2 else _side(pick, frame, frame.height)
    return _inside(pick, frame, width, height)


def _inverted(pick: Picker, frame: Frame, _: Sequence[Box]) -> Box:
    left, top, right, bottom = _ordinary(pick, frame, ())
    axis = pick.integer(0, 2)
    if axis != 1:
        left, right = right, left
    if axis != 2:
        top, bottom = bottom, top
    return left, top, right, bottom


def _off_image(pick: Picker, frame: Frame, _: Sequence[Box]) -> Box:
    left, top, right, bottom = _ordinary(pick, frame, ())
    gap = pick.coordinate(0, 2 * max(frame.strides))
    edge = pick.integer(0, 3)
    shift_x = (frame.width + gap - left, -gap - right, 0.0, 0.0)[edge]
    shift_y = (0.0, 0.0, frame.height + gap - top, -gap - bottom)[edge]
    return left + shift_x, top + shift_y, right + shift_x, bottom + shift_y


def _identical(pick: Picker, _: Frame, parents: Sequence[Box]) -> Box:
    return pick.choice(parents)


def _nested(pick: Picker, _: Frame, parents: Sequence[Box]) -> Box:
    left, top, right, bottom = pick.choice(parents)
    eighths = [pick.integer(1, 3) / 8 for _ in range(4)]
    width, height = right - left, bottom - top
    return (
        left + width * eighths[0],
        top + height * eighths[1],
        right - width * eighths[2],
        bottom - height * eighths[3],
    )


def _on_anchor_centre(pick: Picker, frame: Frame, _: Sequence[Box]) -> Box:
    return _on_grid(pick, frame, 0.5)


def _on_cell_edge(pick: Picker, frame: Frame, _: Sequence[Box]) -> Box:
    return _on_grid(pick, frame, 0.0)


def _on_grid(pick: Picker, frame: Frame, offset: float) -> Box:
    """Corners at whole cells plus `offset` of one level; the far corner may leave the image."""
    stride = pick.choice(frame.strides)
    near, far = [], []
    for length in (frame.width, frame.height):
        cells = length // stride
        first = pick.integer(0, cells - 1)
        near.append((first + offset) * stride)
        far.append((pick.integer(first + 1, cells) + offset) * stride)
    return near[0], near[1], far[0], far[1]


#: Every kind, the most ordinary first: Hypothesis shrinks towards it.
KINDS = {
    kind.name: kind
    for kind in (
        BoxKind("ordinary", _ordinary, share=8),
        BoxKind("tiny", _tiny),
        BoxKind("huge", _huge),
        BoxKind("thin", _thin),
        BoxKind("on-anchor-centre", _on_anchor_centre),
        BoxKind("on-cell-edge", _on_cell_edge),
        BoxKind("off-image", _off_image, share=1),
        BoxKind("zero-area", _zero_area, share=1),
        BoxKind("inverted", _inverted, share=1),
        BoxKind("identical", _identical, share=3, parents=lambda box: True),
        BoxKind("nested", _nested, share=3, parents=_has_area),
    )
}


def place_boxes(pick: Picker, frame: Frame, count: int, kinds: Sequence[str]) -> list[tuple[str, Box]]:
    """`count` boxes (pixels, xyxy) of one image, each with the name of its kind, out of `kinds`."""
    offered = [KINDS[name] for name in kinds for _ in range(KINDS[name].share)]
    placed: list[tuple[str, Box]] = []
    for _ in range(count):
        kind = pick.choice(offered)
        parents: list[Box] = []
        if kind.parents is not None:
            parents = [box for _, box in placed if kind.parents(box)]
            if not parents:
                kind = KINDS["ordinary"]
        placed.append((kind.name, kind.place(pick, frame, parents)))
    return placed


def centre_form(boxes: np.ndarray) -> np.ndarray:
    """Centre x, centre y, width and height (..., 4) of xyxy `boxes`, in the same unit."""
    near, far = boxes[..., :2], boxes[..., 2:]
    return np.concatenate([(near + far) / 2, far - near], axis=-1)
