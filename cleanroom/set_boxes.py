"""Generalised IoU of set prediction: of every pair of two sets, and of matched pairs with their L1 distance.

Rezatofighi et al., Generalized Intersection over Union, 2019; specification: set_prediction.md, A1 and A6. There is no
epsilon: ``giou = I/U - (H - U)/H``. Where upstream divides 0 by 0 (two boxes without area), the term is 0 here and has
no gradient: apart such boxes give -1, or 0 where the hull has no area either.

Boxes are worked on as planes of corners, the lower ones negated: one minimum gives the sides of an overlap, one maximum
those of the hull.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cleanroom.paths import data_dependent

#: Pairs that are worked on at a time on the CPU: planes of 128 KB stay in the cache, and both cores get work.
_CHUNK_PAIRS = 1 << 15


def generalized_box_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Generalised IoU of every pair (set_prediction.md A1), chunk by chunk and without a temporary of N * M.

    Differs from upstream in giving finite values and gradients for two boxes without area (upstream: NaN).

    Args:
        boxes1: (N, 4) floating or integer, (x1, y1, x2, y2).
        boxes2: (M, 4) floating, likewise.

    Returns:
        (N, M) in [-1, 1], float32 (half boxes too) or float64; gradient to both.

    Raises:
        ValueError: shapes; on the CPU also a box with x2 < x1, y2 < y1 or NaN. Both name the argument.
    """
    for name, boxes in (("boxes1", boxes1), ("boxes2", boxes2)):
        if boxes.ndim != 2 or boxes.shape[1] != 4:
            raise ValueError(f"{name} must have shape (N, 4), got {tuple(boxes.shape)}")
        check_corners(name, boxes)
    dtype = torch.promote_types(torch.promote_types(boxes1.dtype, boxes2.dtype), torch.float32)
    return _PairwiseGIoU.apply(boxes1.to(dtype), boxes2.to(dtype))


def check_corners(name: str, boxes: Tensor) -> None:
    """Raise ValueError where a box (..., 4) of corners is inverted or NaN; looks at values on the CPU only."""
    if data_dependent(boxes) and not bool((boxes[..., 2:] >= boxes[..., :2]).all()):
        raise ValueError(f"{name} hold a box that is inverted (x2 < x1 or y2 < y1) or NaN")


def check_sides(name: str, boxes: Tensor) -> None:
    """`check_corners` of boxes (cx, cy, w, h)."""
    # A comparison is cheap, and says enough of nearly all: NaN is not at least 0, and infinity is looked at again.
    if not bool((boxes[..., 2:] >= 0).all()) or not bool(boxes.sum().isfinite()):
        check_corners(name, corners_of(boxes))


def corners_of(boxes: Tensor) -> Tensor:
    """Corners (..., 4) of boxes (cx, cy, w, h)."""
    centre, half = boxes[..., :2], 0.5 * boxes[..., 2:]
    return torch.cat([centre - half, centre + half], -1)


def paired_box_losses(predicted: Tensor, target: Tensor, *, check: bool = True) -> tuple[Tensor, Tensor]:
    """L1 distance and ``1 - giou`` of matched boxes, pair by pair (set_prediction.md A6): nothing of P * P is formed.

    Both gradients are computed along with the values, so that the backward pass is two multiplications. They are
    finite wherever the boxes are; upstream's GIoU gradient of all pairs is NaN where a prediction and the target of
    *any* pair have no area.

    Args:
        predicted: (P, 4) floating, (cx, cy, w, h).
        target: (P, 4) likewise; gets no gradient.
        check: whether to look at the boxes, on the CPU.

    Returns:
        (P,) and (P,), float32 (half boxes too) or float64.

    Raises:
        ValueError: a box whose corners are not in order or NaN, naming pred_boxes or boxes.
    """
    dtype = torch.promote_types(torch.promote_types(predicted.dtype, target.dtype), torch.float32)
    target = target.detach()
    if check and data_dependent(predicted, target):
        # In the dtype given: what a rounding puts in order is in order upstream too.
        for name, boxes in (("pred_boxes", predicted.detach()), ("boxes", target)):
            check_sides(name, boxes)
    distance, overlap = _PairedLosses.apply(predicted, target)
    return distance.to(dtype), overlap.to(dtype)


