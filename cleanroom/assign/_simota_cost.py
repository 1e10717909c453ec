"""What both paths of SimOTA compute: regions, overlaps, costs, dynamic k and the k lowest costs.

Every function is elementwise over broadcast shapes, so that a list of pairs, a block of rows and a padded batch
run the same arithmetic. Half precision is widened to float32 on entry (`widen`).
"""

from typing import NamedTuple

import torch
from torch import Tensor

OVERLAPS_FOR_K = 10
OVERLAP_WEIGHT = 3.0
OVERLAP_OFFSET = 1e-8
# Bounds of a pair's cost: one entry a class, and OVERLAP_WEIGHT * -ln(OVERLAP_OFFSET) = 55.26 for no overlap.
# The binary cross entropy of PyTorch clamps its logarithms here.
LOG_FLOOR = -100.0
MAX_CLASS_COST = -LOG_FLOOR
MAX_OVERLAP_COST = 56.0


class Rules(NamedTuple):
    """What the variants of the algorithm differ in (specification simota.md, section 1)."""

    radius: float
    penalty: float
    region: str


class Grid(NamedTuple):
    """Centres in pixels and strides of the anchors, (N,) each."""

    x: Tensor
    y: Tensor
    stride: Tensor

    def at(self, anchors: Tensor) -> "Grid":
        """Return the grid of some anchors."""
        return Grid(self.x[anchors], self.y[anchors], self.stride[anchors])


class Corners(NamedTuple):
    """Corners and areas of boxes, one tensor a coordinate so that broadcast kernels read contiguous memory."""

    left: Tensor
    top: Tensor
    right: Tensor
    bottom: Tensor
    area: Tensor


def widen(values: Tensor) -> Tensor:
    """Return float32 for half precision and integers, the tensor itself for float32 and float64."""
    return values if values.dtype in (torch.float32, torch.float64) else values.float()


def anchor_grid(strides: Tensor, x_shifts: Tensor, y_shifts: Tensor) -> Grid:
    """Return the anchors' centres from (1, N) strides and cell indices."""
    stride, x, y = widen(strides[0]), widen(x_shifts[0]), widen(y_shifts[0])
    return Grid(x * stride + 0.5 * stride, y * stride + 0.5 * stride, stride)


def _inside(grid: Grid, x: Tensor, y: Tensor, half_width: Tensor, half_height: Tensor) -> Tensor:
    inside = grid.x > x - half_width
    inside &= grid.x < x + half_width
    inside &= grid.y > y - half_height
    inside &= grid.y < y + half_height
    return inside


def regions(gt: Tensor, grid: Grid, rules: Rules) -> tuple[Tensor, Tensor]:
    """Return masks (near, free) of centre-form boxes (..., 4) broadcast against the grid.

    An anchor is a candidate of the image when it is near to any ground truth; a free pair bears no penalty.
    Edges are outside, and so is NaN.
    """
    x, y, width, height = gt.unbind(-1)
    reach = rules.radius * grid.stride
    in_centre = _inside(grid, x, y, reach, reach)
    if rules.region == "centre":
        return in_centre, in_centre
    in_box = _inside(grid, x, y, 0.5 * width, 0.5 * height)
    return in_box | in_centre, in_box & in_centre


def corners(boxes: Tensor) -> Corners:
    """Return the corners and areas of centre-form boxes (..., 4)."""
    x, y, width, height = boxes.unbind(-1)
    half_width, half_height = width / 2, height / 2
    return Corners(x - half_width, y - half_height, x + half_width, y + half_height, width * height)


def overlap(a: Corners, b: Corners) -> Tensor:
    """Return the IoU without epsilon, in [0, 1]; 0 for two boxes without area, NaN where a box is NaN."""
    width = torch.minimum(a.right, b.right).sub_(torch.maximum(a.left, b.left)).clamp_(min=0)
    height = torch.minimum(a.bottom, b.bottom).sub_(torch.maximum(a.top, b.top)).clamp_(min=0)
    intersection = width.mul_(height)
    union = (a.area + b.area).sub_(intersection)
    # Far from the origin the corners of a tiny box round, and its union may come out at 0 or below.
    return intersection.div_(union.clamp_(min=torch.finfo(union.dtype).tiny)).clamp_(max=1)


def dynamic_k(iou: Tensor, dtype: torch.dtype) -> Tensor:
    """Return how many anchors each ground truth takes, (...) int64, from overlaps (..., n) with the candidates.

    The sum of the largest overlaps is rounded to `dtype` before it is truncated. NaN counts as 0.
    """
    largest = iou.nan_to_num(nan=0.0).topk(min(OVERLAPS_FOR_K, iou.shape[-1])).values
    return largest.to(dtype).sum(-1).to(torch.int64).clamp_(min=1)


def _probability(cls_logits: Tensor, obj_logits: Tensor) -> Tensor:
    return cls_logits.float().sigmoid().mul_(obj_logits.float().sigmoid()).sqrt_()


def background_cost(cls_logits: Tensor, obj_logits: Tensor) -> Tensor:
    """Return the class cost of anchors as if no class were theirs, (...) float64, from (..., C) and (..., 1) logits.

    Summed in float64 so that a pair can take its own class out again without cancellation.
    """
    log_absent = _probability(cls_logits, obj_logits).neg_().log1p_().clamp_(min=LOG_FLOOR)
    return log_absent.sum(-1, dtype=torch.float64).neg_()


def pair_cost(
    background: Tensor, label_logits: Tensor, obj_logits: Tensor, iou: Tensor, free: Tensor, penalty: float
) -> Tensor:
    """Return (class cost + 3 * overlap cost) + penalty where not free; +inf in place of NaN.

    The class cost is the binary cross entropy against one class: background_cost with that class's own entry
    exchanged. It is rounded to float32 whatever the dtype of the boxes.
    """
    probability = _probability(label_logits, obj_logits)
    class_cost = background + (-probability).log1p_().clamp_(min=LOG_FLOOR)
    class_cost -= probability.log_().clamp_(min=LOG_FLOOR)
    cost = class_cost.float() + (iou + OVERLAP_OFFSET).log_().mul_(-OVERLAP_WEIGHT)
    return torch.where(free, cost, cost + penalty).nan_to_num_(nan=torch.inf, posinf=torch.inf)


def lowest(cost: Tensor, k: Tensor) -> Tensor:
    """Mark the k lowest finite costs of each row: cost (..., n), k (...); equal costs by lowest index."""
    # Only the values of topk are used: which of equal entries it returns differs between devices.
    bounds = cost.topk(min(OVERLAPS_FOR_K, cost.shape[-1]), largest=False).values
    bound = bounds.gather(-1, (k - 1).clamp_(0, bounds.shape[-1] - 1)[..., None])
    below, equal = cost < bound, cost == bound
    room = k[..., None] - below.sum(-1, keepdim=True)
    chosen = below | (equal & (equal.cumsum(-1, dtype=torch.int32) <= room))
    return chosen & (cost < torch.inf)
