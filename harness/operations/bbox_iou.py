"""`bbox_iou`: element-wise IoU, GIoU, DIoU and CIoU."""

from __future__ import annotations

from typing import Any

from cleanroom.boxes import bbox_iou
from harness.operation import Input, Operation, Output, Setting, Tensors, Upstream, release

STABLE_ALPHA_SINCE = (8, 4, 144)


def _era(version: str) -> dict[str, Any]:
    return {"ciou_alpha": "stable" if release(version) >= STABLE_ALPHA_SINCE else "legacy"}


def _torch(**arguments: Any) -> Tensors:
    return {"iou": bbox_iou(**arguments)}


OPERATION = Operation(
    name="bbox_iou",
    summary="Overlap of pairs of boxes: IoU, generalised, distance or complete IoU",
    source="spec/boxes.md section 9; arXiv:1902.09630, arXiv:1911.08287",
    inputs=(
        Input("box1", "(..., 4)", "floating", "boxes, corners or centre form"),
        Input("box2", "(..., 4)", "floating", "boxes of a shape that broadcasts"),
    ),
    settings=(
        Setting("xywh", True, "centre form; false: corners"),
        Setting("GIoU", False, "generalised IoU"),
        Setting("DIoU", False, "distance IoU, before GIoU"),
        Setting("CIoU", False, "complete IoU, before DIoU"),
        Setting("eps", 1e-7, "added to denominators and to heights of corners"),
    ),
    outputs=(Output("iou", "(..., 1)", "promoted", "overlap of each pair"),),
    upstreams={"ultralytics": Upstream(era=_era)},
    candidates={"torch": _torch},
    predictions=("box1", "box2"),
    gradients=("box1", "box2"),
    workloads=("coco-b1", "coco-b16"),
)
