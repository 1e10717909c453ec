"""Overlap of axis-aligned boxes given by their corners (x1, y1, x2, y2)."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

EPS = 1e-7
CIOU_ALPHAS = ("stable", "legacy")


class BoxTerms(NamedTuple):
    """What the overlap of a pair needs of one of its boxes; computed once a box, not once a pair."""

    left: Tensor
    top: Tensor
    right: Tensor
    bottom: Tensor
    area: Tensor
    angle: Tensor  # arc tangent of width / height

    def map(self, function) -> "BoxTerms":
        """Apply a function of one tensor (an indexing, a reshape) to every term."""
        return BoxTerms(*map(function, self))


def box_terms(boxes: Tensor) -> BoxTerms:
    """Terms of boxes (..., 4), each (...) and contiguous. The height, not the width, carries an epsilon."""
    left, top, right, bottom = boxes.movedim(-1, 0).contiguous().unbind(0)
    width = right - left
    height = (bottom - top).add_(EPS)
    return BoxTerms(left, top, right, bottom, width * height, width.div_(height).atan_())


def complete_iou(first: BoxTerms, second: BoxTerms, alpha: str = "stable") -> Tensor:
    """Complete IoU (Zheng et al., 2020) of broadcastable terms, in their dtype.

    Every operation is rounded on its own, in the order of the specification (boxes.md, section 9): where that
    order is kept, float32 results have the same bits as upstream's, and decisions behind them agree.

    Args:
        first, second: terms of the boxes; swapping them may change the last bit.
        alpha: "stable" divides v by ``1 - IoU + v + eps``, "legacy" by ``v - IoU + (1 + eps)``.

    Returns:
        CIoU, NaN where a coordinate is NaN.
    """
    across = first.left, first.right, second.left, second.right
    along = first.top, first.bottom, second.top, second.bottom
    inner = _shared(*across).mul_(_shared(*along))
    iou = inner.div_((first.area + second.area).sub_(inner).add_(EPS))
    diagonal = _enclosing(*across).square_().add_(_enclosing(*along).square_()).add_(EPS)
    distance = _shift(*across).square_().add_(_shift(*along).square_()).div_(4).div_(diagonal)
    aspect = (second.angle - first.angle).square_().mul_(4 / math.pi**2)
    scale = (1 - iou).add_(aspect).add_(EPS) if alpha == "stable" else (aspect - iou).add_(1 + EPS)
    return iou.sub_(distance.add_((aspect / scale).mul_(aspect)))


# Along one axis, the first interval's ends before the second's.


def _shared(low: Tensor, high: Tensor, other_low: Tensor, other_high: Tensor) -> Tensor:
    return torch.minimum(high, other_high).sub_(torch.maximum(low, other_low)).clamp_(min=0)


def _enclosing(low: Tensor, high: Tensor, other_low: Tensor, other_high: Tensor) -> Tensor:
    return torch.maximum(high, other_high).sub_(torch.minimum(low, other_low))


def _shift(low: Tensor, high: Tensor, other_low: Tensor, other_high: Tensor) -> Tensor:
    """Twice the distance of the centres."""
    return (other_low + other_high - low).sub_(high)
