"""Ragged costs of set prediction: each target against the queries of its own image, one row a target.

Everything is elementwise over (targets, queries), in chunks of targets, so memory grows with the targets that
exist and no block between different images is ever formed. Terms are added in upstream's order, so that
float32 costs come out equal, not only close.
"""

from typing import NamedTuple

import torch
from torch import Tensor

CHECKED = ("labels", "pred_boxes", "boxes")
"""What the flags at the end of `packed_costs` speak of, in order (`rtdetr` checks labels only)."""

# Entries of the cost matrix worked on at a time. On the CPU an operation on four planes of them stays below the
# 32768 elements from which PyTorch splits one over its threads: on two idle cores splitting saves up to half
# of the time, on busy ones every split waits for a core, and a call took a hundred times longer.
# Elsewhere the number only bounds memory, at about 160 MB.
_CHUNK_ENTRIES = {"cpu": (1 << 13) - 1}
_CHUNK_ENTRIES_ELSEWHERE = 1 << 21

_RTDETR_OVERLAP_EPS = 1e-7
_RTDETR_LOG_EPS = 1e-8

# Groups of the planes that describe a set of boxes: (cx, cy, w, h); lower corner negated and upper corner; area.
# With the negation one minimum gives both corners of an overlap, and one maximum those of a hull.
_GROUPS = (4, 4, 1)


class CostTerms(NamedTuple):
    """How a pair is priced: `detr` after specification A1, A2, or `rtdetr` after B1, B2.

    `use_fl`, `alpha` and `gamma` are the focal class cost of `rtdetr`.
    """

    variant: str
    class_cost: float = 1
    bbox_cost: float = 1
    giou_cost: float = 1
    use_fl: bool = True
    alpha: float = 0.25
    gamma: float = 2.0


