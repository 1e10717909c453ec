"""SimOTA as three launches: class sums and candidates (one a level), claims of the ground truths, conflicts.

Values and decisions are those of `cleanroom.assign._simota_static`, term by term in its order of rounding. Nothing is
held by pair, and nothing by anchor and class: beyond its outputs the assignment keeps 16 bytes an anchor.

Bytes at B=16, N=8400, C=80, float32: the class logits of candidates are read once (43 MB if every anchor is one),
boxes, objectness and the 16 bytes an anchor add 9 MB from memory; each ground truth reads 36 bytes an anchor again,
from the L2 cache.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from cleanroom.assign._simota_cost import LOG_FLOOR, OVERLAP_OFFSET, OVERLAP_WEIGHT, OVERLAPS_FOR_K, Grid, Rules
from cleanroom.assign._simota_logits import as_rows
from cleanroom.kernels import runtime
from cleanroom.kernels.numbers import log1p, ordered_bits, round_bfloat16, sigmoid

_FLOOR = tl.constexpr(LOG_FLOOR)
_OFFSET = tl.constexpr(OVERLAP_OFFSET)
_WEIGHT = tl.constexpr(OVERLAP_WEIGHT)
_TEN = tl.constexpr(OVERLAPS_FOR_K)
_LANES = tl.constexpr(triton.next_power_of_2(OVERLAPS_FOR_K))
_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
_INFINITE = tl.constexpr(float("inf"))
#: A key beyond that of any cost, and the key of the cost +infinity.
_NEVER = tl.constexpr(2**64 - 1)
_INFINITE_KEY = tl.constexpr(0xFF800000 << 32)
_LOW_WORD = tl.constexpr(2**32 - 1)
_ONE_CLAIM = tl.constexpr(1 << 32)
#: No pair that is not free costs less than the penalty by more than this: its other terms are rounded from below 0.
_SLACK = tl.constexpr(1e-3)

#: Anchors and classes of a tile of class logits, and ground truths tested at once against its anchors.
CLASS_ANCHORS, CLASS_CLASSES, CLASS_ROWS = 64, 16, 16
#: Anchors of a tile that one ground truth scans.
CLAIM_ANCHORS = 512
#: Anchors and ground truths of a tile of costs in a conflict.
RESOLVE_ANCHORS, RESOLVE_ROWS = 64, 8
#: Levels of class logits that are read where they lie; of more, the rows are put together first.
LEVELS = 4

_ROUNDED = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def match_triton(
    gt_boxes: Tensor,
    gt_classes: Tensor,
    labels: Tensor,
    real: Tensor,
    pred_boxes: Tensor,
    cls_logits: Tensor | Sequence[Tensor],
    obj_logits: Tensor,
    grid: Grid,
    rules: Rules,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the ground truth, class and overlap of each anchor, (B, N) each, with -1, 0 and 0 for background.

    Takes what match_static takes, but no float64, and class logits as rows (B, N, C) or as levels (B, C, n). Tensors
    of any strides are read where they lie. A real label outside [0, C) is read as class 0, and makes an assertion
    fail when the device comes to it.

    Source: specification simota.md, section 4; Ge et al., arXiv:2107.08430.
    """
    one = isinstance(cls_logits, Tensor) or len(cls_logits) > LEVELS
    levels = [as_rows(cls_logits).mT] if one else list(cls_logits)
    matched_gt, matched_classes, matched_iou, sound = _match(
        gt_boxes, gt_classes, labels, real, pred_boxes, levels, obj_logits, *grid, *rules
    )
    torch._assert_async(sound, f"gt_classes must lie in [0, {levels[0].shape[1]})")
    return matched_gt, matched_classes, matched_iou


def _outputs(gt_boxes: Tensor, gt_classes: Tensor, pred_boxes: Tensor, allocate) -> tuple[Tensor, ...]:
    """Rows, classes, overlaps, and a word that is 1 when every label was sound."""
    shape, device = pred_boxes.shape[:2], pred_boxes.device
    iou_dtype = torch.promote_types(gt_boxes.dtype, pred_boxes.dtype)
    kinds = (shape, torch.int64), (shape, gt_classes.dtype), (shape, iou_dtype), ((), torch.int32)
    return tuple(allocate(size, dtype=dtype, device=device) for size, dtype in kinds)


