"""Binary cross entropies that are weighted by how easy an element is: focal loss and varifocal loss.

Focal loss: Lin et al., arXiv:1708.02002; varifocal loss: Zhang et al., arXiv:2008.13367. The weight is differentiated
too. Elements are worked on block by block in the cache. Where gradient is asked for, the forward pass leaves the
derivatives, which the backward pass scales: for N float32 elements of K inputs 4 K N bytes are read, and 12 N move a
gradient.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from cleanroom.losses._blocks import flat_blocks

VFL_REDUCTIONS = ("mean", "sum")


def varifocal_loss(
    pred_score: Tensor,
    gt_score: Tensor,
    label: Tensor,
    *,
    gamma: float = 2.0,
    alpha: float = 0.75,
    vfl_reduction: str = "mean",
) -> Tensor:
    """Cross entropy to soft targets in which easy negatives count little (yolo_losses.md, section 2.1).

    ``u = alpha sigmoid(x)^gamma (1 - y) + q y``, ``loss = sum bce(x, q) u``, divided by the size of dim 1. The cross
    entropy is computed in float32 whatever the dtype, as upstream's is; the rest in float32 or wider.

    Args:
        pred_score: (B, N, ...) logits x; with "sum" (N,) too.
        gt_score: soft targets q in [0, 1], of the shape of `pred_score`.
        label: y in {0, 1}, floating or integer, broadcastable.
        gamma, alpha: exponent and factor of the weight of negatives.
        vfl_reduction: "mean" over dim 1, then the sum (8.0.119 on); "sum" over everything (before).

    Returns:
        0-dim, in the dtype that the inputs and float32 promote to; NaN where dim 1 has size 0 and no other has.
        Gradient reaches all three inputs; that of a saturated negative is 0 where gamma < 1 (upstream: NaN).

    Raises:
        ValueError: a shape or `vfl_reduction` is wrong.
        TypeError: `pred_score` or `gt_score` is not floating, or `label` is bool.
    """
    _check("pred_score", pred_score, "gt_score", gt_score, dims=1 if vfl_reduction == "sum" else 2)
    if label.dtype == torch.bool:
        raise TypeError("label must be floating or integer, got torch.bool")
    if vfl_reduction not in VFL_REDUCTIONS:
        raise ValueError(f"vfl_reduction must be one of {VFL_REDUCTIONS}, got {vfl_reduction!r}")
    if label.shape != pred_score.shape:
        try:
            pred_score, gt_score, label = torch.broadcast_tensors(pred_score, gt_score, label)
        except RuntimeError:
            shapes = f"{tuple(label.shape)} to {tuple(pred_score.shape)}"
            raise ValueError(f"label must broadcast to the shape of pred_score, got {shapes}") from None
    total = _element_sum(_Varifocal(gamma, alpha), pred_score, gt_score, label)
    return total if vfl_reduction == "sum" else total / _divisor(pred_score)


def focal_loss(
    pred: Tensor, label: Tensor, *, gamma: float = 1.5, alpha: float | Sequence[float] | Tensor = 0.25
) -> Tensor:
    """Cross entropy in which easy elements count little (yolo_losses.md, section 2.2).

    ``m = y (1 - p) + (1 - y) p``, ``loss = sum bce(x, y) m^gamma (y alpha + (1 - y) (1 - alpha))``, divided by the size
    of dim 1. Computed in float32 or wider.

    Args:
        pred: (B, N, ...) logits x; p is their sigmoid.
        label: targets y in [0, 1], floating, of the shape of `pred`.
        gamma: exponent.
        alpha: weight of positives, a number or a list that broadcasts to `pred` from the last dim; no weights at all
            where none is above 0. A tensor is read on the host.

    Returns:
        0-dim, in the dtype of `label`, as upstream's; NaN where dim 1 has size 0 and no other has. Gradient reaches
        `pred` and `label`; that of a saturated, rightly answered element is 0 where gamma < 1 (upstream: NaN).

    Raises:
        ValueError: a shape is wrong, that of `alpha` too.
        TypeError: `pred` or `label` is not floating.
    """
    _check("pred", pred, "label", label)
    alpha = alpha.tolist() if isinstance(alpha, Tensor) else alpha
    if not _any_positive(alpha):
        total = _element_sum(_Focal(gamma), pred, label)
    elif not isinstance(alpha, Sequence):
        total = _element_sum(_Focal(gamma, alpha), pred, label)
    else:
        weights = torch.tensor(alpha, dtype=_wide(pred, label), device=pred.device)
        try:
            weights = weights.expand(pred.shape)
        except RuntimeError:
            shapes = f"{tuple(weights.shape)} to {tuple(pred.shape)}"
            raise ValueError(f"alpha must broadcast to the shape of pred, got {shapes}") from None
        total = _element_sum(_Focal(gamma), pred, label, weights)
    return (total / _divisor(pred)).to(label.dtype)


class VarifocalLoss(nn.Module):
    """Drop-in for ``ultralytics.utils.loss.VarifocalLoss``; `vfl_reduction` is this library's, see `varifocal_loss`."""

    def __init__(self, gamma: float = 2.0, alpha: float = 0.75, *, vfl_reduction: str = "mean") -> None:
        super().__init__()
        self.gamma, self.alpha, self.vfl_reduction = gamma, alpha, vfl_reduction

    def forward(self, pred_score: Tensor, gt_score: Tensor, label: Tensor) -> Tensor:
        """The 0-dim loss of logits, soft targets and labels."""
        settings = {"gamma": self.gamma, "alpha": self.alpha, "vfl_reduction": self.vfl_reduction}
        return varifocal_loss(pred_score, gt_score, label, **settings)


