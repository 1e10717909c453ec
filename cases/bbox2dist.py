"""Cases of the codec from boxes to distances, with and without a bound."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from cases.anchor_targets import anchor_targets
from cases.boxes import drawn
from cases.case import DTYPES, Case
from cases.codec_inputs import draw_sides
from cases.flaws import Flaw, perhaps
from cases.labels import LabelImage
from cases.scenes import scene_from_labels

#: Change it whenever the same draws give another case.
STRATEGY_VERSION = 1

_BOUNDS = (15, 15, 15, 7, 3, 1, 0, 0.005, -2, 15.5)
_ON_A_BOUND = (False, False, False, True)


@st.composite
def cases(draw: st.DrawFn, *, dtypes: Sequence[str] = ("float32",), unbounded: bool = True) -> Case:
    """Draw a case in one of `dtypes`; releases before 8.4.0 need a bound: `unbounded` is False."""
    pick = drawn(draw)
    dtype = pick.choice(dtypes)
    sides = draw_sides(pick, dtype)
    points = pick.choice((dtype, dtype, "float32")) if dtype != "float64" else dtype
    reg_max = pick.choice((*_BOUNDS, *((None,) * 4 if unbounded else ())))
    tags, distances, origins = set(sides.tags), sides.distances, sides.points
    if reg_max is not None and pick.choice(_ON_A_BOUND):
        # From the origin the distances are the coordinates: they meet the rounded bound exactly.
        origins, tags = np.zeros_like(origins), tags | {"on-a-bound"}
        bound = float(torch.tensor(reg_max - 0.01, dtype=DTYPES[dtype]))
        distances = np.where(distances > np.nanmedian(distances), bound, distances) if distances.size else distances
    case = build(
        origins,
        boxes_around(origins, distances),
        dtype,
        reg_max,
        f"drawn:bbox2dist/{STRATEGY_VERSION}",
        points_dtype=points,
        tags=tags,
    )
    return perhaps(pick, FLAWS, case)


def from_labels(images: Sequence[LabelImage], stage: str, seed: int, dtype: str = "float32", **_release: bool) -> Case:
    """The ground truth of every anchor of a batch of labelled `images`, in cells, bounded for 16 bins."""
    scene = scene_from_labels(images, stage, seed)
    strides = scene.frame.cells[:, 2:]
    boxes = anchor_targets(scene, "all").boxes / strides
    origin = f"labels:{images[0].name}+{len(images) - 1}/{stage}/{seed}"
    return build(scene.frame.points / strides, boxes, dtype, 15, origin, tags={"labelled", *scene.tags})


def allows(case: Case, *, unbounded: bool = True) -> bool:
    """Whether `cases` with these options could have drawn `case`."""
    return unbounded or case.settings["reg_max"] is not None


def boxes_around(points: np.ndarray, distances: np.ndarray) -> np.ndarray:
    """Corners of the shape of `distances` (..., 4): around their own points, or, where these are more, the first."""
    shape = (*distances.shape[:-1], 2)
    if np.broadcast_shapes(points.shape, shape) != shape:
        points = points.reshape(-1, 2)[:1].sum(axis=0)
    return np.concatenate([points - distances[..., :2], points + distances[..., 2:]], axis=-1)


def build(
    points: np.ndarray,
    boxes: np.ndarray,
    dtype: str,
    reg_max: float | None,
    origin: str,
    *,
    points_dtype: str = "",
    tags: set[str] = frozenset(),
) -> Case:
    """The case of points (..., 2) and corners (..., 4)."""
    tensors = {
        "anchor_points": torch.from_numpy(points).to(DTYPES[points_dtype or dtype]),
        "bbox": torch.from_numpy(boxes).to(DTYPES[dtype]),
    }
    tags = {*tags, dtype, "unbounded" if reg_max is None else f"bound-{reg_max:g}"}
    if points_dtype not in ("", dtype):
        tags.add("mixed-dtype")
    return Case("bbox2dist", tensors, {"reg_max": reg_max}, origin, frozenset(tags))


def _boxes_missing(tensors: dict[str, Tensor], _: dict[str, Any]) -> bool:
    points, boxes = tensors["anchor_points"], tensors["bbox"]
    if points.ndim < 2 or boxes.ndim < 2 or points.shape[-2] < 2 or boxes.shape[-2] < 3:
        return False
    tensors["bbox"] = boxes.narrow(-2, 0, boxes.shape[-2] - 1)
    return True


def _five_columns(tensors: dict[str, Tensor], _: dict[str, Any]) -> bool:
    tensors["bbox"] = torch.nn.functional.pad(tensors["bbox"], (0, 1))
    return True


FLAWS = (
    Flaw("boxes-missing", "points of no box", _boxes_missing),
    Flaw("five-columns", "what is no box", _five_columns),
)


def pinned_cases() -> Iterator[tuple[str, Case]]:
    """The worked examples of boxes.md, section 3, and its edge cases."""

    def case(box: Any, reg_max: float | None, *tags: str, point: Any = (2.5, 3.5), dtype: str = "float32") -> Case:
        numbers = (np.array(values, dtype=np.float64) for values in (point, box))
        return build(*numbers, dtype, reg_max, "pinned", tags=set(tags))

    proper, far = (1.5, 1.5, 5.5, 8), (-1e3, 3.5, 2.5, 1e3)
    yield "worked-example", case(proper, None, "worked-example")
    yield "worked-example-bound", case(proper, 4, "worked-example")
    yield "inverted", case((3, 3, 3, 3), None, "worked-example")
    yield "inverted-bound", case((3, 3, 3, 3), 15, "worked-example")
    for dtype in DTYPES:
        yield f"beyond-the-bound-{dtype}", case(far, 15, dtype=dtype)
        bound = float(torch.tensor(15 - 0.01, dtype=DTYPES[dtype]))
        yield f"on-the-bound-{dtype}", case((-bound, 0, bound, 0), 15, "on-a-bound", point=(0, 0), dtype=dtype)
    yield "no-bins", case(proper, 0)
    yield "bound-below-zero", case(proper, 0.005)
    special = (np.nan, np.inf, np.inf, 5)
    yield "non-finite", case(special, None, "non-finite")
    yield "non-finite-bound", case(special, 15, "non-finite")
    yield "no-anchors", case(np.zeros((2, 0, 4)), 15, "empty", point=np.zeros((0, 2)))
