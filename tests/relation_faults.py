"""Candidates of which each breaks one relation: what one answer contradicts another in."""

import itertools

import torch

from harness.operations import operation
from harness.worker import as_outputs

calls = itertools.count()


def right(name, given):
    """The built-in candidate's answer."""
    return as_outputs(operation(name).candidates["torch"](**given))


def dfl_loss(**given):
    return right("dfl_loss", given)


def last_image_is_special(**given):
    outputs = right("class_bce", given)
    return {"loss": outputs["loss"] + given["scores"][-1].abs().sum() / 8}


def images_share_a_mean(*, scores, **given):
    return right("class_bce", {"scores": scores - scores.mean(0), **given})


def first_row_is_enlarged(*, gt_bboxes, **given):
    first = torch.zeros_like(gt_bboxes)
    first[:, :1, 2:] = 4
    return right("tal", {"gt_bboxes": gt_bboxes + first, **given})


def first_query_is_cheap(*, logits, **given):
    first = torch.zeros_like(logits)
    first[:, :1] = 9 * (torch.arange(logits.shape[2]) == 0)
    return right("hungarian", {"logits": logits + first, **given})


def first_anchor_is_never_chosen(*, pd_bboxes, **given):
    """Not a tie: whatever overlap it has."""
    moved = pd_bboxes.clone()
    moved[:, 0] += 10_000
    return right("tal", {"pd_bboxes": moved, **given})


def first_level_is_shifted(*, strides, **given):
    outputs = right("make_anchors", {"strides": strides, **given})
    first = outputs["point_strides"] == outputs["point_strides"][:1]
    return {**outputs, "points": outputs["points"] + 0.25 * first}


def class_0_weighs_more(*, values, labels, **given):
    return right("class_bce", {"values": values * (1 + (labels == 0)), "labels": labels, **given})


def padding_votes_for_anchor_0(*, mask_gt, **given):
    outputs = right("tal", {"mask_gt": mask_gt, **given})
    foreground = outputs["fg_mask"].clone()
    foreground[:, 0] |= (mask_gt == 0).any(1)[:, 0]
    return {**outputs, "fg_mask": foreground}


def epsilon_of_a_pixel(*, bboxes_a, bboxes_b, xyxy):
    sizes = [boxes[:, 2:] - boxes[:, :2] if xyxy else boxes[:, 2:] for boxes in (bboxes_a, bboxes_b)]
    union = sizes[0].prod(1)[:, None] + sizes[1].prod(1)[None]
    outputs = right("bboxes_iou", {"bboxes_a": bboxes_a, "bboxes_b": bboxes_b, "xyxy": xyxy})
    return {"iou": outputs["iou"] * union / (union + 1)}


def counts_its_calls(**given):
    outputs = right("dfl_loss", given)
    return {"loss": outputs["loss"] * (1 + 1e-6 * next(calls))}


def refuses_deterministic_algorithms(**given):
    if torch.are_deterministic_algorithms_enabled():
        raise RuntimeError("no deterministic implementation")
    return right("dfl_loss", given)


def clamps_its_target(*, target, **given):
    outputs = right("dfl_loss", {"target": target, **given})
    with torch.no_grad():
        target.clamp_(0.125, 0.25)
    return outputs


def leaks_gradient(*, pd_scores, **given):
    outputs = right("tal", {"pd_scores": pd_scores, **given})
    return {**outputs, "target_scores": outputs["target_scores"] + 0 * pd_scores.sum()}


def slope_is_larger(*, pred_dist, **given):
    outputs = right("dfl_loss", {"pred_dist": pred_dist, **given})
    return {"loss": outputs["loss"] + 0.01 * (pred_dist - pred_dist.detach()).sum()}


def matches_without_boxes(*, bbox_cost, giou_cost, **given):
    return right("hungarian", {"bbox_cost": 0.0, "giou_cost": 0.0, **given})


def assigns_greedily(*, cost, sizes):
    columns = cost.new_full(cost.shape[:2], -1, dtype=torch.int64)
    for problem, (rows, width) in enumerate(sizes):
        block = cost[problem, :rows, :width].clone()
        for _ in range(min(rows, width)):
            place = int(block.argmin())
            row, column = divmod(place, width)
            columns[problem, row] = column
            block[row], block[:, column] = torch.inf, torch.inf
    return {"columns": columns}


def large_topk_is_cut_to_1(*, topk, **given):
    return right("tal", {"topk": topk if topk < 20 else 1, **given})


def surer_is_cheaper(*, scores, **given):
    outputs = right("class_bce", {"scores": scores, **given})
    return {"loss": outputs["loss"] - 2 * scores.sum()}
