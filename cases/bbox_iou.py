"""Cases of the element-wise overlaps: boxes of every kind in both forms, in shapes that broadcast."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from cases.anchor_targets import anchor_targets
from cases.boxes import drawn
from cases.case import DTYPES, Case
from cases.centre_pairs import pairs
from cases.flaws import Flaw, perhaps
from cases.labels import LabelImage
from cases.predictions import anchor_predictions
from cases.scenes import scene_from_labels

#: Change it whenever the same draws give another case.
STRATEGY_VERSION = 1

RELATIVES = ("IoU", "GIoU", "DIoU", "CIoU")
_FLAGS = RELATIVES[1:]
_COUNTS = (*range(1, 13), *range(1, 13), 40, 0)
_SPOILED = ("",) * 27 + ("nan", "inf", "minus-inf")
_SPECIAL = {"nan": np.nan, "inf": np.inf, "minus-inf": -np.inf}
#: Sides in one unit or another: pixels, cells, shares of the image.
_SIZES, _HALF_SIZES = (60.0, 20.0, 20.0, 400.0, 1.0, 1e-2), (20.0, 20.0, 60.0, 1.0)
_RARELY = (False,) * 24 + (True,)
#: What happens to single pairs besides: points, and boxes without width or height, alone or as a pair; very far boxes.
_EXTREMES = ("", "", "", "points", "point-and-box", "equal-points", "flat-twins", "far-away", "zeros")
_WITHOUT_AREA = {"flat", "flat-target", "points", "point-and-box", "equal-points", "flat-twins", "zeros"}
_LAYOUTS = ("pairs",) * 6 + ("images", "all-pairs", "all-pairs", "one-and-many", "one-box")


@st.composite
def cases(draw: st.DrawFn, *, dtypes: Sequence[str] = ("float32",)) -> Case:
    """Draw a case in one of `dtypes`; a half box stands beside a float32 one now and then."""
    pick = drawn(draw)
    dtype = pick.choice(dtypes)
    relative, xywh = pick.choice(("CIoU", "CIoU", *RELATIVES)), pick.choice((False, False, True))
    layout, extreme, spoiled = pick.choice(_LAYOUTS), pick.choice(_EXTREMES), pick.choice(_SPOILED)
    size = pick.choice(_HALF_SIZES if dtype == "float16" else _SIZES)
    size = 400.0 if pick.choice(_RARELY) else size
    seed, count = pick.integer(0, 2**16 - 1), pick.choice(_COUNTS)
    first, second, kinds = pairs(seed, count, size=size, whole=size > 1 and pick.choice((False, True)))
    settings = _settings(relative, xywh, pick.choice((1e-7,) * 8 + (1e-6, 0.01)))
    tags = {*kinds, layout}
    if count and extreme:
        _make_extreme(extreme, first, second, seed % count, dtype)
        tags.add(extreme)
    if dtype == "float16" or (dtype == "bfloat16" and relative == "GIoU"):
        # A slope of a box without area is 1e7 or more, which no float16 holds: infinite, and NaN upstream. And the GIoU
        # with such a box does not depend on the other's length: that slope is 0, and rounding in float32 as in half.
        for boxes in (first, second):
            boxes[:, 2:] = np.where(boxes[:, 2:] == 0, size / 4, boxes[:, 2:])
        tags -= _WITHOUT_AREA
    if not xywh:
        first, second = corners(first), corners(second)
    if count and spoiled:
        (first if seed % 2 else second)[seed % count, seed % 4] = _SPECIAL[spoiled]
        tags |= {"non-finite", spoiled}
    other = pick.choice((dtype, dtype, dtype, "float32")) if dtype != "float64" else dtype
    case = build(first, second, dtype, settings, f"drawn:bbox_iou/{STRATEGY_VERSION}", layout, other, tags)
    return perhaps(pick, FLAWS, case)


def from_labels(images: Sequence[LabelImage], stage: str, seed: int, dtype: str = "float32") -> Case:
    """Every anchor's prediction and a ground truth of its image, in cells: CIoU of corners, as the box loss asks."""
    scene = scene_from_labels(images, stage, seed)
    frame, strides = scene.frame, scene.frame.cells[:, 2:]
    found = anchor_predictions(stage, seed, frame, scene.boxes, scene.class_indices, scene.num_classes)
    targets = anchor_targets(scene, "all")
    truths = targets.boxes.copy()
    for image, boxes in enumerate(scene.boxes):
        follows = found.aims[image] >= 0
        truths[image, follows] = boxes[found.aims[image, follows]]
    first, second = ((boxes / strides).reshape(-1, 4) for boxes in (found.boxes, truths))
    origin = f"labels:{images[0].name}+{len(images) - 1}/{stage}/{seed}"
    return build(first, second, dtype, _settings("CIoU", False), origin, tags={"labelled", *scene.tags})


def allows(case: Case) -> bool:
    """Whether `cases` could have drawn `case`: there are no options, so it could."""
    return True


def build(
    first: np.ndarray,
    second: np.ndarray,
    dtype: str,
    settings: dict[str, Any],
    origin: str,
    layout: str = "pairs",
    other: str = "",
    tags: set[str] = frozenset(),
) -> Case:
    """The case of boxes (N, 4) and (N, 4) in the form that `settings` say; `layout` is how they meet."""
    one, two = torch.from_numpy(first).to(DTYPES[dtype]), torch.from_numpy(second).to(DTYPES[other or dtype])
    if layout == "images" and len(one) % 2 == 0:
        one, two = one.view(2, -1, 4), two.view(2, -1, 4)
    elif layout == "all-pairs":
        one, two = one[:, None], two[:9]
    elif layout == "one-and-many":
        one = one[:1]
    elif layout == "one-box" and len(one):
        one, two = one[0], two[0]
    flags = [name for name in _FLAGS if settings[name]]
    tags = {*tags, dtype, flags[-1] if flags else "IoU", "centres" if settings["xywh"] else "corners"}
    if not len(first):
        tags.add("empty")
    if other not in ("", dtype):
        tags.add("mixed-dtype")
    tensors = {"box1": one.contiguous(), "box2": two.contiguous()}
    return Case("bbox_iou", tensors, settings, origin, frozenset(tags))


