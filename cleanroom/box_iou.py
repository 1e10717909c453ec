"""IoU, GIoU, DIoU and CIoU of pairs of boxes, with their gradients (specification: boxes.md, section 9).

After Rezatofighi et al. (GIoU), arXiv:1902.09630, and Zheng et al. (DIoU and CIoU), arXiv:1911.08287 and 2005.03572.
Values come in the evaluation order of the specification, bit for bit in float32 and float64. Gradients are written
down rather than recorded: pairs are worked on in blocks that stay in the cache, and the forward pass leaves nothing
for the backward pass but the derivatives, 4 numbers a pair and box that asks for them.

Derivatives of one pair, I = w_I h_I the intersection, U the union, H the hull (enclosing box), g the derivative of
the value by its index: ``g_U = -IoU/U`` (GIoU: ``+ 1/|H|``), ``g_I = 1/U - g_U``, ``g_(w_I) = g_I h_I``, ``g_(w_H) =
2 w_H d/c^2`` with d the distance term and c^2 the diagonal (GIoU: ``(o - 1)/|H| h_H`` with o the part of the hull
outside of the union). A side of the intersection or the hull belongs to the box whose corner it ends at, to both by
half in a tie. Centres get ``-+ shift/(2 c^2)``; sizes get ``g_U`` times the other size, and by the aspect term
``+-alpha 8/pi^2 (angle' - angle) / (1 + (w/h)^2)`` through w/h, with alpha a constant.
"""

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
        ciou_alpha: "stable" for ultralytics from 8.4.144, "legacy" for the releases before; see `complete_iou`.

    Returns:
        The broadcast shape with last size 1, in the promoted dtype (of integers: the default dtype), differentiable
        once. NaN where upstream's is but for half dtypes: any NaN coordinate, an infinite corner (IoU: 0), and CIoU of a
        point in xywh form, whose width over height is 0/0.

    Raises:
        ValueError: a last size is not 4, shapes do not broadcast, or `ciou_alpha` is unknown.
        TypeError: bool or complex boxes.
    """
    rule = Rule("ciou" if CIoU else "diou" if DIoU else "giou" if GIoU else "iou", bool(xywh), eps, ciou_alpha)
    _check(box1, box2, rule)
    dtype = torch.promote_types(box1.dtype, box2.dtype)
    dtype = dtype if dtype.is_floating_point else torch.get_default_dtype()
    if torch.compiler.is_compiling():  # the compiler fuses, and differentiates, the plain formula
        terms = (_terms(planes(box.to(_at_least_float32(dtype))), rule) for box in (box1, box2))
        return _overlap(*terms, rule).value.unsqueeze(-1).to(dtype)
    if torch.is_grad_enabled() and (box1.requires_grad or box2.requires_grad):
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
    """`_pairwise` with what autograd needs to know of it."""

    @staticmethod
    def forward(ctx, box1: Tensor, box2: Tensor, rule: Rule, dtype: torch.dtype) -> Tensor:
        value, derivatives = _pairwise(box1, box2, rule, dtype, ctx.needs_input_grad[:2])
        ctx.save_for_backward(*derivatives)
        ctx.boxes = [(box.shape, box.dtype) for box in (box1, box2)]
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        pairs = zip(ctx.saved_tensors, ctx.boxes, strict=True)
        return *(None if d is None else _scaled(d, grad, *box) for d, box in pairs), None, None


def _scaled(derivatives: Tensor, grad: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """(4, ...) derivatives of each pair times (..., 1) as the gradient of boxes of `shape`, summed over broadcast dims."""
    result = torch.empty(shape, dtype=dtype, device=grad.device)
    if result.numel() == derivatives.numel():
        torch.mul(derivatives.view(4, *shape[:-1]).movedim(0, -1), grad.view(*shape[:-1], 1), out=result)
        return result
    for coordinate, derivative in zip(result.unbind(-1), derivatives, strict=True):
        coordinate.copy_((derivative.view(grad.shape[:-1]) * grad.squeeze(-1)).sum_to_size(shape[:-1]))
    return result


def _pairwise(
    box1: Tensor, box2: Tensor, rule: Rule, dtype: torch.dtype, wanted: tuple[bool, bool]
) -> tuple[Tensor, list[Tensor | None]]:
    """Values (..., 1) and, for the boxes that are wanted, the derivatives of each value by their coordinates (4, ...)."""
    wide = _at_least_float32(dtype)
    boxes, shape, pairs = _aligned(box1, box2)
    derivatives = [box1.new_empty((4, *pairs), dtype=wide) if want else None for want in wanted]
    values = None
    for rows in _blocks(pairs, box1.device):
        first, second = (
            _terms(planes((box if rows is None or len(box) == 1 else box[rows]).to(wide)), rule) for box in boxes
        )
        overlap = _overlap(first, second, rule)
        if any(wanted):
            parts = [d if d is None or rows is None else d[:, rows] for d in derivatives]
            _differentiate(overlap, first, second, rule, parts)
        if rows is None:
            values = overlap.value.to(dtype)
        else:
            values = box1.new_empty(pairs, dtype=dtype) if values is None else values
            values[rows] = overlap.value
    return values.view(*shape, 1), derivatives


def _aligned(box1: Tensor, box2: Tensor) -> tuple[tuple[Tensor, Tensor], torch.Size, torch.Size]:
    """Both boxes with as many dims as the pairs, and the pairs' shape; flattened where nothing is broadcast."""
    if box1.shape == box2.shape:
        shape = box1.shape[:-1]
        return (box1.reshape(-1, 4), box2.reshape(-1, 4)), shape, torch.Size((shape.numel(),))
    shape = torch.broadcast_shapes(box1.shape, box2.shape)[:-1]
    dims = max(len(shape), 1)
    boxes = (box[(None,) * (dims + 1 - box.ndim)] for box in (box1, box2))
    return tuple(boxes), shape, shape


