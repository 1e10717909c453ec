"""What an assigner might have told the anchors of a scene: foreground, target boxes, labels and scores."""

from dataclasses import dataclass

import numpy as np

from cases.scenes import Scene, inside

#: Anchors that a ground truth gets, as in the trainers.
_POSITIVES = 10
#: How much of an image is foreground: what an assigner gives, every anchor, or none.
FOREGROUNDS = ("assigned", "assigned", "assigned", "assigned", "all", "none")


@dataclass(frozen=True)
class AnchorTargets:
    """Of every anchor (B, A): `foreground`, `rows` (the ground truth in its image, 0 in the background), `values` (the
    target score, 0 in the background, float64), `labels`; and `boxes` (B, A, 4) float64 xyxy, pixels.
    """

    foreground: np.ndarray
    rows: np.ndarray
    values: np.ndarray
    labels: np.ndarray
    boxes: np.ndarray


def anchor_targets(scene: Scene, foreground: str = "assigned") -> AnchorTargets:
    """Targets of `scene`, `foreground` one of `FOREGROUNDS`; an image without ground truths has none.

    Every ground truth gets the anchors inside it that are nearest to its centre, and the nearest one of all where none
    is inside. Scores are spread over (0, 1], some of them exactly 1 and some tiny.
    """
    rng = np.random.default_rng([scene.seed, 5])
    shape = (len(scene.images), scene.frame.anchors)
    chosen, rows = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=np.int64)
    labels, boxes = np.zeros(shape, dtype=np.int64), np.zeros((*shape, 4))
    for image, (truths, classes) in enumerate(zip(scene.boxes, scene.class_indices, strict=True)):
        if not len(truths):
            continue
        if foreground == "all":
            chosen[image], rows[image] = True, rng.integers(0, len(truths), shape[1])
        elif foreground == "assigned":
            _assign(scene.frame.points, truths, chosen[image], rows[image])
        labels[image], boxes[image] = classes[rows[image]], truths[rows[image]]
    kinds = rng.random(shape)
    values = np.where(kinds < 0.1, 1.0, np.where(kinds < 0.2, 1e-6 * (1 + kinds), rng.uniform(0.05, 1, shape)))
    return AnchorTargets(chosen, rows, np.where(chosen, values, 0.0), labels, boxes)


def _assign(points: np.ndarray, truths: np.ndarray, chosen: np.ndarray, rows: np.ndarray) -> None:
    within = inside(points, truths)
    for row, box in enumerate(truths):
        distance = np.abs(points - (box[:2] + box[2:]) / 2).sum(axis=1)
        distance = np.where(within[row], distance, np.inf) if within[row].any() else distance
        nearest = np.argsort(distance, kind="stable")[: _POSITIVES if within[row].any() else 1]
        nearest = nearest[np.isfinite(distance[nearest])]
        chosen[nearest], rows[nearest] = True, row
