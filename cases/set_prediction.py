"""What the set losses of DETR and YOLOS are called with, for a scene: predictions, targets, pairs and masks."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cases import boxes as box_kinds
from cases.boxes import Picker, centre_form
from cases.case import DTYPES
from cases.frame import Frame
from cases.predictions import query_predictions, spoil
from cases.scenes import Scene, common_tags

HALVES = ("float16", "bfloat16")
#: Boxes that upstream takes: one with a negative side is a flaw.
BOX_KINDS = tuple(kind for kind in box_kinds.KINDS if kind != "inverted")
QUERIES = (100, 50, 300)
RARELY = (False,) * 19 + (True,)
NOW_AND_THEN = (False,) * 5 + (True,)

#: A sigmoid never gives 0: the least side of a predicted box, as a share of the image.
_LEAST_SIDE = 1e-3
_EXTREME_LOGITS = (30.0, -30.0, 1e4, -1e4)


@dataclass(frozen=True)
class Queries:
    """Predictions of one layer: `logits` (B, Q, C + 1), `boxes` (B, Q, 4), and `aims` (B, Q), the target that each
    query follows, or -1."""

    logits: Tensor
    boxes: Tensor
    aims: np.ndarray


def query_count(pick: Picker, scene: Scene) -> int:
    """Draw Q: few in small scenes, fewer than targets now and then."""
    return pick.integer(1, 16) if "small" in scene.tags else pick.choice(QUERIES)


def predict(
    scene: Scene,
    dtype: str,
    queries: int,
    *,
    layer: int = 0,
    box_dtype: torch.dtype | None = None,
    extreme: bool = False,
    flat: bool = False,
) -> Queries:
    """Predictions of the scene's kind; `extreme` puts logits of ±30 and ±1e4 at a few places, `flat` takes the width or
    the height from every third box."""
    seed = scene.seed + layer
    # No object is one more column, which no ground truth follows.
    columns = scene.num_classes + 1
    found = query_predictions(scene.prediction, seed, scene.frame, scene.boxes, scene.class_indices, columns, queries)
    boxes = normalised(found.boxes, scene.frame)
    if scene.prediction != "saturated":
        boxes[..., 2:] = np.maximum(boxes[..., 2:], _LEAST_SIDE)
    rng = np.random.default_rng([seed, 2])
    if flat:
        places = rng.random(boxes[..., 2:].shape) < 1 / 3
        boxes[..., 2:][places] = 0
    logits = torch.from_numpy(found.logits).to(DTYPES[dtype])
    if extreme and logits.numel():
        places = torch.from_numpy(rng.integers(0, logits.numel(), 3))
        logits.view(-1)[places] = torch.from_numpy(rng.choice(_EXTREME_LOGITS, 3)).to(logits.dtype)
    return Queries(logits, torch.from_numpy(boxes).to(box_dtype or DTYPES[dtype]), found.aims)


def targets(scene: Scene, box_dtype: torch.dtype) -> dict[str, Tensor]:
    """`labels` (G,) int64 and `boxes` (G, 4) normalised, image after image."""
    boxes = [normalised(image, scene.frame) for image in scene.boxes]
    return {
        "labels": torch.from_numpy(np.concatenate(scene.class_indices)),
        "boxes": torch.from_numpy(np.concatenate(boxes)).to(box_dtype),
    }


def normalised(boxes: np.ndarray, frame: Frame) -> np.ndarray:
    """Centre form as shares of the image (..., 4), of xyxy `boxes` in pixels."""
    return centre_form(boxes) / np.array([frame.width, frame.height] * 2, dtype=np.float64)


def pairs(scene: Scene, aims: np.ndarray, *, partial: bool = False) -> tuple[dict[str, Tensor], list[int]]:
    """Pairs as a matcher gives them, `queries` and `targets` (P,) int64 within their image, and how many of each image.

    A target goes to a query that follows it where there is one. `partial` leaves some targets out, as no matcher does.
    """
    rng = np.random.default_rng([scene.seed, 4])
    found, counts = [], []
    for image, own in zip(scene.boxes, aims, strict=True):
        free, chosen = list(rng.permutation(len(own))), []
        for target in rng.permutation(len(image)):
            if not free or (partial and rng.random() < 1 / 3):
                continue
            query = next((query for query in free if own[query] == target), free[0])
            free.remove(query)
            chosen.append((query, target))
        counts.append(len(chosen))
        found += sorted(chosen)
    index = torch.tensor(found, dtype=torch.int64).view(-1, 2)
    return {"queries": index[:, 0].clone(), "targets": index[:, 1].clone()}, counts


@dataclass(frozen=True)
class Masks:
    """Mask `logits` (B, Q, h, w), `masks` (G, H, W) padded with background, and the size of each image's masks."""

    logits: Tensor
    masks: Tensor
    sizes: list[list[int]]


