"""`yolox_bce`: objectness and class term of YOLOX for a given assignment."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cases.case import Case
from cleanroom.losses.yolox_given import yolox_bce
from harness.operation import Input, Operation, Output, Setting, Tensors, Upstream


def _torch(**arguments: Any) -> dict[str, Tensor]:
    return yolox_bce(**arguments)._asdict()


def minimum_bytes(case: Case, outputs: Tensors) -> int:
    """Objectness of all anchors, class logits and targets of the foreground."""
    logits, mask = case.tensors["outputs"], case.tensors["fg_mask"]
    foreground = int(mask.sum())
    rows = foreground * (logits.shape[2] - 5) * logits.element_size()
    targets = foreground * sum(case.tensors[name].element_size() for name in ("matched_classes", "matched_iou"))
    return mask.numel() * logits.element_size() + mask.nbytes + rows + targets


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
)
