"""`bboxes_iou`: overlap of every pair of boxes, as YOLOX has it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cleanroom.yolox_boxes import bboxes_iou
from harness.operation import Input, Operation, Output, Setting, Upstream
from harness.relations import reasons
from harness.relations.declaration import Axis, Relations, Scale
from harness.relations.quantities import largest_with_itself
from harness.relations.reasons import exempt


def _torch(**arguments: Any) -> dict[str, Tensor]:
    return {"iou": bboxes_iou(**arguments)}


OPERATION = Operation(
    name="bboxes_iou",
    summary="intersection over union of every pair, without epsilon",
    source="spec/yolox_losses.md section 1",
    inputs=(
        Input("bboxes_a", "(N, 4)", "number", "boxes, corners or centre form"),
        Input("bboxes_b", "(M, 4)", "number", "boxes, corners or centre form"),
    ),
    settings=(Setting("xyxy", True, "corners; false: cxcywh"),),
    outputs=(Output("iou", "(N, M)", "promoted", "overlap of each pair"),),
    upstreams={"yolox": Upstream()},
    candidates={"torch": _torch},
    predictions=("bboxes_a", "bboxes_b"),
    gradients=("bboxes_a", "bboxes_b"),
    workloads=("coco-b1", "crowd-b16"),
    relations=Relations(
        truths=Axis({"bboxes_b": 0, "iou": 1}),
        anchors=Axis({"bboxes_a": 0, "iou": 0}),
        scale=Scale({"bboxes_a": slice(None), "bboxes_b": slice(None)}),
        gradcheck=("bboxes_a", "bboxes_b"),
        monotony=largest_with_itself("bboxes_a", "bboxes_b", "iou"),
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