def _fake(gt_boxes, gt_classes, labels, real, pred_boxes, *rest):
    return _outputs(gt_boxes, gt_classes, pred_boxes, torch.empty)


@runtime.operator(
    "simota_match(Tensor gt_boxes, Tensor gt_classes, Tensor labels, Tensor real, Tensor pred_boxes, "
    "Tensor[] levels, Tensor obj_logits, Tensor x, Tensor y, Tensor stride, "
    "float radius, float penalty, str region) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake,
)
def _match(
    gt_boxes: Tensor,
    gt_classes: Tensor,
    labels: Tensor,
    real: Tensor,
    pred_boxes: Tensor,
    levels: Sequence[Tensor],
    obj_logits: Tensor,
    x: Tensor,
    y: Tensor,
    stride: Tensor,
    radius: float,
    penalty: float,
    region: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch; see match_triton."""
    outputs = _outputs(gt_boxes, gt_classes, pred_boxes, runtime.empty)
    matched_gt, matched_classes, matched_iou, sound = outputs
    images, anchors = pred_boxes.shape[:2]
    boxes, classes = real.shape[1], levels[0].shape[1]
    if boxes == 0 or matched_gt.numel() == 0 or classes == 0:
        sound.copy_((~real | (labels >= 0) & (labels < classes)).all())
        return matched_gt.fill_(-1), matched_classes.zero_(), matched_iou.zero_(), sound
    if not gt_boxes.is_floating_point():
        gt_boxes = gt_boxes.float()
    background = runtime.empty((images, anchors), torch.float64, pred_boxes.device)
    claims = runtime.empty((images, anchors), torch.int64, pred_boxes.device)

    truths = gt_boxes, *gt_boxes.stride(), labels.contiguous(), real.contiguous()
    centres = x.contiguous(), y.contiguous(), stride.contiguous()
    objectness = obj_logits, *obj_logits.stride()[:2]
    predicted = pred_boxes, *pred_boxes.stride()
    sizes = boxes, anchors, classes
    union = region == "union"
    end, ends = 0, []
    for level in levels:
        start, end = end, end + level.shape[2]
        ends.append(end)
        runtime.launch(
            _sum_classes, (triton.cdiv(level.shape[2], CLASS_ANCHORS), images),
            *truths, *centres, *objectness, level, *level.stride(), start, end,
            background, claims, sound, *sizes, radius,
            UNION=union, ANCHORS=CLASS_ANCHORS, CLASSES=CLASS_CLASSES, ROWS=CLASS_ROWS, num_warps=8,
        )  # fmt: skip
    described = [(level, *level.stride(), end) for level, end in zip(levels, ends, strict=True)]
    described += described[-1:] * (LEVELS - len(levels))
    logits = (*objectness, *(value for level in described for value in level))
    runtime.launch(
        _claim, (boxes, images),
        *truths, *centres, *logits, *predicted, background, claims, sound, *sizes, radius, penalty,
        UNION=union, ROUNDED=_ROUNDED[matched_iou.dtype], LEVELS=len(levels), ANCHORS=CLAIM_ANCHORS,
    )  # fmt: skip
    runtime.launch(
        _resolve, (triton.cdiv(anchors, RESOLVE_ANCHORS), images),
        *truths, *centres, *logits, *predicted, background, claims,
        gt_classes, *gt_classes.stride(), *outputs[:3], *sizes, radius, penalty,
        UNION=union, LEVELS=len(levels), ANCHORS=RESOLVE_ANCHORS, ROWS=RESOLVE_ROWS,
    )  # fmt: skip
    return outputs


# --- What kernels share: each function of _simota_cost that a pair needs, in the same order of operations ----------


@triton.jit
def _load_box(boxes, stride, mask):
    """Centre, width and height in float32; zeros where masked."""
    x = tl.load(boxes, mask=mask, other=0).to(tl.float32)
    y = tl.load(boxes + stride, mask=mask, other=0).to(tl.float32)
    width = tl.load(boxes + 2 * stride, mask=mask, other=0).to(tl.float32)
    height = tl.load(boxes + 3 * stride, mask=mask, other=0).to(tl.float32)
    return x, y, width, height


@triton.jit
def _inside(at_x, at_y, x, y, half_width, half_height):
    return (at_x > x - half_width) & (at_x < x + half_width) & (at_y > y - half_height) & (at_y < y + half_height)


@triton.jit
def _regions(at_x, at_y, reach, x, y, width, height, UNION: tl.constexpr):
    """Whether the anchor is near to the box, and whether the pair is free."""
    near = _inside(at_x, at_y, x, y, reach, reach)
    free = near
    if UNION:
        in_box = _inside(at_x, at_y, x, y, 0.5 * width, 0.5 * height)
        free = near & in_box
        near = near | in_box
    return near, free


@triton.jit
def _corners(x, y, width, height):
    """Corners and area; the area is NaN where a corner is, as minima and maxima may drop it."""
    half_width, half_height = 0.5 * width, 0.5 * height  # division would be approximate
    left, right = x - half_width, x + half_width
    top, bottom = y - half_height, y + half_height
    numbers = (left >= -_INFINITE) & (right >= -_INFINITE) & (top >= -_INFINITE) & (bottom >= -_INFINITE)
    return left, top, right, bottom, tl.where(numbers, width * height, float("nan"))


@triton.jit
def _overlap(left, top, right, bottom, area, left_2, top_2, right_2, bottom_2, area_2):
    """IoU in [0, 1], NaN of NaN. Clamps are selections, so that NaN passes them."""
    width = tl.minimum(right, right_2) - tl.maximum(left, left_2)
    height = tl.minimum(bottom, bottom_2) - tl.maximum(top, top_2)
    common = tl.where(width < 0, 0.0, width) * tl.where(height < 0, 0.0, height)
    union = (area + area_2) - common
    iou = tl.div_rn(common, tl.where(union < _TINY, _TINY, union))
    return tl.where(iou > 1, 1.0, iou)


@triton.jit
def _probability(cls_logits, obj_logits):
    return tl.sqrt_rn(sigmoid(cls_logits.to(tl.float32)) * sigmoid(obj_logits.to(tl.float32)))


@triton.jit
def _label_logits(
    cls_0, image_0, class_0, anchor_0, end_0, cls_1, image_1, class_1, anchor_1, end_1,
    cls_2, image_2, class_2, anchor_2, end_2, cls_3, image_3, class_3, anchor_3, end_3,
    image, label, anchor, wanted, LEVELS: tl.constexpr,
):  # fmt: skip
    """Logits of a label at anchors counted over all levels, broadcast; 0 where not wanted."""
    place = cls_0 + image * image_0 + label * class_0 + anchor * anchor_0
    found = tl.load(place, mask=wanted & (anchor < end_0), other=0).to(tl.float32)
    if LEVELS > 1:
        place = cls_1 + image * image_1 + label * class_1 + (anchor - end_0) * anchor_1
        found += tl.load(place, mask=wanted & (anchor >= end_0) & (anchor < end_1), other=0).to(tl.float32)
    if LEVELS > 2:
        place = cls_2 + image * image_2 + label * class_2 + (anchor - end_1) * anchor_2
        found += tl.load(place, mask=wanted & (anchor >= end_1) & (anchor < end_2), other=0).to(tl.float32)
    if LEVELS > 3:
        place = cls_3 + image * image_3 + label * class_3 + (anchor - end_2) * anchor_3
        found += tl.load(place, mask=wanted & (anchor >= end_2) & (anchor < end_3), other=0).to(tl.float32)
    return found


@triton.jit
def _log_absent(probability):
    found = log1p(-probability)
    return tl.where(found < _FLOOR, _FLOOR, found)


@triton.jit
def _cost_key(background, label_logits, obj_logits, iou, free, penalty, wanted, index):
    """Key of (class cost + 3 * overlap cost) + penalty where not free: least cost, then least index, is least.

    The class cost is `background` with the entry of the label exchanged: in float64, because that entry may be
    nearly all of the sum. Pairs that are not wanted, or cost NaN or infinity, get the key that is never chosen.
    """
    probability = _probability(label_logits, obj_logits)
    log_present = tl.log(probability)
    log_present = tl.where(log_present < _FLOOR, _FLOOR, log_present)
    class_cost = background + _log_absent(probability).to(tl.float64) - log_present.to(tl.float64)
    cost = class_cost.to(tl.float32) + tl.log(iou + _OFFSET) * -_WEIGHT
    cost = tl.where(free, cost, cost + penalty)
    key = (ordered_bits(cost).to(tl.uint64) << 32) | index.to(tl.uint64)
    return tl.where(wanted & (cost < _INFINITE), key, _NEVER)


# --- First launch ---------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["boxes"])
def _sum_classes(
    gt, gt_image, gt_row, gt_side, labels, real,
    at_x, at_y, at_stride,
    obj, obj_image, obj_anchor, cls, cls_image, cls_class, cls_anchor, start, end,
    background, claims, sound, boxes, anchors, classes, radius,
    UNION: tl.constexpr, ANCHORS: tl.constexpr, CLASSES: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Class cost of an anchor as if no class were its own, sum of ``-max(log1p(-p), -100)`` over the classes.

    One program an image and tile of the anchors `start` to `end`, those of a level. Anchors near to no ground truth get
    +infinity, their logits are not read. Writes 16 bytes an anchor: the sum in float64 and no claims.
    """
    image = tl.program_id(1).to(tl.int64)
    anchor = start + tl.program_id(0) * ANCHORS + tl.arange(0, ANCHORS)
    there = anchor < end
    x, y = tl.load(at_x + anchor, mask=there, other=0), tl.load(at_y + anchor, mask=there, other=0)
    reach = radius * tl.load(at_stride + anchor, mask=there, other=0)

    near_any = tl.zeros((ANCHORS,), tl.int32)
    for first_row in range(0, boxes, ROWS):
        row = first_row + tl.arange(0, ROWS)
        is_real = tl.load(real + image * boxes + row, mask=row < boxes, other=0) != 0
        if tl.max(is_real.to(tl.int32)) > 0:
            g_x, g_y, g_width, g_height = _load_box(gt + image * gt_image + row * gt_row, gt_side, is_real)
            near, _ = _regions(
                x[None, :], y[None, :], reach[None, :],
                g_x[:, None], g_y[:, None], g_width[:, None], g_height[:, None], UNION,
            )  # fmt: skip
            near_any = tl.maximum(near_any, tl.max((near & is_real[:, None]).to(tl.int32), 0))
    candidate = there & (near_any > 0)

    log_absent = tl.zeros((ANCHORS, CLASSES), tl.float64)
    if tl.max(candidate.to(tl.int32)) > 0:
        obj_logits = tl.load(obj + image * obj_image + anchor * obj_anchor, mask=candidate, other=0)
        at = cls + image * cls_image + (anchor - start).to(tl.int64)[:, None] * cls_anchor
        for first_entry in range(0, classes, CLASSES):
            entry = first_entry + tl.arange(0, CLASSES)[None, :]
            wanted = candidate[:, None] & (entry < classes)
            cls_logits = tl.load(at + entry.to(tl.int64) * cls_class, mask=wanted, other=0)
            found = _log_absent(_probability(cls_logits, obj_logits[:, None]))
            log_absent += tl.where(wanted, found, 0.0)
    total = tl.where(candidate, -tl.sum(log_absent, 1), _INFINITE)
    tl.store(background + image * anchors + anchor, total, mask=there)
    tl.store(claims + image * anchors + anchor, tl.zeros((ANCHORS,), tl.int64), mask=there)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):  # every level says it again
        tl.store(sound, 1)


