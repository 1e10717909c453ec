"""Target scores of an assignment by their definition, from predictions that nothing has rounded.

Specification: task_aligned.md, section 4, step 7. An assigner decides by probabilities and boxes in the dtype of the
head; in half dtypes its target scores, which are sixth powers of overlaps, carry some percent of rounding.
Bytes moved: 8 an anchor, and some 300 a foreground anchor; two launches, and one to clear the peaks.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cleanroom.kernels import runtime
from cleanroom.kernels.complete_iou import complete_iou_slopes
from cleanroom.kernels.decode import expectation
from cleanroom.kernels.numbers import sigmoid

BLOCK = 32
"""Anchors of a program, one warp: few programs have foreground."""
PLACES = 512
"""Anchors of a program that normalises."""

_EPS = tl.constexpr(1e-9)


def target_scores(
    scores: Tensor,
    boxes: Tensor,
    owner: Tensor,
    score: Tensor,
    labels: Tensor,
    gt_boxes: Tensor,
    points: Tensor,
    strides: Tensor,
    reg_max: int,
    ciou_alpha: str,
) -> Tensor:
    """Metric of each foreground anchor, ``sqrt(p) CIoU^6``, times largest overlap over largest metric of its row.

    Args:
        scores, boxes: (B, C, A) class logits and (B, 4 R, A) box channels, any strides.
        owner: (B, A) int32 row that an anchor learns.
        score: (B, A) float32, above 0 where it is foreground.
        labels: (B, n) int64; negative: class C + label.
        gt_boxes: (B, n, 4) float32 xyxy, pixels.
        points, strides: (A, 2) centres in cells, (A, 1) pixels a cell.
        reg_max, ciou_alpha: see `v8_detection_loss`.

    Returns:
        (B, A) float32, 0 for background; without gradient.
    """
    tensors = (tensor.detach() for tensor in (scores, boxes, owner, score, labels, gt_boxes, points, strides))
    return _target_scores(*tensors, reg_max, ciou_alpha == "legacy")


@runtime.operator(
    "target_scores(Tensor scores, Tensor boxes, Tensor owner, Tensor score, Tensor labels, Tensor gt_boxes, "
    "Tensor points, Tensor strides, int reg_max, bool legacy) -> Tensor",
    lambda scores, boxes, owner, score, *others: torch.empty_like(score),
)
def _target_scores(
    scores: Tensor,
    boxes: Tensor,
    owner: Tensor,
    score: Tensor,
    labels: Tensor,
    gt_boxes: Tensor,
    points: Tensor,
    strides: Tensor,
    reg_max: int,
    legacy: bool,
) -> Tensor:
    images, classes, anchors = scores.shape
    rows = labels.shape[1]
    owner, score, labels, gt_boxes = (tensor.contiguous() for tensor in (owner, score, labels, gt_boxes))
    target = runtime.empty(score.shape, torch.float32, score.device)
    peaks = runtime.zeros((2, images, rows), torch.int32, score.device)
    runtime.launch(
        metric_kernel,
        (triton.cdiv(anchors, BLOCK), images),
        *(scores, boxes, owner, score, labels, gt_boxes, points.contiguous(), strides.contiguous(), target, peaks),
        *(anchors, classes, rows, images * rows, *scores.stride(), *boxes.stride()),
        R=reg_max,
        LEGACY=legacy,
        BLOCK=BLOCK,
        BINS=triton.next_power_of_2(reg_max),
        num_warps=1,
    )
    runtime.launch(
        normalise_kernel,
        (triton.cdiv(anchors, PLACES), images),
        *(owner, target, peaks, anchors, rows, images * rows),
        BLOCK=PLACES,
    )
    return target


@triton.jit(do_not_specialize=["rows", "pairs", "box_channel", "box_anchor"])
def metric_kernel(
    scores, boxes, owner, score, labels, gt_boxes, points, strides, target, peaks,
    anchors, classes, rows, pairs, score_image, score_class, score_anchor, box_image, box_channel, box_anchor,
    R: tl.constexpr, LEGACY: tl.constexpr, BLOCK: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """Metric of a tile's foreground, 0 elsewhere; largest metric and overlap of each row, by their bits."""
    tile, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    anchor = tile * BLOCK + tl.arange(0, BLOCK)
    inside = anchor < anchors
    place = image * anchors + anchor
    learns = tl.load(score + place, mask=inside, other=0.0) > 0
    metric = tl.zeros((BLOCK,), tl.float32)
    if tl.max(learns.to(tl.int32), 0) > 0:
        row = image * rows + tl.load(owner + place, mask=learns, other=0)
        label = tl.load(labels + row, mask=learns, other=0)
        label = tl.where(label < 0, label + classes, label)
        label = tl.maximum(tl.minimum(label, classes - 1), 0)
        at = scores + image * score_image + label * score_class + anchor * score_anchor
        probability = sigmoid(tl.load(at, mask=learns, other=0.0).to(tl.float32))

        stride = tl.load(strides + anchor, mask=inside, other=1.0).to(tl.float32)
        x = tl.load(points + anchor * 2, mask=inside, other=0.0).to(tl.float32)
        y = tl.load(points + anchor * 2 + 1, mask=inside, other=0.0).to(tl.float32)
        at = boxes + image * box_image
        left = distance_of(at, 0, anchor, learns, box_channel, box_anchor, R, BINS)
        top = distance_of(at, 1, anchor, learns, box_channel, box_anchor, R, BINS)
        right = distance_of(at, 2, anchor, learns, box_channel, box_anchor, R, BINS)
        bottom = distance_of(at, 3, anchor, learns, box_channel, box_anchor, R, BINS)
        truth = gt_boxes + row * 4
        overlap, _, _, _, _ = complete_iou_slopes(
            tl.load(truth, mask=learns, other=0.0),
            tl.load(truth + 1, mask=learns, other=0.0),
            tl.load(truth + 2, mask=learns, other=0.0),
            tl.load(truth + 3, mask=learns, other=0.0),
            (x - left) * stride,
            (y - top) * stride,
            (x + right) * stride,
            (y + bottom) * stride,
            LEGACY,
        )
        overlap = tl.maximum(overlap, 0.0)
        cube = overlap * overlap * overlap
        metric = tl.where(learns, tl.sqrt_rn(probability) * (cube * cube), 0.0)
        # Bits of floats that are not negative have the order of the floats: the largest does not depend on the order.
        tl.atomic_max(peaks + row, metric.to(tl.int32, bitcast=True), mask=learns, sem="relaxed")
        tl.atomic_max(peaks + pairs + row, overlap.to(tl.int32, bitcast=True), mask=learns, sem="relaxed")
    tl.store(target + place, metric, mask=inside)


