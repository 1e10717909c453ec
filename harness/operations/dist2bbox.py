"""`dist2bbox`: distances of a point to the sides, to a box."""

from __future__ import annotations

from typing import Any

from cleanroom.boxes import dist2bbox
from harness.operation import Input, Operation, Output, Setting, Tensors, Upstream


def _torch(**arguments: Any) -> Tensors:
    return {"boxes": dist2bbox(**arguments)}


OPERATION = Operation(
    name="dist2bbox",
    summary="Boxes, corners or centre form, from the distances of a point to their sides",
    source="spec/boxes.md section 2",
    inputs=(
        Input("distance", "(..., 4)", "floating", "to left, top, right and bottom along `dim`"),
        Input("anchor_points", "(..., 2)", "floating", "x and y along the same dim"),
    ),
    settings=(
        Setting("xywh", True, "centre form; false: corners"),
        Setting("dim", -1, "dim of the coordinates"),
    ),
    outputs=(Output("boxes", "(..., 4)", "promoted", "the boxes"),),
    upstreams={"ultralytics": Upstream()},
    candidates={"torch": _torch},
    predictions=("distance",),
    gradients=("distance", "anchor_points"),
    workloads=("coco-b1", "coco-b16"),
)
