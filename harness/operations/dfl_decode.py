"""`dfl_decode`: distributions over bins of distance, to boxes."""

from __future__ import annotations

from typing import Any

from cases.case import Case
from cleanroom.boxes import dfl_decode
from harness.operation import Input, Operation, Output, Tensors, Upstream
from harness.relations import reasons
from harness.relations.declaration import Axis, Images, Relations
from harness.relations.reasons import exempt


def _torch(**arguments: Any) -> Tensors:
    return {"boxes": dfl_decode(**arguments)}


def _shared_points(case: Case) -> bool:
    """One set of points for all images."""
    return case.tensors["anchor_points"].shape == (case.tensors["logits"].shape[1], 2)


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
    relations=Relations(
        images=Images({"logits": 0, "boxes": 0}),
        anchors=Axis({"logits": 1, "anchor_points": 0, "boxes": 1}),
        gradcheck=("logits", "anchor_points"),
        fits=_shared_points,
        exempt=exempt(
            ground_truths=reasons.NO_ROWS,
            levels=reasons.NO_LEVELS,
            classes=reasons.NO_CLASSES,
            padding=reasons.NO_PADDING,
            scale=reasons.CELL_UNITS,
            leak=reasons.DIFFERENTIABLE,
            optimality=reasons.NOTHING_MATCHED,
            monotony=reasons.NOTHING_GROWS,
        ),
    ),
)
