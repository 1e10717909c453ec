"""Class term of the detection criterion of ultralytics (specification: yolo_losses.md, sections 0 and 3)."""

from collections.abc import Mapping

from torch import Tensor

from reference.bound import Bound
from reference.ultralytics import detection


def bind(tensors: Mapping[str, Tensor], settings: Mapping[str, object]) -> Bound:
    """Prepare the call: the criterion's own cross entropy on the dense target that the compact one stands for."""
    scores, labels, values = tensors["scores"], tensors["labels"], tensors["values"]
    head = {
        "strides": [8],
        "num_classes": scores.shape[2],
        "reg_max": 16,
        "gains": {"box": 1.0, "cls": 1.0, "dfl": 1.0},
    }
    bce = detection.criterion(head, 10, None).bce
    background = values == 0
    dense = values.new_zeros(scores.shape).scatter_(2, labels.masked_fill(background, 0)[..., None], values[..., None])

    def call() -> Tensor:
        return bce(scores, dense.to(scores.dtype)).sum() / tensors["normaliser"]

    return Bound(call, lambda raw: {"loss": raw})
