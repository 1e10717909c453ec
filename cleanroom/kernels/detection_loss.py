"""The terms of the YOLOv8 criterion under given decisions: class BCE, CIoU and DFL (or L1), value and gradient.

Specification: yolo_losses.md, sections 2.3, 2.4 and 3; gradient of CIoU as in `cleanroom.box_iou`.

The forward pass reads each class logit once and writes the gradient beside the sum. For logits of s bytes, training
moves ``s B A (2 C + 4 R)`` bytes and the box channels of foreground anchors: 120.4 MB of float32 at B = 16, A = 8400,
C = 80, R = 16, and some 5 MB more. Gains, normaliser and B are in that gradient. The backward pass looks at the factors
that come in: where they are 1 it is done; else it makes the gradient again (read and write of the class logits, the
tiles with foreground of the box channels). It makes it for the first time, from the same inputs, where writing it early
is of no use: for float16, which must not be rounded before a scaler's factor is in (+ 21.5 MB at the sizes above); in a
graph of torch.compile; and from the second time on that a graph is differentiated (+ 43.0 MB).

Launches: targets, class term, box and distance terms, sums; in the backward pass one for each gradient.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from cleanroom.kernels import runtime
from cleanroom.kernels.detection_terms import box_kernel, class_kernel, normaliser_of

CLASS_BLOCK, CLASSES = 128, 8
"""Anchors of a program of the class term, and classes that it has in registers at a time."""
BOX_BLOCK = 32
"""Anchors of a program of the box terms, one warp: the fewer, the more of them have no foreground."""
PARTS = 64
"""Programs, and partial sums, of the normaliser; each program of the terms adds them up for itself."""
PLACES = 512
"""Anchors that a program of the targets has in registers at a time."""
SUMS = 1024
"""Partial sums that are added up at a time."""


class Terms(NamedTuple):
    """Terms of a batch, and who learns what."""

    loss: Tensor  # (3,) float32: box, class and distance term, gains in, times B; by image: (B, 3)
    items: Tensor  # the same, not times B, without gradient
    foreground: Tensor  # (B, A) bool: the target score is above 0
    gt_index: Tensor  # (B, A) int64: row of the ground truth, 0 for background


def detection_loss(
    scores: Tensor,
    boxes: Tensor,
    owner: Tensor,
    score: Tensor,
    labels: Tensor,
    gt_boxes: Tensor,
    points: Tensor,
    strides: Tensor,
    size: tuple[float, float],
    *,
    target: Tensor | None = None,
    gains: Mapping[str, float],
    reg_max: int,
    class_weights: Tensor | None = None,
    ignore_mask: Tensor | None = None,
    ciou_alpha: str = "stable",
    reg1_distance: str = "l1",
    reduction: str = "sum",
) -> Terms:
    """Terms of B >= 1 images with A >= 1 anchors, given who learns what; gradient to `scores` and `boxes`.

    With t the target scores and S = max(sum t, 1): ``box sum t (1 - CIoU) / S``, ``cls sum bce / S`` over all anchors
    and classes, ``dfl sum t DFL / S``. In float32, sums in a fixed order. Differentiable once.

    Args:
        scores: (B, C, A) class logits, any strides.
        boxes: (B, 4 R, A) logits of distances, side by side, any strides; R = 1: distances in cells.
        owner: (B, A) int32 row of the ground truth that a foreground anchor learns.
        score: (B, A) float32, above 0 where an anchor is foreground.
        labels: (B, n) int64; negative: trained as class 0.
        gt_boxes: (B, n, 4) float32 xyxy, pixels.
        points, strides: (A, 2) centres in cells, (A, 1) pixels a cell.
        size: width and height of the image, pixels.
        target: (B, A) float32 target scores of foreground anchors, not negative, 0 elsewhere; None: `score`.
        class_weights: (C,) on the device of the scores, or None.
        gains, reg_max, ignore_mask, ciou_alpha, reg1_distance, reduction: see `v8_detection_loss`.
    """
    given = (owner, score, target, labels, gt_boxes, points, strides, class_weights, ignore_mask)
    owner, score, target, labels, gt_boxes, points, strides, weights, ignore_mask = map(_contiguous, given)
    foreground, gt_index, parts = _targets(owner, score, target, ignore_mask)
    target = score if target is None else target
    weights = None if weights is None else weights.float()
    tensors = (scores, boxes, owner, target, parts, labels, gt_boxes, points, strides, weights, ignore_mask)
    settings = (
        [float(gains[name]) for name in ("box", "cls", "dfl")],
        [float(side) for side in size],
        reg_max,
        ciou_alpha == "legacy",
        reg1_distance == "l1",
        reduction == "none",
    )
    early = not torch.compiler.is_compiling() and torch.float16 not in (scores.dtype, boxes.dtype)
    early = early and torch.is_grad_enabled()
    loss, items, _, _ = _terms(*tensors, *settings, early and scores.requires_grad, early and boxes.requires_grad)
    return Terms(loss, items, foreground, gt_index)


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


# Targets: outputs, and the normaliser in parts.


def _fake_targets(owner, score, target, ignore_mask):
    return owner.new_empty(owner.shape, dtype=torch.bool), owner.long(), score.new_empty(PARTS)


@runtime.operator(
    "detection_targets(Tensor owner, Tensor score, Tensor? target, Tensor? ignore_mask) -> (Tensor, Tensor, Tensor)",
    _fake_targets,
)
def _targets(
    owner: Tensor, score: Tensor, target: Tensor | None, ignore_mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Foreground, index and `PARTS` partial sums of the target scores, without those that are ignored."""
    foreground = runtime.empty(owner.shape, torch.bool, owner.device)
    gt_index = runtime.empty(owner.shape, torch.int64, owner.device)
    parts = runtime.empty((PARTS,), torch.float32, owner.device)
    given = owner, score, target, ignore_mask, foreground, gt_index, parts, owner.numel()
    runtime.launch(targets_kernel, (PARTS,), *given, PARTS=PARTS, BLOCK=PLACES)
    return foreground, gt_index, parts


