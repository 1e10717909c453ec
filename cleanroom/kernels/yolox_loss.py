"""YOLOX's total loss for an assignment that is made, forward and backward: specification yolox_losses.md, section 3.

With the raw values t of an anchor at cell (x, y) of stride s, its box P = ((t0 + x) s, (t1 + y) s, exp(t2) s,
exp(t3) s), the matched box T, `iou = I / (U + 1e-16)`, the number D of positives of the batch (at least 1) and
`bce(z, t) = max(z, 0) - z t + ln(1 + exp(-|z|))`:

    box         5 / D  sum over positives of 1 - iou^2
    objectness  1 / D  sum over anchors of bce(z, is positive)
    class       1 / D  sum over positives and classes of bce(z, iou at the matched class, else 0)
    L1          1 / D  sum over positives of |t - (cx / s - x, cy / s - y, ln(w / s + 1e-8), ln(h / s + 1e-8))|

The maps are read where they lie, level by level: objectness of all anchors, box and class channels of positives only.
Nothing is kept for the backward pass but the inputs. It computes the terms' slopes anew and writes the dense gradient
once, scaled by what comes in: a pass that stored the gradient beside the sums would save what little is read (0.5 MB
of objectness, 3 MB of positives, where B = 16, N = 8400, C = 80), and would read and write all of it again (2 x 46 MB
in float32) wherever the incoming factor is not 1, as under a gradient scaler or with accumulated batches; and half
types would have to store it unscaled.

Bytes moved there: 5 MB forward (assignment 1 MB); backward the same, and the gradient, 46 MB in float32: 11 us at
4.8 TB/s. Launches: one a level and one, forward; one a level, backward. Nothing here knows how the assignment was made;
`yolox_decode` prepares what that asks for.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cleanroom.kernels import runtime
from cleanroom.kernels.numbers import cast, log1p, sigmoid, softplus

#: Anchors and channels that a program works on at a time, where anchors or channels lie side by side in memory.
PLANES = (128, 8)
ROWS = (16, 64)
#: Partial sums that are added at a time, and the weight of the box term.
FINISH_BLOCK = 256
BOX_WEIGHT = 5.0

_EPS = tl.constexpr(1e-16)
_LOG_OFFSET = tl.constexpr(1e-8)
_ALL = tl.constexpr(tl.PropagateNan.ALL)
_INFINITY = tl.constexpr(float("inf"))


@triton.jit
def _total(counts, number, BLOCK: tl.constexpr):
    """Sum of so many integers, at least 1, as float32."""
    found = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, number, BLOCK):
        at = first + tl.arange(0, BLOCK)
        found += tl.load(counts + at, mask=at < number, other=0).to(tl.int32)
    return tl.maximum(tl.sum(found, 0), 1).to(tl.float32)


@triton.jit
def _axis(distance, size, other):
    """What two intervals share, whose centres lie `distance` apart, and the shares of the first in its two ends.

    An inner end belongs to the interval that sets it; equal ends are shared in halves. Measured from the centre of
    the second, so that no digit is lost far from the origin.
    """
    end, other_end = distance + 0.5 * size, 0.5 * other
    start = distance - 0.5 * size
    shared = tl.minimum(end, other_end, propagate_nan=_ALL) - tl.maximum(start, -other_end, propagate_nan=_ALL)
    of_end = tl.where(end < other_end, 1.0, tl.where(end == other_end, 0.5, 0.0))
    of_start = tl.where(start > -other_end, 1.0, tl.where(start == -other_end, 0.5, 0.0))
    return tl.maximum(shared, 0.0, propagate_nan=_ALL), 0.5 * (of_end + of_start), of_end - of_start


@triton.jit
def _finite(value):
    return tl.where(tl.abs(value) < _INFINITY, value, 0.0)


@triton.jit
def _overlap(px, py, pw, ph, tx, ty, tw, th):
    """`1 - IoU^2` of pairs of boxes, its slopes by the first (0 where they are no numbers), and the plain IoU."""
    wide, grow_x, move_x = _axis(px - tx, pw, tw)
    high, grow_y, move_y = _axis(py - ty, ph, th)
    inner = wide * high
    union = pw * ph + tw * th - inner
    denominator = union + _EPS
    iou = tl.div_rn(inner, denominator)
    # A side that is 0 stands for one that was negative: whether boxes overlap is a constant of the gradient.
    by_inner = tl.where((wide > 0) & (high > 0), tl.div_rn(1.0 + iou, denominator), 0.0)
    by_area, step = tl.div_rn(iou, denominator), -2.0 * iou
    by_x, by_y = _finite(step * by_inner * high * move_x), _finite(step * by_inner * wide * move_y)
    by_w = _finite(step * (by_inner * high * grow_x - ph * by_area))
    by_h = _finite(step * (by_inner * wide * grow_y - pw * by_area))
    plain = tl.where(union == 0, 0.0, tl.div_rn(inner, tl.where(union == 0, 1.0, union)))
    return 1.0 - iou * iou, by_x, by_y, by_w, by_h, plain


@triton.jit
def _sign(value):
    return tl.where(value > 0, 1.0, tl.where(value < 0, -1.0, 0.0))


@triton.jit
def _anchors(
    image, anchor, inside, matched, matched_image, matched_anchor, ignore, ignore_image, ignore_anchor, label_rows
):
    """Which anchors take part, which of them are positive, and the row of their ground truth, always one that is."""
    anchor = anchor.to(tl.int64)
    row = tl.load(matched + image * matched_image + anchor * matched_anchor, mask=inside, other=-1).to(tl.int32)
    counted = inside
    if ignore is not None:
        ignored = tl.load(ignore + image * ignore_image + anchor * ignore_anchor, mask=inside, other=0)
        counted = inside & (ignored == 0)
    return counted, counted & (row >= 0), tl.minimum(tl.maximum(row, 0), label_rows - 1)


@triton.jit
def _place(anchor, width, by_row, by_column):
    # Divided in 32 bits: a division in 64 is a function call.
    return (anchor // width).to(tl.int64) * by_row + (anchor % width).to(tl.int64) * by_column


@triton.jit
def _objectness(logit, positive):
    """BCE against 0 or 1; -infinity on a negative is no number, as the reference's product with 0 makes it."""
    none = (logit == -_INFINITY) & ~positive
    return tl.where(none, float("nan"), softplus(tl.where(positive, -logit, logit)))


