"""`iou_loss`: box loss of matched pairs, as YOLOX has it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from cases.case import Case
from cleanroom.losses.yolox_iou import IOUloss
from harness.operation import DropIn, Input, Operation, Output, Setting, Tensors, Upstream
from harness.relations import reasons
from harness.relations.declaration import Axis, Relations, Scale
from harness.relations.reasons import exempt


def _bind(*, pred: Tensor, target: Tensor, **settings: str) -> tuple[Callable[[], Any], Callable[[Any], Tensors]]:
    module = IOUloss(**settings)
    return lambda: module(pred, target), lambda raw: {"loss": raw}


def _each(case: Case) -> bool:
    """A loss a pair, or their sum; what lies in dims beside the first goes with it."""
    return case.tensors["pred"].dim() > 1 and case.tensors["pred"].shape == case.tensors["target"].shape


OPERATION = Operation(
    name="iou_loss",
    summary="1 - IoU^2, or 1 - GIoU, of matched boxes",
    source="spec/yolox_losses.md section 2; GIoU (Rezatofighi et al., CVPR 2019)",
    inputs=(
        Input("pred", "(..., 4)", "floating", "predicted boxes, cxcywh"),
        Input("target", "(..., 4)", "floating", "target boxes, cxcywh"),
    ),
    settings=(
        Setting("reduction", "none", '"mean" or "sum"; any other word means none'),
        Setting("loss_type", "iou", '"iou" or "giou"'),
        Setting("autocast", None, "dtype under whose autocast both sides run"),
    ),
    outputs=(Output("loss", "(P,) or ()", "promoted", "loss of each pair, or reduced"),),
    upstreams={"yolox": Upstream()},
    candidates={"torch": DropIn(_bind)},
    predictions=("pred",),
    gradients=("pred", "target"),
    workloads=("coco-b1", "coco-b16", "crowd-b16"),
    relations=Relations(
        anchors=Axis({"pred": 0, "target": 0, "loss": 0}),
        scale=Scale({"pred": slice(None), "target": slice(None)}, exact=False),
        gradcheck=("pred", "target"),
        fits=_each,
        exempt=exempt(
            ground_truths=reasons.NO_ROWS,
            levels=reasons.NO_LEVELS,
            classes=reasons.NO_CLASSES,
            padding=reasons.NO_PADDING,
            leak=reasons.DIFFERENTIABLE,
            optimality=reasons.NOTHING_MATCHED,
            monotony=reasons.NOTHING_GROWS,
            images=reasons.NO_IMAGES,
        ),
    ),
)
