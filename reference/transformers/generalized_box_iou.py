"""Pairwise generalised IoU of DETR and YOLOS (specification: set_prediction.md, A1)."""

from functools import partial

from torch import Tensor

from reference.bound import Bound
from reference.transformers.criterion import Settings, Tensors


def bind(tensors: Tensors, settings: Settings) -> Bound:
    """Prepare the call."""
    from transformers.loss.loss_for_object_detection import generalized_box_iou

    return Bound(partial(generalized_box_iou, tensors["boxes1"], tensors["boxes2"]), lambda raw: {"giou": raw})


def quantities(tensors: Tensors, settings: Settings) -> dict[str, Tensor]:
    """Return nothing: nothing is decided."""
    return {}
