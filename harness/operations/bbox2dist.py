"""`bbox2dist`: a box as distances of a point to its sides."""

from __future__ import annotations

from typing import Any

from cleanroom.boxes import bbox2dist
from harness.operation import Input, Operation, Output, Setting, Tensors, Upstream, release

UNBOUNDED_SINCE = (8, 4, 0)


def _torch(**arguments: Any) -> Tensors:
    return {"distance": bbox2dist(**arguments)}


OPERATION = Operation(
    name="bbox2dist",
    summary="Distances of a point to the sides of a box, bounded by the bins there are",
    source="spec/boxes.md section 3",
    inputs=(
        Input("anchor_points", "(..., 2)", "floating", "x and y"),
        Input("bbox", "(..., 4)", "floating", "corners of the boxes"),
    ),
    settings=(Setting("reg_max", None, "distances are clamped to [0, reg_max - 0.01]; None: not"),),
    outputs=(Output("distance", "(..., 4)", "promoted", "to left, top, right and bottom"),),
    upstreams={"ultralytics": Upstream(options=lambda version: {"unbounded": release(version) >= UNBOUNDED_SINCE})},
    candidates={"torch": _torch},
    predictions=("bbox",),
    gradients=("anchor_points", "bbox"),
    workloads=("coco-b1", "coco-b16"),
)
