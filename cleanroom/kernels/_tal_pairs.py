"""What a pair of a ground truth and an anchor is worth, and who is a candidate: for the task-aligned kernels.

The same operations in the same order as `cleanroom.overlap` and `cleanroom.assign._tal_terms`, so that decisions agree.
"""

import triton
import triton.language as tl

from cleanroom.assign._tal_terms import EDGE
from cleanroom.kernels.numbers import atan, round_bfloat16, sigmoid
from cleanroom.overlap import ASPECT, EPS

_EDGE = tl.constexpr(EDGE)
_EPS = tl.constexpr(EPS)
_ONE_AND_EPS = tl.constexpr(1 + EPS)
_ASPECT = tl.constexpr(ASPECT)


@triton.jit
def load_box(boxes, stride, mask):
    """The four coordinates in float32, NaN where masked."""
    nan = float("nan")
    left = tl.load(boxes, mask=mask, other=nan).to(tl.float32)
    top = tl.load(boxes + stride, mask=mask, other=nan).to(tl.float32)
    right = tl.load(boxes + 2 * stride, mask=mask, other=nan).to(tl.float32)
    bottom = tl.load(boxes + 3 * stride, mask=mask, other=nan).to(tl.float32)
    return left, top, right, bottom


@triton.jit
def find_angle(left, top, right, bottom):
    """Arc tangent of width / height."""
    return atan(tl.div_rn(right - left, (bottom - top) + _EPS))


@triton.jit
def find_overlap(l1, t1, r1, b1, angle1, l2, t2, r2, b2, angle2, STABLE: tl.constexpr):
    """CIoU of ground truth and prediction, floored at 0; NaN where the prediction has one."""
    across = tl.maximum(tl.minimum(r1, r2) - tl.maximum(l1, l2), 0.0)
    along = tl.maximum(tl.minimum(b1, b2) - tl.maximum(t1, t2), 0.0)
    inner = across * along
    areas = (r1 - l1) * ((b1 - t1) + _EPS) + (r2 - l2) * ((b2 - t2) + _EPS)
    iou = tl.div_rn(inner, (areas - inner) + _EPS)
    hull_x = tl.maximum(r1, r2) - tl.minimum(l1, l2)
    hull_y = tl.maximum(b1, b2) - tl.minimum(t1, t2)
    shift_x = ((l2 + r2) - l1) - r1
    shift_y = ((t2 + b2) - t1) - b1
    diagonal = (hull_x * hull_x + hull_y * hull_y) + _EPS
    distance = tl.div_rn((shift_x * shift_x + shift_y * shift_y) * 0.25, diagonal)
    turn = angle2 - angle1
    aspect = turn * turn * _ASPECT
    guard = ((1.0 - iou) + aspect) + _EPS
    if not STABLE:
        guard = (aspect - iou) + _ONE_AND_EPS
    weight = tl.div_rn(aspect, guard)
    found = iou - (distance + weight * aspect)
    return tl.where(found <= 0, 0.0, found)  # not -0, whose bits are below all others; a maximum would drop NaN


@triton.jit
def _power(base, EXPONENT: tl.constexpr):
    """`_tal_terms.power`: products of float64, rounded once, so that both paths have the same bits."""
    if EXPONENT == 0:
        result = tl.full(base.shape, 1.0, tl.float32)
    elif EXPONENT == 1:
        result = base
    elif EXPONENT == 0.5:
        result = tl.sqrt_rn(base)
    elif EXPONENT % 1 == 0 and EXPONENT > 1 and EXPONENT <= 16:
        wide = base.to(tl.float64)
        product = wide
        for step in tl.static_range(4):
            if (EXPONENT >> (4 - step)) != 0:
                product = product * product
                if (EXPONENT >> (3 - step)) % 2 == 1:
                    product = product * wide
        result = product.to(tl.float32)
    else:
        result = tl.exp2(EXPONENT * tl.log2(base.to(tl.float64))).to(tl.float32)
    return result


@triton.jit
def find_metric(score, overlap, ALPHA: tl.constexpr, BETA: tl.constexpr):
    """The metric, and -1 where it cannot be used: where it or the overlap is NaN, infinite or negative."""
    metric = _power(score, ALPHA) * _power(overlap, BETA)
    usable = (metric >= 0) & (metric < float("inf")) & (overlap < float("inf"))
    return tl.where(usable, metric + 0.0, -1.0)  # -0 counts as 0


@triton.jit
def _rounded(value, DTYPE: tl.constexpr):
    """Float32 rounded to a dtype."""
    result = value
    if DTYPE.is_bf16():
        result = round_bfloat16(value)
    elif DTYPE.is_fp16():
        result = value.to(tl.float16).to(tl.float32)
    return result


@triton.jit
def load_score(scores, mask, LOGITS: tl.constexpr):
    """Probabilities in float32; of logits, rounded to their dtype as the torch path's."""
    given = tl.load(scores, mask=mask, other=0.0)
    value = given.to(tl.float32)
    if LOGITS:
        value = _rounded(sigmoid(value), given.dtype)
    return value


@triton.jit
def class_of(label, classes):
    """The class whose score counts, and whether there is one: a negative label counts from the end."""
    index = tl.where(label < 0, label + classes, label)
    known = (index >= 0) & (index < classes)
    return tl.where(known, index, 0), known


@triton.jit
def edges(start, stop, small_below, small_side, DTYPE: tl.constexpr, ROUND_TRIP: tl.constexpr):
    """`_tal_terms.candidate_corners` along one axis."""
    low, high = start, stop
    if ROUND_TRIP:
        centre = _rounded(_rounded(start + stop, DTYPE) * 0.5, DTYPE)
        side = _rounded(stop - start, DTYPE)
        half = _rounded(tl.where(side < small_below, small_side, side) * 0.5, DTYPE)
        low = _rounded(centre - half, DTYPE)
        high = _rounded(centre + half, DTYPE)
    return low, high


@triton.jit
def between(value, low, high):
    """Strictly inside, along one axis."""
    return (value - low > _EDGE) & (high - value > _EDGE)