# --- Second launch --------------------------------------------------------------------------------------------------


@triton.jit
def _keep_highest(kept, keys):
    """Put keys of a tile into the list `kept` while they beat its least. All keys differ, but for keys of 0."""
    best = tl.max(keys)
    least = tl.min(kept)
    while best > least:
        kept = tl.where(kept == least, best, kept)
        keys = tl.where(keys == best, 0, keys)
        best = tl.max(keys)
        least = tl.min(kept)
    return kept


@triton.jit
def _keep_lowest(kept, keys):
    """Put keys of a tile into the list `kept` while they beat its greatest. All keys differ, but for `_NEVER`."""
    best = tl.min(keys)
    greatest = tl.max(kept)
    while best < greatest:
        kept = tl.where(kept == greatest, best, kept)
        keys = tl.where(keys == best, _NEVER, keys)
        best = tl.min(keys)
        greatest = tl.max(kept)
    return kept


@triton.jit
def _rounded(x, dtype: tl.constexpr):
    return round_bfloat16(x) if dtype == tl.bfloat16 else x.to(dtype).to(tl.float32)


@triton.jit
def _dynamic_k(overlaps, ROUNDED: tl.constexpr):
    """Truncated sum of the overlaps in a list of keys, at least 1; overlaps and sum rounded to the type of boxes."""
    total = tl.full((), 0.0, tl.float32)
    for _ in tl.static_range(_TEN):
        best = tl.max(overlaps)
        total += _rounded((best >> 32).to(tl.int32).to(tl.float32, bitcast=True), ROUNDED)
        overlaps = tl.where(overlaps == best, -1, overlaps)
    return tl.maximum(_rounded(total, ROUNDED).to(tl.int32), 1)


