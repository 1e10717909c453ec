"""Distribution focal loss (Li et al., arXiv:2006.04388): a distribution over R bins learns a real-valued distance."""

import torch
from torch import Tensor, nn

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
    # In float64: near a bin and at the upper bound, the small weight would lose its digits in float32.
    distance = target.detach().double().clamp(0, bins - 1.01)
    lower = distance.long()
    if not data_dependent(pred_dist, target):
        lower = lower.clamp(0, bins - 2)  # changes only what NaN became
    upper = lower + 1
    log_p = torch.log_softmax(pred_dist.reshape(*target.shape, bins), -1, dtype=_at_least_float32(pred_dist.dtype))
    left = (upper - distance).to(log_p.dtype)
    try:
        beside = log_p.gather(-1, torch.stack((lower, upper), -1))
    except (IndexError, RuntimeError):  # no number lies outside of the bins
        raise ValueError("target must not be NaN") from None
    loss = (beside * torch.stack((left, 1 - left), -1)).sum((-1, -2)) / -target.shape[-1]
    return loss.to(torch.promote_types(pred_dist.dtype, target.dtype))


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


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
    bins = pred_dist.shape[-1]
    if bins < 2:
        raise ValueError(f"pred_dist must have at least 2 bins, got {tuple(pred_dist.shape)}")
    if pred_dist.numel() != target.numel() * bins:
        shapes = f"{tuple(pred_dist.shape)} for {tuple(target.shape)}"
        raise ValueError(f"pred_dist must have a row of bins for each element of target, got {shapes}")
