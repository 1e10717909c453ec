"""Overlap of every pair as YOLOX has it (specification: yolox_losses.md, section 1)."""

from collections.abc import Mapping
from functools import partial

from torch import Tensor

from reference.bound import Bound


def bind(tensors: Mapping[str, Tensor], settings: Mapping[str, object]) -> Bound:
    """Prepare the call of two lists of boxes."""
    from yolox.utils import bboxes_iou

    call = partial(bboxes_iou, tensors["bboxes_a"], tensors["bboxes_b"], settings["xyxy"])
    return Bound(call, _translate)


def _translate(raw: Tensor) -> dict[str, Tensor]:
    return {"iou": raw}
