"""Task-aligned assignment in four launches (five with a second selection), without an array of boxes x anchors.

1. `_prepare`: counters and outputs are set, arc tangents taken once a prediction, tiles of points get bounds.
2. `_propose`, a program a ground truth: of the tiles of points that its region touches, overlap and metric of the
   points inside, and the k best in registers. A key holds the bits of the metric above the inverted anchor, so one
   maximum gives the largest metric and the lowest anchor. An atomic counts who proposes an anchor.
3. `_resolve`, a program a ground truth: an anchor that others propose too goes to the row that overlaps it most,
   found by every one of them alike; maxima of metric and overlap a row by integer atomics on the bits.
   With a second selection `_keep`, a program a ground truth, then takes the best of the anchors that a row owns.
4. `_normalise`, over anchors: scores.

Bytes moved, in float32: 28 B A by `_prepare` (16 read, 12 written) and 12 B A by `_normalise`; a pair of a point
inside a region reads 20, and for its class score a sector of 32 where scores are (B, A, C) in memory, 4 where they are
(B, C, A). At B = 16, A = 8400: 5.4 MB; 672,000 pairs (5% of 1,600 rows) 16 to 35 MB, boxes mostly out of the L2 cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cleanroom.assign._tal_static import assign_static
from cleanroom.assign._tal_terms import EDGE, Assignment, Rules, Scene, at_least_float32
from cleanroom.kernels import runtime
from cleanroom.kernels._tal_pairs import (
    between,
    class_of,
    edges,
    find_angle,
    find_metric,
    find_overlap,
    load_box,
    load_score,
)
from cleanroom.overlap import box_terms

MOST = 128
"""Largest `topk` and `topk2` kept in registers; beyond, the static path decides."""
BLOCK = 512
"""Points, or anchors, looked at together."""
PAIRS = 512
"""Pairs of a contested anchor and a ground truth looked at together."""

#: What differs from batch to batch: no kernel is compiled anew where one of them is 1 or a multiple of 16.
ROW_ARGUMENTS = (
    "rows", "tiles", "pairs", "label_image", "label_row", "truth_image", "truth_row", "truth_side",
    "valid_image", "valid_row",
)  # fmt: skip

_EDGE = tl.constexpr(EDGE)
_LAST = tl.constexpr(2**31 - 1)
_LARGEST_KEY = tl.constexpr(2**63 - 1)


@triton.jit
def _touched(bounds, x1, y1, x2, y2, tiles, TILES: tl.constexpr):
    """Which tiles of points may have one inside the region (TILES,), and their numbers."""
    tile = tl.arange(0, TILES)
    exists = tile < tiles
    left = tl.load(bounds + tile, mask=exists, other=0.0)
    top = tl.load(bounds + tiles + tile, mask=exists, other=0.0)
    right = tl.load(bounds + 2 * tiles + tile, mask=exists, other=0.0)
    bottom = tl.load(bounds + 3 * tiles + tile, mask=exists, other=0.0)
    touched = (right - x1 > _EDGE) & (x2 - left > _EDGE) & (bottom - y1 > _EDGE) & (y2 - top > _EDGE)
    return touched & exists, tile


@triton.jit
def _next_tile(touched, tile, after, TILES: tl.constexpr):
    """The first touched tile after one; TILES where there is none."""
    return tl.min(tl.where(touched & (tile > after), tile, TILES))


# The k best so far: (SLOTS,) int64 keys of metric bits, inverted anchor, and whether the anchor may be chosen.


@triton.jit
def _key(metric, anchor, chosen):
    """Non-negative float32 sort as their bits do. The lowest bit says whether the anchor is a candidate."""
    return (metric.to(tl.int32, bitcast=True).to(tl.int64) << 32) | ((anchor ^ _LAST).to(tl.int64) << 1) | chosen


@triton.jit
def _anchor_of(key):
    return ((key >> 1) & _LAST).to(tl.int32) ^ _LAST


@triton.jit
def _start(zero, positive, COUNT: tl.constexpr, SLOTS: tl.constexpr):
    """The list before anything positive is entered, given which of the COUNT lowest anchors are positive, or zero.

    Zeros fill up a row of fewer positives than COUNT, lowest anchor first, whether or not they are candidates. The
    ones that can are below COUNT: so many are taken by zeros or by positives. Places of positives stay empty, with
    keys below all others and unlike each other, as the smallest is what a new key replaces.
    """
    lane = tl.arange(0, SLOTS)
    filling = _key(tl.zeros([SLOTS], tl.float32), lane, zero.to(tl.int64))
    keys = tl.where(positive, 2 * lane.to(tl.int64), filling)
    return tl.where(lane < COUNT, keys, _LARGEST_KEY)


@triton.jit
def _enter(best, keys):
    """The list after keys (BLOCK,), each once; 0 is none."""
    least = tl.min(best)
    largest = tl.max(keys)
    while largest > least:
        best = tl.where(best == least, largest, best)
        keys = tl.where(keys == largest, 0, keys)
        least = tl.min(best)
        largest = tl.max(keys)
    return best


# Kernels


@triton.jit(do_not_specialize=["pairs", "tiles"])
def _prepare(
    boxes, points, angles, claims, owner, kept, peaks, fine, bounds,
    images, anchors, pairs, tiles,
    box_image, box_anchor, box_side, point_anchor, point_axis,
    SECOND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Arc tangents (B, A); claims 0, owners -1; peaks 0; fine 1; bounds of tiles of BLOCK points (4, tiles)."""
    block = tl.program_id(0)
    if block == 0:
        tl.store(fine, 1)
    flat = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(peaks + flat, tl.zeros([BLOCK], tl.int32), mask=flat < 2 * pairs)
    image, anchor = flat // anchors, flat % anchors
    inside = image < images
    left, top, right, bottom = load_box(boxes + image * box_image + anchor * box_anchor, box_side, inside)
    tl.store(angles + flat, find_angle(left, top, right, bottom), mask=inside)
    tl.store(claims + flat, tl.zeros([BLOCK], tl.int32), mask=inside)
    tl.store(owner + flat, tl.full([BLOCK], -1, tl.int32), mask=inside)
    if SECOND:
        tl.store(kept + flat, tl.full([BLOCK], -1, tl.int32), mask=inside)
    if block < tiles:
        here = points + flat * point_anchor
        x = tl.load(here, mask=flat < anchors, other=float("nan")).to(tl.float32)
        y = tl.load(here + point_axis, mask=flat < anchors, other=float("nan")).to(tl.float32)
        infinity = float("inf")
        # A point that is NaN is in no region.
        tl.store(bounds + block, tl.min(tl.where(tl.abs(x) <= infinity, x, infinity)))
        tl.store(bounds + tiles + block, tl.min(tl.where(tl.abs(y) <= infinity, y, infinity)))
        tl.store(bounds + 2 * tiles + block, tl.max(tl.where(tl.abs(x) <= infinity, x, -infinity)))
        tl.store(bounds + 3 * tiles + block, tl.max(tl.where(tl.abs(y) <= infinity, y, -infinity)))


