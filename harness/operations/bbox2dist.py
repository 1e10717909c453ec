"""`bbox2dist`: a box as distances of a point to its sides."""

from __future__ import annotations

from typing import Any

from cases.case import Case
from cleanroom.boxes import bbox2dist
from harness.operation import Input, Operation, Output, Setting, Tensors, Upstream, release
from harness.relations import reasons
from harness.relations.declaration import Axis, Relations
from harness.relations.reasons import exempt

UNBOUNDED_SINCE = (8, 4, 0)


def _torch(**arguments: Any) -> Tensors:
    return {"distance": bbox2dist(**arguments)}


def _rows(case: Case) -> bool:
    """Points and boxes in rows."""
    return all(tensor.dim() > 1 for tensor in case.tensors.values())


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
    relations=Relations(
        anchors=Axis({"anchor_points": -2, "bbox": -2, "distance": -2}),
        gradcheck=("anchor_points", "bbox"),
        fits=_rows,
        exempt=exempt(
            ground_truths=reasons.NO_ROWS,
            levels=reasons.NO_LEVELS,
            classes=reasons.NO_CLASSES,
            padding=reasons.NO_PADDING,
            scale="a bound is a number of bins",
            leak=reasons.DIFFERENTIABLE,
            optimality=reasons.NOTHING_MATCHED,
            monotony=reasons.NOTHING_GROWS,
            images=reasons.NO_IMAGES,
        ),
    ),
)
