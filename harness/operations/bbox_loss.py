"""`bbox_loss`: the box and distance terms of YOLOv8 and later on foreground anchors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cases.case import Case
from cleanroom.losses.bbox import BboxLoss
from harness.operation import DropIn, Input, Operation, Output, Setting, Tensors, Upstream, release
from harness.relations import reasons
from harness.relations.declaration import Axis, Images, Relations
from harness.relations.reasons import exempt

NAMES = ("loss_iou", "loss_dfl")
ROWS = ("pred_dist", "pred_bboxes", "target_bboxes", "target_scores")


def _era(version: str) -> dict[str, Any]:
    number = release(version)
    former = {"reg1_distance": "zero"} if number < (8, 4, 0) else {}
    return former | ({"ciou_alpha": "legacy"} if number < (8, 4, 144) else {})


def _bind(
    *, stride: Tensor, reg_max: int, imgsz: list[int], **given: Any
) -> tuple[Callable[[], Any], Callable[[Any], Tensors]]:
    era = {name: given.pop(name) for name in ("reg1_distance", "ciou_alpha") if name in given}
    loss = BboxLoss(reg_max, **era)
    size = torch.tensor(imgsz, dtype=stride.dtype, device=stride.device)
    return lambda: loss(**given, imgsz=size, stride=stride), lambda raw: dict(zip(NAMES, raw, strict=True))


def minimum_bytes(case: Case, outputs: Tensors) -> int:
    """The mask, and of everything else the rows of foreground anchors."""
    tensors, foreground = case.tensors, case.tensors["fg_mask"]
    positives = int(foreground.sum())
    rows = sum(tensors[name].shape[-1] * tensors[name].element_size() for name in ROWS)
    return foreground.nbytes + positives * rows + sum(tensor.nbytes for tensor in outputs.values())


OPERATION = Operation(
    name="bbox_loss",
    summary="Weighted complete IoU and distance losses of foreground anchors",
    source="spec/yolo_losses.md 2.4, spec/boxes.md 3 and 9; Zheng et al., arXiv:2005.03572",
    inputs=(
        Input("pred_dist", "(B, A, 4R)", "floating", "logits of distances, side-major; R = 1: distances"),
        Input("pred_bboxes", "(B, A, 4)", "floating", "predicted xyxy, grid units"),
        Input("anchor_points", "(A, 2)", "floating", "anchor centres, grid units"),
        Input("target_bboxes", "(B, A, 4)", "floating", "target xyxy, grid units"),
        Input("target_scores", "(B, A, C)", "floating", "their sum weighs an anchor"),
        Input("target_scores_sum", "()", "floating", "divisor"),
        Input("fg_mask", "(B, A)", "bool", "foreground anchors"),
        Input("stride", "(A, 1)", "floating", "pixels a grid unit"),
    ),
    settings=(
        Setting("reg_max", 16, "R, bins a side; 1: L1 distances"),
        Setting("imgsz", [640, 640], "(height, width), pixels; read for one bin"),
    ),
    outputs=(
        Output("loss_iou", "()", "promoted", "sum of weighted 1 - CIoU over the divisor"),
        Output("loss_dfl", "()", "promoted", "sum of weighted distance losses over the divisor"),
    ),
    upstreams={"ultralytics": Upstream(era=_era)},
    candidates={"torch": DropIn(_bind)},
    predictions=("pred_dist", "pred_bboxes"),
    gradients=("pred_dist", "pred_bboxes"),
    moved=("pred_dist", "pred_bboxes", "anchor_points", "target_bboxes", "target_scores", "target_scores_sum"),
    minimum_bytes=minimum_bytes,
    workloads=("coco-b1", "coco-b16", "crowd-b16"),
    relations=Relations(
        images=Images(dict.fromkeys((*ROWS, "fg_mask"), 0)),
        anchors=Axis({**dict.fromkeys((*ROWS, "fg_mask"), 1), "anchor_points": 0, "stride": 0}),
        classes=Axis({"target_scores": 2}),
        # The weight of the aspect term is held fixed, so the gradient of the overlap is not its slope.
        gradcheck=("pred_dist",),
        exempt=exempt(
            ground_truths=reasons.NO_ROWS,
            levels=reasons.NO_LEVELS,
            padding=reasons.NO_PADDING,
            scale=reasons.CELL_UNITS,
            leak=reasons.DIFFERENTIABLE,
            optimality=reasons.NOTHING_MATCHED,
            monotony=reasons.NOTHING_GROWS,
        ),
    ),
)