@triton.jit
def distance_of(
    at, side, anchor, learns, s_channel, s_anchor, R: tl.constexpr, BINS: tl.constexpr
):  # fmt: skip
    """Distance of a side in cells, of foreground anchors."""
    at += side * R * s_channel
    if R == 1:
        distance = tl.load(at + anchor * s_anchor, mask=learns, other=0.0).to(tl.float32)
    else:
        distance = expectation(at, anchor, learns, s_channel, s_anchor, R, BINS, tl.float32)
    return distance


@triton.jit(do_not_specialize=["rows", "pairs"])
def normalise_kernel(owner, target, peaks, anchors, rows, pairs, BLOCK: tl.constexpr):
    """``metric * largest overlap / (largest metric + eps)`` in place; 8 bytes an anchor."""
    image = tl.program_id(1).to(tl.int64)
    anchor = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    place = image * anchors + anchor
    metric = tl.load(target + place, mask=anchor < anchors, other=0.0)
    learns = metric > 0
    row = image * rows + tl.load(owner + place, mask=learns, other=0)
    most = tl.load(peaks + row, mask=learns, other=0).to(tl.float32, bitcast=True)
    overlap = tl.load(peaks + pairs + row, mask=learns, other=0).to(tl.float32, bitcast=True)
    tl.store(target + place, metric * overlap / (most + _EPS), mask=learns)