def corners(boxes: np.ndarray) -> np.ndarray:
    """(N, 4) centre form as corners."""
    return np.concatenate([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], axis=1)


def _settings(relative: str, xywh: bool, eps: float = 1e-7) -> dict[str, Any]:
    return {"xywh": xywh, **{name: name == relative for name in _FLAGS}, "eps": eps}


def _make_extreme(kind: str, first: np.ndarray, second: np.ndarray, row: int, dtype: str) -> None:
    """Change one pair (centre form) in place."""
    one, two = first[row], second[row]
    if kind in ("points", "point-and-box"):
        one[2:] = 0
    if kind == "points":
        two[2:] = 0
    elif kind == "equal-points":
        one[:], two[:] = np.append(one[:2], (0, 0)), np.append(one[:2], (0, 0))
    elif kind == "flat-twins":
        one[2 + row % 2] = 0
        two[:] = one
    elif kind == "far-away":
        two[:2] += 100 if dtype == "float16" else 1e6
    elif kind == "zeros":
        one[:], two[:] = 0, 0


def _five_columns(tensors: dict[str, Tensor], _: dict[str, Any]) -> bool:
    tensors["box2"] = torch.nn.functional.pad(tensors["box2"], (0, 1))
    return True


def _one_box_less(tensors: dict[str, Tensor], _: dict[str, Any]) -> bool:
    first, second = tensors["box1"], tensors["box2"]
    tensors["box1"] = first[1:].clone()
    return first.shape == second.shape and first.ndim == 2 and len(first) > 2


FLAWS = (
    Flaw("five-columns", "what is no box", _five_columns),
    Flaw("one-box-less", "boxes without a partner", _one_box_less),
)

#: The table of boxes.md, section 9: the two boxes.
EDGES = {
    "identical": ((0, 0, 10, 10), (0, 0, 10, 10)),
    "equal-points": ((3, 3, 3, 3), (3, 3, 3, 3)),
    "equal-points-centres": ((3, 3, 0, 0), (3, 3, 0, 0)),
    "zeros": ((0, 0, 0, 0), (0, 0, 0, 0)),
    "point-and-box": ((0, 0, 0, 0), (1, 1, 2, 2)),
    "no-width": ((0, 0, 0, 10), (0, 0, 0, 10)),
    "no-height": ((0, 0, 10, 0), (0, 0, 10, 0)),
    "touching": ((0, 0, 10, 10), (10, 0, 20, 10)),
    "contained": ((0, 0, 10, 10), (2, 2, 4, 4)),
    "inverted": ((5, 5, 2, 2), (1, 1, 2, 2)),
    "far-apart": ((1, 1, 2, 2), (1e6, 1e6, 1e6 + 1, 1e6 + 1)),
    "infinite-corner": ((0, 0, np.inf, 10), (1, 1, 2, 2)),
    "minus-infinite-corner": ((-np.inf, 0, 5, 10), (1, 1, 2, 2)),
    "nan": ((0, np.nan, 5, 10), (1, 1, 2, 2)),
    "huge": ((0, 0, 1e19, 1e19), (0, 0, 1e19, 1e19)),
    "thin": ((0, 0, 10, 1e-6), (0, 0, 10, 2e-6)),
    "tiny-shares": ((0.5, 0.5, 0.51, 0.51), (0.5, 0.5, 0.51, 0.51)),
    "shared-left-edge": ((0, 0, 10, 10), (0, 5, 15, 20)),
}


def pinned_cases() -> Iterator[tuple[str, Case]]:
    """The worked example and the edge table of boxes.md, section 9, in every relative and both forms."""

    def case(pair: Any, relative: str, *tags: str, xywh: bool = False, dtype: str = "float32", other: str = "") -> Case:
        boxes = (np.array(box, dtype=np.float64).reshape(-1, 4) for box in pair)
        return build(*boxes, dtype, _settings(relative, xywh), "pinned", other=other, tags=set(tags))

    worked = ((0, 0, 10, 10), (5, 5, 15, 20))
    large = ((0, 0, 300, 300), (0, 0, 300, 300))
    finite = {name: pair for name, pair in EDGES.items() if np.isfinite(pair).all()}
    for relative in RELATIVES:
        yield f"{relative}-worked-example", case(worked, relative, "worked-example")
        for form, xywh in (("corners", False), ("centres", True)):
            yield f"{relative}-{form}-edges", case(zip(*finite.values(), strict=True), relative, "edges", xywh=xywh)
            for name in EDGES.keys() - finite.keys():
                yield f"{relative}-{form}-{name}", case(EDGES[name], relative, "non-finite", xywh=xywh)
        yield f"{relative}-large-float16", case(large, relative, "divergence:bbox-iou-half-overflow", dtype="float16")
        yield f"{relative}-identical-float16", case(EDGES["identical"], relative, dtype="float16")
    yield "large-bfloat16", case(large, "CIoU", dtype="bfloat16")
    yield "mixed", case(worked, "CIoU", "mixed-dtype", dtype="float16", other="float32")
    yield "no-boxes", case(((), ()), "CIoU", "empty")
