"""Mask losses of DETR under given pairs (specification: set_prediction.md, A7)."""

from functools import partial

from torch import Tensor

from reference.bound import Bound
from reference.transformers.criterion import Settings, Tensors, criterion, indices, targets


def bind(tensors: Tensors, settings: Settings) -> Bound:
    """Prepare the call; each image's masks have their own size, and upstream pads them."""
    masks = tensors["pred_masks"]
    given = targets(tensors, settings, masks="masks")
    pairs = indices(tensors, settings)
    call = partial(criterion(masks.dtype).loss_masks, {"pred_masks": masks}, given, pairs, settings["num_boxes"])
    return Bound(call, dict)


def quantities(tensors: Tensors, settings: Settings) -> dict[str, Tensor]:
    """Return nothing: nothing is decided."""
    return {}
