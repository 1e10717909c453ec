"""Distances to boxes, of ultralytics (specification: boxes.md, section 2)."""

from collections.abc import Mapping
from functools import partial

from torch import Tensor

from reference.bound import Bound
from reference.ultralytics.modules import public


def bind(tensors: Mapping[str, Tensor], settings: Mapping[str, object]) -> Bound:
    """Prepare the call."""
    function = public("utils.tal", "dist2bbox")
    call = partial(function, tensors["distance"], tensors["anchor_points"], settings["xywh"], settings["dim"])
    return Bound(call, lambda raw: {"boxes": raw})
