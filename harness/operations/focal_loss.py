"""`focal_loss`: cross entropy in which easy elements count little."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from cleanroom.losses.focal import FocalLoss
from harness.operation import DropIn, Input, Operation, Output, Setting, Tensors, Upstream, release

LISTED_SINCE = (8, 3, 117)
"""First release whose constructor takes gamma and alpha, and one alpha a class."""


def _bind(pred: Tensor, label: Tensor, **settings: Any) -> tuple[Callable[[], Any], Callable[[Any], Tensors]]:
    return partial(FocalLoss(**settings), pred, label), lambda raw: {"loss": raw}


OPERATION = Operation(
    name="focal_loss",
    summary="Focal loss: cross entropy weighted by how far an answer is from right",
    source="spec/yolo_losses.md 2.2; Lin et al., arXiv:1708.02002",
    inputs=(
        Input("pred", "(B, N, C)", "floating", "logits"),
        Input("label", "(B, N, C)", "floating", "targets in [0, 1]"),
    ),
    settings=(
        Setting("gamma", 1.5, "exponent"),
        Setting("alpha", 0.25, "weight of positives, or one a class; none above 0: no weights"),
    ),
    outputs=(Output("loss", "()", "that of label", "mean over N, sum over the rest"),),
    upstreams={
        "ultralytics": Upstream(options=lambda version: {"listed": release(version) >= LISTED_SINCE}, since=(8, 0, 119))
    },
    candidates={"torch": DropIn(_bind)},
    predictions=("pred",),
    gradients=("pred", "label"),
    workloads=("detr-b16", "coco-b1"),
)
