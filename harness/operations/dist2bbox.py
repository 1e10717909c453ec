"""`dist2bbox`: distances of a point to the sides, to a box."""

from __future__ import annotations

from typing import Any

from cases.case import Case
from cleanroom.boxes import dist2bbox
from harness.operation import Input, Operation, Output, Setting, Tensors, Upstream
from harness.relations import reasons
from harness.relations.declaration import Axis, Relations, Scale
from harness.relations.reasons import exempt


def _torch(**arguments: Any) -> Tensors:
    return {"boxes": dist2bbox(**arguments)}


def _last(case: Case) -> bool:
    """Coordinates lie in the last dim, in rows."""
    shapes = [case.tensors[name].shape for name in ("distance", "anchor_points")]
    return all(len(shape) > 1 for shape in shapes) and case.settings["dim"] in (-1, len(shapes[0]) - 1)


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
    relations=Relations(
        anchors=Axis({"distance": -2, "anchor_points": -2, "boxes": -2}),
        scale=Scale({"distance": slice(None), "anchor_points": slice(None)}, outputs={"boxes": slice(None)}),
        gradcheck=("distance", "anchor_points"),
        fits=_last,
        exempt=exempt(
            ground_truths=reasons.NO_ROWS,
            levels=reasons.NO_LEVELS,
            classes=reasons.NO_CLASSES,
            padding=reasons.NO_PADDING,
            leak=reasons.DIFFERENTIABLE,
            optimality=reasons.NOTHING_MATCHED,
            monotony=reasons.NOTHING_GROWS,
            images=reasons.NO_IMAGES,
        ),
    ),
)
