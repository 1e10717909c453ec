"""Scenes: image size, levels, ragged ground truths and a prediction kind; what operations share."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from cases import boxes as box_kinds
from cases import predictions as prediction_kinds
from cases.boxes import Box, Picker, place_boxes, seeded
from cases.frame import TRAINING_STRIDES, Frame
from cases.labels import LabelImage


@dataclass(frozen=True)
class Target:
    """A ground truth: xyxy `box` in pixels, `label` as an assigner receives it, and its box kind."""

    box: Box
    label: float
    kind: str


@dataclass(frozen=True)
class Scene:
    """What a case is built from: `seed` gives the predictions, `tags` say what it was drawn to contain."""

    frame: Frame
    images: tuple[tuple[Target, ...], ...]
    num_classes: int
    prediction: str
    seed: int
    tags: frozenset[str]

    @cached_property
    def boxes(self) -> list[np.ndarray]:
        """(n_b, 4) float64 xyxy in pixels of every image."""
        return [np.array([t.box for t in image], dtype=np.float64).reshape(-1, 4) for image in self.images]

    @cached_property
    def labels(self) -> list[np.ndarray]:
        """(n_b,) float64 labels of every image."""
        return [np.array([t.label for t in image], dtype=np.float64) for image in self.images]

    @property
    def class_indices(self) -> list[np.ndarray]:
        """(n_b,) int64: the labels truncated towards zero, as assigners do."""
        return [labels.astype(np.int64) for labels in self.labels]

    @property
    def counts(self) -> list[int]:
        """Ground truths of every image."""
        return [len(image) for image in self.images]


#: Label kinds beside whole class indices. Each maps (class index, number of classes) to the label.
LABEL_KINDS = {
    "whole": lambda index, classes: index,
    "fractional": lambda index, classes: index + 0.9,
    "fraction-below-zero": lambda index, classes: -0.5,
    "negative": lambda index, classes: index - classes,
    "no-object": lambda index, classes: classes,
}

#: Ways to lay out padded rows, and what hostile content they carry; the losses pad with zero rows at the end.
PADDING_PLACES = ("end", "end", "start", "anywhere")
PADDING_CONTENTS = ("zeros", "zeros", "boxes", "nan", "labels")

#: Levels of small scenes, and the cells of the coarsest level on a side at most, for about 100 anchors.
SMALL_FRAMES = (((8,), 10), ((8, 16), 4), ((8, 16, 32), 2), ((4, 8, 16), 2), ((16,), 8), ((4,), 10))
SMALL_CLASSES, SMALL_IMAGES, SMALL_BOXES = 8, 4, 8
MEDIUM_SIDES, MEDIUM_SIDES_HALF = (160, 224, 320), (96, 128)
MEDIUM_STRIDES = ((8,), (8, 16), (8, 16, 32), (16, 32))
MEDIUM_BOXES = 200
#: The largest float16; squared lengths above it are infinite.
HALF_LARGEST = 65504


def draw_scene(
    pick: Picker,
    *,
    dtype: str,
    boxes: Sequence[str] = tuple(box_kinds.KINDS),
    labels: Sequence[str] = ("whole",),
    empty_batch: bool = False,
) -> Scene:
    """Draw a scene out of the box kinds `boxes` and the label kinds `labels`.

    Six of seven scenes are small and drawn element by element, so that they shrink to something readable; the
    rest have tens to hundreds of boxes from one drawn seed. `empty_batch` allows B = 0. Scenes for float16 stay
    below its range but for a few, which are tagged "half-overflow".
    """
    size = pick.choice(_SIZES)
    prediction = pick.choice(_PREDICTIONS)
    label_kind = pick.choice(("whole",) * 3 * len(labels) + tuple(labels))
    if size == "small":
        seed = pick.integer(0, 2**16 - 1)
        strides, cells = pick.choice(SMALL_FRAMES)
        frame = _frame(strides, pick.integer(1, cells), pick.integer(1, cells))
        num_classes = pick.integer(1, SMALL_CLASSES)
        images = 0 if empty_batch and pick.choice(_RARELY) else pick.integer(1, SMALL_IMAGES)
        counts = [pick.choice(_SMALL_COUNTS) for _ in range(images)]
    else:
        overflow = dtype == "float16" and pick.choice(_RARELY)
        pick = seeded(int("".join(str(pick.integer(0, 1)) for _ in range(_SEED_BITS)), base=2))
        seed = pick.integer(0, 2**16 - 1)
        sides = MEDIUM_SIDES_HALF if dtype == "float16" and not overflow else MEDIUM_SIDES
        strides = pick.choice(MEDIUM_STRIDES)
        frame = _frame(strides, pick.choice(sides) // max(strides), pick.choice(sides) // max(strides))
        num_classes = pick.integer(1, 20)
        # Ragged on purpose: sparse images beside a crowded one.
        most = pick.integer(20, MEDIUM_BOXES)
        counts = [most] + [pick.integer(0, pick.choice((5, most))) for _ in range(pick.integer(0, 3))]
    images, tags = [], {size, f"prediction-{prediction}", f"labels-{label_kind}"}
    for count in counts:
        image = []
        for kind, box in place_boxes(pick, frame, count, boxes):
            label = pick.integer(0, num_classes - 1)
            chosen = label_kind if label_kind == "whole" else pick.choice((label_kind, "whole"))
            image.append(Target(box, float(LABEL_KINDS[chosen](label, num_classes)), kind))
            tags.add(kind)
        images.append(tuple(image))
    return Scene(frame, tuple(images), num_classes, prediction, seed, frozenset(tags))


_SIZES = ("small",) * 6 + ("medium",)
_PREDICTIONS = tuple(kind for kind, share in prediction_kinds.KINDS.items() for _ in range(share))
# Hypothesis takes the case of fewer draws for the simpler one. A seeded scene therefore costs more of them than
# the largest small one, or a failure would shrink to hundreds of boxes.
_SEED_BITS = 400
_RARELY = (False,) * 19 + (True,)
# Zero comes first because shrinking ends there, and seldom.
_SMALL_COUNTS = (0, *range(1, SMALL_BOXES + 1), *range(1, SMALL_BOXES + 1))


def _frame(strides: tuple[int, ...], columns: int, rows: int) -> Frame:
    coarsest = max(strides)
    return Frame(columns * coarsest, rows * coarsest, strides)


def scene_from_labels(
    images: Sequence[LabelImage], prediction: str, seed: int, strides: tuple[int, ...] = TRAINING_STRIDES
) -> Scene:
    """The scene of a batch of labelled `images`; raises ValueError unless they share size and classes."""
    shapes = {(image.width, image.height, image.num_classes) for image in images}
    if len(shapes) != 1:
        raise ValueError(f"images: a batch shares one width, height and number of classes, not {sorted(shapes)}")
    width, height, num_classes = shapes.pop()
    targets = tuple(
        tuple(
            Target(tuple(box), float(label), "labelled")
            for box, label in zip(image.boxes.tolist(), image.classes.tolist(), strict=True)
        )
        for image in images
    )
    tags = frozenset({f"prediction-{prediction}", "labelled"})
    return Scene(Frame(width, height, strides), targets, num_classes, prediction, seed, tags)


def common_tags(scene: Scene, dtype: str) -> set[str]:
    """The tags that follow from the scene alone, for every operation."""
    tags = {*scene.tags, dtype}
    if not scene.counts:
        tags.add("empty-batch")
    if 0 in scene.counts:
        tags.add("empty-image")
    if not any(scene.counts):
        tags.add("no-ground-truth")
    repeated = any(len({t.box for t in image}) < len(image) for image in scene.images)
    if repeated or scene.prediction in ("tied", "uniform"):
        tags.add("tie")
    extent = 2 * prediction_kinds.MARGIN
    if dtype == "float16" and (scene.frame.width + extent) ** 2 + (scene.frame.height + extent) ** 2 > HALF_LARGEST:
        tags.add("half-overflow")
    return tags


def inside(points: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """(n, A) bool: anchor centres `points` (A, 2) strictly inside xyxy `boxes` (n, 4), as assigners ask."""
    return ((points > boxes[:, None, :2]) & (points < boxes[:, None, 2:])).all(axis=2)


def padded(
    scene: Scene, rows: int, place: str = "end", content: str = "zeros"
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes (B, rows, 4) xyxy in pixels and labels (B, rows), float64, and validity (B, rows) bool.

    `place` is one of `PADDING_PLACES`, `content` of `PADDING_CONTENTS`: padded rows hold zeros, a box as large as
    the image, NaN coordinates, or a label that no class has (never on row 0, whose label background anchors
    carry).
    """
    shape = (len(scene.images), rows)
    boxes, labels, valid = np.zeros((*shape, 4)), np.zeros(shape), np.zeros(shape, dtype=bool)
    if content == "boxes":
        boxes[:] = (0, 0, scene.frame.width, scene.frame.height)
    elif content == "nan":
        boxes[:] = np.nan
    elif content == "labels":
        labels[:, 1:] = 1e4
    chooser = random.Random(scene.seed)
    for image, count in enumerate(scene.counts):
        if place == "anywhere":
            chosen = sorted(chooser.sample(range(rows), count))
        else:
            chosen = list(range(count) if place == "end" else range(rows - count, rows))
        boxes[image, chosen] = scene.boxes[image]
        labels[image, chosen] = scene.labels[image]
        valid[image, chosen] = True
    return boxes, labels, valid
