"""Matching costs of set prediction on the device: targets of an image against its queries, all layers at once.

The counterpart of `cleanroom.assign.matching_cost.packed_costs`: the same terms, added in the same order, in float32.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cleanroom.assign.matching_cost import CHECKED, CostTerms
from cleanroom.kernels import runtime
from cleanroom.kernels.host_numbers import on_device
from cleanroom.kernels.numbers import sigmoid

BLOCK_TARGETS, BLOCK_QUERIES = 8, 64
_BLOCK_COLUMNS = 32
_RTDETR_OVERLAP_EPS = tl.constexpr(1e-7)
_RTDETR_LOG_EPS = tl.constexpr(1e-8)
_LARGEST = tl.constexpr(torch.finfo(torch.float32).max)


class Ragged(NamedTuple):
    """Where the problems of L layers and B images lie: views (L * B,) int64 of one table on the device.

    A problem is one image in one layer; its costs are `queries` columns of one row for each of its `sizes` targets.
    """

    starts: Tensor
    """First cost, in (L, G, Q)."""
    queries: Tensor
    """Q."""
    sizes: Tensor
    """Targets of the image."""
    first_targets: Tensor
    """The first of them, in [0, G)."""
    first_pairs: Tensor
    """The first pair of the problem, `min(Q, size)` each."""


def ragged(sizes: Sequence[int], queries: int, layers: int, device: torch.device) -> Ragged:
    """The table of the problems, from numbers that the host knows: 40 bytes a problem, without a transfer."""
    table = runtime.empty((len(Ragged._fields), layers * len(sizes)), torch.int64, device)
    counts = on_device(sizes, device)
    runtime.launch(
        _write_table, (layers,), table, counts, len(sizes), queries, BLOCK=triton.next_power_of_2(len(sizes))
    )
    return Ragged(*table)


@triton.jit(do_not_specialize=("images", "queries"))
def _write_table(table, sizes, images, queries, BLOCK: tl.constexpr):
    """Rows of `Ragged` for the images of one layer."""
    image = tl.arange(0, BLOCK)
    real = image < images
    size = tl.load(sizes + image, mask=real, other=0)
    matched = tl.minimum(size, queries)
    layer = tl.program_id(0).to(tl.int64)
    first_target = tl.cumsum(size, 0) - size
    first_pair = tl.cumsum(matched, 0) - matched
    at = table + layer * images + image
    field = tl.num_programs(0).to(tl.int64) * images
    tl.store(at, (layer * tl.sum(size, 0) + first_target) * queries, mask=real)
    tl.store(at + field, queries + size * 0, mask=real)
    tl.store(at + 2 * field, size, mask=real)
    tl.store(at + 3 * field, first_target, mask=real)
    tl.store(at + 4 * field, layer * tl.sum(matched, 0) + first_pair, mask=real)


def layer_costs(
    logits: Sequence[Tensor],
    pred_boxes: Sequence[Tensor],
    labels: Tensor,
    boxes: Tensor,
    problems: Ragged,
    *,
    terms: CostTerms,
    non_finite: str,
    block_targets: int = 0,
    block_queries: int = 0,
) -> tuple[Tensor, Tensor]:
    """Costs of every layer, one row a target, and what is wrong with the inputs.

    Layers that lie at equal distances in one tensor, as those of a stack do, are read in one launch; others take one
    each. Reads logits and boxes once from memory, the columns of targets again from a cache, and writes 4 L G Q bytes.

    Args:
        logits: L tensors (B, Q, K), float32 or half, of one dtype; any strides.
        pred_boxes: L tensors (B, Q, 4), the same.
        labels: (G,) int32 or int64.
        boxes: (G, 4) float32 or half.
        problems: the table of the sizes, L * B of them, on the same device.
        terms, non_finite: as in `packed_costs`.

    Returns:
        (L, G, Q) float32 costs; (3,) int32, 1 where an input of `CHECKED` holds a value that upstream rejects.
    """
    variant, class_cost, bbox_cost, giou_cost, use_fl, alpha, gamma = terms
    batch, queries, columns = logits[0].shape
    device = logits[0].device
    costs = runtime.empty((len(logits), labels.shape[0], queries), torch.float32, device)
    wrong = runtime.zeros((len(CHECKED),), torch.int32, device)
    spacing = [_spacing(given) for given in (logits, pred_boxes)]
    together = len(logits) if None not in spacing else 1
    block_queries = block_queries or BLOCK_QUERIES
    for layer in range(0, len(logits), together):
        own_logits, own_boxes = logits[layer], pred_boxes[layer]
        runtime.launch(
            _costs,
            (together * batch, triton.cdiv(queries, block_queries)),
            own_logits,
            own_boxes,
            labels,
            boxes,
            problems.sizes,
            problems.first_targets,
            costs[layer],
            wrong,
            spacing[0] or 0,
            spacing[1] or 0,
            *own_logits.stride(),
            *own_boxes.stride(),
            *labels.stride(),
            *boxes.stride(),
            batch,
            queries,
            columns,
            labels.shape[0],
            float(class_cost),
            float(bbox_cost),
            float(giou_cost),
            float(alpha),
            float(gamma),
            DETR=variant == "detr",
            FOCAL=variant == "rtdetr" and use_fl,
            SQUARE=gamma == 2,
            POLICY=non_finite,
            BLOCK_TARGETS=block_targets or BLOCK_TARGETS,
            BLOCK_QUERIES=block_queries,
            BLOCK_COLUMNS=_BLOCK_COLUMNS,
            num_warps=4,
        )
    return costs, wrong


def _spacing(layers: Sequence[Tensor]) -> int | None:
    """Elements from one layer to the next, where all have the same distance and strides in one memory."""
    first = layers[0]
    distances = {after.storage_offset() - before.storage_offset() for before, after in pairwise(layers)}
    memories = {(layer.untyped_storage().data_ptr(), layer.stride(), layer.dtype) for layer in layers}
    if len(memories) > 1 or len(distances) > 1:
        return None
    return distances.pop() if len(layers) > 1 and first.numel() else 0


@triton.jit
def _minimum(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _maximum(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _power(p, gamma, SQUARE: tl.constexpr):
    """`p ** gamma` of p in [0, 1]; the square as PyTorch takes it."""
    if SQUARE:
        return p * p
    return tl.where(gamma == 0, tl.where(p == p, 1.0, p), tl.exp2(gamma * tl.log2(p)))


@triton.jit
def _corners(box, stride, real):
    """Centre form at `box`, and its corners."""
    cx = tl.load(box, mask=real, other=0.0).to(tl.float32)
    cy = tl.load(box + stride, mask=real, other=0.0).to(tl.float32)
    w = tl.load(box + 2 * stride, mask=real, other=0.0).to(tl.float32)
    h = tl.load(box + 3 * stride, mask=real, other=0.0).to(tl.float32)
    return cx, cy, w, h, cx - 0.5 * w, cy - 0.5 * h, cx + 0.5 * w, cy + 0.5 * h


@triton.jit(do_not_specialize=("targets",))
def _costs(logits, pred_boxes, labels, boxes, sizes, first_targets, costs, wrong, logit_layer, box_layer,
           logit_image, logit_query, logit_column, box_image, box_query, box_value, label_stride, target_stride,
           target_value, images, queries, columns, targets, class_cost, bbox_cost, giou_cost, alpha, gamma,
           DETR: tl.constexpr, FOCAL: tl.constexpr, SQUARE: tl.constexpr, POLICY: tl.constexpr,
           BLOCK_TARGETS: tl.constexpr, BLOCK_QUERIES: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):  # fmt: skip
    """A tile of queries of one image in one layer against all targets of the image.

    `detr`: `bbox * L1 - class * softmax - giou * GIoU`. `rtdetr`: `class * focal + bbox * L1 + giou * (1 - GIoU)`, with
    `focal = alpha (1-p)^gamma (-ln(p + 1e-8)) - (1-alpha) p^gamma (-ln(1 - p + 1e-8))`, or minus the softmax.
    """
    layer = (tl.program_id(0) // images).to(tl.int64)
    image = (tl.program_id(0) % images).to(tl.int64)
    query = tl.program_id(1) * BLOCK_QUERIES + tl.arange(0, BLOCK_QUERIES)
    real_query = query < queries
    row = logits + layer * logit_layer + image * logit_image + query.to(tl.int64) * logit_query

    # What the softmax is normalised by.
    highest = tl.full((BLOCK_QUERIES,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_QUERIES,), tl.float32)
    if not FOCAL:
        for first in range(0, columns, BLOCK_COLUMNS):
            column = first + tl.arange(0, BLOCK_COLUMNS)
            there = real_query[:, None] & (column < columns)[None, :]
            logit = tl.load(row[:, None] + column[None, :] * logit_column, mask=there, other=float("-inf"))
            highest = tl.maximum(highest, tl.max(logit.to(tl.float32), axis=1))
        for first in range(0, columns, BLOCK_COLUMNS):
            column = first + tl.arange(0, BLOCK_COLUMNS)
            there = real_query[:, None] & (column < columns)[None, :]
            logit = tl.load(row[:, None] + column[None, :] * logit_column, mask=there, other=0.0).to(tl.float32)
            total += tl.sum(tl.where(there, tl.exp(logit - highest[:, None]), 0.0), axis=1)

    box = pred_boxes + layer * box_layer + image * box_image + query.to(tl.int64) * box_query
    cx, cy, w, h, left, top, right, bottom = _corners(box, box_value, real_query)
    area = (right - left) * (bottom - top) if DETR else w * h
    if DETR:
        ordered = (right >= left) & (bottom >= top)
        tl.atomic_max(wrong + 1 + query * 0, 1, mask=real_query & (ordered == 0))

    size = tl.load(sizes + image)
    first_target = tl.load(first_targets + image)
    # One tile of queries speaks for all of what it says about targets.
    checked = tl.where(tl.program_id(1) == 0, size, 0)
    for start in range(0, size, BLOCK_TARGETS):
        place = start + tl.arange(0, BLOCK_TARGETS)
        target = first_target + place
        real_target = place < size
        label = tl.load(labels + target * label_stride, mask=real_target, other=0).to(tl.int64)
        beyond = (label >= columns) | (label < (-columns if DETR else 0))
        tl.atomic_max(wrong + place * 0, 1, mask=(place < checked) & beyond)
        label = tl.where(beyond, 0, tl.where(label < 0, label + columns, label))
        truth = boxes + target * target_stride
        tx, ty, tw, th, t_left, t_top, t_right, t_bottom = _corners(truth, target_value, real_target)
        t_area = (t_right - t_left) * (t_bottom - t_top) if DETR else tw * th
        if DETR:
            upright = (t_right >= t_left) & (t_bottom >= t_top)
            tl.atomic_max(wrong + 2 + place * 0, 1, mask=(place < checked) & (upright == 0))

        real = real_target[:, None] & real_query[None, :]
        logit = tl.load(row[None, :] + label[:, None] * logit_column, mask=real, other=0.0).to(tl.float32)
        distance = tl.abs(tx[:, None] - cx[None, :]) + tl.abs(ty[:, None] - cy[None, :])
        distance = distance + tl.abs(tw[:, None] - w[None, :]) + tl.abs(th[:, None] - h[None, :])
        shared_w = _minimum(t_right[:, None], right[None, :]) - _maximum(t_left[:, None], left[None, :])
        shared_h = _minimum(t_bottom[:, None], bottom[None, :]) - _maximum(t_top[:, None], top[None, :])
        shared = _maximum(shared_w, 0.0) * _maximum(shared_h, 0.0)
        hull_w = _maximum(t_right[:, None], right[None, :]) - _minimum(t_left[:, None], left[None, :])
        hull_h = _maximum(t_bottom[:, None], bottom[None, :]) - _minimum(t_top[:, None], top[None, :])
        hull = hull_w * hull_h
        union = (t_area[:, None] + area[None, :]) - shared
        if not DETR:
            union, hull = union + _RTDETR_OVERLAP_EPS, hull + _RTDETR_OVERLAP_EPS
        overlap = tl.div_rn(shared, union) - tl.div_rn(hull - union, hull)
        if FOCAL:
            p = sigmoid(logit)
            rest = 1 - p
            against = _power(p, gamma, SQUARE) * (1 - alpha) * tl.log(rest + _RTDETR_LOG_EPS)
            of_class = against - _power(rest, gamma, SQUARE) * alpha * tl.log(p + _RTDETR_LOG_EPS)
        else:
            of_class = tl.div_rn(tl.exp(logit - highest[None, :]), total[None, :] + tl.zeros_like(logit))
        if DETR:
            cost = (distance * bbox_cost - of_class * class_cost) - overlap * giou_cost
        elif FOCAL:
            cost = (of_class * class_cost + distance * bbox_cost) + (1 - overlap) * giou_cost
        else:
            cost = (-of_class * class_cost + distance * bbox_cost) + (1 - overlap) * giou_cost
        # NaN compares as false.
        if POLICY == "largest":
            cost = tl.where(tl.abs(cost) <= _LARGEST, cost, _LARGEST)
        elif POLICY == "zero":
            cost = tl.where(tl.abs(cost) <= _LARGEST, cost, 0.0)
        at = costs + (layer * targets + target[:, None]) * queries + query[None, :]
        tl.store(at, cost, mask=real)