@triton.jit
def targets_kernel(
    owner, score, target, ignored, foreground, gt_index, parts, places, PARTS: tl.constexpr, BLOCK: tl.constexpr
):
    """``score > 0``, the owner's row where it is, and the sum of t over every `PARTS`-th block; 17 bytes an anchor."""
    program = tl.program_id(0)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(program * BLOCK, places, PARTS * BLOCK):
        place = first + tl.arange(0, BLOCK)
        inside = place < places
        value = tl.load(score + place, mask=inside, other=0.0)
        learns = value > 0
        row = tl.load(owner + place, mask=inside, other=0)
        tl.store(foreground + place, learns, mask=inside)
        tl.store(gt_index + place, tl.where(learns, row, 0).to(tl.int64), mask=inside)
        if target is not None:
            value = tl.load(target + place, mask=inside, other=0.0)
        if ignored is not None:
            value = tl.where(tl.load(ignored + place, mask=inside, other=0) != 0, 0.0, value)
        total += value
    tl.store(parts + program, tl.sum(total))


# Terms: sums and gradients.

_ARGUMENTS = (
    "Tensor scores, Tensor boxes, Tensor owner, Tensor target, Tensor parts, Tensor labels, Tensor gt_boxes, "
    "Tensor points, Tensor strides, Tensor? weights, Tensor? ignore_mask, "
    "float[] gains, float[] size, int reg_max, bool legacy, bool l1, bool by_image"
)
_TENSORS = 11  # of these arguments


def _slope(tensor: Tensor, wanted: bool) -> Tensor:
    """Memory of a gradient, anchors innermost, or of none."""
    return runtime.empty(tensor.shape if wanted else (0,), tensor.dtype, tensor.device)


def _fake_terms(scores, boxes, *given):
    by_image, *wanted = given[-3:]
    shape = (len(scores), 3) if by_image else (3,)
    terms = (scores.new_empty(shape, dtype=torch.float32) for _ in range(2))
    slopes = (
        tensor.new_empty(tensor.shape if need else (0,)) for tensor, need in zip((scores, boxes), wanted, strict=True)
    )
    return *terms, *slopes


