"""Overlaps of axis-aligned boxes, values only: what assigners need, and what `bbox_iou` gives without gradient."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

EPS = 1e-7
ASPECT = 4 / math.pi**2
CIOU_ALPHAS = ("stable", "legacy")


class BoxTerms(NamedTuple):
    """What the overlap of a pair needs of one of its boxes; computed once a box, not once a pair."""

    left: Tensor
    top: Tensor
    right: Tensor
    bottom: Tensor
    area: Tensor
    angle: Tensor | None  # arc tangent of width / height, which only CIoU needs

    def map(self, function) -> "BoxTerms":
        """Apply a function of one tensor (an indexing, a reshape) to every term."""
        return BoxTerms(*map(function, self))


class Rule(NamedTuple):
    """Which overlap, and its settings; see `cleanroom.boxes.bbox_iou`."""

    kind: str = "ciou"  # or "iou", "giou", "diou"
    xywh: bool = False
    eps: float = EPS
    alpha: str = "stable"


def box_terms(boxes: Tensor) -> BoxTerms:
    """Terms for `complete_iou` of boxes (..., 4) in corner form, each (...) and contiguous."""
    return coordinate_terms(planes(boxes).unbind(0), Rule())


def planes(boxes: Tensor) -> Tensor:
    """(..., 4) as (4, ...), contiguous. One strided copy a coordinate: a sixth of the time of a transposing copy."""
    return torch.stack(boxes.unbind(-1))


def coordinate_terms(coordinates: tuple[Tensor, ...], rule: Rule) -> BoxTerms:
    """Terms of boxes given coordinate by coordinate. In corner form the height, not the width, carries an epsilon."""
    if rule.xywh:
        x, y, width, height = coordinates
        across, along = width / 2, height / 2
        left, top, right, bottom = x - across, y - along, x + across, y + along
    else:
        left, top, right, bottom = coordinates
        width, height = right - left, (bottom - top).add_(rule.eps)
    angle = (width / height).atan_() if rule.kind == "ciou" else None
    return BoxTerms(left, top, right, bottom, width * height, angle)


def complete_iou(first: BoxTerms, second: BoxTerms, alpha: str = "stable") -> Tensor:
    """Complete IoU (Zheng et al., 2020) of broadcastable terms, in their dtype; see `overlap`."""
    return overlap(first, second, Rule(alpha=alpha))


def overlap(first: BoxTerms, second: BoxTerms, rule: Rule) -> Tensor:
    """IoU, GIoU, DIoU or CIoU of broadcastable terms, in their dtype.

    Every operation is rounded on its own, in the order of the specification (boxes.md, section 9): where that
    order is kept, float32 results have the same bits as upstream's, and decisions behind them agree.

    Args:
        first, second: terms of the boxes; swapping them may change the last bit.
        rule: which overlap. Its alpha "stable" divides CIoU's v by ``1 - IoU + v + eps``, "legacy" by
            ``v - IoU + (1 + eps)``.

    Returns:
        The overlap, NaN where a coordinate is NaN.
    """
    eps = rule.eps
    across = first.left, first.right, second.left, second.right
    along = first.top, first.bottom, second.top, second.bottom
    inner = gap(*across).clamp_(min=0).mul_(gap(*along).clamp_(min=0))
    union = (first.area + second.area).sub_(inner).add_(eps)
    if rule.kind == "giou":
        hull = enclosing(*across).mul_(enclosing(*along)).add_(eps)
        return inner.div_(union).sub_((hull - union).div_(hull))
    iou = inner.div_(union)
    if rule.kind == "iou":
        return iou
    diagonal = enclosing(*across).square_().add_(enclosing(*along).square_()).add_(eps)
    distance = shift(*across).square_().add_(shift(*along).square_()).div_(4).div_(diagonal)
    if rule.kind == "diou":
        return iou.sub_(distance)
    aspect = (second.angle - first.angle).square_().mul_(ASPECT)
    return iou.sub_(distance.add_(aspect_weight(aspect.detach(), iou.detach(), rule).mul_(aspect)))


# Along one axis or more: the first box's ends, then the second's.


def gap(low: Tensor, high: Tensor, other_low: Tensor, other_high: Tensor) -> Tensor:
    """Length of the common part; where there is a gap, minus its length."""
    return torch.minimum(high, other_high).sub_(torch.maximum(low, other_low))


def enclosing(low: Tensor, high: Tensor, other_low: Tensor, other_high: Tensor) -> Tensor:
    """Length of the smallest interval around both."""
    return torch.maximum(high, other_high).sub_(torch.minimum(low, other_low))


def shift(low: Tensor, high: Tensor, other_low: Tensor, other_high: Tensor) -> Tensor:
    """Twice the distance of the centres."""
    return (other_low + other_high - low).sub_(high)


def aspect_weight(aspect: Tensor, iou: Tensor, rule: Rule) -> Tensor:
    """CIoU's alpha, a constant to the gradient, of the aspect term v and the IoU; see `overlap`."""
    if rule.alpha == "stable":
        return aspect / (1 - iou).add_(aspect).add_(rule.eps)
    return aspect / (aspect - iou).add_(1 + rule.eps)
