"""Expectation decode of ultralytics' losses (specification: boxes.md, section 6)."""

from collections.abc import Mapping
from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor

from reference.bound import Bound
from reference.ultralytics.modules import public


def bind(tensors: Mapping[str, Tensor], settings: Mapping[str, object]) -> Bound:
    """Prepare the call of the loss's method, unbound: of the loss it needs the bins and whether there are several."""
    logits, anchor_points = tensors["logits"], tensors["anchor_points"]
    bins = logits.shape[-1] // 4
    holder = SimpleNamespace(use_dfl=bins > 1, proj=torch.arange(bins, dtype=torch.float32, device=logits.device))
    call = partial(public("utils.loss", "v8DetectionLoss").bbox_decode, holder, anchor_points, logits)
    return Bound(call, lambda raw: {"boxes": raw})
