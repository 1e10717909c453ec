"""`generalized_box_iou`: generalised IoU of every pair, as DETR and YOLOS have it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cleanroom.set_boxes import generalized_box_iou
from harness.operation import Input, Operation, Output, Upstream


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
)
