"""`yolox_bce`: objectness and class term of YOLOX for a given assignment."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cases.case import Case
from cleanroom.losses.yolox_given import yolox_bce
from harness.operation import Input, Operation, Output, Setting, Tensors, Upstream
from harness.relations import reasons
from harness.relations.declaration import Axis, Images, Relations
from harness.relations.quantities import grows_with_wrong_logits
from harness.relations.reasons import exempt


def _torch(**arguments: Any) -> dict[str, Tensor]:
    return yolox_bce(**arguments)._asdict()


def minimum_bytes(case: Case, outputs: Tensors) -> int:
    """Objectness of all anchors, class logits and targets of the foreground."""
    logits, mask = case.tensors["outputs"], case.tensors["fg_mask"]
    foreground = int(mask.sum())
    rows = foreground * (logits.shape[2] - 5) * logits.element_size()
    targets = foreground * sum(case.tensors[name].element_size() for name in ("matched_classes", "matched_iou"))
    return mask.numel() * logits.element_size() + mask.nbytes + rows + targets


def _background_objectness(case: Case) -> Tensor:
    """Objectness of background anchors."""
    where = torch.zeros_like(case.tensors["outputs"], dtype=torch.bool)
    where[..., 4] = ~case.tensors["fg_mask"]
    return where


OPERATION = Operation(
    name="yolox_bce",
    summary="binary cross entropy of objectness at every anchor and of classes at foreground anchors",
    source="spec/yolox_losses.md sections 3.3 and 3.4",
    inputs=(
        Input("outputs", "(B, N, 5+C)", "floating", "rows of a head; columns from 4 on are logits"),
        Input("fg_mask", "(B, N)", "bool", "foreground anchors"),
        Input("matched_classes", "(B, N)", "number", "class of each foreground anchor"),
        Input("matched_iou", "(B, N)", "floating", "overlap of each foreground anchor, its soft label"),
    ),
    settings=(
        Setting("num_classes", 80, "number of classes C"),
        Setting("autocast", None, "dtype under whose autocast both sides run"),
    ),
    outputs=(
        Output("loss_obj", "()", "of outputs", "objectness, summed and divided by the foreground anchors"),
        Output("loss_cls", "()", "of matched_iou", "classes likewise"),
    ),
    upstreams={"yolox": Upstream()},
    candidates={"torch": _torch},
    predictions=("outputs",),
    gradients=("outputs",),
    moved=("outputs", "matched_iou"),
    minimum_bytes=minimum_bytes,
    workloads=("coco-b1", "coco-b16"),
    relations=Relations(
        images=Images({"outputs": 0, "fg_mask": 0, "matched_classes": 0, "matched_iou": 0}, normaliser="one"),
        anchors=Axis({"outputs": 1, "fg_mask": 1, "matched_classes": 1, "matched_iou": 1}),
        classes=Axis({"outputs": 2}, first={"outputs": 5}, counted={"matched_classes": None}),
        whole=("matched_classes",),
        gradcheck=("outputs",),
        monotony=grows_with_wrong_logits("outputs", _background_objectness, "loss_obj"),
        exempt=exempt(
            ground_truths=reasons.NO_ROWS,
            levels=reasons.NO_LEVELS,
            padding=reasons.NO_PADDING,
            scale=reasons.LOGITS,
            leak=reasons.DIFFERENTIABLE,
            optimality=reasons.NOTHING_MATCHED,
        ),
    ),
)