class _Areas(NamedTuple):
    """Sides of the overlap (unclamped) and of the hull (2, ...), overlap, union and hull (...)."""

    sides: Tensor
    hull_sides: Tensor
    shared: Tensor
    union: Tensor
    hull: Tensor

    def giou(self) -> Tensor:
        shared, beside = self.shared / _least(self.union), self.hull - self.union
        return shared.sub_(beside.div_(_least(self.hull)))

    def slopes(self) -> tuple[Tensor, Tensor, Tensor]:
        """Derivatives of the GIoU by the overlap, by the areas of the boxes and by the hull.

        The quotients I/U and U/H come first: they are exactly 1 for identical boxes, and the derivatives cancel.
        """
        per_union = self.union.reciprocal().masked_fill_(self.union == 0, 0)
        per_hull = self.hull.reciprocal().masked_fill_(self.hull == 0, 0)
        by_area = per_hull - (self.shared / _least(self.union)).mul_(per_union)
        return per_union.sub_(by_area), by_area, (self.union / _least(self.hull)).mul_(per_hull).neg_()


def _least(divisor: Tensor) -> Tensor:
    """The divisor, but the least number above 0 for 0: makes 0/0 a 0 and changes no other quotient."""
    info = torch.finfo(divisor.dtype)
    return divisor.clamp(min=info.smallest_normal * info.eps)


def _planes(corners: Tensor) -> tuple[Tensor, Tensor]:
    """(N, 4) corners -> planes (4, N), lower corners negated, and areas (N,)."""
    lower, upper = corners.mT.chunk(2)
    return torch.cat([-lower, upper]), (upper - lower).prod(0)


def _areas(first: Tensor, second: Tensor, areas: Tensor) -> _Areas:
    """Of broadcastable planes (4, ...) and the sums of both areas."""
    sides = _sides(torch.minimum(first, second))
    hull_sides = _sides(torch.maximum(first, second))
    width, height = sides.clamp(min=0)
    shared = width.mul_(height)
    return _Areas(sides, hull_sides, shared, areas - shared, hull_sides[0] * hull_sides[1])


def _sides(planes: Tensor) -> Tensor:
    lower_negated, upper = planes.chunk(2)
    return upper.add_(lower_negated)


def _by_sides(areas: _Areas, by_shared: Tensor, by_hull: Tensor) -> tuple[Tensor, Tensor]:
    """Derivatives by the sides of the overlap and of the hull (2, ...); clamping passes at exactly 0."""
    across = areas.sides.clamp(min=0).flip(0).mul_(by_shared).masked_fill_(areas.sides < 0, 0)
    return across, areas.hull_sides.flip(0).mul_(by_hull)


def _to_corners(
    first: Tensor, second: Tensor, by_side: Tensor, by_hull_side: Tensor, *, select: bool = True
) -> tuple[Tensor, Tensor]:
    """Derivatives by the planes of the first and the second box (4, ...).

    The lesser corner bounds the overlap, the greater one the hull; ties go to both by halves. With `select` what a
    corner does not bound cannot reach it, finite or not; without, the same is said by arithmetic, which a CPU does
    faster.
    """
    by_side, by_hull_side = (torch.cat([slope, slope]) for slope in (by_side, by_hull_side))
    if not select:
        share = (second - first).sign_().mul_(0.5).add_(0.5)
        return torch.lerp(by_hull_side, by_side, share), torch.lerp(by_side, by_hull_side, share)
    lesser, greater, both = first < second, first > second, (by_side + by_hull_side).mul_(0.5)
    return (
        torch.where(lesser, by_side, torch.where(greater, by_hull_side, both)),
        torch.where(lesser, by_hull_side, torch.where(greater, by_side, both)),
    )


