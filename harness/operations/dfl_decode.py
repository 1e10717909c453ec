"""`dfl_decode`: distributions over bins of distance, to boxes."""

from __future__ import annotations

from typing import Any

from cleanroom.boxes import dfl_decode
from harness.operation import Input, Operation, Output, Tensors, Upstream


def _torch(**arguments: Any) -> Tensors:
    return {"boxes": dfl_decode(**arguments)}


OPERATION = Operation(
    name="dfl_decode",
    summary="The box that distributions over bins expect: softmax, mean, corners around the point",
    source="spec/boxes.md section 6; Li et al., arXiv:2006.04388",
    inputs=(
        Input("logits", "(B, N, 4R)", "floating", "of the bins of each side, side-major; R = 1: distances"),
        Input("anchor_points", "(N, 2)", "floating", "x and y in cells"),
    ),
    settings=(),
    outputs=(Output("boxes", "(B, N, 4)", "promoted", "corners in cells"),),
    upstreams={"ultralytics": Upstream()},
    candidates={"torch": _torch},
    predictions=("logits",),
    gradients=("logits", "anchor_points"),
    workloads=("coco-b1", "coco-b16"),
)
