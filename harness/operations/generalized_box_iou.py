"""`generalized_box_iou`: generalised IoU of every pair, as DETR and YOLOS have it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cleanroom.set_boxes import generalized_box_iou
from harness.operation import Input, Operation, Output, Upstream
from harness.relations import reasons
from harness.relations.declaration import Axis, Relations, Scale
from harness.relations.quantities import largest_with_itself
from harness.relations.reasons import exempt


def _torch(**arguments: Any) -> dict[str, Tensor]:
    return {"giou": generalized_box_iou(**arguments)}


OPERATION = Operation(
    name="generalized_box_iou",
    summary="generalised intersection over union of every pair, without epsilon",
    source="spec/set_prediction.md A1; GIoU (Rezatofighi et al., CVPR 2019)",
    inputs=(
        Input("boxes1", "(N, 4)", "floating", "boxes, xyxy"),
        Input("boxes2", "(M, 4)", "floating", "boxes, xyxy"),
    ),
    settings=(),
    outputs=(Output("giou", "(N, M)", "float32 or wider", "generalised IoU of each pair"),),
    upstreams={"transformers": Upstream()},
    candidates={"torch": _torch},
    predictions=("boxes1",),
    gradients=("boxes1", "boxes2"),
    workloads=("detr-b16", "coco-b1"),
    relations=Relations(
        truths=Axis({"boxes2": 0, "giou": 1}),
        anchors=Axis({"boxes1": 0, "giou": 0}),
        scale=Scale({"boxes1": slice(None), "boxes2": slice(None)}),
        gradcheck=("boxes1", "boxes2"),
        monotony=largest_with_itself("boxes1", "boxes2", "giou"),
        exempt=exempt(
            levels=reasons.NO_LEVELS,
            classes=reasons.NO_CLASSES,
            padding=reasons.NO_PADDING,
            leak=reasons.DIFFERENTIABLE,
            optimality=reasons.NOTHING_MATCHED,
            images=reasons.NO_IMAGES,
        ),
    ),
)
