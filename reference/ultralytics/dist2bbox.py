"""Distances to boxes, of ultralytics (specification: boxes.md, section 2)."""

from collections.abc import Mapping
from functools import partial

from torch import Tensor

from reference.bound import Bound


def bind(tensors: Mapping[str, Tensor], settings: Mapping[str, object]) -> Bound:
    """Prepare the call."""
    from ultralytics.utils.tal import dist2bbox

    call = partial(dist2bbox, tensors["distance"], tensors["anchor_points"], settings["xywh"], settings["dim"])
    return Bound(call, lambda raw: {"boxes": raw})
