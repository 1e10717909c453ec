"""`bboxes_iou`: overlap of every pair of boxes, as YOLOX has it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cleanroom.yolox_boxes import bboxes_iou
from harness.operation import Input, Operation, Output, Setting, Upstream


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
)
