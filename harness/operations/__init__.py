"""The declarations, one file an operation. Adding one is a file here and its name in `NAMES`."""

from __future__ import annotations

from functools import cache
from importlib import import_module

from harness.operation import Operation

NAMES = (
    "tal",
    "rotated_tal",
    "simota",
    "hungarian",
    "linear_sum_assignment",
    "v8_detection_loss",
    "v10_detection_loss",
    "rtdetr_loss",
    "yolox_decode",
    "bboxes_iou",
    "iou_loss",
    "yolox_bce",
    "yolox_l1",
    "yolox_loss",
    "dfl_loss",
    "bbox_loss",
    "class_bce",
    "varifocal_loss",
    "focal_loss",
    "generalized_box_iou",
    "set_class_loss",
    "cardinality_error",
    "set_box_loss",
    "set_mask_loss",
    "set_loss",
    "make_anchors",
    "dist2bbox",
    "bbox2dist",
    "dfl_decode",
    "bbox_iou",
    "probiou",
)


class UnknownOperation(ValueError):  # noqa: N818 - reads as what it says at the command line
    """A name that no declaration has."""


@cache
def operation(name: str) -> Operation:
    """The declaration called `name`; raises UnknownOperation with the names there are."""
    if name not in NAMES:
        raise UnknownOperation(f"unknown operation {name!r}; there are {', '.join(NAMES)}")
    return import_module(f"harness.operations.{name}").OPERATION