@triton.jit
def _scan(
    overlaps, costs, g_x, g_y, g_width, g_height, label, image,
    at_x, at_y, at_stride, obj, obj_image, obj_anchor,
    cls_0, image_0, class_0, anchor_0, end_0, cls_1, image_1, class_1, anchor_1, end_1,
    cls_2, image_2, class_2, anchor_2, end_2, cls_3, image_3, class_3, anchor_3, end_3,
    pred, pred_image, pred_anchor, pred_side, background, anchors, radius, penalty,
    FIRST: tl.constexpr, UNION: tl.constexpr, LEVELS: tl.constexpr, ANCHORS: tl.constexpr,
):  # fmt: skip
    """Stream the candidates through both lists: all overlaps and costs of free pairs, or the costs of the others."""
    g_left, g_top, g_right, g_bottom, g_area = _corners(g_x, g_y, g_width, g_height)
    for start in range(0, anchors, ANCHORS):
        anchor = start + tl.arange(0, ANCHORS)
        there = anchor < anchors
        # All at once, before any test: one wait for memory a tile, not three.
        rest = tl.load(background + image * anchors + anchor, mask=there, other=_INFINITE)
        x, y, width, height = _load_box(pred + image * pred_image + anchor * pred_anchor, pred_side, there)
        centre_x = tl.load(at_x + anchor, mask=there, other=0)
        centre_y = tl.load(at_y + anchor, mask=there, other=0)
        reach = radius * tl.load(at_stride + anchor, mask=there, other=0)

        candidate = rest != _INFINITE
        if tl.max(candidate.to(tl.int32)) > 0:
            left, top, right, bottom, area = _corners(x, y, width, height)
            iou = _overlap(g_left, g_top, g_right, g_bottom, g_area, left, top, right, bottom, area)
            _, free = _regions(centre_x, centre_y, reach, g_x, g_y, g_width, g_height, UNION)
            if FIRST:
                overlap_key = (iou.to(tl.int32, bitcast=True).to(tl.int64) << 32) | anchor.to(tl.int64)
                overlaps = _keep_highest(overlaps, tl.where(candidate & (iou > 0), overlap_key, 0))
            wanted = candidate & (free == FIRST)
            if tl.max(wanted.to(tl.int32)) > 0:
                label_logits = _label_logits(
                    cls_0, image_0, class_0, anchor_0, end_0, cls_1, image_1, class_1, anchor_1, end_1,
                    cls_2, image_2, class_2, anchor_2, end_2, cls_3, image_3, class_3, anchor_3, end_3,
                    image, label, anchor.to(tl.int64), wanted, LEVELS,
                )  # fmt: skip
                obj_logits = tl.load(obj + image * obj_image + anchor * obj_anchor, mask=wanted, other=0)
                cost_key = _cost_key(rest, label_logits, obj_logits, iou, free, penalty, wanted, anchor)
                costs = _keep_lowest(costs, cost_key)
    return overlaps, costs


