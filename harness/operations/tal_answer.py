"""What the task-aligned assigner inside a YOLO criterion must have answered, for the criterion's decisions to be so."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cleanroom.overlap import box_terms, complete_iou
from harness.operation import Tensors, release

FLOOR_SINCE = (8, 0, 11)
CANDIDATES_SINCE = (8, 0, 52)
TOPK2_SINCE = (8, 4, 0)
MIN_SIDE_SINCE = (8, 4, 128)
STABLE_ALPHA_SINCE = (8, 4, 144)
CLASS_WEIGHTS_SINCE = (8, 4, 37)
ROW_ORDER_SINCE = (8, 4, 25)


def options(version: str) -> dict[str, Any]:
    """What the case strategies of the criteria may draw for a version of ultralytics."""
    return {
        "topk2": release(version) >= TOPK2_SINCE,
        "class_weights": release(version) >= CLASS_WEIGHTS_SINCE,
        "row_order": release(version) >= ROW_ORDER_SINCE,
    }


def era(version: str) -> dict[str, Any]:
    """Settings under which a criterion behaves like that version (`spec/yolo_losses.md` section 13)."""
    small_box = "first_stride" if release(version) >= TOPK2_SINCE else "off"
    former = {} if release(version) >= CANDIDATES_SINCE else {"pair_domain": "all"}
    former |= {} if release(version) >= FLOOR_SINCE else {"score_sum_floor": False}
    return former | {
        "small_box": "min_side" if release(version) >= MIN_SIDE_SINCE else small_box,
        "edge_round_trip": release(version) >= TOPK2_SINCE,
        "ciou_alpha": "stable" if release(version) >= STABLE_ALPHA_SINCE else "legacy",
        "reg1_distance": "l1" if release(version) >= TOPK2_SINCE else "zero",
    }


def answer(inputs: Tensors, settings: dict[str, Any], foreground: Tensor, index: Tensor) -> Tensors:
    """Outputs of `tal` under the decisions (B, A); scores by the definition, task_aligned.md, section 4, step 7.

    They are exact, as no oracle's error excuses them where decisions differ.
    """
    scores, truths = inputs["pd_scores"], inputs["gt_bboxes"]
    label = inputs["gt_labels"][..., 0].long().gather(1, index)
    boxes = truths.gather(1, index[..., None].expand(-1, -1, 4))
    score = scores.gather(2, label.remainder(scores.shape[2])[..., None])[..., 0].double()
    overlap = complete_iou(box_terms(boxes.double()), box_terms(inputs["pd_bboxes"].double())).clamp_(min=0)
    metric = torch.where(foreground, score ** settings["alpha"] * overlap ** settings["beta"], 0)
    best_metric, best_overlap = (
        value.new_zeros(truths.shape[:2]).scatter_reduce(1, index, value, "amax").gather(1, index)
        for value in (metric, torch.where(foreground, overlap, 0))
    )
    value = (metric * best_overlap / (best_metric + settings["eps"])).to(
        torch.promote_types(scores.dtype, truths.dtype)
    )
    label = label.clamp(min=0)
    return {
        "target_labels": label,
        "target_bboxes": boxes,
        "target_scores": value.new_zeros(scores.shape).scatter_(2, label[..., None], value[..., None]),
        "fg_mask": foreground,
        "target_gt_idx": index,
    }
