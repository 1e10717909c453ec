"""DETR's and YOLOS' matcher of transformers (specification: set_prediction.md, part A)."""

from collections.abc import Mapping
from functools import partial

from torch import Tensor

from reference.bound import Bound
from reference.errors import RequestError
from reference.pairs import join_pairs

VARIANT = "detr"
SETTINGS = ("class_cost", "bbox_cost", "giou_cost")


def bind(tensors: Mapping[str, Tensor], settings: Mapping[str, object]) -> Bound:
    """Prepare the call; raises RequestError for a case of another variant."""
    from transformers.loss.loss_for_object_detection import HungarianMatcher

    if settings["variant"] != VARIANT:
        raise RequestError(f"hungarian: transformers answers variant {VARIANT!r}, the case is {settings['variant']!r}")
    sizes = list(settings["sizes"])
    images = zip(tensors["labels"].split(sizes), tensors["boxes"].split(sizes), strict=True)
    targets = [{"class_labels": labels, "boxes": boxes} for labels, boxes in images]
    outputs = {"logits": tensors["logits"], "pred_boxes": tensors["pred_boxes"]}
    matcher = HungarianMatcher(**{name: settings[name] for name in SETTINGS})
    return Bound(partial(matcher, outputs, targets), join_pairs)


def quantities(tensors: Mapping[str, Tensor], settings: Mapping[str, object]) -> dict[str, Tensor]:
    """Return nothing: what decides is the total cost, which the comparator has from the case."""
    return {}
