"""Complete IoU of a pair of boxes and its gradient, in registers (boxes.md, section 9; `cleanroom.box_iou`)."""

import math

import triton
import triton.language as tl

from cleanroom.kernels.numbers import atan
from cleanroom.overlap import EPS

_EPS = tl.constexpr(EPS)
_ASPECT = tl.constexpr(4 / math.pi**2)


@triton.jit
def complete_iou_slopes(left, top, right, bottom, to_left, to_top, to_right, to_bottom, LEGACY: tl.constexpr):
    """CIoU of the first box with the second, and its gradient by the first one's left, top, right and bottom.

    ``IoU - d / c^2 - alpha v``, alpha a constant; `LEGACY` is the alpha of releases before 8.4.144. Where both boxes
    end at one line, each has half of the slope. Nothing guards against infinite boxes.
    """
    width, height = right - left, bottom - top + _EPS
    to_width, to_height = to_right - to_left, to_bottom - to_top + _EPS
    gap_x = tl.minimum(right, to_right) - tl.maximum(left, to_left)
    gap_y = tl.minimum(bottom, to_bottom) - tl.maximum(top, to_top)
    inner_x, inner_y = tl.maximum(gap_x, 0.0), tl.maximum(gap_y, 0.0)
    inner = inner_x * inner_y
    union = width * height + to_width * to_height - inner + _EPS
    iou = inner / union

    hull_x = tl.maximum(right, to_right) - tl.minimum(left, to_left)
    hull_y = tl.maximum(bottom, to_bottom) - tl.minimum(top, to_top)
    diagonal = hull_x * hull_x + hull_y * hull_y + _EPS
    shift_x, shift_y = to_left + to_right - left - right, to_top + to_bottom - top - bottom
    distance = (shift_x * shift_x + shift_y * shift_y) * 0.25 / diagonal

    ratio = width / height
    turn = atan(to_width / to_height) - atan(ratio)
    aspect = turn * turn * _ASPECT
    rest = aspect - iou + (1 + _EPS) if LEGACY else (1 - iou) + aspect + _EPS
    alpha = aspect / rest
    value = iou - (distance + alpha * aspect)

    by_union = -iou / union
    by_inner = 1.0 / union - by_union
    by_gap_x = tl.where(gap_x >= 0, inner_y * by_inner, 0.0)
    by_gap_y = tl.where(gap_y >= 0, inner_x * by_inner, 0.0)
    by_diagonal = distance / diagonal
    by_hull_x, by_hull_y = 2 * hull_x * by_diagonal, 2 * hull_y * by_diagonal
    pull_x, pull_y = shift_x / (2 * diagonal), shift_y / (2 * diagonal)
    by_ratio = 2 * _ASPECT * alpha * turn / (ratio * ratio + 1.0)
    by_width = height * by_union + by_ratio / height
    by_height = width * by_union - by_ratio * ratio / height

    # Of a near corner the gap loses where it is the larger, the hull where it is the smaller; a far corner mirrors it.
    near_x, near_y = _above(left, to_left), _above(top, to_top)
    far_x, far_y = _above(to_right, right), _above(to_bottom, bottom)
    by_left = pull_x - by_width - near_x * by_gap_x - (1 - near_x) * by_hull_x
    by_top = pull_y - by_height - near_y * by_gap_y - (1 - near_y) * by_hull_y
    by_right = pull_x + by_width + far_x * by_gap_x + (1 - far_x) * by_hull_x
    by_bottom = pull_y + by_height + far_y * by_gap_y + (1 - far_y) * by_hull_y
    return value, by_left, by_top, by_right, by_bottom


@triton.jit
def _above(one, other):
    """1 where the first is larger, a half where both are equal, else 0."""
    return tl.where(one > other, 1.0, tl.where(one == other, 0.5, 0.0))
