"""What the losses of YOLOX's head are called with, for a scene: raw rows and maps, label rows, and an assignment."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cases.boxes import Picker, centre_form
from cases.case import DTYPES
from cases.frame import Frame
from cases.predictions import anchor_predictions
from cases.scenes import Scene

#: Pixels: decoded sizes are exponentials, small and never zero.
_LEAST_SIDE = 0.1
#: Logits far beyond what a network answers, still finite in half.
_EXTREME = 1e4
#: Anchors that a ground truth has at most in `assignment`.
_ANCHORS = 10


@dataclass(frozen=True)
class Head:
    """Raw rows (B, N, 5 + C) float64: box values, objectness and class logits; decoded `boxes` (B, N, 4) in pixels,
    centre form; and `aims` (B, N), the ground truth that each anchor follows, or -1.
    """

    rows: np.ndarray
    boxes: np.ndarray
    aims: np.ndarray


def head(scene: Scene, *, extreme: bool = False) -> Head:
    """Predictions of the scene's kind; `extreme` puts logits of +-1e4 at a few places."""
    found = anchor_predictions(
        scene.prediction, scene.seed, scene.frame, scene.boxes, scene.class_indices, scene.num_classes
    )
    boxes = centre_form(found.boxes)
    boxes[..., 2:] = np.maximum(boxes[..., 2:], _LEAST_SIDE)
    cells, strides = scene.frame.cells[:, :2], scene.frame.cells[:, 2:]
    raw = np.concatenate([boxes[..., :2] / strides - cells, np.log(boxes[..., 2:] / strides)], axis=2)
    rows = np.concatenate([raw, found.objectness, found.logits], axis=2)
    if extreme and rows.size:
        rng = np.random.default_rng([scene.seed, 3])
        logits = rows[..., 4:]
        places = tuple(rng.integers(0, length, 4) for length in logits.shape)
        logits[places] = rng.choice([-_EXTREME, _EXTREME], 4)
    return Head(rows, boxes, found.aims)


def maps(rows: Tensor, frame: Frame) -> dict[str, Tensor]:
    """Raw rows (B, N, 5 + C) as the maps (B, 5 + C, H, W) of the levels: raw0, raw1 and so on."""
    found, start = {}, 0
    for level, stride in enumerate(frame.strides):
        height, width = frame.height // stride, frame.width // stride
        part = rows[:, start : start + height * width]
        found[f"raw{level}"] = part.mT.reshape(len(rows), rows.shape[2], height, width).clone()
        start += height * width
    return found


def grid(frame: Frame, dtype: str) -> dict[str, Tensor]:
    """Strides and cells of the anchors, (1, N) each."""
    columns, rows, strides = frame.cells.T
    cells = {"strides": strides, "x_shifts": columns, "y_shifts": rows}
    return {name: torch.from_numpy(cell[None].copy()).to(DTYPES[dtype]) for name, cell in cells.items()}


def label_rows(scene: Scene, extra: int = 0, gap: bool = False) -> Tensor:
    """(B, M, 5) float64 rows (class, cx, cy, w, h), zero rows after them; with `gap` one zero row between them.

    As upstream counts rows, a zero row between real ones is a ground truth, and the last real one is dropped.
    """
    rows = max(scene.counts, default=0) + extra + gap
    labels = np.zeros((len(scene.counts), rows, 5))
    for image, count in enumerate(scene.counts):
        place = np.arange(count) + ((np.arange(count) > 0) if gap else 0)
        labels[image, place, 0] = scene.labels[image]
        labels[image, place, 1:] = centre_form(scene.boxes[image])
    return torch.from_numpy(labels)


def assignment(scene: Scene, found: Head) -> tuple[np.ndarray, np.ndarray]:
    """(B, N): a few of the anchors that follow each ground truth, bool, and the row that each follows or 0, int64."""
    rng = np.random.default_rng([scene.seed, 4])
    mask = np.zeros(found.aims.shape, dtype=bool)
    for image, aims in enumerate(found.aims):
        for row in range(scene.counts[image]):
            followers = rng.permutation(np.flatnonzero(aims == row))
            mask[image, followers[:_ANCHORS]] = True
    return mask, np.maximum(found.aims, 0)


def overlaps(scene: Scene, found: Head, rows: np.ndarray) -> np.ndarray:
    """(B, N) IoU of each anchor's box with ground truth `rows` (B, N) of its image, 0 where that has no area."""
    matched = np.zeros(found.boxes.shape)
    for image, boxes in enumerate(scene.boxes):
        if len(boxes):
            matched[image] = centre_form(boxes)[rows[image]]
    low = np.maximum(matched[..., :2] - matched[..., 2:] / 2, found.boxes[..., :2] - found.boxes[..., 2:] / 2)
    high = np.minimum(matched[..., :2] + matched[..., 2:] / 2, found.boxes[..., :2] + found.boxes[..., 2:] / 2)
    inner = np.prod(np.maximum(high - low, 0), axis=2)
    areas = np.prod(matched[..., 2:], axis=2), np.prod(found.boxes[..., 2:], axis=2)
    return inner / np.maximum(areas[0] + areas[1] - inner, inner + np.finfo(float).tiny)


def autocast(pick: Picker, dtype: str) -> str | None:
    """The dtype whose autocast a case runs under: mostly none, and none in float64."""
    if dtype in ("float16", "bfloat16"):
        return pick.choice((None, None, None, dtype))
    return pick.choice((None,) * 8 + ("bfloat16", "float16")) if dtype == "float32" else None


def spoiled_places(rows: Tensor, kind: str) -> Mapping[str, Tensor]:
    """Where a NaN or infinity may go: upstream rejects NaN logits of candidates, so only boxes become NaN."""
    places = {"boxes": rows[..., :4], "obj": rows[..., 4:5], "cls": rows[..., 5:]}
    return {"boxes": places["boxes"]} if kind == "nan-one-place" else places


def to_dtype(arrays: Mapping[str, np.ndarray], dtype: str) -> dict[str, Tensor]:
    """The arrays as tensors of a dtype."""
    return {name: torch.from_numpy(np.ascontiguousarray(array)).to(DTYPES[dtype]) for name, array in arrays.items()}


WAVE_CHANNELS = 7


def wave_rows(images: int = 1) -> Tensor:
    """The raw rows (B, 20, 7) of simota.md, section 5: 0.5 sin(0.7 a + 1.3 c + 0.4 b), float64."""
    anchor = torch.arange(20, dtype=torch.float64)[None, :, None]
    channel = torch.arange(WAVE_CHANNELS, dtype=torch.float64)
    return 0.5 * torch.sin(0.7 * anchor + 1.3 * channel + 0.4 * torch.arange(images)[:, None, None])


WAVE_FRAME = Frame(32, 32, (8, 16))
#: Label rows of the worked example: class 1, then class 0.
WAVE_LABELS: Sequence[Sequence[float]] = ((1, 10, 12, 14, 16), (0, 20, 22, 18, 12))
