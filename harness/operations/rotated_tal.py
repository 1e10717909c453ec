"""`rotated_tal`: the task-aligned assigner of rotated boxes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cases.case import Case
from cleanroom.assign.rotated_tal import RotatedTaskAlignedAssigner
from harness.operation import Input, Operation, Output, Tensors, Upstream, release
from harness.operations import tal, tal_compare
from harness.operations.rotated_sides import enlarged, small_box
from harness.relations.declaration import Margins, Scale
from harness.relations.positives import tal_background
from harness.verdict import Evidence, Finding

TOPK2_SINCE = (8, 4, 0)
SMALL_BOX_SINCE = (8, 4, 8)
COPY_SINCE = (8, 4, 39)
MIN_SIDE_SINCE = (8, 4, 128)
PADDING_LABELS_SINCE = (8, 4, 134)
EMPTY_BATCH_SINCE = (8, 4, 155)
#: Before, a lone pair of a box and an anchor is written whatever its dtype: 8.3.253 and 8.4.127 do, 8.4.190 refuses.
WIDER_TRUTHS_UNTIL = (8, 4, 190)
#: A release that enlarges boxes in its input gives other sides back.
KEPT_COLUMNS = (0, 1, 4)
LONG_SIDE = 4


def _options(version: str) -> dict[str, Any]:
    return {
        "topk2": release(version) >= TOPK2_SINCE,
        "padding_labels": release(version) >= PADDING_LABELS_SINCE,
        "empty_batch": release(version) >= EMPTY_BATCH_SINCE,
        "wider_truths": release(version) < WIDER_TRUTHS_UNTIL,
    }


def _era(version: str) -> dict[str, Any]:
    """The settings of `spec/task_aligned.md` section 12 that ordinary inputs can see."""
    number = release(version)
    small = "first_stride" if number >= SMALL_BOX_SINCE else "off"
    return {
        "small_box": "min_side" if number >= MIN_SIDE_SINCE else small,
        "small_box_scope": "boxes" if SMALL_BOX_SINCE <= number < COPY_SINCE else "membership",
    }


def invariants(case: Case, outputs: Tensors) -> str | None:
    """Those of `tal`; of target boxes, centre and angle."""
    columns = list(KEPT_COLUMNS)
    tensors = {**case.tensors, "gt_bboxes": case.tensors["gt_bboxes"][..., columns]}
    return tal.invariants(
        replace(case, tensors=tensors), {**outputs, "target_bboxes": outputs["target_bboxes"][..., columns]}
    )


def compare(evidence: Evidence) -> Finding:
    """As `tal` is compared; where the era enlarges the boxes themselves, with those."""
    if evidence.era["small_box_scope"] == "boxes":
        case = evidence.case
        boxes, valid = case.tensors["gt_bboxes"], case.tensors["mask_gt"] != 0
        sides = small_box(evidence.era, list(case.settings["stride"] or (8, 16, 32)))
        boxes = torch.where(valid, enlarged(boxes, *sides), boxes)
        evidence = replace(evidence, case=replace(case, tensors={**case.tensors, "gt_bboxes": boxes}))
    return tal_compare.compare(evidence)


def quantities(tensors: Tensors) -> dict[str, Tensor]:
    """Probabilistic IoU of every row and anchor, at least 0 (`spec/boxes.md` section 11)."""
    eps = 1e-7
    first, second = (
        (box, *_covariance(box)) for box in (tensors["gt_bboxes"][:, :, None], tensors["pd_bboxes"][:, None])
    )
    across, along, mixed = (first[place] + second[place] for place in (1, 2, 3))
    dx, dy = (first[0][..., axis] - second[0][..., axis] for axis in (0, 1))
    joint = across * along - mixed**2
    own = [(box[1] * box[2] - box[3] ** 2).clamp(min=0) for box in (first, second)]
    distance = (across * dy**2 + along * dx**2) / (joint + eps) / 4 - mixed * dx * dy / (joint + eps) / 2
    distance = distance + (joint / (4 * (own[0] * own[1]).sqrt() + eps) + eps).log() / 2
    return {"overlap": (1 - (1 - (-distance.clamp(eps, 100)).exp() + eps).sqrt()).clamp(min=0)}


def _covariance(boxes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    width, height, angle = boxes[..., 2] ** 2 / 12, boxes[..., 3] ** 2 / 12, boxes[..., 4]
    cosine, sine = angle.cos(), angle.sin()
    return width * cosine**2 + height * sine**2, width * sine**2 + height * cosine**2, (width - height) * cosine * sine


def _long_sides(case: Case) -> bool:
    """Sides beside whose determinants an epsilon vanishes."""
    boxes = case.tensors["gt_bboxes"][case.tensors["mask_gt"][..., 0] != 0], case.tensors["pd_bboxes"]
    return all(bool((box[..., 2:4].abs() >= LONG_SIDE).all()) for box in boxes)


def _lengths(name: str) -> slice:
    """All columns but the angle."""
    return slice(None) if name == "anc_points" else slice(0, 4)


OPERATION = Operation(
    name="rotated_tal",
    summary="task-aligned assignment of rotated boxes, by score^alpha * probabilistic IoU^beta",
    source="spec/task_aligned.md section 9; TOOD (Feng et al., ICCV 2021), Llerena et al., arXiv:2106.06072",
    inputs=(
        Input("pd_scores", "(B, A, C)", "floating", "class probabilities in [0, 1]"),
        Input("pd_bboxes", "(B, A, 5)", "floating", "predicted centre, width, height in pixels, angle in radians"),
        Input("anc_points", "(A, 2)", "floating", "anchor centres in pixels"),
        Input("gt_labels", "(B, n, 1)", "floating", "class of each ground-truth row"),
        Input("gt_bboxes", "(B, n, 5)", "floating", "ground truths, as the predictions"),
        Input("mask_gt", "(B, n, 1)", "floating", "non-zero where the row is a ground truth, not padding"),
    ),
    settings=tal.OPERATION.settings,
    outputs=(
        Output("target_labels", "(B, A)", "int64", "class, row 0's for background", decision=True),
        Output("target_bboxes", "(B, A, 5)", "of gt_bboxes", "box of the ground truth", decision=True),
        Output("target_scores", "(B, A, C)", "promoted", "soft class targets"),
        Output("fg_mask", "(B, A)", "bool", "foreground", decision=True),
        Output("target_gt_idx", "(B, A)", "int64", "ground-truth row, 0 for background", decision=True),
    ),
    upstreams={"ultralytics": Upstream(options=_options, era=_era)},
    candidates={"torch": tal.drop_in(RotatedTaskAlignedAssigner)},
    predictions=("pd_scores", "pd_bboxes"),
    compare=compare,
    invariants=invariants,
    minimum_bytes=tal.minimum_bytes,
    workloads=("coco-b1", "coco-b16", "crowd-b16"),
    relations=replace(
        tal.OPERATION.relations,
        cancels="float32",
        scale=Scale(
            {name: _lengths(name) for name in ("pd_bboxes", "anc_points", "gt_bboxes")},
            settings=("stride",),
            outputs={"target_bboxes": slice(0, 4)},
            fits=_long_sides,
            exact=False,
        ),
        margins=Margins(
            quantities, era={"small_box": "min_side", "small_box_scope": "membership"}, restore=tal_background
        ),
    ),
)
