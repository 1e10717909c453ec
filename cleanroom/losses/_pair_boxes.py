"""L1 distance, GIoU and IoU of matched pairs of boxes in centre form, with the gradient computed in the same pass.

RT-DETR's overlap (set_prediction.md B1): `iou = I / U`, `giou = iou - (H - U) / H`, where 1e-7 is added to the union
U and to the hull H, sides of the overlap are clamped at 0 and nothing else is.

By hand: `dI = 1/U - dU`, `dU = 1/H - I/U^2`, `dH = -U/H^2`; an edge of a box moves the overlap or the hull, or
half of each where it ties, and passes at an overlap of exactly 0.

All of it is float64: of a small box far from the origin float32 corners keep few digits, and the derivatives of U and
H, which cancel, none. Pairs are few.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_EPS = 1e-7
WITHOUT_FLOAT64 = ("mps",)


class PairTerms(NamedTuple):
    """Of every pair, (N,): `distance` the L1 distance, `loss` = 1 - GIoU, `iou` the IoU, without gradient."""

    distance: Tensor
    loss: Tensor
    iou: Tensor


def pair_terms(predictions: Sequence[Tensor], rows: Sequence[Tensor], targets: Tensor) -> PairTerms:
    """Box terms of matched pairs; gradient to the predictions only.

    Args:
        predictions: tensors (..., 4), (cx, cy, w, h); several, so that the pairs of all of them share each step.
        rows: one (n_i,) int64 for each: rows of it, flattened to (., 4).
        targets: (N, 4) with N = sum n_i: the boxes matched to those rows, in that order.

    Returns:
        In the promoted dtype of predictions and targets, float32 at least.
    """
    if torch.is_grad_enabled() and any(given.requires_grad for given in predictions):
        return PairTerms(*_PairTerms.apply(targets.detach(), len(predictions), *predictions, *rows))
    return PairTerms(*_evaluate(targets, predictions, rows, gradient=False)[0])


class _PairTerms(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, targets: Tensor, parts: int, *given: Tensor) -> tuple[Tensor, ...]:
        predictions, rows = given[:parts], given[parts:]
        (distance, loss, iou), slopes = _evaluate(targets, predictions, rows, gradient=True)
        ctx.parts = parts
        ctx.shapes = [prediction.shape for prediction in predictions]
        ctx.dtypes = [prediction.dtype for prediction in predictions]
        ctx.mark_non_differentiable(iou)
        ctx.save_for_backward(*slopes, *rows)
        return distance, loss, iou

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, distance: Tensor, loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        of_distance, of_loss, *rows = ctx.saved_tensors
        slopes = (of_distance * distance).add_(of_loss * loss).t()
        first, gradients = 0, []
        for i, own in enumerate(rows):
            gradient = slopes.new_zeros(ctx.shapes[i], dtype=ctx.dtypes[i])
            some = slopes[first : first + own.shape[0]].to(ctx.dtypes[i])
            gradient.view(-1, 4).index_put_((own,), some, accumulate=True)
            gradients.append(gradient)
            first += own.shape[0]
        return None, None, *gradients, *(None,) * ctx.parts


def _evaluate(
    targets: Tensor, predictions: Sequence[Tensor], rows: Sequence[Tensor], *, gradient: bool
) -> tuple[tuple[Tensor, ...], tuple[Tensor, Tensor] | None]:
    """Distance, loss and IoU of the pairs, and the slopes (4, N) of distance and loss."""
    dtype = torch.promote_types(targets.dtype, torch.float32)
    for prediction in predictions:
        dtype = torch.promote_types(dtype, prediction.dtype)
    wide = dtype if targets.device.type in WITHOUT_FLOAT64 else torch.float64
    chosen = torch.cat([p.detach().reshape(-1, 4)[own] for p, own in zip(predictions, rows, strict=True)])
    *terms, slopes = _terms(_planes(chosen, wide), _planes(targets.detach(), wide), gradient)
    return tuple(term.to(dtype) for term in terms), slopes


def _planes(boxes: Tensor, dtype: torch.dtype) -> Tensor:
    return boxes.t().to(dtype, memory_format=torch.contiguous_format)


def _terms(
    boxes: Tensor, others: Tensor, gradient: bool
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """Terms of planes (4, N), and the slopes (4, N) of distance and loss by `boxes`."""
    sides, other_sides = boxes[2:], others[2:]
    edges, other_edges = _edges(boxes), _edges(others)
    shared = _extent(torch.minimum(edges, other_edges))
    hull_sides = _extent(torch.maximum(edges, other_edges))
    overlap = shared.clamp(min=0)
    intersection = overlap.prod(0)
    union = sides.prod(0) + other_sides.prod(0) - intersection + _EPS
    hull = hull_sides.prod(0) + _EPS
    iou, empty = intersection / union, (hull - union) / hull
    difference = boxes - others
    distance, loss = difference.abs().sum(0), 1 - (iou - empty)
    if not gradient:
        return distance, loss, iou, None

    # NaN goes where upstream's autograd lets it through: comparisons mask it, products with 0 do not.
    by_union = 1 / hull - iou / union
    by_overlap = (overlap.flip(0) * (1 / union - by_union)).masked_fill_(~(shared >= 0), 0)
    by_hull_sides = hull_sides.flip(0) * ((empty - 1) / hull)
    by_edges = by_overlap.repeat(2, 1).masked_fill_(edges > other_edges, 0)
    by_edges += by_hull_sides.repeat(2, 1).masked_fill_(edges < other_edges, 0)
    by_edges = torch.where(edges == other_edges, 0.5 * by_edges, by_edges)
    by_upper, by_lower_negated = by_edges.chunk(2)
    by_sides = 0.5 * (by_upper + by_lower_negated) + sides.flip(0) * by_union
    return distance, loss, iou, (difference.sign_(), torch.cat([by_lower_negated - by_upper, -by_sides]))


def _edges(boxes: Tensor) -> Tensor:
    """(4, N): upper edges, and lower edges negated, so that one minimum or maximum serves both."""
    centre, half = boxes[:2], 0.5 * boxes[2:]
    return torch.cat([centre + half, half - centre])


def _extent(edges: Tensor) -> Tensor:
    """(2, N): sides between upper edges and negated lower edges."""
    return edges[:2] + edges[2:]
