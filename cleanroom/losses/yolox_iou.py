"""IoU loss of matched box pairs as YOLOX has it: `1 - IoU^2`, or `1 - GIoU` (Rezatofighi et al., CVPR 2019)."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

EPS = 1e-16
LOSS_TYPES = ("iou", "giou")


def iou_loss(pred: Tensor, target: Tensor, *, reduction: str = "none", loss_type: str = "iou") -> Tensor:
    """Loss of pairs of boxes (cx, cy, w, h).

    With `IoU = I / (U + 1e-16)` and the enclosing box's area A: "iou" is `1 - IoU^2`, "giou" is
    `1 - clamp(IoU - (A - U) / max(A, 1e-16), -1, 1)`. Half precision is computed in float32. The gradient reaches
    both arguments; whether boxes overlap is a constant of it, equal edges share it in halves, and the clamps pass it
    at their bounds. So "iou" has none for disjoint boxes, and identical boxes have exactly none.

    Args:
        pred: (..., 4) boxes, flattened to (P, 4).
        target: boxes likewise, with the same first dimension and number (or a single box on one side).
        reduction: "mean" or "sum"; any other word means none.
        loss_type: "iou" or "giou".

    Returns:
        (P,), or 0-dim for "mean" (NaN for no pairs) and "sum", in the promoted dtype; under autocast float32 for
        half types.

    Raises:
        ValueError: a shape or `loss_type` is wrong.

    Source: specification yolox_losses.md, section 2.
    """
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type must be one of {LOSS_TYPES}, got {loss_type!r}")
    for name, boxes in (("pred", pred), ("target", target)):
        if boxes.ndim == 0 or boxes.numel() % 4:
            raise ValueError(f"{name} must be (..., 4), got {list(boxes.shape)}")
    if pred.shape[0] != target.shape[0]:
        raise ValueError(f"pred and target differ in their first dimension: {pred.shape[0]} and {target.shape[0]}")
    pairs = pred.reshape(-1, 4), target.reshape(-1, 4)
    if pairs[0].shape != pairs[1].shape:
        if 1 not in (len(pairs[0]), len(pairs[1])):
            raise ValueError(f"pred holds {len(pairs[0])} boxes, target {len(pairs[1])}")
        pairs = torch.broadcast_tensors(*pairs)
    losses = _PairLoss.apply(*pairs, loss_type, torch.is_grad_enabled())
    if reduction == "mean":
        losses = losses.mean()
    elif reduction == "sum":
        losses = losses.sum()
    return losses.to(result_dtype(pred, target))


class IOUloss:
    """The module of that name of YOLOX: `IOUloss(reduction, loss_type)(pred, target)` is `iou_loss`."""

    def __init__(self, reduction: str = "none", loss_type: str = "iou") -> None:
        if loss_type not in LOSS_TYPES:
            raise ValueError(f"loss_type must be one of {LOSS_TYPES}, got {loss_type!r}")
        self.reduction, self.loss_type = reduction, loss_type

    def __call__(self, pred: Tensor, target: Tensor) -> Tensor:
        """Return `iou_loss` of pred and target (..., 4)."""
        return iou_loss(pred, target, reduction=self.reduction, loss_type=self.loss_type)


def result_dtype(*tensors: Tensor) -> torch.dtype:
    """The promoted dtype of what upstream computes from these: float32 for half types under autocast."""
    dtype = torch.float32 if all(not t.is_floating_point() for t in tensors) else tensors[0].dtype
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    if torch.is_autocast_enabled(tensors[0].device.type):
        dtype = torch.promote_types(dtype, torch.float32)
    return dtype


class PairTerms(NamedTuple):
    """What is known of P pairs; derivatives are empty where nobody asked."""

    loss: Tensor
    by_pred: Tensor
    """(4, P) derivative of the loss, as `by_target`."""
    by_target: Tensor
    inner: Tensor
    """(P,) area of the intersection."""
    union: Tensor


def pair_terms(pred: Tensor, target: Tensor, loss_type: str, slopes: bool) -> PairTerms:
    """Loss of boxes (P, 4), and with `slopes` its derivatives.

    On the CPU in float64, in which corners and areas of float32 boxes are exact, so that what cancels for boxes that
    contain each other does; elsewhere in float32 unless either box is wider. Slopes of a box that is not finite are 0
    where they are no numbers.
    """
    least = torch.float64 if pred.device.type == "cpu" else torch.float32
    dtype = torch.promote_types(torch.promote_types(pred.dtype, target.dtype), least)
    # Coordinates first, so that every step runs over contiguous memory, for both boxes and both axes at once.
    boxes = torch.stack([pred.detach().mT.to(dtype), target.detach().mT.to(dtype)], 1)
    centre, size = boxes[:2], boxes[2:]
    half = size / 2
    low, high = centre - half, centre + half
    shared = torch.minimum(high[:, 0], high[:, 1]).sub_(torch.maximum(low[:, 0], low[:, 1])).clamp_(min=0)
    inner = shared[0] * shared[1]
    area = size[0] * size[1]
    union = (area[0] + area[1]).sub_(inner)
    denominator = union + EPS
    iou = inner / denominator
    if loss_type == "iou":
        loss = 1 - iou * iou
        if not slopes:
            return PairTerms(loss, boxes[:, 0, :0], boxes[:, 1, :0], inner, union)
        step = -2 * iou
        shares = _shares(low, high)
        by_size, by_centre = _iou_slopes(size, shared, iou, denominator, *shares)
    else:
        hull = torch.maximum(high[:, 0], high[:, 1]).sub_(torch.minimum(low[:, 0], low[:, 1]))
        enclosing = hull[0] * hull[1]
        giou = iou - (enclosing - union) / enclosing.clamp(min=EPS)
        loss = 1 - giou.clamp(-1, 1)
        if not slopes:
            return PairTerms(loss, boxes[:, 0, :0], boxes[:, 1, :0], inner, union)
        step = -((giou >= -1) & (giou <= 1)).to(dtype)
        shares = _shares(low, high)
        of_iou = _iou_slopes(size, shared, iou, denominator, *shares)
        of_gap = _gap_slopes(size, shared, hull, union, enclosing, *shares)
        by_size, by_centre = of_iou[0] + of_gap[0], of_iou[1] + of_gap[1]
    by_size, by_centre = (by_size * step).nan_to_num_(0), (by_centre * step).nan_to_num_(0)
    by_pred, by_target = torch.cat([by_centre, by_size[:, 0]]), torch.cat([-by_centre, by_size[:, 1]])
    return PairTerms(loss, by_pred, by_target, inner, union)


def _shares(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Mean share (2, 2, P) of each box in its two inner edges, by axis and box, and right minus left share of pred.

    An inner edge belongs to the box that sets it, the outer edge to the other one; equal edges are shared in halves.
    """
    half = low.new_full((), 0.5)  # new_tensor would copy from the host
    right, left = torch.heaviside(high[:, 1] - high[:, 0], half), torch.heaviside(low[:, 0] - low[:, 1], half)
    grow = (right + left).div_(2)
    return torch.stack([grow, 1 - grow], 1), right - left


