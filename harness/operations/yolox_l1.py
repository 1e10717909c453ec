"""`yolox_l1`: L1 term of YOLOX and its target for a given assignment."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from cases.case import Case
from cleanroom.losses.yolox_given import yolox_l1
from harness.operation import Input, Operation, Output, Setting, Tensors, Upstream
from harness.relations import reasons
from harness.relations.declaration import Axis, Images, Padding, Relations, Rows, Scale
from harness.relations.reasons import exempt


def _torch(**arguments: Any) -> dict[str, Tensor]:
    return yolox_l1(**arguments)._asdict()


def minimum_bytes(case: Case, outputs: Tensors) -> int:
    """The mask, and what foreground anchors have: raw values, row, cell; and the targets."""
    mask, raw = case.tensors["fg_mask"], case.tensors["origin_preds"]
    each = 4 * raw.element_size() + case.tensors["matched_gt"].element_size() + 3 * raw.element_size()
    return mask.nbytes + int(mask.sum()) * each + sum(output.nbytes for output in outputs.values())


def _targets_of_anchors(case: Case, outputs: Tensors) -> dict[str, Tensor]:
    """Outputs with the targets of all anchors, 0 for background."""
    found = {name: value for name, value in outputs.items() if name != "l1_target"}
    mask = case.tensors["fg_mask"]
    target = outputs["l1_target"].new_zeros(*mask.shape, 4)
    target[mask] = outputs["l1_target"]
    return {**found, "target": target}


OPERATION = Operation(
    name="yolox_l1",
    summary="L1 distance of raw box values to those that would decode to the matched box",
    source="spec/yolox_losses.md sections 3.3 and 3.4",
    inputs=(
        Input("origin_preds", "(B, N, 4)", "floating", "raw box values"),
        Input("fg_mask", "(B, N)", "bool", "foreground anchors"),
        Input("matched_gt", "(B, N)", "int64", "ground-truth row of each foreground anchor"),
        Input("gt_boxes", "(B, M, 4)", "floating", "ground truths, cxcywh in pixels"),
        Input("strides", "(1, N)", "floating", "stride of each anchor in pixels"),
        Input("x_shifts", "(1, N)", "floating", "column of each anchor in its level"),
        Input("y_shifts", "(1, N)", "floating", "row of each anchor in its level"),
    ),
    settings=(Setting("autocast", None, "dtype under whose autocast both sides run"),),
    outputs=(
        Output("loss_l1", "()", "of origin_preds", "summed and divided by the foreground anchors"),
        Output("l1_target", "(F, 4)", "of origin_preds", "targets of the foreground anchors in order"),
    ),
    upstreams={"yolox": Upstream()},
    candidates={"torch": _torch},
    predictions=("origin_preds",),
    gradients=("origin_preds",),
    moved=("origin_preds", "gt_boxes"),
    minimum_bytes=minimum_bytes,
    workloads=("coco-b1", "coco-b16"),
    relations=Relations(
        images=Images(
            dict.fromkeys(("origin_preds", "fg_mask", "matched_gt", "gt_boxes", "target"), 0), normaliser="one"
        ),
        truths=Rows(
            count=lambda case: [case.tensors["gt_boxes"].shape[1]] * len(case.tensors["gt_boxes"]),
            dense={"gt_boxes": 1},
            counted={"matched_gt": 0},
        ),
        anchors=Axis(
            dict.fromkeys(("origin_preds", "fg_mask", "matched_gt", "strides", "x_shifts", "y_shifts", "target"), 1)
        ),
        padding=Padding(rows={"gt_boxes": math.nan}, dims={"gt_boxes": (1,)}),
        scale=Scale({"gt_boxes": slice(None), "strides": slice(None)}, exact=False),
        gradcheck=("origin_preds",),
        dense=_targets_of_anchors,
        exempt=exempt(
            levels=reasons.NO_LEVELS,
            classes=reasons.NO_CLASSES,
            leak=reasons.DIFFERENTIABLE,
            optimality=reasons.NOTHING_MATCHED,
            monotony=reasons.NOTHING_GROWS,
        ),
    ),
)
