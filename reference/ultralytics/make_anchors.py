"""Anchor grid of ultralytics (specification: boxes.md, section 1)."""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from reference.bound import Bound
from reference.ultralytics.modules import public


def bind(tensors: Mapping[str, Tensor], settings: Mapping[str, object]) -> Bound:
    """Prepare the call: maps are the tensors feat0, feat1, ...; a tensor `sizes` stands for all of them."""
    strides = settings["strides"]
    if settings["strides_as"] == "tensor":
        strides = torch.tensor(strides, dtype=torch.float32)
    maps = [tensors[name] for name in sorted(tensors) if name.startswith("feat")]
    function = public("utils.tal", "make_anchors")
    call = partial(function, tensors.get("sizes", maps), strides, settings["grid_cell_offset"])
    return Bound(call, _translate)


def _translate(raw: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    return dict(zip(("points", "point_strides"), raw, strict=True))
