"""IoU, GIoU, DIoU and CIoU of pairs of boxes, with their gradients (specification: boxes.md, section 9).

After Rezatofighi et al. (GIoU), arXiv:1902.09630, and Zheng et al. (DIoU and CIoU), arXiv:1911.08287 and 2005.03572.
Gradients are written down rather than recorded: nothing but the boxes is kept for the backward pass, which takes the
pairs in blocks that stay in the cache. Values and, where no box is broadcast, gradients come in the order of operations
of the specification and of its differentiation by autograd, so that float32 and float64 results have upstream's bits.

With g the gradient of the value, I the intersection of sides w_I, h_I, U the union, H the hull (the enclosing box) of
diagonal c, d the distance term and v the aspect term, the gradients by each are

    IoU     g_U = -g (IoU/U),  g_I = g/U - g_U,  g_(w_I) = g_I h_I where the sides meet
    GIoU    g_U += g/|H|,  g_|H| = (g (1 - |U|/|H|) - g) / |H|
    DIoU    g_(w_H) = g (d/c^2) 2 w_H,  and -+ g shift / (2 c^2) for every corner
    CIoU    g_angle = +- g alpha 8/pi^2 (angle' - angle),  g_(w/h) = g_angle / (1 + (w/h)^2),  alpha a constant

A side of the intersection or of the hull ends at corners of either box; in a tie each of them gets half.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cleanroom.overlap import (
    ASPECT,
    CIOU_ALPHAS,
    EPS,
    Rule,
    aspect_weight,
    coordinate_terms,
    enclosing,
    gap,
    overlap,
    planes,
    shift,
)
from cleanroom.paths import data_dependent

# From this many elements on PyTorch splits an operation over threads.
_PAIRS_A_THREAD = 1 << 15


def bbox_iou(
    box1: Tensor,
    box2: Tensor,
    xywh: bool = True,
    GIoU: bool = False,  # noqa: N803 - upstream's names
    DIoU: bool = False,  # noqa: N803
    CIoU: bool = False,  # noqa: N803
    eps: float = EPS,
    *,
    ciou_alpha: str = "stable",
) -> Tensor:
    """Overlap of pairs of boxes: IoU, or one of its relatives; a drop-in for ``ultralytics.utils.metrics.bbox_iou``.

    Half dtypes are computed with in float32, so areas above 65504 do not overflow.

    Args:
        box1, box2: (..., 4) of shapes that broadcast, any real dtypes, in one unit.
        xywh: boxes are (centre x, centre y, width, height), else corners (x1, y1, x2, y2).
        GIoU, DIoU, CIoU: which relative; CIoU before DIoU before GIoU where several are set.
        eps: added to the union, to heights given by corners, and to every other denominator.
        ciou_alpha: "stable" for ultralytics from 8.4.144, "legacy" for the releases before; see `overlap`.

    Returns:
        The broadcast shape with last size 1, in the promoted dtype (of integers: the default dtype); differentiable
        once. It is NaN where a coordinate is, where a corner is infinite (IoU in corner form: 0), and for CIoU of a
        point in centre form, whose width over height is 0/0.

    Raises:
        ValueError: a last size is not 4, shapes do not broadcast, or `ciou_alpha` is unknown.
        TypeError: bool or complex boxes.
    """
    rule = Rule("ciou" if CIoU else "diou" if DIoU else "giou" if GIoU else "iou", bool(xywh), eps, ciou_alpha)
    _check(box1, box2, rule)
    dtype = torch.promote_types(box1.dtype, box2.dtype)
    dtype = dtype if dtype.is_floating_point else torch.get_default_dtype()
    tracked = torch.is_grad_enabled() and (box1.requires_grad or box2.requires_grad)
    if tracked and not torch.compiler.is_compiling():  # a compiler fuses and differentiates the plain formula
        return _Overlap.apply(box1, box2, rule, dtype)
    return _values(box1, box2, rule, dtype)


def _values(box1: Tensor, box2: Tensor, rule: Rule, dtype: torch.dtype) -> Tensor:
    """(..., 1) without gradient. Coordinates are read where they lie but where a box is in more than one pair."""
    wide = _at_least_float32(dtype)
    read = torch.unbind if box1.shape == box2.shape else _copied
    first, second = coordinate_terms(read(box1.to(wide), -1), rule), coordinate_terms(read(box2.to(wide), -1), rule)
    return overlap(first, second, rule).unsqueeze(-1).to(dtype)


def _copied(box: Tensor, dim: int) -> tuple[Tensor, ...]:
    return planes(box).unbind(0)


class _Overlap(torch.autograd.Function):
    """`_values` with its gradient."""

    @staticmethod
    def forward(ctx, box1: Tensor, box2: Tensor, rule: Rule, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(box1, box2)
        ctx.rule, ctx.dtype = rule, dtype
        return _values(box1, box2, rule, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        boxes, rule, wide = ctx.saved_tensors, ctx.rule, _at_least_float32(ctx.dtype)
        aligned, pairs = _aligned(*boxes)
        results = [torch.empty_like(box) if ctx.needs_input_grad[index] else None for index, box in enumerate(aligned)]
        grad = grad.reshape(pairs)
        # What is broadcast is in every block, and its sums are all of one piece.
        for rows in [None] if boxes[0].shape != boxes[1].shape else _blocks(len(grad), grad.device):
            terms = [_terms(planes(_part(box, rows).to(wide)), rule) for box in aligned]
            slopes = _slopes(_part(grad, rows), *terms, rule)
            for index, result in enumerate(results):
                if result is not None:
                    into = _part(result, rows).unbind(-1)
                    _write_gradient(slopes, terms[index], terms[1 - index], 1 - 2 * index, rule, into)
        found = zip(boxes, results, strict=True)
        return *(None if result is None else result.view(box.shape) for box, result in found), None, None


def _part(tensor: Tensor, rows: slice | None) -> Tensor:
    return tensor if rows is None else tensor[rows]


def _aligned(box1: Tensor, box2: Tensor) -> tuple[tuple[Tensor, Tensor], torch.Size]:
    """Both boxes with as many dims as the pairs, and the pairs' shape; flattened where nothing is broadcast."""
    if box1.shape == box2.shape:
        return (box1.reshape(-1, 4), box2.reshape(-1, 4)), torch.Size((box1.shape[:-1].numel(),))
    shape = torch.broadcast_shapes(box1.shape, box2.shape)[:-1]
    one, two = (box[(None,) * (len(shape) + 1 - box.ndim)] for box in (box1, box2))
    return (one, two), shape