class FocalLoss(nn.Module):
    """Drop-in for ``ultralytics.utils.loss.FocalLoss``; see `focal_loss`. `alpha` keeps its precision between calls."""

    def __init__(self, gamma: float = 1.5, alpha: float | Sequence[float] = 0.25) -> None:
        super().__init__()
        self.gamma, self.alpha = gamma, alpha

    def forward(self, pred: Tensor, label: Tensor) -> Tensor:
        """The 0-dim loss of logits and targets."""
        return focal_loss(pred, label, gamma=self.gamma, alpha=self.alpha)


class _Formula(Protocol):
    """A sum of elements of flat tensors: the elements, then their derivatives by the inputs, one by one."""

    def parts(self, *inputs: Tensor) -> Iterator[Tensor]: ...


@dataclass(frozen=True)
class _Varifocal:
    """The loss is bce(x, q) u with u = alpha p^gamma (1 - y) + q y."""

    gamma: float
    alpha: float

    def parts(self, x: Tensor, q: Tensor, y: Tensor) -> Iterator[Tensor]:
        # The cross entropy is upstream's, in float32: its rounding is part of the result in float64 too.
        single, target = x.float(), q.float()
        entropy = functional.binary_cross_entropy_with_logits(single, target, reduction="none")
        x, q, y = _cast(x, q, y)
        p = x.sigmoid()
        easy = p.pow(self.gamma).mul_(self.alpha)
        by_negative = torch.addcmul(easy, easy, y, value=-1)
        weight = torch.addcmul(by_negative, q, y)
        yield weight * entropy
        slope = p - target if single.dtype == x.dtype else single.sigmoid().sub_(target)
        by_x = weight * slope
        if self.gamma != 0:  # else the weight does not depend on p, not even where 0 meets infinity
            by_x.addcmul_(by_negative.addcmul_(by_negative, p, value=-1), entropy, value=self.gamma)
        yield by_x
        yield (entropy * y).addcmul_(weight, single, value=-1)
        yield q.sub(easy).mul_(entropy)


