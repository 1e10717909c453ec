"""Class loss of DETR and YOLOS under given pairs (specification: set_prediction.md, A4)."""

from functools import partial

from torch import Tensor

from reference.bound import Bound
from reference.transformers.criterion import Settings, Tensors, criterion, indices, targets


def bind(tensors: Tensors, settings: Settings) -> Bound:
    """Prepare the call, of a criterion in the dtype of the logits."""
    logits = tensors["logits"]
    own = criterion(logits.dtype, settings["num_classes"], settings["eos_coef"])
    given = targets(tensors, settings, class_labels="labels")
    return Bound(partial(own.loss_labels, {"logits": logits}, given, indices(tensors, settings), 1.0), dict)


def quantities(tensors: Tensors, settings: Settings) -> dict[str, Tensor]:
    """Return nothing: nothing is decided."""
    return {}
