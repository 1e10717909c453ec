"""Cardinality error of DETR and YOLOS (specification: set_prediction.md, A5)."""

from functools import partial

from torch import Tensor

from reference.bound import Bound
from reference.transformers.criterion import Settings, Tensors, criterion, targets


def bind(tensors: Tensors, settings: Settings) -> Bound:
    """Prepare the call."""
    logits = tensors["logits"]
    given = targets(tensors, settings, class_labels="labels")
    return Bound(partial(criterion(logits.dtype).loss_cardinality, {"logits": logits}, given, None, 1.0), dict)


def quantities(tensors: Tensors, settings: Settings) -> dict[str, Tensor]:
    """Return nothing: its one number is a count."""
    return {}