def packed_costs(
    logits: Tensor,
    pred_boxes: Tensor,
    labels: Tensor,
    boxes: Tensor,
    image_of_target: Tensor,
    *,
    terms: CostTerms,
    non_finite: str,
) -> Tensor:
    """Matching costs and their validity flags in one flat tensor: one transfer brings both to the host.

    Args:
        logits: (B, Q, K) class logits; K includes the no-object column for `detr`.
        pred_boxes: (B, Q, 4) normalised centre form.
        labels: (G,) int32 or int64; read as an index into K (from the end if negative, for `detr`).
        boxes: (G, 4) normalised centre form.
        image_of_target: (G,) int64, the image each target belongs to.
        terms: the terms of the cost and their weights.
        non_finite: NaN and infinite costs become the `largest` finite number, `zero`, or stay (`raise`).

    Returns:
        (G * Q + flags,): the (G, Q) costs row by row, then one flag for each name in `CHECKED`, 0 where that
        input holds a value upstream rejects (those costs mean nothing).
        float32, or float64 where an input is float64 that upstream does not cast.
    """
    variant, class_cost, bbox_cost, giou_cost, use_fl, alpha, gamma = terms
    detr = variant == "detr"
    if detr:
        logits, pred_boxes = _at_least_float32(logits), _at_least_float32(pred_boxes)
    else:
        logits, pred_boxes = logits.float(), pred_boxes.float()
    _, count, columns = logits.shape
    queries, queries_ordered = _planes(pred_boxes, detr=detr)
    targets, targets_ordered = _planes(_at_least_float32(boxes).unsqueeze(1), detr=detr)

    # Clamped first and judged later: on CUDA an index out of range would take the whole context down.
    safe_labels = labels.clamp(-columns if detr else 0, columns - 1)
    flags = [(safe_labels == labels).all()]
    if detr:
        flags += [queries_ordered, targets_ordered]

    # All columns at once, since the normaliser needs them anyway; logsumexp alone takes twice as long.
    scores = (logits.softmax(-1) if detr or not use_fl else logits).transpose(1, 2)
    dtype = torch.promote_types(logits.dtype, torch.promote_types(queries.dtype, targets.dtype))
    packed = torch.empty(len(labels) * count + len(flags), dtype=dtype, device=logits.device)
    costs = packed[: -len(flags)].view(len(labels), count)
    packed[-len(flags) :] = torch.stack(flags)

    stand_in = torch.finfo(dtype).max if non_finite == "largest" else 0.0
    rows = max(1, _CHUNK_ENTRIES.get(logits.device.type, _CHUNK_ENTRIES_ELSEWHERE) // max(1, count))
    for start in range(0, len(labels), rows):
        chunk = slice(start, start + rows)
        cost = costs[chunk]
        images = image_of_target[chunk]
        of_class = scores[images, safe_labels[chunk]]
        target, target_corners, target_area = targets[:, chunk].split(_GROUPS)
        # One image needs no copy of its queries for each target: they broadcast.
        own = queries if len(logits) == 1 else queries.index_select(1, images)
        query, query_corners, query_area = own.split(_GROUPS)
        distance = (target - query).abs_().sum(0)
        areas = (target_area + query_area)[0]
        if detr:
            overlap = _generalised_iou(target_corners, query_corners, areas, eps=0.0)
            box_and_class = distance.mul_(bbox_cost) - of_class.mul_(class_cost)
            torch.sub(box_and_class, overlap.mul_(giou_cost), out=cost)
        else:
            overlap = _generalised_iou(target_corners, query_corners, areas, eps=_RTDETR_OVERLAP_EPS)
            class_term = _focal_cost(of_class, alpha, gamma) if use_fl else of_class.neg_()
            class_and_box = class_term.mul_(class_cost) + distance.mul_(bbox_cost)
            torch.add(class_and_box, (1 - overlap).mul_(giou_cost), out=cost)
        if non_finite != "raise":
            cost.nan_to_num_(nan=stand_in, posinf=stand_in, neginf=stand_in)
    return packed


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _planes(boxes: Tensor, *, detr: bool) -> tuple[Tensor, Tensor | None]:
    """(N, M, 4) centre form -> planes (9, N, M), and for `detr` whether no box is inverted or NaN.

    Areas come from corners (`detr`) or from sides (`rtdetr`), as each oracle rounds them.
    """
    planes = boxes.permute(2, 0, 1).contiguous()
    centres, sides = planes.chunk(2)
    half = 0.5 * sides
    lower, upper = centres - half, centres + half
    area = (upper - lower if detr else sides).prod(0, keepdim=True)
    return torch.cat([planes, -lower, upper, area]), (upper >= lower).all() if detr else None


def _generalised_iou(target_corners: Tensor, query_corners: Tensor, areas: Tensor, *, eps: float) -> Tensor:
    """Generalised IoU of corners (4, n, 1) and (4, n, Q), eps added to union and hull.

    `areas` (n, Q) are the sums of both areas; they are overwritten.
    """
    shared = _sides(torch.minimum(target_corners, query_corners)).clamp_(min=0).prod(0)
    hull = _sides(torch.maximum(target_corners, query_corners)).prod(0)
    union = areas.sub_(shared)
    if eps:
        union, hull = union.add_(eps), hull.add_(eps)
    return shared.div_(union).sub_((hull - union).div_(hull))


def _sides(corners: Tensor) -> Tensor:
    lower_negated, upper = corners.chunk(2)
    return upper.add_(lower_negated)


def _focal_cost(logits: Tensor, alpha: float, gamma: float) -> Tensor:
    """`alpha (1-p)^gamma (-ln p) - (1-alpha) p^gamma (-ln(1-p))`, p the sigmoid, 1e-8 in the logarithms."""
    p = logits.sigmoid()
    rest = 1 - p
    against = p.pow(gamma).mul_(1 - alpha).mul_((rest + _RTDETR_LOG_EPS).log_())
    return against.sub_(rest.pow(gamma).mul_(alpha).mul_((p + _RTDETR_LOG_EPS).log_()))
