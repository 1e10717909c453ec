"""`simota`: the label assigner of YOLOX."""

from __future__ import annotations

import math
from typing import Any

import torch

from cases.case import Case
from cleanroom.assign.simota import simota_assign
from harness.candidates import by_path
from harness.equality import FLOOR_ULPS, ulp
from harness.operation import Input, Operation, Output, Setting, Tensors, Upstream
from harness.operations.simota_compare import compare
from harness.operations.simota_margins import HEAD, PACKAGE, candidates
from harness.relations import reasons
from harness.relations.declaration import Axis, Images, Margins, Padding, Relations, Rows, Scale
from harness.relations.positives import matched, simota_quantities, within_dynamic_k
from harness.relations.reasons import exempt


def _era(version: str) -> dict[str, Any]:
    """Settings of `spec/simota.md` section 1; the repository's head calls itself what the release does."""
    return dict(HEAD if version.endswith("+head") else PACKAGE)


def _torch(**arguments: Any) -> dict[str, torch.Tensor]:
    return simota_assign(**arguments)._asdict()


def invariants(case: Case, outputs: Tensors) -> str | None:
    """At most one ground truth an anchor is the form of the output; the rest is said here."""
    tensors, owner = case.tensors, outputs["matched_gt"]
    foreground, overlap = outputs["fg_mask"], outputs["matched_iou"]
    if not bool(((owner >= -1) & (owner < tensors["num_gt"].to(owner.device)[:, None])).all()):
        return "matched_gt leaves [-1, num_gt)"
    if not torch.equal(foreground, owner >= 0):
        return "fg_mask is not matched_gt >= 0"
    if not torch.equal(outputs["num_fg"], foreground.sum(1)):
        return "num_fg is not the number of foreground anchors"
    if bool((overlap[~foreground] != 0).any() | (outputs["matched_classes"][~foreground] != 0).any()):
        return "matched_iou or matched_classes of a background anchor is not 0"
    image, anchor = foreground.nonzero(as_tuple=True)
    row = owner[image, anchor]
    classes = tensors["gt_classes"][image, row]
    if not torch.equal(outputs["matched_classes"][image, anchor], classes):
        return "matched_classes is not the class of matched_gt"
    if not bool(candidates(tensors)[foreground].all() or candidates(tensors, possible=True)[foreground].all()):
        return "a foreground anchor is no candidate of its image"
    # Corners of a small box far from the origin round by more than its overlap's own unit.
    boxes = torch.stack((tensors["gt_boxes"][image, row].double(), tensors["pred_boxes"][image, anchor].double()))
    corner = boxes[..., :2].abs() + boxes[..., 2:].abs()
    slack = FLOOR_ULPS * (torch.finfo(overlap.dtype).eps + ulp(corner, overlap.dtype) / boxes[..., 2:].abs())
    slack = slack.amax((0, -1))
    if bool(((overlap[image, anchor] < -slack) | (overlap[image, anchor] > 1 + slack)).any()):
        return "matched_iou leaves [0, 1]"
    return None


def minimum_bytes(case: Case, outputs: Tensors) -> int:
    """Ground truths, grid and outputs once, and boxes and logits of the candidates."""
    rows = ("pred_boxes", "cls_logits", "obj_logits")
    count = int(candidates(case.tensors).sum())
    read = sum(tensor.nbytes for name, tensor in case.tensors.items() if name not in rows)
    each = sum(case.tensors[name].shape[-1] * case.tensors[name].element_size() for name in rows)
    return read + count * each + sum(tensor.nbytes for tensor in outputs.values())


OF_ROWS = ("gt_boxes", "gt_classes")
OF_ANCHORS = (
    *("pred_boxes", "cls_logits", "obj_logits"),
    *("fg_mask", "matched_gt", "matched_classes", "matched_iou"),
)

OPERATION = Operation(
    name="simota",
    summary="SimOTA label assignment: each ground truth takes its k cheapest candidates, k from overlaps",
    source="spec/simota.md section 4; YOLOX (Ge et al., arXiv:2107.08430)",
    inputs=(
        Input("gt_boxes", "(B, M, 4)", "floating", "ground truths, cxcywh in pixels"),
        Input("gt_classes", "(B, M)", "floating", "class of each ground truth"),
        Input("num_gt", "(B,)", "int64", "number of leading rows that are ground truths"),
        Input("pred_boxes", "(B, N, 4)", "floating", "decoded boxes, cxcywh in pixels"),
        Input("cls_logits", "(B, N, C)", "floating", "class logits"),
        Input("obj_logits", "(B, N, 1)", "floating", "objectness logits"),
        Input("strides", "(1, N)", "floating", "stride of each anchor in pixels"),
        Input("x_shifts", "(1, N)", "floating", "column of each anchor in its level"),
        Input("y_shifts", "(1, N)", "floating", "row of each anchor in its level"),
    ),
    settings=(Setting("num_classes", 80, "number of classes C"),),
    outputs=(
        Output("fg_mask", "(B, N)", "bool", "foreground", decision=True),
        Output("matched_gt", "(B, N)", "int64", "ground-truth row, -1 for background", decision=True),
        Output("matched_classes", "(B, N)", "of gt_classes", "class of the ground truth", decision=True),
        Output("matched_iou", "(B, N)", "promoted", "overlap with the ground truth, 0 for background"),
        Output("num_fg", "(B,)", "int64", "number of foreground anchors", decision=True),
    ),
    upstreams={"yolox": Upstream(era=_era)},
    candidates=by_path(_torch),
    predictions=("pred_boxes", "cls_logits", "obj_logits"),
    compare=compare,
    invariants=invariants,
    minimum_bytes=minimum_bytes,
    workloads=("coco-b1", "coco-b16", "coco-b64", "crowd-b16", "dense-b4"),
    relations=Relations(
        images=Images(dict.fromkeys((*OF_ROWS, "num_gt", *OF_ANCHORS, "num_fg"), 0)),
        truths=Rows(
            count=lambda case: case.tensors["num_gt"].tolist(),
            dense={"gt_boxes": 1, "gt_classes": 1},
            counted={"matched_gt": 0},
        ),
        anchors=Axis(dict.fromkeys((*OF_ANCHORS, "strides", "x_shifts", "y_shifts"), 1)),
        classes=Axis({"cls_logits": 2}, counted={"gt_classes": None, "matched_classes": None}),
        whole=("gt_classes",),
        padding=Padding(
            rows={"gt_boxes": math.nan, "gt_classes": math.nan}, dims={"gt_boxes": (1,), "gt_classes": (1,)}
        ),
        scale=Scale({"gt_boxes": slice(None), "pred_boxes": slice(None), "strides": slice(None)}),
        dense=matched,
        margins=Margins(simota_quantities),
        monotony=within_dynamic_k,
        free=("gt_boxes", "pred_boxes", "cls_logits", "obj_logits"),
        exempt=exempt(levels=reasons.NO_LEVELS, gradcheck=reasons.ASSIGNER, optimality=reasons.NOTHING_MATCHED),
    ),
)
