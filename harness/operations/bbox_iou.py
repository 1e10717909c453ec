"""`bbox_iou`: element-wise IoU, GIoU, DIoU and CIoU."""

from __future__ import annotations

from typing import Any

from cases.case import Case
from cleanroom.boxes import bbox_iou
from harness.operation import Input, Operation, Output, Setting, Tensors, Upstream, release
from harness.relations import reasons
from harness.relations.declaration import Axis, Relations, Scale
from harness.relations.quantities import largest_with_itself
from harness.relations.reasons import exempt

STABLE_ALPHA_SINCE = (8, 4, 144)


def _era(version: str) -> dict[str, Any]:
    return {"ciou_alpha": "stable" if release(version) >= STABLE_ALPHA_SINCE else "legacy"}


def _torch(**arguments: Any) -> Tensors:
    return {"iou": bbox_iou(**arguments)}


def _nothing_held(case: Case) -> bool:
    """Complete IoU holds the weight of its aspect term fixed."""
    return not case.settings.get("CIoU")


def _pixels(case: Case) -> bool:
    """Sides beside which an epsilon vanishes."""
    sides = [
        case.tensors[name][..., 2:] - (0 if case.settings["xywh"] else case.tensors[name][..., :2])
        for name in ("box1", "box2")
    ]
    return all(bool(((side >= 1) & side.isfinite()).all()) for side in sides)


def _rows_of_boxes(case: Case) -> bool:
    """Boxes in rows."""
    return all(case.tensors[name].dim() > 1 for name in ("box1", "box2"))


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
    relations=Relations(
        anchors=Axis({"box1": -2, "box2": -2, "iou": -2}),
        scale=Scale({"box1": slice(None), "box2": slice(None)}, fits=_pixels, exact=False),
        smooth=_nothing_held,
        gradcheck=("box1", "box2"),
        monotony=largest_with_itself("box1", "box2", "iou"),
        free=("box1", "box2"),
        fits=_rows_of_boxes,
        exempt=exempt(
            ground_truths=reasons.NO_ROWS,
            levels=reasons.NO_LEVELS,
            classes=reasons.NO_CLASSES,
            padding=reasons.NO_PADDING,
            leak=reasons.DIFFERENTIABLE,
            optimality=reasons.NOTHING_MATCHED,
            images=reasons.NO_IMAGES,
        ),
    ),
)