@triton.jit(do_not_specialize=["boxes"])
def _claim(
    gt, gt_image, gt_row, gt_side, labels, real,
    at_x, at_y, at_stride,
    obj, obj_image, obj_anchor,
    cls_0, image_0, class_0, anchor_0, end_0, cls_1, image_1, class_1, anchor_1, end_1,
    cls_2, image_2, class_2, anchor_2, end_2, cls_3, image_3, class_3, anchor_3, end_3,
    pred, pred_image, pred_anchor, pred_side,
    background, claims, sound, boxes, anchors, classes, radius, penalty,
    UNION: tl.constexpr, ROUNDED: tl.constexpr, LEVELS: tl.constexpr, ANCHORS: tl.constexpr,
):  # fmt: skip
    """Claim the k candidates of lowest cost for one ground truth, k from its ten largest overlaps.

    One program a ground truth. Both lists are keys in registers: (value bits, anchor), 64 bits. The first scan takes
    all overlaps, and the costs of free pairs alone; only where these are not k that cost less than the penalty does a
    second scan look at the others. Each reads 36 bytes an anchor, and label and objectness logits of the pairs whose
    costs it takes. A claim adds 2**32 + row to the anchor's word: integers, so that order is nothing. A minimum of cost
    over the claims would not do, as the owner of a contested anchor may be a ground truth that did not claim it.
    """
    row, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    if tl.load(real + image * boxes + row) != 0:
        label = tl.load(labels + image * boxes + row)
        if (label < 0) | (label >= classes):
            tl.store(sound, 0)
            label = tl.zeros_like(label)
        x, y, width, height = _load_box(gt + image * gt_image + row * gt_row, gt_side, True)

        lane = tl.arange(0, _LANES)
        used = lane < _TEN
        overlaps = tl.where(used, lane.to(tl.int64), 2**63 - 1)
        costs = tl.where(used, _NEVER - 1 - lane.to(tl.uint64), 0)  # all differ, also from _NEVER
        overlaps, costs = _scan(
            overlaps, costs, x, y, width, height, label, image,
            at_x, at_y, at_stride, obj, obj_image, obj_anchor,
            cls_0, image_0, class_0, anchor_0, end_0, cls_1, image_1, class_1, anchor_1, end_1,
            cls_2, image_2, class_2, anchor_2, end_2, cls_3, image_3, class_3, anchor_3, end_3,
            pred, pred_image, pred_anchor, pred_side, background, anchors, radius, penalty,
            True, UNION, LEVELS, ANCHORS,
        )  # fmt: skip

        # Ranks by comparison of all lanes; those beyond k become 0, so that the greatest left is the k-th.
        k = _dynamic_k(tl.where(used, overlaps, -1), ROUNDED)
        costs = tl.where(used, costs, _NEVER)
        kept = tl.sum((costs[None, :] < costs[:, None]).to(tl.int32), 1) < k
        costs = tl.where(kept, costs, 0)
        least_penalised = ordered_bits(tl.full((), 0.0, tl.float32) + penalty - _SLACK).to(tl.uint64) << 32
        if tl.max(costs) >= least_penalised:
            overlaps, costs = _scan(
                overlaps, costs, x, y, width, height, label, image,
                at_x, at_y, at_stride, obj, obj_image, obj_anchor,
                cls_0, image_0, class_0, anchor_0, end_0, cls_1, image_1, class_1, anchor_1, end_1,
                cls_2, image_2, class_2, anchor_2, end_2, cls_3, image_3, class_3, anchor_3, end_3,
                pred, pred_image, pred_anchor, pred_side, background, anchors, radius, penalty,
                False, UNION, LEVELS, ANCHORS,
            )  # fmt: skip

        claimed = (costs & _LOW_WORD).to(tl.int64)
        chosen = kept & (costs < _INFINITE_KEY)
        word = tl.zeros((_LANES,), tl.int64) + _ONE_CLAIM + row
        tl.atomic_add(claims + image * anchors + claimed, word, mask=chosen, sem="relaxed")


