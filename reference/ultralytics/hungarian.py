"""RT-DETR's matcher of ultralytics (specification: set_prediction.md, part B)."""

from collections.abc import Mapping
from functools import partial

from torch import Tensor

from reference.bound import Bound
from reference.errors import RequestError
from reference.pairs import join_pairs
from reference.ultralytics.modules import public

VARIANT = "rtdetr"
SETTINGS = ("use_fl", "alpha", "gamma")


def bind(tensors: Mapping[str, Tensor], settings: Mapping[str, object]) -> Bound:
    """Prepare the call; raises RequestError for a case of another variant."""
    if settings["variant"] != VARIANT:
        raise RequestError(f"hungarian: ultralytics answers variant {VARIANT!r}, the case is {settings['variant']!r}")
    holder = public("models.utils.ops", "HungarianMatcher")
    gains = {term: settings[f"{term}_cost"] for term in ("class", "bbox", "giou")}
    matcher = holder(cost_gain=gains, **{name: settings[name] for name in SETTINGS})
    arguments = (tensors["pred_boxes"], tensors["logits"], tensors["boxes"], tensors["labels"])
    return Bound(partial(matcher, *arguments, list(settings["sizes"])), join_pairs)


def quantities(tensors: Mapping[str, Tensor], settings: Mapping[str, object]) -> dict[str, Tensor]:
    """Return nothing: what decides is the total cost, which the comparator has from the case."""
    return {}