def _overlapping(shared: Tensor) -> Tensor:
    """A side that is 0 stands for one that was negative: whether boxes overlap is a constant."""
    return (shared > 0).all(0)


def _iou_slopes(
    size: Tensor, shared: Tensor, iou: Tensor, denominator: Tensor, grow: Tensor, move: Tensor
) -> tuple[Tensor, Tensor]:
    """Derivatives of `I / (U + eps)` by size (2, 2, P), by axis and box, and by pred's centre (2, P)."""
    by_shared = torch.where(_overlapping(shared), (1 + iou) / denominator * shared.flip(0), 0)
    by_area = iou / denominator
    return by_shared[:, None] * grow - size.flip(0) * by_area, by_shared * move


def _gap_slopes(
    size: Tensor, shared: Tensor, hull: Tensor, union: Tensor, enclosing: Tensor, grow: Tensor, move: Tensor
) -> tuple[Tensor, Tensor]:
    """Derivatives of `-(A - U) / max(A, eps)`, likewise.

    It is U / A - 1, so the numerator by a side of the hull is `dU hull - U dhull`: where boxes contain each other its
    two products are equal and cancel exactly.
    """
    of_inner = torch.where(_overlapping(shared), shared.flip(0), 0)
    by_size_of_union, by_centre_of_union = size.flip(0) - of_inner[:, None] * grow, of_inner * move
    # The wider hull is no wider where a box lies inside the other: 1 - share is what it grows.
    plain = enclosing >= EPS
    scale, by_hull = torch.where(plain, hull, 1), torch.where(plain, union, hull.flip(0))
    divisor = torch.where(plain, enclosing * hull, EPS)
    by_size = (by_size_of_union * scale[:, None] - by_hull[:, None] * (1 - grow)) / divisor[:, None]
    return by_size, (by_hull * move - by_centre_of_union * scale) / divisor


class _PairLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, pred: Tensor, target: Tensor, loss_type: str, track: bool) -> Tensor:
        slopes = track and (ctx.needs_input_grad[0] or ctx.needs_input_grad[1])
        found = pair_terms(pred, target, loss_type, slopes)
        ctx.save_for_backward(found.by_pred, found.by_target)
        ctx.dtypes = pred.dtype, target.dtype
        return found.loss

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        wanted = zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad, strict=False)
        pred, target = ((slope * grad).mT.to(dtype) if needed else None for slope, dtype, needed in wanted)
        return pred, target, None, None