# --- Third launch ---------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["boxes"])
def _resolve(
    gt, gt_image, gt_row, gt_side, labels, real,
    at_x, at_y, at_stride,
    obj, obj_image, obj_anchor,
    cls_0, image_0, class_0, anchor_0, end_0, cls_1, image_1, class_1, anchor_1, end_1,
    cls_2, image_2, class_2, anchor_2, end_2, cls_3, image_3, class_3, anchor_3, end_3,
    pred, pred_image, pred_anchor, pred_side,
    background, claims,
    gt_classes, gt_classes_image, gt_classes_row,
    matched_gt, matched_classes, matched_iou, boxes, anchors, classes, radius, penalty,
    UNION: tl.constexpr, LEVELS: tl.constexpr, ANCHORS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Owner of each anchor: its one claimant, or of several the ground truth of lowest cost, claimant or not.

    One program an image and tile of anchors. Costs are computed again, only in tiles with a conflict. Reads 8 bytes
    an anchor and writes the outputs.
    """
    image = tl.program_id(1).to(tl.int64)
    anchor = tl.program_id(0) * ANCHORS + tl.arange(0, ANCHORS)
    there = anchor < anchors
    word = tl.load(claims + image * anchors + anchor, mask=there, other=0)
    claimed = word >= _ONE_CLAIM
    contested = word >= 2 * _ONE_CLAIM
    owner = tl.where(claimed, (word & _LOW_WORD).to(tl.int32), -1)

    p_x, p_y, p_width, p_height = _load_box(pred + image * pred_image + anchor * pred_anchor, pred_side, claimed)
    left, top, right, bottom, area = _corners(p_x, p_y, p_width, p_height)
    if tl.max(contested.to(tl.int32)) > 0:
        rest = tl.load(background + image * anchors + anchor, mask=contested, other=0)[None, :]
        obj_logits = tl.load(obj + image * obj_image + anchor * obj_anchor, mask=contested, other=0)[None, :]
        x = tl.load(at_x + anchor, mask=contested, other=0)[None, :]
        y = tl.load(at_y + anchor, mask=contested, other=0)[None, :]
        reach = radius * tl.load(at_stride + anchor, mask=contested, other=0)[None, :]
        cheapest = tl.full((ANCHORS,), _NEVER, tl.uint64)
        for start in range(0, boxes, ROWS):
            row = start + tl.arange(0, ROWS)
            is_real = tl.load(real + image * boxes + row, mask=row < boxes, other=0) != 0
            label = tl.load(labels + image * boxes + row, mask=is_real, other=0)
            label = tl.where((label >= 0) & (label < classes), label, 0)
            if tl.max(is_real.to(tl.int32)) > 0:
                g_x, g_y, g_width, g_height = _load_box(gt + image * gt_image + row * gt_row, gt_side, is_real)
                g_x, g_y, g_width, g_height = g_x[:, None], g_y[:, None], g_width[:, None], g_height[:, None]
                g_left, g_top, g_right, g_bottom, g_area = _corners(g_x, g_y, g_width, g_height)
                iou = _overlap(
                    g_left, g_top, g_right, g_bottom, g_area,
                    left[None, :], top[None, :], right[None, :], bottom[None, :], area[None, :],
                )  # fmt: skip
                _, free = _regions(x, y, reach, g_x, g_y, g_width, g_height, UNION)
                wanted = is_real[:, None] & contested[None, :]
                label_logits = _label_logits(
                    cls_0, image_0, class_0, anchor_0, end_0, cls_1, image_1, class_1, anchor_1, end_1,
                    cls_2, image_2, class_2, anchor_2, end_2, cls_3, image_3, class_3, anchor_3, end_3,
                    image, label[:, None], anchor.to(tl.int64)[None, :], wanted, LEVELS,
                )  # fmt: skip
                cost_key = _cost_key(rest, label_logits, obj_logits, iou, free, penalty, wanted, row[:, None])
                cheapest = tl.minimum(cheapest, tl.min(cost_key, 0))
        owner = tl.where(contested, (cheapest & _LOW_WORD).to(tl.int32), owner)

    owned = claimed & (owner >= 0)
    g_x, g_y, g_width, g_height = _load_box(gt + image * gt_image + owner * gt_row, gt_side, owned)
    g_left, g_top, g_right, g_bottom, g_area = _corners(g_x, g_y, g_width, g_height)
    iou = _overlap(g_left, g_top, g_right, g_bottom, g_area, left, top, right, bottom, area)
    at = gt_classes + image * gt_classes_image + owner * gt_classes_row
    own_class = tl.load(at, mask=owned, other=0)
    place = image * anchors + anchor
    tl.store(matched_gt + place, tl.where(owned, owner, -1).to(tl.int64), mask=there)
    tl.store(matched_classes + place, own_class, mask=there)
    iou = _rounded(tl.where(owned, iou, 0.0), matched_iou.dtype.element_ty)
    tl.store(matched_iou + place, iou.to(matched_iou.dtype.element_ty), mask=there)