def _blocks(pairs: int, device: torch.device) -> list[slice | None]:
    """Slices with few enough pairs for the cache; None for all of them."""
    room = _PAIRS_A_THREAD * torch.get_num_threads()
    if pairs <= room or device.type != "cpu":
        return [None]
    step = -(-pairs // -(-pairs // room))
    return [slice(start, start + step) for start in range(0, pairs, step)]


class _Terms(NamedTuple):
    """What a pair needs of one of its boxes; (2, ...) is across and along."""

    low: Tensor  # (2, ...)
    high: Tensor  # (2, ...)
    size: Tensor  # (2, ...)
    area: Tensor
    ratio: Tensor | None  # width / height
    angle: Tensor | None  # its arc tangent


def _terms(box: Tensor, rule: Rule) -> _Terms:
    """Terms of (4, ...) coordinates."""
    if rule.xywh:
        size = box[2:]
        half = size / 2
        low, high = box[:2] - half, box[:2] + half
    else:
        low, high = box[:2], box[2:]
        size = high - low
        size[1].add_(rule.eps)
    width, height = size[0], size[1]
    area = width * height
    if rule.kind != "ciou":
        return _Terms(low, high, size, area, None, None)
    ratio = width / height
    return _Terms(low, high, size, area, ratio, ratio.atan())


class _Slopes(NamedTuple):
    """Gradients by what both boxes have in common."""

    union: Tensor
    inner: Tensor  # (2, ...): by the sides of the intersection
    hull: Tensor | None  # (2, ...): by the sides of the hull; not for IoU
    shift: Tensor | None  # (2, ...): of the first box's corners, by the distance of the centres; DIoU and CIoU
    angle: Tensor | None  # of the first box; CIoU
    finite: bool  # as far as is known at no great cost


def _slopes(grad: Tensor, first: _Terms, second: _Terms, rule: Rule) -> _Slopes:
    """The common gradients, given those of the values (...)."""
    ends = first.low, first.high, second.low, second.high
    lap = gap(*ends)
    inner = lap.clamp(min=0)
    common = inner[0] * inner[1]
    union = (first.area + second.area).sub_(common).add_(rule.eps)
    iou = common.div_(union)
    by_union = (iou / union).mul_(grad).neg_()
    by_hull = by_shift = by_angle = None
    if rule.kind == "giou":
        hull = enclosing(*ends)
        area = (hull[0] * hull[1]).add_(rule.eps)
        share = grad / area
        by_area = (area - union).div_(area).div_(area).mul_(grad).sub_(share)
        by_union += share
        by_hull = hull.flip(0).mul_(by_area)
    elif rule.kind != "iou":
        hull, between = enclosing(*ends), shift(*ends)
        diagonal = _sum(hull.square()).add_(rule.eps)
        distance = _sum(between.square()).div_(4).div_(diagonal)
        by_hull = hull.mul_(2).mul_((distance / diagonal).mul_(grad))
        by_shift = between.mul_(grad / diagonal).div_(2)
        if rule.kind == "ciou":
            turn = second.angle - first.angle
            alpha = aspect_weight(turn.square().mul_(ASPECT), iou, rule)
            by_angle = alpha.mul_(grad).mul_(ASPECT).mul_(turn.mul_(2))
    by_common = (grad / union).sub_(by_union)
    by_inner = inner.flip(0).mul_(by_common)
    finite = _finite(by_common, by_hull)
    if finite:
        by_inner.mul_(torch.ge(lap, 0, out=lap))
    else:
        by_inner = torch.where(lap >= 0, by_inner, 0)
    return _Slopes(by_union, by_inner, by_hull, by_shift, by_angle, finite)


def _finite(by_common: Tensor, by_hull: Tensor | None) -> bool:
    if not data_dependent(by_common):
        return False
    total = by_common.sum() if by_hull is None else by_common.sum() + by_hull.sum()
    return bool(total.isfinite())


def _write_gradient(slopes: _Slopes, own: _Terms, other: _Terms, sign: int, rule: Rule, into: Sequence[Tensor]) -> None:
    """Write the gradient of a box, the first one (sign 1) or the second (-1), coordinate by coordinate."""
    # The near corner and minus the far one: the intersection takes the maximum of both boxes, the hull the minimum.
    # Each term is summed on its own over what is broadcast, as in autograd: huge ones may cancel.
    shape = own.area.shape
    of_maximum, of_minimum = _shares(own, other, slopes)
    corner = slopes.inner.new_zeros((2, 2, *shape))
    if slopes.shift is not None:
        pull = slopes.shift.sum_to_size(2, *shape)
        torch.mul(pull, sign, out=corner[0])
        torch.mul(pull, -sign, out=corner[1])
    take_off = _take_off if slopes.finite else _take_off_chosen
    if slopes.hull is not None:
        take_off(corner, slopes.hull, of_minimum)
    take_off(corner, slopes.inner, of_maximum)
    size = own.size.flip(0).mul_(slopes.union.sum_to_size(shape))
    if slopes.angle is not None:
        by_ratio = (slopes.angle.sum_to_size(shape) / own.ratio.square().add_(1)).mul_(sign)
        size[0].add_(by_ratio / own.size[1])
        size[1].sub_(by_ratio.mul_(own.ratio / own.size[1]))
    for axis, (near, far) in enumerate(zip(*corner, strict=True)):
        if rule.xywh:
            torch.sub(near, far, out=into[axis])
            torch.sub(size[axis], near.add_(far), alpha=0.5, out=into[2 + axis])
        else:
            torch.sub(near, size[axis], out=into[axis])
            torch.sub(size[axis], far, out=into[2 + axis])


def _sum(pair: Tensor) -> Tensor:
    return pair[0] + pair[1]


def _shares(own: _Terms, other: _Terms, slopes: _Slopes) -> tuple[Tensor, Tensor]:
    """What the gradients of the maximum and of the minimum of two boxes leave to `own`, for its corners (2, 2, ...).

    1, 0, or a half of each in a tie. As in autograd, a comparison with NaN leaves it all of both.
    """
    above = _above(own, other, slopes.inner)
    return above if slopes.finite else 1 - _above(other, own, slopes.inner), 1 - above


def _above(own: _Terms, other: _Terms, like: Tensor) -> Tensor:
    """1 where the near corner or minus the far one of `own` is the larger, 1/2 in a tie, else 0, at NaN too."""
    above, reached = like.new_empty((2, *like.shape)), like.new_empty((2, *like.shape))
    # Written as numbers right away: to select by a mask without pattern takes a CPU ten times as long.
    torch.gt(own.low, other.low, out=above[0])
    torch.lt(own.high, other.high, out=above[1])
    torch.ge(own.low, other.low, out=reached[0])
    torch.le(own.high, other.high, out=reached[1])
    return above.add_(reached).mul_(0.5)


def _take_off(corner: Tensor, term: Tensor, share: Tensor) -> None:
    """Take ``term * share`` off the corners; shares of 0, 1/2 and 1 leave nothing to round."""
    if corner.shape == share.shape:
        corner.addcmul_(term, share, value=-1)
    else:
        corner.sub_((term * share).sum_to_size(corner.shape))


def _take_off_chosen(corner: Tensor, term: Tensor, share: Tensor) -> None:
    """The same where a term may be infinite or NaN: a share of 0 takes nothing of it."""
    corner.sub_(torch.where(share == 0, 0, term * share).sum_to_size(corner.shape))


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _check(box1: Tensor, box2: Tensor, rule: Rule) -> None:
    for name, box in (("box1", box1), ("box2", box2)):
        if box.ndim == 0 or box.shape[-1] != 4:
            raise ValueError(f"{name} must have last size 4, got shape {tuple(box.shape)}")
        if box.dtype == torch.bool or box.is_complex():
            raise TypeError(f"{name} must be real, got {box.dtype}")
    if rule.alpha not in CIOU_ALPHAS:
        raise ValueError(f"ciou_alpha must be one of {CIOU_ALPHAS}, got {rule.alpha!r}")
    facing = zip(reversed(box1.shape), reversed(box2.shape), strict=False)
    if box1.shape != box2.shape and any(one != two and 1 not in (one, two) for one, two in facing):
        raise ValueError(f"box1 and box2 do not broadcast: {tuple(box1.shape)}, {tuple(box2.shape)}")