class _PairedLosses(torch.autograd.Function):
    """(P, 4) and (P, 4), cxcywh -> L1 distances (P,), 1 - GIoU (P,), float64.

    float64 because pairs are few, and for thin boxes large parts of the derivative cancel.
    """

    @staticmethod
    def forward(ctx, predicted: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        first, second = predicted.double(), target.double()
        difference = first - second
        (planes, own_area), (others, area) = _planes(corners_of(first)), _planes(corners_of(second))
        areas = _areas(planes, others, own_area + area)
        if ctx.needs_input_grad[0]:
            by_shared, by_area, by_hull = areas.slopes()
            by_corner, _ = _to_corners(planes, others, *_by_sides(areas, by_shared, by_hull))
            lower, upper = by_corner.add_(_by_area(planes, by_area)).chunk(2)
            ctx.save_for_backward(difference.sign(), torch.cat([lower - upper, (lower + upper).mul_(-0.5)]).mT)
            ctx.dtype = predicted.dtype
        return difference.abs_().sum(-1), 1 - areas.giou()

    @staticmethod
    @once_differentiable
    def backward(ctx, by_distance: Tensor, by_overlap: Tensor) -> tuple[Tensor, None]:
        sign, slope = ctx.saved_tensors
        grad = (sign * by_distance.unsqueeze(-1)).addcmul_(slope, by_overlap.unsqueeze(-1))
        return grad.to(ctx.dtype), None


def _by_area(planes: Tensor, slope: Tensor) -> Tensor:
    """What the area adds to the derivatives by planes (4, N), where it has the derivative `slope` (N,)."""
    lower_negated, upper = planes.chunk(2)
    return (upper + lower_negated).flip(0).mul_(slope).repeat(2, 1)


class _PairwiseGIoU(torch.autograd.Function):
    """(N, 4) and (M, 4) corners -> (N, M). The backward pass computes the pairs again instead of keeping them."""

    @staticmethod
    def forward(ctx, boxes1: Tensor, boxes2: Tensor) -> Tensor:
        ctx.save_for_backward(boxes1, boxes2)
        # Pairs are laid out with the longer set innermost, or short rows would cost more than what is in them.
        swapped = len(boxes1) > len(boxes2)
        rows, columns = (boxes2, boxes1) if swapped else (boxes1, boxes2)
        found = boxes1.new_empty(len(rows), len(columns))
        for chunk, _, _, areas in _chunks(rows, columns):
            found[chunk] = areas.giou()
        return found.mT.contiguous() if swapped else found

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:
        boxes1, boxes2 = ctx.saved_tensors
        swapped = len(boxes1) > len(boxes2)
        given = (boxes2, boxes1, grad.mT) if swapped else (boxes1, boxes2, grad)
        on_cpu = data_dependent(grad)
        own, other = _pairwise_slopes(*given, select=not on_cpu)
        if on_cpu and not bool((own.sum() + other.sum()).isfinite()):
            own, other = _pairwise_slopes(*given, select=True)
        return (other, own) if swapped else (own, other)


def _pairwise_slopes(rows: Tensor, columns: Tensor, grad: Tensor, *, select: bool) -> tuple[Tensor, Tensor]:
    """Gradients by both sets of corners (N, 4), (M, 4) from that by their GIoU (N, M).

    In float64: what a box gets through its area cancels most of what it gets through its corners.
    """
    dtype, rows, columns = rows.dtype, rows.double(), columns.double()
    by_row, area_row = rows.new_zeros(4, len(rows)), rows.new_zeros(len(rows))
    by_column, area_column = rows.new_zeros(4, len(columns)), rows.new_zeros(len(columns))
    for chunk, first, second, areas in _chunks(rows, columns):
        by_shared, by_area, by_hull = (slope.mul_(grad[chunk]) for slope in areas.slopes())
        own, other = _to_corners(first, second, *_by_sides(areas, by_shared, by_hull), select=select)
        by_row[:, chunk] = own.sum(2)
        by_column += other.sum(1)
        area_row[chunk] = by_area.sum(1)
        area_column += by_area.sum(0)
    return (
        _from_planes(by_row + _by_area(_planes(rows)[0], area_row)).to(dtype),
        _from_planes(by_column + _by_area(_planes(columns)[0], area_column)).to(dtype),
    )


def _from_planes(planes: Tensor) -> Tensor:
    """Derivatives by corners (N, 4) from those by planes (4, N)."""
    lower_negated, upper = planes.chunk(2)
    return torch.cat([-lower_negated, upper]).mT.contiguous()


def _chunks(rows: Tensor, columns: Tensor):
    """Chunks of rows, each with the planes (4, n, 1) and (4, 1, M) and what follows from both."""
    (first, row_areas), (second, column_areas) = _planes(rows), _planes(columns)
    second = second.unsqueeze(1)
    on_cpu = data_dependent(rows)
    step = max(1, _CHUNK_PAIRS // max(1, len(columns))) if on_cpu else max(1, len(rows))
    for start in range(0, len(rows), step):
        chunk = slice(start, start + step)
        own = first[:, chunk].unsqueeze(2)
        yield chunk, own, second, _areas(own, second, row_areas[chunk].unsqueeze(1) + column_areas)