@triton.jit
def _find_region(
    truths, valid, image, row, small_below, small_side,
    truth_image, truth_row, truth_side, valid_image, valid_row, ROUND_TRIP: tl.constexpr,
):  # fmt: skip
    """Coordinates of a ground truth, and edges of the region whose inner points are candidates: NaN of padding."""
    counts = tl.load(valid + image * valid_image + row * valid_row) != 0
    l1, t1, r1, b1 = load_box(truths + image * truth_image + row * truth_row, truth_side, counts)
    left, right = edges(l1, r1, small_below, small_side, truths.dtype.element_ty, ROUND_TRIP)
    top, bottom = edges(t1, b1, small_below, small_side, truths.dtype.element_ty, ROUND_TRIP)
    return l1, t1, r1, b1, left, top, right, bottom


@triton.jit
def _weigh(
    scores, boxes, points, angles, anchor, exists, l1, t1, r1, b1, angle1, left, top, right, bottom,
    score_anchor, box_anchor, box_side, point_anchor, point_axis,
    ALPHA: tl.constexpr, BETA: tl.constexpr, STABLE: tl.constexpr, LOGITS: tl.constexpr,
):  # fmt: skip
    """Metric of anchors with a row, -1 where the anchor is no candidate or of no use; 1 if any is inside."""
    wide = anchor.to(tl.int64)
    x = tl.load(points + wide * point_anchor, mask=exists, other=float("nan")).to(tl.float32)
    y = tl.load(points + wide * point_anchor + point_axis, mask=exists, other=float("nan")).to(tl.float32)
    contained = between(x, left, right) & between(y, top, bottom)
    metric = tl.full(anchor.shape, -1.0, tl.float32)
    found = tl.max(contained.to(tl.int32))
    if found > 0:
        l2, t2, r2, b2 = load_box(boxes + wide * box_anchor, box_side, contained)
        angle2 = tl.load(angles + anchor, mask=contained, other=0.0)
        score = load_score(scores + wide * score_anchor, contained, LOGITS)
        overlap = find_overlap(l1, t1, r1, b1, angle1, l2, t2, r2, b2, angle2, STABLE)
        metric = tl.where(contained, find_metric(score, overlap, ALPHA, BETA), -1.0)
    return metric, found