@triton.jit
def _entropy(logit, target):
    """BCE against `target` in [0, 1], without cancellation; -infinity is no number, as in `_objectness`."""
    linear = tl.where(logit > 0, (1.0 - target) * logit, -target * logit)
    loss = tl.where(target == 0, tl.maximum(logit, 0.0), linear) + log1p(tl.exp(-tl.abs(logit)))
    return tl.where(logit == -_INFINITY, float("nan"), loss)


@triton.jit
def _boxes(
    base, place, positive, image, anchor, row, by_channel, width, stride,
    cells, cells_part, cells_anchor, raw, raw_image, raw_anchor, raw_value, labels, labels_image, labels_row,
    labels_column, DECODED: tl.constexpr, USE_L1: tl.constexpr,
):  # fmt: skip
    """Box and L1 loss of positive anchors with all their slopes by raw values, the IoU, and the matched class.

    DECODED: the map holds boxes in pixels, cells come from memory, and raw values, for L1 only, from `raw`.
    """
    v0 = tl.load(base + place, mask=positive, other=0.0).to(tl.float32)
    v1 = tl.load(base + by_channel + place, mask=positive, other=0.0).to(tl.float32)
    v2 = tl.load(base + 2 * by_channel + place, mask=positive, other=0.0).to(tl.float32)
    v3 = tl.load(base + 3 * by_channel + place, mask=positive, other=0.0).to(tl.float32)
    if DECODED:
        cell = cells + anchor * cells_anchor
        x = tl.load(cell, mask=positive, other=0.0).to(tl.float32)
        y = tl.load(cell + cells_part, mask=positive, other=0.0).to(tl.float32)
        s = tl.load(cell + 2 * cells_part, mask=positive, other=1.0).to(tl.float32)
        px, py, pw, ph = v0, v1, v2, v3
        by_centre, by_width, by_height = 1.0 + 0.0 * s, 1.0 + 0.0 * s, 1.0 + 0.0 * s
        t0, t1, t2, t3 = v0, v1, v2, v3
        if USE_L1:
            origin = raw + image * raw_image + anchor.to(tl.int64) * raw_anchor
            t0 = tl.load(origin, mask=positive, other=0.0).to(tl.float32)
            t1 = tl.load(origin + raw_value, mask=positive, other=0.0).to(tl.float32)
            t2 = tl.load(origin + 2 * raw_value, mask=positive, other=0.0).to(tl.float32)
            t3 = tl.load(origin + 3 * raw_value, mask=positive, other=0.0).to(tl.float32)
    else:
        # Cells and strides have the dtype of the maps, and so are rounded to it.
        x = cast((anchor % width).to(tl.float32), base.dtype.element_ty).to(tl.float32)
        y = cast((anchor // width).to(tl.float32), base.dtype.element_ty).to(tl.float32)
        s = cast(0.0 * x + stride, base.dtype.element_ty).to(tl.float32)
        t0, t1, t2, t3 = v0, v1, v2, v3
        px, py, pw, ph = (t0 + x) * s, (t1 + y) * s, tl.exp(t2) * s, tl.exp(t3) * s
        by_centre, by_width, by_height = s, pw, ph
    label = labels + image * labels_image + row.to(tl.int64) * labels_row
    tx = tl.load(label + labels_column, mask=positive, other=0.0).to(tl.float32)
    ty = tl.load(label + 2 * labels_column, mask=positive, other=0.0).to(tl.float32)
    tw = tl.load(label + 3 * labels_column, mask=positive, other=0.0).to(tl.float32)
    th = tl.load(label + 4 * labels_column, mask=positive, other=0.0).to(tl.float32)
    loss, g0, g1, g2, g3, iou = _overlap(px, py, pw, ph, tx, ty, tw, th)
    g0, g1, g2, g3 = g0 * by_centre, g1 * by_centre, g2 * by_width, g3 * by_height
    distance = 0.0 * loss
    d0, d1, d2, d3 = distance, distance, distance, distance
    if USE_L1:
        d0, d1 = t0 - (tl.div_rn(tx, s) - x), t1 - (tl.div_rn(ty, s) - y)
        d2 = t2 - tl.log(tl.div_rn(tw, s) + _LOG_OFFSET)
        d3 = t3 - tl.log(tl.div_rn(th, s) + _LOG_OFFSET)
        distance = tl.abs(d0) + tl.abs(d1) + tl.abs(d2) + tl.abs(d3)
    kind = tl.load(label, mask=positive, other=0.0).to(tl.int32)
    return loss, distance, iou, kind, g0, g1, g2, g3, _sign(d0), _sign(d1), _sign(d2), _sign(d3)


@triton.jit
def _sums_kernel(
    level, by_image, by_channel, by_row, by_column, width, anchors, stride, first_anchor, classes,
    cells, cells_part, cells_anchor, raw, raw_image, raw_anchor, raw_value,
    labels, labels_image, labels_row, labels_column, label_rows, matched, matched_image, matched_anchor,
    ignore, ignore_image, ignore_anchor, partials, tiles, first_tile,
    DECODED: tl.constexpr, USE_L1: tl.constexpr, BLOCK_ANCHORS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """Sums of the four terms over a tile of anchors of one image, into `partials` (B, tiles, 4)."""
    tile, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    anchor = tile * BLOCK_ANCHORS + tl.arange(0, BLOCK_ANCHORS)
    inside = anchor < anchors
    counted, positive, row = _anchors(
        image, anchor + first_anchor, inside, matched, matched_image, matched_anchor, ignore, ignore_image,
        ignore_anchor, label_rows,
    )  # fmt: skip
    base, place = level + image * by_image, _place(anchor, width, by_row, by_column)
    logit = tl.load(base + 4 * by_channel + place, mask=counted, other=0.0).to(tl.float32)
    target = partials + (image * tiles + first_tile + tile) * 4
    tl.store(target + 1, tl.sum(tl.where(counted, _objectness(logit, positive), 0.0), 0))
    by_box, by_class, by_distance = tl.full((), 0, tl.float32), tl.full((), 0, tl.float32), tl.full((), 0, tl.float32)
    if tl.max(positive.to(tl.int32), 0) > 0:
        loss, distance, iou, kind, _, _, _, _, _, _, _, _ = _boxes(
            base, place, positive, image, anchor, row, by_channel, width, stride,
            cells, cells_part, cells_anchor, raw, raw_image, raw_anchor, raw_value,
            labels, labels_image, labels_row, labels_column, DECODED, USE_L1,
        )  # fmt: skip
        by_box = tl.sum(tl.where(positive, loss, 0.0), 0)
        by_distance = tl.sum(tl.where(positive, distance, 0.0), 0)
        kind = tl.minimum(tl.maximum(kind, 0), classes - 1)
        found = tl.zeros((BLOCK_CHANNELS, BLOCK_ANCHORS), tl.float32)
        for first in range(0, classes, BLOCK_CHANNELS):
            channel = first + tl.arange(0, BLOCK_CHANNELS)
            read = (channel < classes)[:, None] & positive[None, :]
            where = (5 + channel).to(tl.int64)[:, None] * by_channel + place[None, :]
            logits = tl.load(base + where, mask=read, other=0.0).to(tl.float32)
            wanted = tl.where(channel[:, None] == kind[None, :], iou[None, :], 0.0)
            found += tl.where(read, _entropy(logits, wanted), 0.0)
        by_class = tl.sum(tl.sum(found, 1), 0)
    tl.store(target, by_box)
    tl.store(target + 2, by_class)
    tl.store(target + 3, by_distance)


@triton.jit
def _finish_kernel(
    partials, rows, positives, truths, images, total, box, objectness, kind, distance, mean, WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Add the partial sums of a group of `rows` tiles in their order, divide, weigh, and total the terms."""
    group = tl.program_id(0)
    sums = tl.zeros((BLOCK, 4), tl.float32)
    for first in range(0, rows, BLOCK):
        at = first + tl.arange(0, BLOCK)
        place = (group * rows + at)[:, None] * 4 + tl.arange(0, 4)[None, :]
        sums += tl.load(partials + place, mask=(at < rows)[:, None], other=0.0)
    count = _total(positives, images, 64)
    term = tl.arange(0, 4)
    terms = tl.div_rn(tl.sum(sums, 0), count) * tl.where(term == 0, WEIGHT, 1.0)
    tl.store(box + group, tl.sum(tl.where(term == 0, terms, 0.0), 0))
    tl.store(objectness + group, tl.sum(tl.where(term == 1, terms, 0.0), 0))
    tl.store(kind + group, tl.sum(tl.where(term == 2, terms, 0.0), 0))
    tl.store(distance + group, tl.sum(tl.where(term == 3, terms, 0.0), 0))
    tl.store(total + group, tl.sum(terms, 0))
    if group == 0:
        tl.store(mean, tl.div_rn(count, _total(truths, images, 64)))


@triton.jit
def _factor(image, count, total, by_total, term, by_term):
    """What a term's slopes are multiplied with: what comes in through the total and through the term, over D."""
    found = tl.full((), 0, tl.float32)
    if total is not None:
        found += tl.load(total + image * by_total)
    if term is not None:
        found += tl.load(term + image * by_term)
    return tl.div_rn(found, count)


@triton.jit
def _store_four(place, d0, d1, d2, d3, positive, inside):
    """Values side by side where positive, else zeros."""
    kept = place.dtype.element_ty
    tl.store(place, cast(tl.where(positive, d0, 0.0), kept), mask=inside)
    tl.store(place + 1, cast(tl.where(positive, d1, 0.0), kept), mask=inside)
    tl.store(place + 2, cast(tl.where(positive, d2, 0.0), kept), mask=inside)
    tl.store(place + 3, cast(tl.where(positive, d3, 0.0), kept), mask=inside)


@triton.jit
def _slopes_kernel(
    level, by_image, by_channel, by_row, by_column, width, anchors, stride, first_anchor, classes,
    cells, cells_part, cells_anchor, raw, raw_image, raw_anchor, raw_value,
    labels, labels_image, labels_row, labels_column, label_rows, matched, matched_image, matched_anchor,
    ignore, ignore_image, ignore_anchor, positives, images,
    total, by_total, box, by_box, objectness, by_objectness, kind, by_kind, distance, by_distance,
    grad, grad_channel, grad_anchor, grad_raw, WEIGHT: tl.constexpr,
    DECODED: tl.constexpr, USE_L1: tl.constexpr, BLOCK_ANCHORS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """The gradient of all channels of a tile of anchors of one image, zeros included."""
    tile, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    anchor = tile * BLOCK_ANCHORS + tl.arange(0, BLOCK_ANCHORS)
    inside = anchor < anchors
    counted, positive, row = _anchors(
        image, anchor + first_anchor, inside, matched, matched_image, matched_anchor, ignore, ignore_image,
        ignore_anchor, label_rows,
    )  # fmt: skip
    count = _total(positives, images, 64)
    of_objectness = _factor(image, count, total, by_total, objectness, by_objectness)
    base, place = level + image * by_image, _place(anchor, width, by_row, by_column)
    logit = tl.load(base + 4 * by_channel + place, mask=counted, other=0.0).to(tl.float32)
    # The probability of the other answer, so that 1 - p of a sure positive keeps its digits.
    slope = tl.where(positive, -sigmoid(-logit), sigmoid(logit))
    by_logit = tl.where(counted, of_objectness * slope, 0.0)
    target = grad + image * (classes + 5) * anchors
    if tl.max(positive.to(tl.int32), 0) > 0:
        _, _, iou, own, g0, g1, g2, g3, d0, d1, d2, d3 = _boxes(
            base, place, positive, image, anchor, row, by_channel, width, stride,
            cells, cells_part, cells_anchor, raw, raw_image, raw_anchor, raw_value,
            labels, labels_image, labels_row, labels_column, DECODED, USE_L1,
        )  # fmt: skip
        own = tl.minimum(tl.maximum(own, 0), classes - 1)
        of_class = _factor(image, count, total, by_total, kind, by_kind)
        of_box = _factor(image, count, total, by_total, box, by_box) * WEIGHT
        g0, g1, g2, g3 = of_box * g0, of_box * g1, of_box * g2, of_box * g3
        if USE_L1:
            of_distance = _factor(image, count, total, by_total, distance, by_distance)
            d0, d1, d2, d3 = of_distance * d0, of_distance * d1, of_distance * d2, of_distance * d3
            if DECODED:
                _store_four(grad_raw + (image * anchors + anchor) * 4, d0, d1, d2, d3, positive, inside)
            else:
                g0, g1, g2, g3 = g0 + d0, g1 + d1, g2 + d2, g3 + d3
        for first in range(0, classes + 5, BLOCK_CHANNELS):
            channel = first + tl.arange(0, BLOCK_CHANNELS)
            valid = channel < classes + 5
            read = (valid & (channel >= 5))[:, None] & positive[None, :]
            where = channel.to(tl.int64)[:, None] * by_channel + place[None, :]
            logits = tl.load(base + where, mask=read, other=0.0).to(tl.float32)
            wanted = tl.where(channel[:, None] == (own + 5)[None, :], iou[None, :], 0.0)
            found = of_class * (sigmoid(logits) - wanted)
            number = channel[:, None]
            of_four = tl.where(number < 2, tl.where(number == 0, g0[None, :], g1[None, :]),
                               tl.where(number == 2, g2[None, :], g3[None, :]))  # fmt: skip
            found = tl.where(positive[None, :], tl.where(number < 4, of_four, found), 0.0)
            found = tl.where(number == 4, by_logit[None, :], found)
            there = channel.to(tl.int64)[:, None] * grad_channel + anchor.to(tl.int64)[None, :] * grad_anchor
            tl.store(target + there, cast(found, grad.dtype.element_ty), mask=valid[:, None] & inside[None, :])
    else:
        if DECODED and USE_L1:
            # None is positive: zeros.
            _store_four(grad_raw + (image * anchors + anchor) * 4, logit, logit, logit, logit, positive, inside)
        for first in range(0, classes + 5, BLOCK_CHANNELS):
            channel = first + tl.arange(0, BLOCK_CHANNELS)
            found = tl.where(channel[:, None] == 4, by_logit[None, :], 0.0)
            there = channel.to(tl.int64)[:, None] * grad_channel + anchor.to(tl.int64)[None, :] * grad_anchor
            valid = (channel < classes + 5)[:, None] & inside[None, :]
            tl.store(target + there, cast(found, grad.dtype.element_ty), mask=valid)


def _planes(level: Tensor) -> bool:
    """Whether the anchors of a channel lie side by side, as in a contiguous map, rather than the channels of one."""
    return level.stride(1) >= level.stride(3)


def _blocks(level: Tensor) -> tuple[int, int]:
    return PLANES if _planes(level) else ROWS


def _strides(tensor: Tensor | None, count: int) -> tuple[int, ...]:
    return (0,) * count if tensor is None else tensor.stride()[:count]


def _of_images(term: Tensor | None) -> tuple[Tensor | None, int]:
    """A gradient that comes in, and its step from image to image."""
    return term, 0 if term is None or term.ndim == 0 else term.stride(0)


def _per_level(
    maps: Sequence[Tensor],
    raw: Tensor | None,
    cells: Tensor | None,
    labels: Tensor,
    matched_gt: Tensor,
    ignore: Tensor | None,
    strides: Sequence[float],
) -> list[tuple[tuple[int, int], list[Any]]]:
    """Grid, and the arguments that both kernels of a level begin with."""
    found, first = [], 0
    for level, stride in zip(maps, strides, strict=True):
        images, channels, height, width = level.shape
        shared = [
            level, *level.stride(), width, height * width, float(stride), first, channels - 5,
            cells, *_strides(cells, 2), raw, *_strides(raw, 3), labels, *labels.stride(), labels.shape[1],
            matched_gt, *matched_gt.stride(), ignore, *_strides(ignore, 2),
        ]  # fmt: skip
        found.append(((triton.cdiv(height * width, _blocks(level)[0]), images), shared))
        first += height * width
    return found


def _fake_sums(maps, raw, cells, labels, matched_gt, positives, truths, ignore, strides, use_l1, each_image):
    shape = (len(maps[0]),) if each_image else ()
    return tuple(maps[0].new_empty(kind, dtype=torch.float32) for kind in (*(shape,) * 5, ()))


@runtime.operator(
    "yolox_loss(Tensor[] maps, Tensor? raw, Tensor? cells, Tensor labels, Tensor matched_gt, Tensor positives, "
    "Tensor truths, Tensor? ignore, float[] strides, bool use_l1, bool each_image) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_sums,
)
def _yolox_loss(
    maps: list[Tensor],
    raw: Tensor | None,
    cells: Tensor | None,
    labels: Tensor,
    matched_gt: Tensor,
    positives: Tensor,
    truths: Tensor,
    ignore: Tensor | None,
    strides: list[float],
    use_l1: bool,
    each_image: bool,
) -> tuple[Tensor, ...]:
    images, device = len(maps[0]), maps[0].device
    levels = _per_level(maps, raw, cells, labels, matched_gt, ignore, strides)
    tiles = sum(grid[0] for grid, _ in levels)
    partials = runtime.empty((images, tiles, 4), torch.float32, device)
    first_tile = 0
    for level, (grid, shared) in zip(maps, levels, strict=True):
        anchors, channels = _blocks(level)
        runtime.launch(
            _sums_kernel, grid, *shared, partials, tiles, first_tile,
            DECODED=cells is not None, USE_L1=use_l1, BLOCK_ANCHORS=anchors, BLOCK_CHANNELS=channels,
        )  # fmt: skip
        first_tile += grid[0]
    groups = images if each_image else 1
    terms = [runtime.empty((images,) if each_image else (), torch.float32, device) for _ in range(5)]
    mean = runtime.empty((), torch.float32, device)
    runtime.launch(
        _finish_kernel, (groups,), partials, images * tiles // groups, positives, truths, images, *terms, mean,
        WEIGHT=BOX_WEIGHT, BLOCK=FINISH_BLOCK,
    )  # fmt: skip
    return *terms, mean


def _grad_like(level: Tensor) -> Tensor:
    """Memory for the gradient of a map, dense, with channels innermost where the map has them so."""
    images, channels, height, width = level.shape
    if _planes(level):
        return runtime.empty(level.shape, level.dtype, level.device)
    return runtime.empty((images, height, width, channels), level.dtype, level.device).permute(0, 3, 1, 2)


def _fake_slopes(incoming, maps, raw, *_):
    return [_grad_like(level) for level in maps], maps[0].new_empty(0) if raw is None else raw.new_empty(raw.shape)


@runtime.operator(
    "yolox_loss_backward(Tensor?[] incoming, Tensor[] maps, Tensor? raw, Tensor? cells, Tensor labels, "
    "Tensor matched_gt, Tensor positives, Tensor? ignore, float[] strides, bool use_l1) -> (Tensor[], Tensor)",
    _fake_slopes,
)
def _yolox_loss_backward(
    incoming: list[Tensor | None],
    maps: list[Tensor],
    raw: Tensor | None,
    cells: Tensor | None,
    labels: Tensor,
    matched_gt: Tensor,
    positives: Tensor,
    ignore: Tensor | None,
    strides: list[float],
    use_l1: bool,
) -> tuple[list[Tensor], Tensor]:
    grads = [_grad_like(level) for level in maps]
    shape, dtype = ((0,), maps[0].dtype) if raw is None else (raw.shape, raw.dtype)
    grad_raw = runtime.empty(shape, dtype, maps[0].device)
    factors = [value for term in incoming for value in _of_images(term)]
    levels = _per_level(maps, raw, cells, labels, matched_gt, ignore, strides)
    for level, grad, (grid, shared) in zip(maps, grads, levels, strict=True):
        anchors, channels = _blocks(level)
        planes, cells_of_level = _planes(level), level.shape[2] * level.shape[3]
        runtime.launch(
            _slopes_kernel, grid, *shared, positives, len(level), *factors,
            grad, cells_of_level if planes else 1, 1 if planes else level.shape[1], grad_raw, WEIGHT=BOX_WEIGHT,
            DECODED=cells is not None, USE_L1=use_l1, BLOCK_ANCHORS=anchors, BLOCK_CHANNELS=channels,
        )  # fmt: skip
    return grads, grad_raw


def _set_up(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    maps, raw, cells, labels, matched_gt, positives, _, ignore, ctx.strides, ctx.use_l1, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[5])
    ctx.save_for_backward(raw, cells, labels, matched_gt, positives, ignore, *maps)


def _backward(ctx: Any, *incoming: Tensor | None) -> tuple[Any, ...]:
    raw, cells, labels, matched_gt, positives, ignore, *maps = ctx.saved_tensors
    grads, grad_raw = _yolox_loss_backward(
        list(incoming[:5]), maps, raw, cells, labels, matched_gt, positives, ignore, ctx.strides, ctx.use_l1
    )
    return grads, None if raw is None else grad_raw, *(None,) * 9


if runtime.REGISTERED:
    torch.library.register_autograd("cleanroom::yolox_loss", _backward, setup_context=_set_up)


def fused_terms(
    maps: Sequence[Tensor],
    labels: Tensor,
    matched_gt: Tensor,
    positives: Tensor,
    truths: Tensor,
    strides: Sequence[float],
    *,
    cells: Tensor | None = None,
    raw: Tensor | None = None,
    ignore: Tensor | None = None,
    use_l1: bool = False,
    each_image: bool = False,
) -> tuple[Tensor, ...]:
    """The losses of a batch of which every anchor knows its ground truth; gradient to maps and `raw`.

    Args:
        maps: (B, 5 + C, H, W) of each level, float32, float16 or bfloat16, in any memory order: raw values; or with
            `cells` one map whose first four channels are boxes in pixels.
        labels: (B, M, 5 or more), M >= 1, rows (class, cx, cy, w, h) in pixels; classes are clamped to [0, C).
        matched_gt: (B, N) integer, row of labels, negative on background.
        positives: (B,) integer, how many anchors of an image are matched and not ignored.
        truths: (B,) integer, how many ground truths an image has.
        strides: pixels a cell of each level; not read with `cells`.
        cells: (3, N) columns, rows and strides of all anchors.
        raw: (B, N, 4) raw values beside `cells`, for L1.
        ignore: (B, N) bool, anchors that take no part.
        use_l1: whether there is an L1 term.
        each_image: shares of the images (B,) rather than their sums.

    Returns:
        Total, 5 times the box term, objectness, class and L1 term, 0-dim or (B,) float32, and the mean number of
        positives a ground truth, 0-dim float32.
    """
    return _yolox_loss(
        list(maps), raw, cells, labels, matched_gt, positives, truths, ignore, list(strides), use_l1, each_image
    )
