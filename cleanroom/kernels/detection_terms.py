"""Sums and gradients of the class term and of the box and distance terms of a YOLO criterion, tile by tile.

Two kernels rather than one: box terms take twice the registers that keep the class logits, by far the larger part,
streaming. Both make sums, gradients or both, as their pointers are given; for what they compute see `detection_loss`.
"""

import torch
import triton
import triton.language as tl

from cleanroom.kernels import runtime
from cleanroom.kernels.complete_iou import complete_iou_slopes
from cleanroom.kernels.decode import bins_of, rounded
from cleanroom.kernels.numbers import log1p_unit

# The interpreter's cast to bfloat16 truncates.
_TRUNCATES = tl.constexpr(runtime.INTERPRETED)
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)


@triton.jit
def learners(target, owner, ignored, anchor, place, anchors):
    """Of a tile: which anchors there are, which take part, their target scores, and the rows of those that learn."""
    inside = anchor < anchors
    kept = inside
    if ignored is not None:
        kept = inside & (tl.load(ignored + place, mask=inside, other=1) == 0)
    value = tl.load(target + place, mask=kept, other=0.0)
    return inside, kept, value, tl.load(owner + place, mask=value > 0, other=0)


@triton.jit
def normaliser_of(parts, PARTS: tl.constexpr):
    """Sum of the target scores, at least 1."""
    return tl.maximum(tl.sum(tl.load(parts + tl.arange(0, PARTS))), 1.0)


@triton.jit(do_not_specialize=["objects"])
def class_kernel(
    scores, owner, target, parts, labels, weights, ignored, grad, slopes, sums,
    anchors, classes, objects, s_image, s_class, s_anchor, grad_image, grad_term, scale,
    RESCALE: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr, CLASSES: tl.constexpr,
):  # fmt: skip
    """``sum softplus(x) - t x`` over a tile's anchors and all classes; its slopes ``scale (sigmoid(x) - t) / S``.

    `grad` multiplies the scale; `RESCALE` ends where that is by 1. Reads a logit once, writes a slope.
    """
    tile, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    factor = 1.0
    needed = True
    if grad is not None:
        factor = tl.load(grad + image * grad_image + grad_term)
        if RESCALE:
            needed = factor != 1.0
    if needed:
        anchor = tile * BLOCK + tl.arange(0, BLOCK)
        inside, kept, value, row = learners(target, owner, ignored, anchor, image * anchors + anchor, anchors)
        # In the dtype of the logits, as upstream's dense target.
        value = rounded(value, scores.dtype.element_ty)
        label = tl.load(labels + image * objects + row, mask=value > 0, other=-1)
        label = tl.where((value > 0) & (label < 0), 0, label).to(tl.int32)
        if slopes is not None:
            scale = scale * factor / normaliser_of(parts, PARTS)
        total = tl.zeros((CLASSES, BLOCK), tl.float32)
        for first in range(0, classes, CLASSES):
            column = first + tl.arange(0, CLASSES)[:, None]
            there = column < classes
            # A logit of -infinity costs nothing and has no slope.
            at = scores + image * s_image + column * s_class + anchor[None, :] * s_anchor
            x = tl.load(at, mask=there & kept[None, :], other=float("-inf")).to(tl.float32)
            wanted = tl.where(column == label[None, :], value[None, :], 0.0)
            small = tl.exp(-tl.abs(x))
            # (1 - t) x or -t x, and log(1 + e^-|x|): nothing cancels.
            sign = tl.where(x > 0, 1.0 - wanted, -wanted)
            loss = sign * tl.maximum(x, _LOWEST) + log1p_unit(small)
            if weights is not None:
                weight = tl.load(weights + column, mask=there, other=0.0)
                loss *= weight
            total += loss
            if slopes is not None:
                other = small / (1.0 + small)
                slope = (sign + tl.where(x > 0, -other, other)) * scale
                if weights is not None:
                    slope *= weight
                if _TRUNCATES:
                    slope = rounded(slope, slopes.dtype.element_ty)
                into = slopes + (image * classes + column) * anchors + anchor[None, :]
                tl.store(into, slope, mask=there & inside[None, :])
        if sums is not None:
            tl.store(sums + image * tl.num_programs(0) + tile, tl.sum(total))