def masks(
    scene: Scene,
    aims: np.ndarray,
    dtype: str,
    small: tuple[int, int],
    sizes: list[list[int]],
    *,
    kind: torch.dtype = torch.bool,
    extreme: bool = False,
) -> Masks:
    """Ellipses in the boxes of `scene`, on grids of `sizes` an image, and logits on a grid `small`.

    Logits of a query that follows a target are high inside of it, by as much as the stage of the scene has learned.
    """
    rng = np.random.default_rng([scene.seed, 5])
    spread = {"late": 0.5, "mid": 1.0, "saturated": 0.0}.get(scene.prediction, 2.0)
    # Beyond 14 a gradient of nothing but saturated pixels is what float64 rounds of it.
    rise = {"late": 6.0, "mid": 2.0, "saturated": 14.0, "uniform": 0.0}.get(scene.prediction, 0.5)
    logits = spread * rng.standard_normal((*aims.shape, *small))
    height, width = (max(sizes[image][axis] for image in range(len(sizes))) for axis in (0, 1))
    every = []
    for image, (boxes, own, size) in enumerate(zip(scene.boxes, aims, sizes, strict=True)):
        padded = np.zeros((len(boxes), height, width))
        padded[:, : size[0], : size[1]] = _ellipses(boxes, scene.frame, size)
        every.append(padded)
        followers = np.flatnonzero(own >= 0)
        logits[image, followers] += rise * (2 * _ellipses(boxes, scene.frame, small)[own[followers]] - 1)
    if scene.prediction == "uniform":
        logits[:] = 0
    if extreme and logits.size:
        logits.reshape(-1)[rng.integers(0, logits.size, 3)] = rng.choice((30.0, -30.0, 1e3, -1e3), 3)
    found = torch.from_numpy(np.concatenate(every)).to(kind)
    return Masks(torch.from_numpy(logits).to(DTYPES[dtype]), found, sizes)


def _ellipses(boxes: np.ndarray, frame: Frame, size: tuple[int, int] | list[int]) -> np.ndarray:
    """(n, H, W) 0 or 1: cells of a grid over the image whose centre lies in the ellipse in a box."""
    y, x = ((np.arange(count) + 0.5) / count for count in size)
    cx, cy, w, h = (part[:, None, None] for part in normalised(boxes, frame).T)
    with np.errstate(divide="ignore", invalid="ignore"):
        inside = ((x - cx) / (w / 2)) ** 2 + ((y[:, None] - cy) / (h / 2)) ** 2 <= 1
    return inside.astype(np.float64)


def draw_masks(pick: Picker, images: int) -> tuple[tuple[int, int], list[list[int]], torch.dtype]:
    """Draw the grid of the logits, the sizes of the masks of each image, and their dtype; equal sizes now and then."""
    small = pick.integer(1, 5), pick.integer(1, 5)
    if pick.choice(NOW_AND_THEN):
        sizes = [list(small)] * images
    else:
        sizes = [[pick.integer(1, 10), pick.integer(1, 10)] for _ in range(images)]
    return small, sizes, pick.choice((torch.bool, torch.bool, torch.uint8, torch.float32))


def spoiled(scene: Scene, queries: Queries, tensors: dict[str, Tensor]) -> bool:
    """Put the NaN or infinity of a "...-one-place" scene into one of `tensors`; upstream rejects NaN boxes."""
    if scene.prediction == "nan-one-place":
        tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith("boxes")}
    return bool(tensors) and spoil(scene.prediction, scene.seed, queries.aims, tensors)


def tags(scene: Scene, dtype: str, queries: int) -> set[str]:
    """The tags that every set loss has."""
    found = common_tags(scene, dtype)
    if max(scene.counts) > queries:
        found.add("more-targets-than-queries")
    if scene.num_classes == 1:
        found.add("one-class")
    return found


def autocast(pick: Picker, dtype: str) -> str | None:
    """The dtype whose autocast a case runs under: mostly none, and none in float64."""
    if dtype in HALVES:
        return pick.choice((None, None, None, dtype))
    return pick.choice((None,) * 8 + HALVES) if dtype == "float32" else None


def wave(shape: tuple[int, ...], a: float, b: float, amplitude: float, offset: float) -> Tensor:
    """S of set_prediction.md, A13: offset + amplitude sin(a i + b) over the row-major index, float32."""
    index = torch.arange(math.prod(shape), dtype=torch.float64)
    return (offset + amplitude * torch.sin(a * index + b)).float().view(shape)


def example() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Predictions and targets of A13: two images, four queries, three classes."""
    tensors = {
        "logits": wave((2, 4, 4), 0.9, 0.3, 2, 0),
        "pred_boxes": wave((2, 4, 4), 1.1, 0.5, 0.15, 0.4),
        "labels": torch.tensor([0, 2, 1]),
        "boxes": torch.tensor([[0.3, 0.4, 0.2, 0.3], [0.6, 0.5, 0.4, 0.2], [0.5, 0.5, 0.3, 0.3]]),
    }
    return tensors, {"sizes": [2, 1]}


def example_pairs() -> tuple[dict[str, Tensor], list[int]]:
    """The pairs of A13, and how many each image has."""
    return {"queries": torch.tensor([2, 3, 2]), "targets": torch.tensor([0, 1, 0])}, [2, 1]


def example_masks() -> tuple[dict[str, Tensor], list[list[int]]]:
    """The masks of A13, padded, and their sizes."""
    masks = torch.zeros(3, 6, 8, dtype=torch.bool)
    masks[:2] = wave((2, 6, 8), 0.5, 0.1, 1, 0) > 0
    masks[2:, :5, :7] = wave((1, 5, 7), 0.4, 0.3, 1, 0) > 0
    return {"pred_masks": wave((2, 4, 3, 4), 0.7, 0.2, 2, 0), "masks": masks}, [[6, 8], [5, 7]]
