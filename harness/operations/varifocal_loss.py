"""`varifocal_loss`: cross entropy to soft targets in which easy negatives count little."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from cleanroom.losses.focal import VarifocalLoss
from harness.operation import DropIn, Input, Operation, Output, Setting, Tensors, Upstream, release

MEAN_SINCE = (8, 0, 119)
"""By experiment; `spec/yolo_losses.md` section 13 names the release before."""


def _bind(
    pred_score: Tensor, gt_score: Tensor, label: Tensor, **settings: Any
) -> tuple[Callable[[], Any], Callable[[Any], Tensors]]:
    return partial(VarifocalLoss(**settings), pred_score, gt_score, label), lambda raw: {"loss": raw}


OPERATION = Operation(
    name="varifocal_loss",
    summary="Varifocal loss: cross entropy to soft targets, negatives weighted by how hard they are",
    source="spec/yolo_losses.md 2.1; Zhang et al., arXiv:2008.13367",
    inputs=(
        Input("pred_score", "(B, N, C)", "floating", "logits"),
        Input("gt_score", "(B, N, C)", "floating", "soft targets in [0, 1]"),
        Input("label", "(B, N, C)", "floating", "1 for positives, 0 for negatives; broadcastable"),
    ),
    settings=(
        Setting("gamma", 2.0, "exponent of the weight of negatives"),
        Setting("alpha", 0.75, "factor of the weight of negatives"),
    ),
    outputs=(Output("loss", "()", "promoted with float32", "mean over N, sum over the rest"),),
    upstreams={
        "ultralytics": Upstream(
            era=lambda version: {"vfl_reduction": "sum"} if release(version) < MEAN_SINCE else {},
        )
    },
    candidates={"torch": DropIn(_bind)},
    predictions=("pred_score",),
    gradients=("pred_score", "gt_score", "label"),
    precision="float32",
    workloads=("detr-b16", "coco-b1"),
)
