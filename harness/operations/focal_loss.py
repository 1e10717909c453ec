"""`focal_loss`: cross entropy in which easy elements count little."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from cases.case import Case
from cleanroom.losses.focal import FocalLoss
from harness.operation import DropIn, Input, Operation, Output, Setting, Tensors, Upstream, release
from harness.relations import reasons
from harness.relations.declaration import Axis, Images, Relations
from harness.relations.quantities import grows_with_wrong_logits
from harness.relations.reasons import exempt

LISTED_SINCE = (8, 3, 125)
"""First release seen to take one alpha a class; 8.3.118, whose constructor takes gamma and alpha too, does not."""


def _bind(pred: Tensor, label: Tensor, **settings: Any) -> tuple[Callable[[], Any], Callable[[Any], Tensors]]:
    return partial(FocalLoss(**settings), pred, label), lambda raw: {"loss": raw}


def _negatives(case: Case) -> Tensor:
    """Logits that should be low, where they are not low already."""
    return (case.tensors["label"] == 0).expand_as(case.tensors["pred"])


def _of_images(case: Case) -> bool:
    """Images, anchors and classes."""
    return all(tensor.dim() == 3 for tensor in case.tensors.values())


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
    relations=Relations(
        images=Images(dict.fromkeys(("pred", "label"), 0)),
        anchors=Axis(dict.fromkeys(("pred", "label"), 1)),
        classes=Axis(dict.fromkeys(("pred", "label"), 2), lists=("alpha",)),
        gradcheck=("pred",),
        monotony=grows_with_wrong_logits("pred", _negatives, "loss"),
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
