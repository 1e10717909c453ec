"""Element-wise overlaps of ultralytics (specification: boxes.md, section 9)."""

from collections.abc import Mapping
from functools import partial

from torch import Tensor

from reference.bound import Bound
from reference.ultralytics.modules import public

SETTINGS = ("xywh", "GIoU", "DIoU", "CIoU", "eps")


def bind(tensors: Mapping[str, Tensor], settings: Mapping[str, object]) -> Bound:
    """Prepare the call."""
    function = public("utils.metrics", "bbox_iou")
    call = partial(function, tensors["box1"], tensors["box2"], **{name: settings[name] for name in SETTINGS})
    return Bound(call, lambda raw: {"iou": raw})
