"""Distribution focal loss (Li et al., arXiv:2006.04388): a distribution over R bins learns a real-valued distance."""

import math

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from cleanroom.paths import data_dependent


def distribution_focal_loss(pred_dist: Tensor, target: Tensor) -> Tensor:
    """Mean over the last dim of ``target`` (the sides) of the cross entropy against the two bins beside each distance.

    ``t = min(max(target, 0), R - 1.01)``, ``l = trunc(t)``, ``f = t - l``; a side costs
    ``-[(1 - f) log softmax(x)_l + f log softmax(x)_{l + 1}]`` (yolo_losses.md, section 2.3). Gradient reaches
    ``pred_dist`` only. Half dtypes are computed with in float32, the bound R - 1.01 included.

    Args:
        pred_dist: logits; the last dim are the R >= 2 bins, the others hold as many rows as `target` has elements, in
            the same order: (P, 4, R) or (4 P, R) beside a target (P, 4).
        target: distances in bins (..., sides), floating; not changed (upstream's class clamps its own in place).

    Returns:
        ``target.shape[:-1]``, in the dtype that both promote to.

    Raises:
        ValueError: a shape is wrong; on the CPU, a target is NaN (on an accelerator its loss is NaN).
        TypeError: a dtype is not floating.
    """
    _check(pred_dist, target)
    bins = pred_dist.shape[-1]
    distance = target.detach().double().clamp(0, bins - 1.01)
    if data_dependent(pred_dist, target) and math.isnan(distance.sum()):
        raise ValueError("target must not be NaN")
    low = distance.long().clamp_(0, bins - 2)  # changes only what NaN became
    # In float64: near a bin and at the upper bound, the small weight would lose its digits in float32.
    left = low + 1 - distance
    weights = torch.stack((left, 1 - left), -1)
    beside = low.unsqueeze(-1) + torch.arange(2, device=low.device)
    rows = pred_dist.reshape(*target.shape, bins)
    loss = _double_losses if rows.dtype == torch.float64 else _Losses.apply
    return loss(rows, beside, weights).to(torch.promote_types(pred_dist.dtype, target.dtype))


class DFLoss(nn.Module):
    """Drop-in for ``ultralytics.utils.loss.DFLoss``: constructor, call and result (..., 1); the target is not changed.

    See `distribution_focal_loss`.
    """

    def __init__(self, reg_max: int = 16) -> None:
        super().__init__()
        self.reg_max = reg_max

    def forward(self, pred_dist: Tensor, target: Tensor) -> Tensor:
        """Losses target.shape[:-1] + (1,) of logits (4 N, reg_max) and distances (N, 4)."""
        if pred_dist.ndim == 0 or pred_dist.shape[-1] != self.reg_max:
            raise ValueError(f"pred_dist must have {self.reg_max} bins in its last dim, got {tuple(pred_dist.shape)}")
        return distribution_focal_loss(pred_dist, target).unsqueeze(-1)


def _check(pred_dist: Tensor, target: Tensor) -> None:
    for name, tensor in (("pred_dist", pred_dist), ("target", target)):
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating, got {tensor.dtype}")
        if tensor.ndim == 0:
            raise ValueError(f"{name} must have a last dim, got a tensor without dims")
    if pred_dist.shape[-1] < 2:
        raise ValueError(f"pred_dist must have at least 2 bins, got {tuple(pred_dist.shape)}")
    if pred_dist.numel() != target.numel() * pred_dist.shape[-1]:
        raise ValueError(
            f"pred_dist must have a row of bins for each element of target, got {tuple(pred_dist.shape)} for "
            f"{tuple(target.shape)}"
        )


def _double_losses(rows: Tensor, bins: Tensor, weights: Tensor) -> Tensor:
    """The formula as it stands: in float64 there is nothing to gain from another, and upstream's bits to lose."""
    return -(weights * torch.log_softmax(rows, -1).gather(-1, bins)).sum(-1).mean(-1)


class _Losses(torch.autograd.Function):
    """(..., sides, R) logits, bins and float64 weights 1 - f, f (..., sides, 2) -> float64 means over the sides (...).

    The gradient is ``p - (1 - f)`` at the lower bin l, ``p - f`` at l + 1 and p = softmax(x) elsewhere. Where a bin has
    most of the probability, its p is what a float64 sum of the others leaves of 1, so that the difference has digits.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, bins: Tensor, weights: Tensor) -> Tensor:
        log_p = torch.log_softmax(logits, -1, dtype=torch.float32)
        ctx.save_for_backward(log_p, bins, weights)
        ctx.dtype = logits.dtype
        return (log_p.gather(-1, bins) * weights).sum((-1, -2)).div_(-bins.shape[-2])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        log_p, bins, weights = ctx.saved_tensors
        grad = (grad / bins.shape[-2])[..., None, None]
        p = log_p.exp()
        beside = p.gather(-1, bins).double()
        others = p.double() @ weights.new_ones(p.shape[-1], 1) - beside
        slope = torch.where(beside > 0.5, 1 - others, beside).sub_(weights).mul_(grad)
        return p.mul_(grad).scatter_(-1, bins, slope.float()).to(ctx.dtype), None, None