@runtime.operator(
    f"detection_terms({_ARGUMENTS}, bool by_scores, bool by_boxes) -> (Tensor, Tensor, Tensor, Tensor)", _fake_terms
)
def _terms(scores: Tensor, boxes: Tensor, *given) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss and items, and, where asked for, their gradients; else empty tensors."""
    *arguments, by_scores, by_boxes = given
    images, _, anchors = scores.shape
    slopes = _slope(scores, by_scores), _slope(boxes, by_boxes)
    counts = triton.cdiv(anchors, BOX_BLOCK), triton.cdiv(anchors, CLASS_BLOCK)
    sums = [
        runtime.empty((terms, images, count), torch.float32, scores.device)
        for terms, count in zip((2, 1), counts, strict=True)
    ]
    _launch_terms(scores, boxes, *arguments, sums=sums, slopes=slopes)

    _, _, parts, *_, gains, _, _, _, _, by_image = arguments
    shape = (images, 3) if by_image else (3,)
    loss, items = (runtime.empty(shape, torch.float32, scores.device) for _ in range(2))
    groups = images if by_image else 1
    counts = [images // groups * count for count in counts]
    runtime.launch(
        sums_kernel,
        (groups, 3),
        *(*sums, parts, loss, items, *gains, float(images), *counts),
        PARTS=PARTS,
        BLOCK=min(SUMS, triton.next_power_of_2(max(counts))),
    )
    return loss, items, *slopes


def _fake_slopes(grad, scores, boxes, *given):
    return _fake_terms(scores, boxes, *given)[2:]


@runtime.operator(
    f"detection_slopes(Tensor grad, {_ARGUMENTS}, bool by_scores, bool by_boxes) -> (Tensor, Tensor)", _fake_slopes
)
def _slopes(grad: Tensor, scores: Tensor, boxes: Tensor, *given) -> tuple[Tensor, Tensor]:
    """Gradients where asked for, else empty tensors, given those of the loss."""
    *arguments, by_scores, by_boxes = given
    slopes = _slope(scores, by_scores), _slope(boxes, by_boxes)
    _launch_terms(scores, boxes, *arguments, grad=grad, slopes=slopes)
    return slopes


@runtime.operator(
    f"detection_rescale(Tensor grad, Tensor(a!) by_scores, Tensor(b!) by_boxes, {_ARGUMENTS}) -> ()",
    lambda *given: None,
)
def _rescale(grad: Tensor, by_scores: Tensor, by_boxes: Tensor, *arguments) -> None:
    """Turn gradients of the sum of the loss into those of the loss, given its own; nothing to do where that is 1."""
    _launch_terms(*arguments, grad=grad, slopes=(by_scores, by_boxes), rescale=True)


def _launch_terms(
    scores: Tensor,
    boxes: Tensor,
    owner: Tensor,
    target: Tensor,
    parts: Tensor,
    labels: Tensor,
    gt_boxes: Tensor,
    points: Tensor,
    strides: Tensor,
    weights: Tensor | None,
    ignore_mask: Tensor | None,
    gains: Sequence[float],
    size: Sequence[float],
    reg_max: int,
    legacy: bool,
    l1: bool,
    by_image: bool,
    *,
    sums: Sequence[Tensor | None] = (None, None),
    grad: Tensor | None = None,
    slopes: tuple[Tensor, Tensor],
    rescale: bool = False,
) -> None:
    """Launch what has sums or a gradient to make.

    `sums` are of the box and of the class terms, `slopes` by scores and by boxes; `grad` may be an expanded tensor.
    """
    images, classes, anchors = scores.shape
    by_scores, by_boxes = (slope if slope.numel() else None for slope in slopes)
    box_scale, class_scale, distance_scale = (gain * images for gain in gains)
    grad_strides = (0, 0) if grad is None else grad.stride() if by_image else (0, grad.stride(0))
    box_sums, class_sums = sums
    shared = {"RESCALE": rescale, "PARTS": PARTS, "enable_fp_fusion": True}
    if class_sums is not None or by_scores is not None:
        runtime.launch(
            class_kernel,
            (triton.cdiv(anchors, CLASS_BLOCK), images),
            *(scores, owner, target, parts, labels, weights, ignore_mask, grad, by_scores, class_sums),
            *(anchors, classes, labels.shape[1], *scores.stride(), *grad_strides, class_scale),
            BLOCK=CLASS_BLOCK,
            CLASSES=CLASSES,
            **shared,
        )
    if box_sums is not None or by_boxes is not None:
        runtime.launch(
            box_kernel,
            (triton.cdiv(anchors, BOX_BLOCK), images),
            *(boxes, owner, target, parts, gt_boxes, points, strides, ignore_mask, grad, by_boxes, box_sums),
            *(anchors, labels.shape[1], *boxes.stride(), 1, *grad_strides, box_scale, distance_scale, *size),
            BLOCK=BOX_BLOCK,
            num_warps=1,
            R=reg_max,
            LEGACY=legacy,
            L1=l1,
            BINS=triton.next_power_of_2(reg_max),
            **shared,
        )


@triton.jit
def sums_kernel(
    box_sums, class_sums, parts, loss, items, box_gain, class_gain, distance_gain, images, box_count, class_count,
    PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A group's sum of partial sums, in order, over the normaliser, times the gain; one program a group and term.

    Box sums are (2, groups, box_count), of both terms; class sums (groups, class_count).
    """
    group, term = tl.program_id(0), tl.program_id(1)
    at, count, gain = class_sums + group * class_count, class_count, class_gain
    if term != 1:
        at = box_sums + (term // 2 * tl.num_programs(0) + group) * box_count
        count = box_count
        gain = tl.where(term == 0, box_gain, distance_gain)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, count, BLOCK):
        index = first + tl.arange(0, BLOCK)
        total += tl.load(at + index, mask=index < count, other=0.0)
    item = tl.sum(total) / normaliser_of(parts, PARTS) * gain
    tl.store(items + group * 3 + term, item)
    tl.store(loss + group * 3 + term, item * images)


# Gradient.


def _set_up(ctx, inputs, output) -> None:
    *arguments, by_scores, by_boxes = inputs
    _, items, *slopes = output
    ctx.mark_non_differentiable(items, *slopes)
    ctx.save_for_backward(*arguments[:_TENSORS])
    ctx.settings = arguments[_TENSORS:]
    # Given away by the first backward pass, which may write into them.
    ctx.slopes = slopes if by_scores or by_boxes else None


@once_differentiable
def _backward(ctx, grad, *others):
    arguments = (*ctx.saved_tensors, *ctx.settings)
    wanted = ctx.needs_input_grad[:2]
    slopes, ctx.slopes = ctx.slopes, None
    if slopes is None:
        slopes = _slopes(grad, *arguments, *wanted)
    else:
        _rescale(grad, *slopes, *arguments)
    found = (slope if need else None for slope, need in zip(slopes, wanted, strict=True))
    return *found, *[None] * (_TENSORS - 2 + len(ctx.settings) + 2)


if runtime.REGISTERED:
    torch.library.register_autograd("cleanroom::detection_terms", _backward, setup_context=_set_up)