def _blocks(shape: torch.Size, device: torch.device) -> list[slice | None]:
    """Slices of the first dim, each with few enough pairs for the cache; None for all of it."""
    pairs, room = shape.numel(), _PAIRS_A_THREAD * torch.get_num_threads()
    if pairs <= room or device.type != "cpu":
        return [None]
    rows = shape[0]
    step = -(-rows // min(rows, -(-pairs // room)))
    return [slice(start, start + step) for start in range(0, rows, step)]


class _Terms(NamedTuple):
    """What a pair needs of one of its boxes; (2, ...) is across and along."""

    low: Tensor  # (2, ...)
    high: Tensor  # (2, ...)
    size: Tensor  # (2, ...)
    area: Tensor
    ratio: Tensor | None  # width / height
    angle: Tensor | None  # its arc tangent


class _Values(NamedTuple):
    """The overlap of pairs, and what its derivatives need."""

    value: Tensor
    iou: Tensor
    union: Tensor
    excess: Tensor  # (2, ...): sides of the intersection, negative where there is none
    inner: Tensor  # (2, ...): sides of the intersection
    hull: Tensor | None = None  # (2, ...)
    area: Tensor | None = None  # of the hull
    outside: Tensor | None = None  # share of the hull outside of the union
    shift: Tensor | None = None  # (2, ...): twice the distance of the centres
    diagonal: Tensor | None = None  # of the hull, squared
    distance: Tensor | None = None  # of the centres over the diagonal, squared
    turn: Tensor | None = None  # difference of the angles
    alpha: Tensor | None = None


def _terms(box: Tensor, rule: Rule) -> _Terms:
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


def _overlap(first: _Terms, second: _Terms, rule: Rule) -> _Values:
    """Values of broadcastable terms; plain autograd can differentiate it too."""
    eps, ends = rule.eps, (first.low, first.high, second.low, second.high)
    excess = gap(*ends)
    inner = excess.clamp(min=0)
    common = inner[0] * inner[1]
    union = (first.area + second.area).sub_(common).add_(eps)
    iou = common / union
    if rule.kind == "iou":
        return _Values(iou, iou, union, excess, inner)
    hull = enclosing(*ends)
    if rule.kind == "giou":
        area = (hull[0] * hull[1]).add_(eps)
        outside = (area - union) / area
        return _Values(iou - outside, iou, union, excess, inner, hull, area=area, outside=outside)
    between = shift(*ends)
    diagonal = _sum(hull.square()).add_(eps)
    distance = _sum(between.square()).div_(4).div_(diagonal)
    centres = {"shift": between, "diagonal": diagonal, "distance": distance}
    if rule.kind == "diou":
        return _Values(iou - distance, iou, union, excess, inner, hull, **centres)
    turn = second.angle - first.angle
    aspect = turn.square().mul_(ASPECT)
    alpha = aspect_weight(aspect.detach(), iou.detach(), rule)
    value = iou - (alpha * aspect).add_(distance)
    return _Values(value, iou, union, excess, inner, hull, **centres, turn=turn, alpha=alpha)


def _sum(pair: Tensor) -> Tensor:
    return pair[0] + pair[1]


def _differentiate(values: _Values, first: _Terms, second: _Terms, rule: Rule, results: list[Tensor | None]) -> None:
    """Write the derivatives of `values` by the coordinates of the boxes into `results` (4, ...), where there is one."""
    inverse = values.union.reciprocal()
    by_union = (values.iou * inverse).neg_()
    by_hull = pull = by_angle = None
    if rule.kind == "giou":
        by_union += values.area.reciprocal()
        by_hull = ((values.outside - 1) / values.area) * values.hull.flip(0)
    elif rule.kind != "iou":
        by_hull = (values.distance / values.diagonal).mul_(2) * values.hull
        pull = (0.5 / values.diagonal) * values.shift
    if rule.kind == "ciou":
        by_angle = (values.alpha * values.turn).mul_(2 * ASPECT)
    by_common = inverse.sub_(by_union)
    split = _split_finite if _finite(values.value, by_common) else _split
    by_inner = _where_not_negative(values.excess, by_common * values.inner.flip(0), split)
    for own, other, sign, result in ((first, second, 1, results[0]), (second, first, -1, results[1])):
        if result is None:
            continue
        low = split(other.low, own.low, by_inner, by_hull).neg_()
        high = split(own.high, other.high, by_inner, by_hull)
        if pull is not None:
            low.add_(pull, alpha=sign)
            high.add_(pull, alpha=sign)
        size = by_union * own.size.flip(0)
        if by_angle is not None:
            by_ratio = by_angle / own.ratio.square().add_(1).mul_(own.size[1])
            size[0].add_(by_ratio, alpha=sign)
            size[1].addcmul_(by_ratio, own.ratio, value=-sign)
        if rule.xywh:
            torch.add(low, high, out=result[:2])
            torch.add(size, high.sub_(low), alpha=0.5, out=result[2:])
        else:
            torch.sub(low, size, out=result[:2])
            torch.add(high, size, out=result[2:])


def _finite(value: Tensor, derivative: Tensor) -> bool:
    """Whether nothing is infinite or NaN, where that can be known at no great cost."""
    return data_dependent(value) and bool((value.sum() + derivative.sum()).isfinite())


def _split(less: Tensor, greater: Tensor, own: Tensor, rest: Tensor | None) -> Tensor:
    """`own` where less < greater, `rest` (None: 0) where it is above, half of both in a tie; all of both at a NaN.

    The rules of the derivatives of a minimum and a maximum, as PyTorch has them.
    """
    rest = torch.zeros_like(own) if rest is None else rest
    both = own + rest
    even = torch.where(less == greater, both / 2, both)
    return torch.where(less < greater, own, torch.where(less > greater, rest, even))


def _split_finite(less: Tensor, greater: Tensor, own: Tensor, rest: Tensor | None) -> Tensor:
    """`_split` of finite numbers by arithmetic: a selection by an unpredictable mask takes ten times as long on a CPU."""
    weight = (greater - less).sign_().mul_(0.5).add_(0.5)
    return weight.mul_(own) if rest is None else torch.lerp(rest, own, weight)


def _where_not_negative(test: Tensor, value: Tensor, split) -> Tensor:
    """`value` where `test` >= 0, else 0, at NaN too: the derivative of a clamp at 0."""
    if split is _split_finite:
        return value.mul_(torch.ge(test, 0, out=test))
    return torch.where(test >= 0, value, 0)


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _check(box1: Tensor, box2: Tensor, rule: Rule) -> None:
    for name, box in (("box1", box1), ("box2", box2)):
        if box.ndim == 0 or box.shape[-1] != 4:  # noqa: PLR2004 - a box has four coordinates
            raise ValueError(f"{name} must have last size 4, got shape {tuple(box.shape)}")
        if box.dtype == torch.bool or box.is_complex():
            raise TypeError(f"{name} must be real, got {box.dtype}")
    unequal = box1.shape != box2.shape
    if unequal and any(a != b and 1 not in (a, b) for a, b in zip(reversed(box1.shape), reversed(box2.shape), strict=False)):
        raise ValueError(f"box1 and box2 do not broadcast: {tuple(box1.shape)}, {tuple(box2.shape)}")
    if rule.alpha not in CIOU_ALPHAS:
        raise ValueError(f"ciou_alpha must be one of {CIOU_ALPHAS}, got {rule.alpha!r}")
