"""Cases of the codec from distances to boxes."""

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


@st.composite
def cases(draw: st.DrawFn, *, dtypes: Sequence[str] = ("float32",)) -> Case:
    """Draw a case in one of `dtypes`; half distances stand beside float32 points now and then."""
    pick = drawn(draw)
    dtype = pick.choice(dtypes)
    sides = draw_sides(pick, dtype)
    points = pick.choice((dtype, dtype, "float32")) if dtype != "float64" else dtype
    xywh, first = pick.choice((True, False)), pick.choice((False, False, True))
    origin = f"drawn:dist2bbox/{STRATEGY_VERSION}"
    case = build(
        sides.distances, sides.points, dtype, origin, xywh, channels_first=first, points_dtype=points, tags=sides.tags
    )
    return perhaps(pick, FLAWS, case)


def from_labels(images: Sequence[LabelImage], stage: str, seed: int, dtype: str = "float32") -> Case:
    """Every anchor of a batch of labelled `images`: noisy distances to its ground truth, in cells, to corners."""
    scene = scene_from_labels(images, stage, seed)
    strides = scene.frame.cells[:, 2:]
    points, boxes = scene.frame.points / strides, anchor_targets(scene, "all").boxes / strides
    distances = np.concatenate([points - boxes[..., :2], boxes[..., 2:] - points], axis=2)
    distances += 0.3 * np.random.default_rng([seed, 8]).standard_normal(distances.shape)
    origin = f"labels:{images[0].name}+{len(images) - 1}/{stage}/{seed}"
    return build(distances, points, dtype, origin, xywh=False, tags={"labelled", *scene.tags})


def allows(case: Case) -> bool:
    """Whether `cases` could have drawn `case`: there are no options, so it could."""
    return True


def build(
    distances: np.ndarray,
    points: np.ndarray,
    dtype: str,
    origin: str,
    xywh: bool,
    *,
    channels_first: bool = False,
    points_dtype: str = "",
    tags: set[str] = frozenset(),
) -> Case:
    """The case of distances (..., 4) and points (..., 2); with `channels_first` the last two dims change places."""
    tensors = {
        "distance": torch.from_numpy(distances).to(DTYPES[dtype]),
        "anchor_points": torch.from_numpy(points).to(DTYPES[points_dtype or dtype]),
    }
    dim = -1
    tags = {*tags, dtype, "centres" if xywh else "corners"}
    if channels_first and points.ndim > 1 and distances.ndim >= points.ndim:
        tensors = {name: tensor.mT.contiguous() for name, tensor in tensors.items()}
        dim = distances.ndim - 2
        tags.add("channels-first")
    if points_dtype not in ("", dtype):
        tags.add("mixed-dtype")
    return Case("dist2bbox", tensors, {"xywh": xywh, "dim": dim}, origin, frozenset(tags))


def _points_missing(tensors: dict[str, Tensor], settings: dict[str, Any]) -> bool:
    points, axis = tensors["anchor_points"], -2 if settings["dim"] == -1 else -1
    if points.ndim < 2 or points.shape[axis] < 3 or tensors["distance"].ndim < 2 or tensors["distance"].shape[axis] < 3:
        return False
    tensors["anchor_points"] = points.narrow(axis, 0, points.shape[axis] - 1)
    return True


def _five_distances(tensors: dict[str, Tensor], settings: dict[str, Any]) -> bool:
    distance, dim = tensors["distance"], settings["dim"]
    tensors["distance"] = torch.cat((distance, distance.narrow(dim, 0, 1)), dim)
    return distance.numel() > 0


def _no_such_dim(tensors: dict[str, Tensor], settings: dict[str, Any]) -> bool:
    settings["dim"] = 7
    return True


FLAWS = (
    Flaw("points-missing", "distances from nowhere", _points_missing),
    Flaw("five-distances", "a box has four sides", _five_distances),
    Flaw("no-such-dim", "the coordinates lie nowhere", _no_such_dim),
)


def pinned_cases() -> Iterator[tuple[str, Case]]:
    """The worked examples of boxes.md, section 2, and what its definition is silent about."""
    proper, inverted, point = (1, 2, 3, 4.5), (-1, -2, 0.5, 1), (2.5, 3.5)

    def case(distances: Any, points: Any, xywh: bool, *tags: str, dtype: str = "float32", **kind: Any) -> Case:
        numbers = (np.array(values, dtype=np.float64) for values in (distances, points))
        return build(*numbers, dtype, "pinned", xywh, tags=set(tags), **kind)

    for form, xywh in (("corners", False), ("centres", True)):
        yield f"{form}-worked-example", case(proper, point, xywh, "worked-example")
        yield f"{form}-inverted", case(inverted, point, xywh, "worked-example")
        yield f"{form}-channels-first", case([[proper] * 3] * 2, [[point] * 3], xywh, channels_first=True)
        yield f"{form}-no-anchors", case(np.zeros((2, 0, 4)), np.zeros((0, 2)), xywh, "empty")
        infinite = (np.inf, 1, np.inf, np.nan)
        yield f"{form}-non-finite", case(infinite, point, xywh, "non-finite")
        yield f"{form}-float16-overflow", case((6e4, 0, 6e4, 1), (6e4, 1), xywh, "overflow", dtype="float16")
    # The side is the difference of rounded corners: 2e7 + 1 is not a float32.
    yield "rounded-corners", case((1, 1, 1, 1), (2e7, 1), True, "rounded")
