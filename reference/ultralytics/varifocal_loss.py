"""Varifocal loss of ultralytics (specification: yolo_losses.md, section 2.1)."""

from collections.abc import Mapping

from torch import Tensor

from reference.bound import Bound
from reference.ultralytics.modulated import bind_modulated
from reference.ultralytics.modules import public

ARGUMENTS = ("pred_score", "gt_score", "label")


def bind(tensors: Mapping[str, Tensor], settings: Mapping[str, object]) -> Bound:
    """Prepare the call."""
    return bind_modulated(public("utils.loss", "VarifocalLoss"), [tensors[name] for name in ARGUMENTS], settings)
