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
    inner = torch.minimum(first.right, second.right).sub_(torch.maximum(first.left, second.left)).clamp_(min=0)
    inner *= torch.minimum(first.bottom, second.bottom).sub_(torch.maximum(first.top, second.top)).clamp_(min=0)
    iou = inner.div_((first.area + second.area).sub_(inner).add_(EPS))

    outer_width = torch.maximum(first.right, second.right).sub_(torch.minimum(first.left, second.left))
    outer_height = torch.maximum(first.bottom, second.bottom).sub_(torch.minimum(first.top, second.top))
    diagonal = outer_width.square_().add_(outer_height.square_()).add_(EPS)
    shift_x = (second.left + second.right - first.left).sub_(first.right)
    shift_y = (second.top + second.bottom - first.top).sub_(first.bottom)
    distance = shift_x.square_().add_(shift_y.square_()).div_(4).div_(diagonal)

    aspect = (second.angle - first.angle).square_().mul_(4 / math.pi**2)
    if alpha == "stable":
        weight = aspect / (1 - iou).add_(aspect).add_(EPS)
    else:
        weight = aspect / (aspect - iou).add_(1 + EPS)
    return iou.sub_(distance.add_(weight.mul_(aspect)))
