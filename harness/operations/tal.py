"""`tal`: the task-aligned assigner of YOLOv8, YOLOv10 and YOLO11."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cases.case import Case
from cleanroom.assign.tal import TaskAlignedAssigner
from harness.candidates import by_path
from harness.operation import DropIn, Input, Operation, Output, Setting, Tensors, Upstream, release
from harness.operations.tal_compare import compare
from harness.relations import reasons
from harness.relations.declaration import Axis, Images, Margins, Padding, Relations, Rows, Scale
from harness.relations.positives import grow_with_topk, scored, tal_background, tal_quantities
from harness.relations.reasons import exempt

OUTPUT_NAMES = ("target_labels", "target_bboxes", "target_scores", "fg_mask", "target_gt_idx")
CANDIDATES_SINCE = (8, 0, 52)
TOPK2_SINCE = (8, 4, 0)
MIN_SIDE_SINCE = (8, 4, 128)
PADDING_LABELS_SINCE = (8, 4, 134)
STABLE_ALPHA_SINCE = (8, 4, 144)
EMPTY_BATCH_SINCE = (8, 4, 155)


def _options(version: str) -> dict[str, Any]:
    return {
        "topk2": release(version) >= TOPK2_SINCE,
        "padding_labels": release(version) >= PADDING_LABELS_SINCE,
        "empty_batch": release(version) >= EMPTY_BATCH_SINCE,
        "wider_truths": release(version) < CANDIDATES_SINCE,
    }


def _era(version: str) -> dict[str, Any]:
    """The settings of `spec/task_aligned.md` section 12 that ordinary inputs can see."""
    small_box = "first_stride" if release(version) >= TOPK2_SINCE else "off"
    if release(version) >= MIN_SIDE_SINCE:
        small_box = "min_side"
    former = {} if release(version) >= CANDIDATES_SINCE else {"pair_domain": "all"}
    return former | {
        "small_box": small_box,
        "edge_round_trip": release(version) >= TOPK2_SINCE,
        "ciou_alpha": "stable" if release(version) >= STABLE_ALPHA_SINCE else "legacy",
    }


def drop_in(assigner: type) -> DropIn:
    """The candidate that an assigner class is: its constructor's settings, and its call."""

    def bind(
        pd_scores: Tensor,
        pd_bboxes: Tensor,
        anc_points: Tensor,
        gt_labels: Tensor,
        gt_bboxes: Tensor,
        mask_gt: Tensor,
        **settings: Any,
    ) -> tuple[Callable[[], tuple[Tensor, ...]], Callable[[tuple[Tensor, ...]], Tensors]]:
        made = assigner(**settings)
        return (
            lambda: made(pd_scores, pd_bboxes, anc_points, gt_labels, gt_bboxes, mask_gt),
            lambda outputs: dict(zip(OUTPUT_NAMES, outputs, strict=True)),
        )

    return DropIn(bind)


def invariants(case: Case, outputs: Tensors) -> str | None:
    """At most one ground truth an anchor is the form of the output; the rest is said here."""
    gt_boxes = case.tensors["gt_bboxes"]
    batch, rows = gt_boxes.shape[:2]
    if rows == 0 or batch == 0:
        return None
    index, foreground, scores = outputs["target_gt_idx"], outputs["fg_mask"], outputs["target_scores"]
    if not bool(((index >= 0) & (index < rows)).all()):
        return f"target_gt_idx leaves [0, {rows})"
    if bool((index[~foreground] != 0).any()):
        return "target_gt_idx of a background anchor is not 0"
    image = torch.arange(batch, device=index.device)[:, None]
    if not torch.equal(outputs["target_bboxes"].nan_to_num(), gt_boxes[image, index].nan_to_num()):
        return "target_bboxes is not the ground truth of target_gt_idx"
    labels = case.tensors["gt_labels"][..., 0].long()[image, index].clamp(min=0)
    if not torch.equal(outputs["target_labels"], labels):
        return "target_labels is not the label of target_gt_idx"
    allowed = (
        foreground[..., None]
        & torch.nn.functional.one_hot(labels.clamp(max=scores.shape[-1] - 1), scores.shape[-1]).bool()
    )
    if bool(((scores != 0) & ~allowed & scores.isfinite()).any()):
        return "target_scores is not zero off the assigned class"
    return None


def minimum_bytes(case: Case, outputs: Tensors) -> int:
    """Boxes, points and outputs once; the few scores that a pair needs are not counted."""
    read = sum(t.nbytes for name, t in case.tensors.items() if name != "pd_scores")
    return read + sum(t.nbytes for t in outputs.values())


