"""Prediction kinds: what a detector would answer at stages of its training, and what breaks assigners.

The arrays come from a NumPy generator with a given seed, in float64; an operation casts them and puts them into
its own layout.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cases.frame import Frame


@dataclass(frozen=True)
class Stage:
    """How far training has come.

    `learned` is the share of anchors (queries) that follow their ground truth at all, `noise` the standard
    deviation of their corners in units of the box's sides, `background` and `hit` the mean logits of a wrong and
    of the right class, `spread` their standard deviation.
    """

    learned: float
    noise: float
    background: float
    hit: float
    spread: float


#: A fresh head answers 0.01 everywhere (logit -4.6, the focal prior); a trained one 0.9 at the right class.
STAGES = {
    "early": Stage(learned=0.15, noise=0.6, background=-4.6, hit=-4.2, spread=0.4),
    "mid": Stage(learned=0.7, noise=0.2, background=-5.0, hit=-1.0, spread=1.0),
    "late": Stage(learned=1.0, noise=0.04, background=-7.0, hit=2.2, spread=1.2),
}

#: Kinds that are a stage with something done to it, and the stage.
_VARIANTS = {
    "saturated": Stage(learned=1.0, noise=0.0, background=-30.0, hit=30.0, spread=0.0),
    "uniform": Stage(learned=0.0, noise=0.0, background=0.0, hit=0.0, spread=0.0),
    "tied": STAGES["mid"],
    "nan-one-place": STAGES["mid"],
    "inf-one-place": STAGES["mid"],
}

#: Every prediction kind and its weight among drawn cases; few are non-finite, so most cases have an answer.
KINDS = {
    "late": 6,
    "mid": 6,
    "early": 4,
    "uniform": 2,
    "tied": 3,
    "saturated": 2,
    "nan-one-place": 1,
    "inf-one-place": 1,
}

#: Pixels by which a prediction may leave the image.
MARGIN = 16


@dataclass(frozen=True)
class Predictions:
    """What a head gives, float64: class `logits` (B, A, C), `objectness` logits (B, A, 1), `boxes` (B, A, 4) xyxy
    in pixels; and `aims` (B, A) int64, the row in the image that each anchor or query follows, or -1.
    """

    logits: np.ndarray
    objectness: np.ndarray
    boxes: np.ndarray
    aims: np.ndarray


def anchor_predictions(
    kind: str,
    seed: int,
    frame: Frame,
    boxes: Sequence[np.ndarray],
    labels: Sequence[np.ndarray],
    num_classes: int,
) -> Predictions:
    """Predictions of kind `kind` at every anchor of `frame`.

    `boxes` holds (n_b, 4) float64 xyxy in pixels and `labels` (n_b,) int64 class indices of every image.
    """
    rng = np.random.default_rng(seed)
    stage = _stage(kind)
    points, strides = frame.points, frame.cells[:, 2:]
    images = []
    for image_boxes, image_labels in zip(boxes, labels, strict=True):
        # A fresh head predicts a box of a few cells around its own anchor.
        shape = (frame.anchors, 2)
        reach = np.full(shape, 1.5) if kind == "uniform" else np.exp(rng.normal(0.5, 0.5, shape))
        own = np.concatenate([points - reach * strides, points + reach * strides], axis=1)
        aims = _aims(points, image_boxes)
        images.append(_answer(stage, rng, own, aims, image_boxes, image_labels, num_classes))
    return _finish(kind, images, frame, num_classes)


def query_predictions(
    kind: str,
    seed: int,
    frame: Frame,
    boxes: Sequence[np.ndarray],
    labels: Sequence[np.ndarray],
    num_classes: int,
    queries: int,
) -> Predictions:
    """Predictions of kind `kind` of `queries` free queries; arguments as for `anchor_predictions`."""
    rng = np.random.default_rng(seed)
    stage = _stage(kind)
    images = []
    for image_boxes, image_labels in zip(boxes, labels, strict=True):
        size = np.array([frame.width, frame.height], dtype=np.float64)
        centres = np.full((queries, 2), 0.5) if kind == "uniform" else rng.uniform(0.1, 0.9, (queries, 2))
        sides = np.full((queries, 2), 0.5) if kind == "uniform" else rng.uniform(0.02, 0.6, (queries, 2))
        own = np.concatenate([(centres - sides / 2) * size, (centres + sides / 2) * size], axis=1)
        # Each ground truth has one query of its own where there are enough; a third of the rest follow along.
        aims = np.full(queries, -1)
        order = rng.permutation(queries)
        count = min(queries, len(image_boxes))
        aims[order[:count]] = rng.permutation(len(image_boxes))[:count]
        if count:
            followers = order[count:][rng.random(queries - count) < 1 / 3]
            aims[followers] = rng.integers(0, len(image_boxes), followers.size)
        images.append(_answer(stage, rng, own, aims, image_boxes, image_labels, num_classes))
    return _finish(kind, images, frame, num_classes)


def spoil(kind: str, seed: int, aims: np.ndarray, tensors: Mapping[str, Tensor]) -> bool:
    """Put the NaN or infinity of a "...-one-place" kind into one of `tensors` (B, A, ...), in place.

    Prefers an anchor that follows a ground truth, where it matters. Returns whether there was anything to spoil.
    """
    if kind not in ("nan-one-place", "inf-one-place") or aims.size == 0:
        return False
    rng = np.random.default_rng([seed, 1])
    name = sorted(tensors)[rng.integers(len(tensors))]
    followers = np.argwhere(aims >= 0)
    places = followers if len(followers) else np.argwhere(aims < 0)
    image, anchor = places[rng.integers(len(places))]
    row = tensors[name][image, anchor]
    row[rng.integers(len(row))] = torch.nan if kind == "nan-one-place" else torch.inf
    return True


def _stage(kind: str) -> Stage:
    return STAGES[kind] if kind in STAGES else _VARIANTS[kind]


def _aims(points: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """(A,) int64: the smallest of `boxes` that contains each point, or -1.

    The anchor nearest to a box that contains none follows it too, as in a trained head.
    """
    if not len(boxes):
        return np.full(len(points), -1)
    near, far = (
        np.minimum(boxes[:, None, :2], boxes[:, None, 2:]),
        np.maximum(boxes[:, None, :2], boxes[:, None, 2:]),
    )
    inside = ((points > near) & (points < far)).all(axis=2)
    areas = np.prod(far - near, axis=2)
    aims = np.where(inside.any(axis=0), np.where(inside, areas, np.inf).argmin(axis=0), -1)
    for row in np.flatnonzero(~inside.any(axis=1)):
        distance = np.abs(points - (boxes[row, :2] + boxes[row, 2:]) / 2).sum(axis=1)
        aims[distance.argmin()] = row
    return aims


def _answer(
    stage: Stage,
    rng: np.random.Generator,
    own: np.ndarray,
    aims: np.ndarray,
    boxes: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Logits, objectness, boxes and aims of one image."""
    aims = np.where(rng.random(len(aims)) < stage.learned, aims, -1)
    logits = stage.background + stage.spread * rng.standard_normal((len(aims), num_classes))
    objectness = stage.background + stage.spread * rng.standard_normal((len(aims), 1))
    predicted = own.copy()
    anchors = np.flatnonzero(aims >= 0)
    if anchors.size:
        rows = aims[anchors]
        targets = boxes[rows]
        sides = np.tile(np.abs(targets[:, 2:] - targets[:, :2]), 2)
        noisy = targets + stage.noise * sides * rng.standard_normal(targets.shape)
        predicted[anchors] = noisy
        rise = stage.hit - stage.background
        logits[anchors, np.clip(labels[rows], 0, num_classes - 1)] += rise
        objectness[anchors, 0] += rise
    return logits, objectness, predicted, aims


