"""`varifocal_loss`: cross entropy to soft targets in which easy negatives count little."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from cases.case import Case
from cleanroom.losses.focal import VarifocalLoss
from harness.operation import DropIn, Input, Operation, Output, Setting, Tensors, Upstream, release
from harness.relations import reasons
from harness.relations.declaration import Axis, Images, Relations
from harness.relations.quantities import grows_with_wrong_logits
from harness.relations.reasons import exempt

MEAN_SINCE = (8, 0, 119)
"""By experiment; `spec/yolo_losses.md` section 13 names the release before."""


def _bind(
    pred_score: Tensor, gt_score: Tensor, label: Tensor, **settings: Any
) -> tuple[Callable[[], Any], Callable[[Any], Tensors]]:
    return partial(VarifocalLoss(**settings), pred_score, gt_score, label), lambda raw: {"loss": raw}


def _negatives(case: Case) -> Tensor:
    """Logits that should be low, where they are not low already."""
    return ((case.tensors["label"] == 0) & (case.tensors["gt_score"] == 0)).expand_as(case.tensors["pred_score"])


def _of_images(case: Case) -> bool:
    """Images, anchors and classes."""
    return all(tensor.dim() == 3 for tensor in case.tensors.values())


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
    relations=Relations(
        images=Images(dict.fromkeys(("pred_score", "gt_score", "label"), 0)),
        anchors=Axis(dict.fromkeys(("pred_score", "gt_score", "label"), 1)),
        classes=Axis(dict.fromkeys(("pred_score", "gt_score", "label"), 2)),
        gradcheck=("pred_score",),
        monotony=grows_with_wrong_logits("pred_score", _negatives, "loss"),
        fits=_of_images,
        exempt=exempt(
            ground_truths=reasons.NO_ROWS,
            levels=reasons.NO_LEVELS,
            padding=reasons.NO_PADDING,
            scale=reasons.LOGITS,
            leak=reasons.DIFFERENTIABLE,
            optimality=reasons.NOTHING_MATCHED,
        ),
    ),
)