@dataclass(frozen=True)
class _Focal:
    """The loss is bce(x, y) m^gamma a; m = y (1 - p) + (1 - y) p, a = y alpha + (1 - y) (1 - alpha), or 1.

    ``bce = max(x, 0) (1 - y) + max(-x, 0) y - log(1 - min(p, 1 - p))`` keeps its digits however right the answer is,
    as m does and the slope ``p - y = (1 - y) p - y (1 - p)``.
    """

    gamma: float
    alpha: float | None = None

    def parts(self, x: Tensor, y: Tensor, alpha: Tensor | None = None) -> Iterator[Tensor]:
        alpha = self.alpha if alpha is None else alpha
        x, y = _cast(x, y)
        negative, minus_x = 1 - y, -x
        p, rest = x.sigmoid(), minus_x.sigmoid()
        entropy = torch.minimum(p, rest).neg_().log1p_().neg_()
        entropy.addcmul_(negative, x.clamp(min=0)).addcmul_(y, minus_x.clamp(min=0))
        above, below = negative * p, y * rest
        modulation, steepness = self._powers(above + below)
        balance = None if alpha is None else y * (2 * alpha - 1) + (1 - alpha)
        loss = entropy * modulation
        yield loss if balance is None else loss * balance
        by_x = above.sub_(below).mul_(modulation)
        by_m = None if steepness is None else steepness.mul_(entropy)
        if by_m is not None:
            by_x.addcmul_((p * rest).mul_(by_m), negative.sub_(y))
        yield by_x if balance is None else by_x.mul_(balance)
        by_y = minus_x.mul_(modulation)
        if by_m is not None:
            by_y.addcmul_(by_m, rest.sub_(p))
        if balance is not None:
            by_y.mul_(balance).add_(loss.mul_(2 * alpha - 1))
        yield by_y

    def _powers(self, m: Tensor) -> tuple[Tensor, Tensor | None]:
        """m^gamma, and gamma m^(gamma - 1): None for gamma = 0; 0 where m = 0, for the cross entropy falls faster."""
        if self.gamma == 0:
            return torch.ones_like(m), None
        if self.gamma < 1:
            power = m.pow(self.gamma)
            return power, (power / m).masked_fill_(m == 0, 0).mul_(self.gamma)
        slope = m.pow(self.gamma - 1)
        return slope * m, slope.mul_(self.gamma)


class _ElementSum(torch.autograd.Function):
    """Sum over all elements of a formula of tensors of one shape, block by block, and its derivatives on the way.

    `needed` says by which inputs; those by the last inputs cost nothing where nobody asks for them.
    """

    @staticmethod
    def forward(ctx, formula: _Formula, needed: tuple[bool, ...], *inputs: Tensor) -> Tensor:
        flat = [tensor.reshape(-1) for tensor in inputs]
        sums, slopes = [], []
        for block in flat_blocks(flat[0]):
            parts = formula.parts(*(flat if block is None else [tensor[block] for tensor in flat]))
            sums.append(next(parts).sum())
            slopes.append([slope if need else None for need, slope in zip(needed, parts, strict=False)])
        ctx.save_for_backward(*(_joined(column) for column in zip(*slopes, strict=True)))
        ctx.inputs = [(tensor.shape, tensor.dtype) for tensor in inputs]
        return sums[0] if len(sums) == 1 else torch.stack(sums).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        found: list[Tensor | None] = [None] * len(ctx.inputs)
        for index, slope in enumerate(ctx.saved_tensors):
            if slope is not None:
                shape, dtype = ctx.inputs[index]
                found[index] = (slope * grad).to(dtype).view(shape)
        return None, None, *found


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    return parts[0] if len(parts) == 1 or parts[0] is None else torch.cat(parts)


def _element_sum(formula: _Formula, *inputs: Tensor) -> Tensor:
    track = torch.is_grad_enabled()
    needed = [track and tensor.requires_grad for tensor in inputs]
    while needed and not needed[-1]:
        needed.pop()
    return _ElementSum.apply(formula, tuple(needed), *inputs)


def _cast(*tensors: Tensor) -> list[Tensor]:
    """The tensors in the dtype that they and float32 promote to."""
    wide = _wide(*tensors)
    return [tensor.to(wide) for tensor in tensors]


def _wide(*tensors: Tensor) -> torch.dtype:
    """Dtype that the tensors and float32 promote to."""
    wide = torch.float32
    for tensor in tensors:
        wide = torch.promote_types(wide, tensor.dtype)
    return wide


def _any_positive(alpha: float | Sequence) -> bool:
    return any(map(_any_positive, alpha)) if isinstance(alpha, Sequence) else alpha > 0


def _divisor(x: Tensor) -> int:
    """Size of dim 1; where that is 0 and nothing asks for a mean over it, 1."""
    return x.shape[1] or int(x.shape[:1].numel() * x.shape[2:].numel() == 0)


def _check(logits_name: str, logits: Tensor, target_name: str, target: Tensor, *, dims: int = 2) -> None:
    for name, tensor in ((logits_name, logits), (target_name, target)):
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating, got {tensor.dtype}")
    if logits.ndim < dims:
        raise ValueError(f"{logits_name} must have at least {dims} dims, got {tuple(logits.shape)}")
    if target.shape != logits.shape:
        raise ValueError(
            f"{target_name} must have the shape of {logits_name}, {tuple(logits.shape)}, got {tuple(target.shape)}"
        )