def _movable_rows(case: Case) -> list[int]:
    """All rows, padded ones too, unless one has a label that row 0 may not have."""
    batch, rows = case.tensors["gt_bboxes"].shape[:2]
    anywhere = bool((case.tensors["gt_labels"] < case.settings["num_classes"]).all())
    return [rows if anywhere else 0] * batch


def _has_rows(case: Case) -> bool:
    """Without rows dtypes are others, and nothing is computed."""
    return case.tensors["gt_bboxes"].numel() > 0


OPERATION = Operation(
    name="tal",
    summary="task-aligned assignment: ground truths propose their top-k anchors by score^alpha * CIoU^beta",
    source="spec/task_aligned.md sections 1 to 8; TOOD (Feng et al., ICCV 2021)",
    inputs=(
        Input("pd_scores", "(B, A, C)", "floating", "class probabilities in [0, 1]"),
        Input("pd_bboxes", "(B, A, 4)", "floating", "predicted boxes, xyxy in pixels"),
        Input("anc_points", "(A, 2)", "floating", "anchor centres in pixels"),
        Input("gt_labels", "(B, n, 1)", "floating", "class of each ground-truth row"),
        Input("gt_bboxes", "(B, n, 4)", "floating", "ground truths, xyxy in pixels"),
        Input("mask_gt", "(B, n, 1)", "floating", "non-zero where the row is a ground truth, not padding"),
    ),
    settings=(
        Setting("topk", 13, "anchors each ground truth proposes"),
        Setting("topk2", None, "anchors each ground truth keeps after conflicts; None: all"),
        Setting("num_classes", 80, "classes of the target scores"),
        Setting("alpha", 1.0, "exponent of the score"),
        Setting("beta", 6.0, "exponent of the overlap"),
        Setting("stride", [8, 16, 32], "strides of the levels in pixels"),
        Setting("eps", 1e-9, "added to the normaliser of the scores"),
    ),
    outputs=(
        Output("target_labels", "(B, A)", "int64", "class, row 0's for background", decision=True),
        Output("target_bboxes", "(B, A, 4)", "of gt_bboxes", "box of the ground truth", decision=True),
        Output("target_scores", "(B, A, C)", "promoted", "soft class targets"),
        Output("fg_mask", "(B, A)", "bool", "foreground", decision=True),
        Output("target_gt_idx", "(B, A)", "int64", "ground-truth row, 0 for background", decision=True),
    ),
    upstreams={"ultralytics": Upstream(options=_options, era=_era)},
    candidates=by_path(drop_in(TaskAlignedAssigner)),
    predictions=("pd_scores", "pd_bboxes"),
    compare=compare,
    invariants=invariants,
    minimum_bytes=minimum_bytes,
    workloads=("coco-b1", "coco-b16", "coco-b64", "crowd-b16", "dense-b4", "dense-xview"),
    relations=Relations(
        images=Images(dict.fromkeys(("pd_scores", "pd_bboxes", "gt_labels", "gt_bboxes", "mask_gt", *OUTPUT_NAMES), 0)),
        truths=Rows(
            count=_movable_rows,
            dense={"gt_labels": 1, "gt_bboxes": 1, "mask_gt": 1},
            counted={"target_gt_idx": 0},
        ),
        anchors=Axis({"pd_scores": 1, "pd_bboxes": 1, "anc_points": 0, **dict.fromkeys(OUTPUT_NAMES, 1)}),
        classes=Axis({"pd_scores": 2, "target_scores": 2}, counted={"gt_labels": None, "target_labels": None}),
        whole=("gt_labels",),
        padding=Padding(
            rows={"gt_labels": 0, "gt_bboxes": math.nan, "mask_gt": 0},
            dims={"gt_labels": (1,), "gt_bboxes": (1,), "mask_gt": (1,)},
        ),
        scale=Scale(
            {"pd_bboxes": slice(None), "anc_points": slice(None), "gt_bboxes": slice(None)},
            settings=("stride",),
            outputs={"target_bboxes": slice(None)},
            exact=False,
        ),
        certain=scored,
        margins=Margins(tal_quantities, era={"small_box": "min_side", "edge_round_trip": True}, restore=tal_background),
        monotony=grow_with_topk,
        free=("pd_scores", "pd_bboxes", "gt_bboxes"),
        fits=_has_rows,
        exempt=exempt(levels=reasons.NO_LEVELS, gradcheck=reasons.ASSIGNER, optimality=reasons.NOTHING_MATCHED),
    ),
)
