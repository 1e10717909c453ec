"""Workloads by name: the case sizes that are timed. Each is a row of data with a fixed seed."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from cases.case import Case
from cases.frame import TRAINING_SIZE
from cases.labels import LabelImage, LabelSet

CLASSES = 80
#: Workloads show a detector on its way: some anchors are right, some are not.
STAGE = "mid"
#: Added to a workload's seed for other values of the same shapes.
FRESH = 1000


@dataclass(frozen=True)
class Workload:
    """A named case size: `counts` ground truths an image, the least and largest of their `sides` in pixels, a
    seed, and why it is measured (`summary`). Images have 640 x 640 pixels and 80 classes. Which operations it is for,
    their declarations say.
    """

    name: str
    counts: tuple[int, ...]
    sides: tuple[int, int]
    seed: int
    summary: str


#: Ordinary counts of COCO: mean 7, half of the images with 4 or fewer, one crowded image that pads the batch.
_COCO_COUNTS = (7, 2, 4, 1, 14, 3, 8, 2, 1, 21, 5, 3, 2, 10, 1, 28)

WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload(
            "coco-b1",
            (7,),
            (12, 400),
            1,
            "one image of 7 boxes: nobody may lose at batch 1",
        ),
        Workload(
            "coco-b16",
            _COCO_COUNTS,
            (12, 400),
            2,
            "16 images of 1 to 28 boxes, 7 on average: ordinary training",
        ),
        Workload(
            "coco-b64",
            _COCO_COUNTS * 4,
            (12, 400),
            6,
            "64 images of 1 to 28 boxes: a batch that fills a GPU",
        ),
        Workload(
            "crowd-b16",
            (100,) * 16,
            (8, 160),
            3,
            "16 images of 100 boxes: memory against boxes an image",
        ),
        Workload(
            "dense-b4",
            (1000, 5, 5, 5),
            (6, 48),
            4,
            "1000 boxes in one image, 5 in the other 3: one image pads the batch",
        ),
        # Only on request: upstream takes gigabytes for it, and a minute of a CPU.
        Workload(
            "dense-xview",
            (4967, 1000, 200, 20),
            (6, 48),
            7,
            "4967 boxes in one of 4 images, the most that xView has: memory must be bounded up front",
        ),
        Workload(
            "detr-b16",
            tuple(100 * (image + 1) // 16 for image in range(16)),
            (12, 400),
            5,
            "16 images of 300 queries and 6 to 100 targets",
        ),
    )
}


def workload_images(workload: Workload) -> tuple[LabelImage, ...]:
    """The images of a workload: log-uniform sides, a third of the labels of class 0 (people)."""
    rng = np.random.default_rng(workload.seed)
    images = []
    for position, count in enumerate(workload.counts):
        sides = np.exp(rng.uniform(*np.log(workload.sides), (count, 2)))
        near = rng.uniform(0, 1, (count, 2)) * (TRAINING_SIZE - sides)
        classes = rng.integers(0, CLASSES, count) * (rng.random(count) > 1 / 3)
        boxes = torch.from_numpy(np.concatenate([near, near + sides], axis=1))
        name = f"{workload.name}/{position}"
        images.append(LabelImage(name, TRAINING_SIZE, TRAINING_SIZE, boxes, torch.from_numpy(classes), CLASSES))
    return tuple(images)


def workload_case(name: str, operation: str, dtype: str = "float32", *, fresh: bool = False, **options: Any) -> Case:
    """The case of workload `name` for `operation`; `options` are those of the operation's `from_labels`.

    `fresh`: as many boxes an image, elsewhere and predicted otherwise: no candidate has seen them while it was timed.
    Raises ValueError for an unknown workload.
    """
    if name not in WORKLOADS:
        raise ValueError(f"name: no workload {name!r}; there are {', '.join(WORKLOADS)}")
    workload = WORKLOADS[name]
    if fresh:
        workload = replace(workload, seed=workload.seed + FRESH)
    return _case(workload_images(workload), name, operation, workload.seed, dtype, options)


def labels_case(labels: LabelSet, operation: str, dtype: str = "float32", batch: int = 16, **options: Any) -> Case:
    """The workload "labels-b16" (or another batch): the first images of `labels`, repeated where few."""
    images = [labels.images[position % len(labels.images)] for position in range(batch)]
    return _case(images, f"labels-b{batch}", operation, 0, dtype, options)


def _case(
    images: Sequence[LabelImage],
    name: str,
    operation: str,
    seed: int,
    dtype: str,
    options: dict[str, Any],
) -> Case:
    # Every operation has its module under its own name, so a new one needs no entry here.
    module = importlib.import_module(f"cases.{operation}")
    case = module.from_labels(images, STAGE, seed, dtype, **options)
    return replace(case, origin=f"workload:{name}")
