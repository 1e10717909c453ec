"""Box losses of DETR and YOLOS under given pairs (specification: set_prediction.md, A6)."""

from functools import partial

from torch import Tensor

from reference.bound import Bound
from reference.transformers.criterion import Settings, Tensors, criterion, indices, targets


def bind(tensors: Tensors, settings: Settings) -> Bound:
    """Prepare the call."""
    boxes = tensors["pred_boxes"]
    given = targets(tensors, settings, boxes="boxes")
    pairs = indices(tensors, settings)
    call = partial(criterion(boxes.dtype).loss_boxes, {"pred_boxes": boxes}, given, pairs, settings["num_boxes"])
    return Bound(call, dict)


def quantities(tensors: Tensors, settings: Settings) -> dict[str, Tensor]:
    """Return nothing: nothing is decided."""
    return {}