@triton.jit(do_not_specialize=["objects", "s_channel", "s_anchor", "slope_anchor"])
def box_kernel(
    boxes, owner, target, parts, gt_boxes, points, strides, ignored, grad, slopes, sums,
    anchors, objects, s_image, s_channel, s_anchor, slope_anchor, grad_image, grad_term,
    box_scale, distance_scale, width, height,
    R: tl.constexpr, LEGACY: tl.constexpr, L1: tl.constexpr, RESCALE: tl.constexpr,
    PARTS: tl.constexpr, BLOCK: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """``sum t (1 - CIoU)`` and ``sum t DFL`` (or L1) over a tile's foreground, and the slopes of all its channels.

    `grad` multiplies the scales; `RESCALE` ends where both are by 1, and leaves tiles without foreground as they are.
    Reads 4 R channels of foreground anchors, writes 4 R of every anchor. Strides of channels and anchors are not
    specialised on, nor `slope_anchor`, which is 1: without vectors, a lane has all bins of an anchor, and nothing is
    computed twice.
    """
    tile, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    needed = True
    if grad is not None:
        box_factor = tl.load(grad + image * grad_image)
        distance_factor = tl.load(grad + image * grad_image + 2 * grad_term)
        box_scale *= box_factor
        distance_scale *= distance_factor
        if RESCALE:
            needed = (box_factor != 1.0) | (distance_factor != 1.0)
    if needed:
        anchor = tile * BLOCK + tl.arange(0, BLOCK)
        inside, _, value, row = learners(target, owner, ignored, anchor, image * anchors + anchor, anchors)
        into = slopes
        if slopes is not None:
            normaliser = normaliser_of(parts, PARTS)
            box_scale, distance_scale = box_scale / normaliser, distance_scale / normaliser
            into += image * (4 * R) * anchors
        box_sum = tl.full((), 0.0, tl.float32)
        distance_sum = tl.full((), 0.0, tl.float32)
        if tl.max((value > 0).to(tl.int32), 0) > 0:
            box_sum, distance_sum = box_terms(
                boxes + image * s_image, into, points, strides, gt_boxes + (image * objects + row) * 4, anchor, inside,
                value, box_scale, distance_scale, anchors, s_channel, s_anchor, slope_anchor, width, height,
                R, LEGACY, L1, BLOCK, BINS,
            )  # fmt: skip
        elif (slopes is not None) and (not RESCALE):
            bins = tl.arange(0, BINS)[:, None]
            for side in range(4):
                at = into + (side * R + bins) * anchors + anchor[None, :] * slope_anchor
                tl.store(at, tl.zeros((BINS, BLOCK), tl.float32), mask=(bins < R) & inside[None, :])
        if sums is not None:
            images, tiles = tl.num_programs(1), tl.num_programs(0)
            tl.store(sums + image * tiles + tile, box_sum)
            tl.store(sums + (images + image) * tiles + tile, distance_sum)


@triton.jit
def box_terms(
    at, slope_at, points, strides, truth, anchor, inside, value, by_box, by_distance, anchors, s_channel, s_anchor,
    slope_anchor, width, height,
    R: tl.constexpr, LEGACY: tl.constexpr, L1: tl.constexpr, BLOCK: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """Sums of the box and the distance term of a tile with foreground; stores the gradient of the whole tile.

    Of background anchors no channel is read. Sides are taken one after the other, twice: for the box, and for slopes.
    """
    learns = value > 0
    left, top = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    right, bottom = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for side in range(4):
        x, bins = bins_of(at + side * R * s_channel, anchor, learns, s_channel, s_anchor, R, BINS, "evict_last")
        _, _, _, distance = expected(x, bins, R, BINS)
        left = tl.where(side == 0, distance, left)
        top = tl.where(side == 1, distance, top)
        right = tl.where(side == 2, distance, right)
        bottom = tl.where(side == 3, distance, bottom)

    stride = tl.load(strides + anchor, mask=inside, other=1.0).to(tl.float32)
    x_point = tl.load(points + anchor * 2, mask=inside, other=0.0).to(tl.float32)
    y_point = tl.load(points + anchor * 2 + 1, mask=inside, other=0.0).to(tl.float32)
    to_left = tl.load(truth, mask=learns, other=0.0) / stride
    to_top = tl.load(truth + 1, mask=learns, other=0.0) / stride
    to_right = tl.load(truth + 2, mask=learns, other=0.0) / stride
    to_bottom = tl.load(truth + 3, mask=learns, other=0.0) / stride
    overlap, by_left, by_top, by_right, by_bottom = complete_iou_slopes(
        x_point - left, y_point - top, x_point + right, y_point + bottom,
        to_left, to_top, to_right, to_bottom, LEGACY,
    )  # fmt: skip

    weight = tl.where(learns, value, 0.0)
    box_sum = tl.sum(tl.where(learns, weight * (1.0 - overlap), 0.0))
    by_overlap, by_side = -by_box * weight, by_distance * weight * 0.25
    cost = tl.zeros((BLOCK,), tl.float32)
    for side in range(4):
        wanted = tl.where(side == 0, x_point - to_left, y_point - to_top)
        wanted = tl.where(side == 2, to_right - x_point, tl.where(side == 3, to_bottom - y_point, wanted))
        by_end = tl.where(side == 0, -by_left, -by_top)
        by_end = tl.where(side == 2, by_right, tl.where(side == 3, by_bottom, by_end)) * by_overlap
        x, bins = bins_of(at + side * R * s_channel, anchor, learns, s_channel, s_anchor, R, BINS, "evict_first")
        if R == 1:
            pixel = stride / tl.where(side % 2 == 0, width, height)
            loss, slope = absolute_terms(x, wanted[None, :], by_end[None, :], (by_side * pixel)[None, :], L1)
            loss = tl.sum(loss, 0) * pixel
        else:
            loss, slope = focal_terms(x, bins, wanted, by_end, by_side, R, BINS)
        cost += loss
        if slope_at is not None:
            if _TRUNCATES:
                slope = rounded(slope, slope_at.dtype.element_ty)
            into = slope_at + (side * R + bins) * anchors + anchor[None, :] * slope_anchor
            tl.store(into, tl.where(learns[None, :], slope, 0.0), mask=(bins < R) & inside[None, :])
    return box_sum, tl.sum(tl.where(learns, weight * cost * 0.25, 0.0))


@triton.jit
def expected(x, bins, R: tl.constexpr, BINS: tl.constexpr):
    """Logits below the largest, their exponentials and the sum of these, and the expected bin; of R = 1 the value."""
    below = x - tl.max(x, 0)[None, :]
    share = tl.exp(below)
    total = tl.sum(share, 0)
    distance = tl.sum(x, 0) if R == 1 else tl.sum(share * bins, 0) / total
    return below, share, total, distance


@triton.jit
def focal_terms(x, bins, wanted, by_expected, by_side, R: tl.constexpr, BINS: tl.constexpr):
    """Distribution focal loss of a side, and the slope of its logits, that of the expectation included."""
    below, likely, total, distance = expected(x, bins, R, BINS)
    # Beyond the last distance weights are 0.01 and 0.99; in float32, R - 1.01 has lost the digits of the first.
    beyond = wanted >= R - 1.01
    clamped = tl.maximum(wanted, 0.0)
    lower = tl.where(beyond, R - 2.0, tl.floor(clamped))
    near = tl.where(beyond, 0.01, lower + 1.0 - clamped)[None, :]
    far = tl.where(beyond, 0.99, clamped - lower)[None, :]
    low = lower.to(tl.int32)[None, :]
    share = tl.where(bins == low, near, tl.where(bins == low + 1, far, 0.0))
    if R != BINS:
        below = tl.where(bins < R, below, 0.0)
    loss = tl.sum(tl.where((bins == low) | (bins == low + 1), share * (tl.log(total)[None, :] - below), 0.0), 0)
    likely = likely / total[None, :]
    slope = likely * (bins - distance[None, :]) * by_expected[None, :] + (likely - share) * by_side[None, :]
    return loss, slope


@triton.jit
def absolute_terms(distance, wanted, by_distance, by_error, L1: tl.constexpr):
    """Absolute error of a distance, or with no `L1` none, and the slope of the distance, that of the box included."""
    if L1:
        error = distance - wanted
        return tl.abs(error), by_distance + by_error * tl.where(error > 0, 1.0, tl.where(error < 0, -1.0, 0.0))
    else:
        return tl.zeros_like(distance), by_distance + 0.0 * distance
