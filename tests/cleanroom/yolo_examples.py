"""Example ExD of yolo_losses.md, section 3, and what a criterion's class is built from and called with."""

import math
from types import SimpleNamespace

import torch

LABELS = ("batch_idx", "cls", "bboxes")
GAINS = {"box": 7.5, "cls": 0.5, "dfl": 1.5}


def pattern(shape, a, b, c):
    """S of the specification: a sin(b n + c) over the row-major index."""
    index = torch.arange(math.prod(shape), dtype=torch.float64)
    return (a * torch.sin(b * index + c)).float().view(shape)


def example(reg_max=16, classes=3, **changes):
    """Example ExD."""
    boxes = pattern((2, 4 * reg_max, 126), 1, 0.7, 0.3)
    given = {
        "boxes": boxes + 1.5 if reg_max == 1 else boxes,
        "scores": pattern((2, classes, 126), 2, 1.1, 0.5) - 2,
        "batch_idx": torch.tensor([0.0, 0.0, 1.0]),
        "cls": torch.tensor([0.0, 2.0, 1.0]) if classes > 1 else torch.zeros(3),
        "bboxes": torch.tensor([[0.30, 0.40, 0.40, 0.50], [0.70, 0.60, 0.35, 0.55], [0.50, 0.50, 0.60, 0.70]]),
    }
    return given | changes, {
        "levels": [[8, 12], [4, 6], [2, 3]],
        "strides": [8, 16, 32],
        "num_classes": classes,
        "reg_max": reg_max,
        "gains": GAINS,
        "class_weights": None,
    }


def first_rows(count):
    """The example with the labels of its first objects alone."""
    given, settings = example()
    return given | {name: given[name][:count] for name in LABELS}, settings


def model(reg_max=16, classes=3, **attributes):
    """What the class reads of a model (section 12)."""
    head = SimpleNamespace(stride=torch.tensor([8.0, 16.0, 32.0]), nc=classes, reg_max=reg_max)
    return SimpleNamespace(args=SimpleNamespace(**GAINS), model=[head], **attributes)


def as_upstream(given, settings):
    feats = [given["boxes"].new_zeros(len(given["boxes"]), 7, *level) for level in settings["levels"]]
    return {"boxes": given["boxes"], "scores": given["scores"], "feats": feats}, {name: given[name] for name in LABELS}