@triton.jit(do_not_specialize=ROW_ARGUMENTS)
def _propose(
    scores, boxes, points, labels, truths, valid, angles, bounds, claims, proposals, fine,
    anchors, rows, classes, tiles, small_below, small_side,
    score_image, score_anchor, score_class, box_image, box_anchor, box_side, point_anchor, point_axis,
    label_image, label_row, truth_image, truth_row, truth_side, valid_image, valid_row,
    TOPK: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
    ALPHA: tl.constexpr, BETA: tl.constexpr, STABLE: tl.constexpr, ROUND_TRIP: tl.constexpr, LOGITS: tl.constexpr,
):  # fmt: skip
    """Proposals of a row (B, n, TOPK), -1 for none; their claims; `fine` is 0 where a label that matters is none."""
    program = tl.program_id(0)
    image, row = (program // rows).to(tl.int64), program % rows
    l1, t1, r1, b1, left, top, right, bottom = _find_region(
        truths, valid, image, row, small_below, small_side,
        truth_image, truth_row, truth_side, valid_image, valid_row, ROUND_TRIP,
    )  # fmt: skip
    angle1 = find_angle(l1, t1, r1, b1)
    label, known = class_of(tl.load(labels + image * label_image + row * label_row), classes)
    scores += image * score_image + label * score_class
    boxes += image * box_image
    angles += image * anchors

    lane = tl.arange(0, SLOTS)
    lowest, _ = _weigh(
        scores, boxes, points, angles, lane, lane < min(TOPK, anchors),
        l1, t1, r1, b1, angle1, left, top, right, bottom,
        score_anchor, box_anchor, box_side, point_anchor, point_axis, ALPHA, BETA, STABLE, LOGITS,
    )  # fmt: skip
    best = _start(lowest == 0, lowest > 0, TOPK, SLOTS)
    touched, tile = _touched(bounds, left, top, right, bottom, tiles, TILES)
    current = _next_tile(touched, tile, -1, TILES)
    contains = 0
    while current < TILES:
        place = current * BLOCK + tl.arange(0, BLOCK)
        metric, found = _weigh(
            scores, boxes, points, angles, place, place < anchors,
            l1, t1, r1, b1, angle1, left, top, right, bottom,
            score_anchor, box_anchor, box_side, point_anchor, point_axis, ALPHA, BETA, STABLE, LOGITS,
        )  # fmt: skip
        contains = tl.maximum(contains, found)
        best = _enter(best, tl.where(metric > 0, _key(metric, place, 1), 0))
        current = _next_tile(touched, tile, current, TILES)

    chosen = (lane < TOPK) & ((best & 1) == 1)
    anchor = _anchor_of(best)
    tl.store(proposals + program.to(tl.int64) * TOPK + lane, tl.where(chosen, anchor, -1), mask=lane < TOPK)
    tl.atomic_add(claims + image * anchors + anchor, 1, mask=chosen, sem="relaxed")
    tl.atomic_min(fine, 0, mask=(contains == 1) & (known == 0), sem="relaxed")


@triton.jit(do_not_specialize=ROW_ARGUMENTS)
def _resolve(
    scores, boxes, points, labels, truths, valid, angles, claims, proposals, owner, metrics, overlaps, peaks,
    anchors, rows, classes, pairs, small_below, small_side,
    score_image, score_anchor, score_class, box_image, box_anchor, box_side, point_anchor, point_axis,
    label_image, label_row, truth_image, truth_row, truth_side, valid_image, valid_row,
    TOPK: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr, SECOND: tl.constexpr,
    ALPHA: tl.constexpr, BETA: tl.constexpr, STABLE: tl.constexpr, ROUND_TRIP: tl.constexpr, LOGITS: tl.constexpr,
):  # fmt: skip
    """Owner and its metric of the anchors that a row proposes (B, A); their largest by owner, as bits (2, B, n).

    Whoever proposes an anchor writes the same.
    """
    program = tl.program_id(0)
    image, row = (program // rows).to(tl.int64), program % rows
    labels += image * label_image
    truths += image * truth_image
    valid += image * valid_image
    lane = tl.arange(0, SLOTS)
    anchor = tl.load(proposals + program.to(tl.int64) * TOPK + lane, mask=lane < TOPK, other=-1)
    chosen = anchor >= 0
    flat = image * anchors + anchor
    if tl.max(anchor) >= 0:
        scored = scores + image * score_image + anchor.to(tl.int64) * score_anchor
        boxed = boxes + image * box_image + anchor.to(tl.int64) * box_anchor
        l2, t2, r2, b2 = load_box(boxed, box_side, chosen)
        angle2 = tl.load(angles + flat, mask=chosen, other=0.0)
        winner = tl.zeros([SLOTS], tl.int32) + row
        contested = tl.load(claims + flat, mask=chosen, other=0) > 1
        if tl.max(contested.to(tl.int32)) > 0:
            here = points + anchor.to(tl.int64) * point_anchor
            x = tl.load(here, mask=contested, other=float("nan")).to(tl.float32)[:, None]
            y = tl.load(here + point_axis, mask=contested, other=float("nan")).to(tl.float32)[:, None]
            most = tl.zeros([SLOTS], tl.int64)
            for start in range(0, rows, ROWS):
                other = start + tl.arange(0, ROWS)
                counts = tl.load(valid + other * valid_row, mask=other < rows, other=0) != 0
                l1, t1, r1, b1 = load_box(truths + other * truth_row, truth_side, counts)
                left, right = edges(l1, r1, small_below, small_side, truths.dtype.element_ty, ROUND_TRIP)
                top, bottom = edges(t1, b1, small_below, small_side, truths.dtype.element_ty, ROUND_TRIP)
                angle1 = find_angle(l1, t1, r1, b1)
                label, _ = class_of(tl.load(labels + other * label_row, mask=counts, other=0), classes)
                contained = between(x, left[None, :], right[None, :]) & between(y, top[None, :], bottom[None, :])
                score = load_score(scored[:, None] + (label * score_class)[None, :], contained, LOGITS)
                overlap = find_overlap(
                    l1[None, :], t1[None, :], r1[None, :], b1[None, :], angle1[None, :],
                    l2[:, None], t2[:, None], r2[:, None], b2[:, None], angle2[:, None], STABLE,
                )  # fmt: skip
                usable = contained & (find_metric(score, overlap, ALPHA, BETA) >= 0)
                most = tl.maximum(most, tl.max(tl.where(usable, _key(overlap, other[None, :], 1), 0), 1))
            winner = tl.where(contested, _anchor_of(most), winner)

        l1, t1, r1, b1 = load_box(truths + winner * truth_row, truth_side, chosen)
        label, _ = class_of(tl.load(labels + winner * label_row, mask=chosen, other=0), classes)
        score = load_score(scored + label * score_class, chosen, LOGITS)
        overlap = find_overlap(l1, t1, r1, b1, find_angle(l1, t1, r1, b1), l2, t2, r2, b2, angle2, STABLE)
        metric = find_metric(score, overlap, ALPHA, BETA)
        tl.store(owner + flat, winner, mask=chosen)
        tl.store(metrics + flat, metric, mask=chosen)
        if SECOND:
            tl.store(overlaps + flat, overlap, mask=chosen)
        else:
            peak = peaks + image * rows + winner
            tl.atomic_max(peak, metric.to(tl.int32, bitcast=True), mask=chosen, sem="relaxed")
            tl.atomic_max(peak + pairs, overlap.to(tl.int32, bitcast=True), mask=chosen, sem="relaxed")


@triton.jit(do_not_specialize=ROW_ARGUMENTS)
def _keep(
    truths, valid, bounds, owner, metrics, overlaps, kept, peaks,
    anchors, rows, tiles, pairs, small_below, small_side,
    truth_image, truth_row, truth_side, valid_image, valid_row,
    TOPK: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr, ROUND_TRIP: tl.constexpr,
):  # fmt: skip
    """Of the anchors that a row owns, the TOPK of largest metric: its number in `kept` (B, A), the largest as bits."""
    program = tl.program_id(0)
    image, row = (program // rows).to(tl.int64), program % rows
    _, _, _, _, left, top, right, bottom = _find_region(
        truths, valid, image, row, small_below, small_side,
        truth_image, truth_row, truth_side, valid_image, valid_row, ROUND_TRIP,
    )  # fmt: skip
    owner += image * anchors
    metrics += image * anchors
    lane = tl.arange(0, SLOTS)
    owned = tl.load(owner + lane, mask=lane < min(TOPK, anchors), other=-1) == row
    lowest = tl.load(metrics + lane, mask=owned, other=-1.0)
    best = _start(lowest == 0, lowest > 0, TOPK, SLOTS)
    touched, tile = _touched(bounds, left, top, right, bottom, tiles, TILES)
    current = _next_tile(touched, tile, -1, TILES)
    while current < TILES:
        place = current * BLOCK + tl.arange(0, BLOCK)
        mine = tl.load(owner + place, mask=place < anchors, other=-1) == row
        metric = tl.load(metrics + place, mask=mine, other=-1.0)
        best = _enter(best, tl.where(metric > 0, _key(metric, place, 1), 0))
        current = _next_tile(touched, tile, current, TILES)

    chosen = (lane < TOPK) & ((best & 1) == 1)
    flat = image * anchors + _anchor_of(best)
    tl.store(kept + flat, tl.zeros([SLOTS], tl.int32) + row, mask=chosen)
    overlap = tl.load(overlaps + flat, mask=chosen, other=0.0)
    tl.store(peaks + program, tl.max(tl.where(chosen, (best >> 32).to(tl.int32), 0)))
    tl.store(peaks + pairs + program, tl.max(tl.where(chosen, overlap.to(tl.int32, bitcast=True), 0)))


@triton.jit(do_not_specialize=["rows", "pairs"])
def _normalise(owner, scores, peaks, images, anchors, rows, pairs, eps, BLOCK: tl.constexpr):
    """``metric * best overlap / (best metric + eps)`` of owned anchors, in place of the metric; 0 elsewhere."""
    flat = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    image = flat // anchors
    row = tl.load(owner + flat, mask=image < images, other=-1)
    owned = row >= 0
    metric = tl.load(scores + flat, mask=owned, other=0.0)
    peaks += image * rows + row
    best_metric = tl.load(peaks, mask=owned, other=0).to(tl.float32, bitcast=True)
    best_overlap = tl.load(peaks + pairs, mask=owned, other=0).to(tl.float32, bitcast=True)
    positive = metric > 0
    score = tl.div_rn(metric * best_overlap, tl.where(positive, best_metric + eps, 1.0))
    tl.store(scores + flat, tl.where(positive, score, 0.0), mask=image < images)


# Launches


def _slots(count: int) -> int:
    return triton.next_power_of_2(max(count, 2))


def _exponent(value: float) -> float:
    """As the kernels tell it apart: an integer where products make the power."""
    return int(value) if value in range(17) else float(value)


def launch_all(
    scores: Tensor, boxes: Tensor, points: Tensor, labels: Tensor, gt_boxes: Tensor, valid: Tensor, rules: Rules,
    logits: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Owner, score and a word (1,) int32: 0 where a row that contains an anchor has a label without a class.

    All sizes are positive.
    """
    images, anchors, classes = scores.shape
    rows = labels.shape[1]
    device, second = scores.device, rules.topk2 != rules.topk
    pairs, tiles = images * rows, triton.cdiv(anchors, BLOCK)
    per_anchor = images, anchors

    angles = runtime.empty(per_anchor, torch.float32, device)
    claims = runtime.empty(per_anchor, torch.int32, device)
    owner = runtime.empty(per_anchor, torch.int32, device)
    metrics = runtime.empty(per_anchor, torch.float32, device)
    kept = runtime.empty(per_anchor, torch.int32, device) if second else owner
    overlaps = runtime.empty(per_anchor, torch.float32, device) if second else metrics
    peaks = runtime.empty((2, images, rows), torch.int32, device)
    bounds = runtime.empty((4, tiles), torch.float32, device)
    fine = runtime.empty((1,), torch.int32, device)
    proposals = runtime.empty((images, rows, rules.topk), torch.int32, device)

    small = rules.small_below, rules.small_side
    truth_strides = *gt_boxes.stride(), *valid.stride()
    strides = *scores.stride(), *boxes.stride(), *points.stride(), *labels.stride(), *truth_strides
    worth = {
        "ALPHA": _exponent(rules.alpha),
        "BETA": _exponent(rules.beta),
        "STABLE": rules.ciou_alpha == "stable",
        "ROUND_TRIP": rules.edge_round_trip,
        "LOGITS": logits,
    }
    listed = {"TOPK": rules.topk, "SLOTS": _slots(rules.topk)}
    tiling = {"BLOCK": BLOCK, "TILES": triton.next_power_of_2(max(tiles, 2))}

    everything = triton.cdiv(max(images * anchors, 2 * pairs), BLOCK)
    runtime.launch(
        _prepare, (everything,),
        boxes, points, angles, claims, owner, kept, peaks, fine, bounds,
        images, anchors, pairs, tiles, *boxes.stride(), *points.stride(),
        SECOND=second, BLOCK=BLOCK,
    )  # fmt: skip
    runtime.launch(
        _propose, (pairs,),
        scores, boxes, points, labels, gt_boxes, valid, angles, bounds, claims, proposals, fine,
        anchors, rows, classes, tiles, *small, *strides,
        **listed, **tiling, **worth, num_warps=4,
    )  # fmt: skip
    runtime.launch(
        _resolve, (pairs,),
        scores, boxes, points, labels, gt_boxes, valid, angles, claims, proposals, owner, metrics, overlaps, peaks,
        anchors, rows, classes, pairs, *small, *strides,
        **listed, ROWS=max(1, PAIRS // listed["SLOTS"]), SECOND=second, **worth, num_warps=4,
    )  # fmt: skip
    if second:
        listed = {"TOPK": rules.topk2, "SLOTS": _slots(rules.topk2)}
        runtime.launch(
            _keep, (pairs,),
            gt_boxes, valid, bounds, owner, metrics, overlaps, kept, peaks,
            anchors, rows, tiles, pairs, *small, *truth_strides,
            **listed, **tiling, ROUND_TRIP=rules.edge_round_trip, num_warps=4,
        )  # fmt: skip
    runtime.launch(
        _normalise, (triton.cdiv(images * anchors, BLOCK),),
        kept, metrics, peaks, images, anchors, rows, pairs, rules.eps, BLOCK=BLOCK,
    )  # fmt: skip
    return kept, metrics, fine


def _fake(scores: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    shape = scores.shape[:2]
    return scores.new_empty(shape, dtype=torch.int32), scores.new_empty(shape, dtype=torch.float32)


@runtime.operator(
    "tal_assign(Tensor scores, Tensor boxes, Tensor points, Tensor labels, Tensor gt_boxes, Tensor valid, int topk, "
    "int topk2, float alpha, float beta, float eps, float small_below, float small_side, bool edge_round_trip, "
    "str ciou_alpha, bool logits) -> (Tensor, Tensor)",
    _fake,
)
def tal_assign(scores, boxes, points, labels, gt_boxes, valid, *settings):
    """Operator of `assigned`, which has checked its arguments; the fields of `Rules` one by one, then `logits`."""
    *fields, logits = settings
    owner, score, fine = launch_all(scores, boxes, points, labels, gt_boxes, valid, Rules(*fields), logits)
    classes = scores.shape[2]
    # The text of the static path.
    torch._assert_async(
        fine, f"gt_labels: the label of a row that contains an anchor is outside [-{classes}, {classes})"
    )
    return owner, score


def assigned(
    scores: Tensor,
    boxes: Tensor,
    points: Tensor,
    labels: Tensor,
    gt_boxes: Tensor,
    valid: Tensor,
    rules: Rules,
    *,
    logits: bool = False,
) -> tuple[Tensor, Tensor]:
    """Assign ground truths to anchors, without gradient; all but `labels` of float32, float16 or bfloat16.

    Decides as the static path does, but for near-ties within a rounding of an arc tangent, exponential or logarithm.
    More than `MOST` proposals a row are the static path's affair.

    Args:
        scores: (B, A, C) class probabilities, or logits; of any layout, as all that follow.
        boxes: (B, A, 4) predicted xyxy, pixels.
        points: (A, 2) anchor centres, pixels.
        labels: (B, n) int64; -C ... -1 count from the end.
        gt_boxes: (B, n, 4) xyxy, pixels.
        valid: (B, n) bool: the row is a ground truth.
        rules: settings; `topk` and `topk2` at most A.
        logits: scores are logits.

    Returns:
        Row of the ground truth that each anchor learns, (B, A) int32, -1 for background; and its target score, (B, A)
        float32, 0 for background.

    Raises:
        RuntimeError: by the device itself, where the label of a row that contains an anchor is outside [-C, C).
    """
    images, anchors, _ = scores.shape
    if images == 0 or anchors == 0 or labels.shape[1] == 0:
        return _fill(scores, -1, torch.int32), _fill(scores, 0, torch.float32)
    tensors = [tensor.detach() for tensor in (scores, boxes, points, labels, gt_boxes, valid)]
    if max(rules.topk, rules.topk2) > MOST:
        with torch.no_grad():
            scores, boxes, *rest = tensors
            found = assign_static(
                Scene(scores, box_terms(boxes.to(at_least_float32(boxes.dtype))), *rest, logits), rules
            )
        return torch.where(found.foreground, found.gt_index, -1).int(), found.score
    fields = rules.topk, rules.topk2, rules.alpha, rules.beta, rules.eps, rules.small_below, rules.small_side
    return tal_assign(*tensors, *fields, rules.edge_round_trip, rules.ciou_alpha, logits)


def _fill(scores: Tensor, value: int, dtype: torch.dtype) -> Tensor:
    return torch.full(scores.shape[:2], value, dtype=dtype, device=scores.device)


def as_assignment(owner: Tensor, score: Tensor) -> Assignment:
    """What `assigned` gives, as the torch paths give it."""
    return Assignment(owner >= 0, owner.clamp(min=0).long(), score)


def assign_triton(scene: Scene, rules: Rules) -> Assignment:
    """`assign_static` by kernels."""
    boxes = torch.stack(scene.predictions[:4]).permute(1, 2, 0)
    points_and_rows = scene.points, scene.labels, scene.boxes, scene.valid
    return as_assignment(*assigned(scene.scores, boxes, *points_and_rows, rules, logits=scene.logits))