def _finish(
    kind: str,
    images: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]],
    frame: Frame,
    num_classes: int,
) -> Predictions:
    """Stack the images, keep boxes ordered and near the image, and tie neighbours of the kind "tied"."""
    if images:
        logits, objectness, boxes, aims = (np.stack(part) for part in zip(*images, strict=True))
    else:
        logits, objectness = np.zeros((0, frame.anchors, num_classes)), np.zeros((0, frame.anchors, 1))
        boxes, aims = np.zeros((0, frame.anchors, 4)), np.zeros((0, frame.anchors), dtype=np.int64)
    boxes = np.concatenate(
        [np.minimum(boxes[..., :2], boxes[..., 2:]), np.maximum(boxes[..., :2], boxes[..., 2:])], axis=2
    )
    limits = np.array([frame.width, frame.height] * 2) + MARGIN
    boxes = np.clip(boxes, -MARGIN, limits)
    if kind == "tied":
        # Bit-identical twins: whatever is computed from one anchor is computed from its neighbour.
        count = boxes.shape[1] // 2 * 2
        for part in (logits, objectness, boxes):
            part[:, 1:count:2] = part[:, 0:count:2]
        logits, objectness = np.round(logits), np.round(objectness)
    return Predictions(logits, objectness, boxes, aims)
