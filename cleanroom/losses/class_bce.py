"""Binary cross entropy of class logits against soft targets, of which an anchor has at most one.

Assigners of detectors give an anchor one class and one value; the dense (B, A, C) target that upstream builds is
zero elsewhere. Here it is never built: every logit costs ``softplus(x)``, but the one of the anchor's own class.

Block by block of logits that stays in the cache, the forward pass reads each logit once and writes nothing to memory;
the backward pass reads it once more and writes the gradient ``(sigmoid(x) - t) / normaliser``, already scaled. Bytes
moved for N float32 logits: 4 N forward, 8 N backward.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from cleanroom.losses._blocks import Block, blocks, empty_like
from cleanroom.paths import data_dependent

REDUCTIONS = ("sum", "none")


def class_bce(
    scores: Tensor,
    labels: Tensor,
    values: Tensor,
    normaliser: Tensor | float = 1.0,
    *,
    class_weights: Tensor | None = None,
    ignore_mask: Tensor | None = None,
    reduction: str = "sum",
) -> Tensor:
    """Sum of ``bce(x, t) / normaliser`` over all logits, t being ``values`` at the anchor's label and 0 elsewhere.

    ``bce(x, t) = (1 - t) softplus(x) + t softplus(-x)``, in float32 or wider (yolo_losses.md, sections 0 and 3).
    x = +inf costs inf where t < 1, NaN where t = 1; x = -inf costs 0 where t = 0 (upstream: NaN), inf where t > 0; NaN
    costs NaN. Gradient reaches ``scores`` only.

    Args:
        scores: (B, A, C) class logits, floating. A transposed view of (B, C, A) memory is read as it lies.
        labels: (B, A) integer class of each anchor; not read where the value is 0.
        values: (B, A) target value, floating; 0 for background.
        normaliser: divisor, 0-dim or a number, used as it is.
        class_weights: (C,) factor of each class, for positives and negatives alike.
        ignore_mask: (B, A) bool; True: the anchor takes no part.
        reduction: "sum", or "none" for the contribution of each image.

    Returns:
        0-dim, or (B,) for "none", in the dtype that scores and the normaliser promote to.

    Raises:
        ValueError: a shape or `reduction` is wrong.
        TypeError: a dtype is wrong.
        IndexError: on the CPU, a label with a value is outside [0, C) (undefined on an accelerator).
    """
    _check(scores, labels, values, class_weights, ignore_mask, reduction)
    value = values.detach().to(_wide(scores, values))
    background = value == 0 if ignore_mask is None else (value == 0) | ignore_mask
    own = labels.long().masked_fill(background, 0)
    classes = scores.shape[2]
    if own.numel() and data_dependent(scores, labels, values) and not 0 <= own.min() <= own.max() < max(1, classes):
        raise IndexError(f"labels with a value must be in [0, {classes}), got {int(own.min())} to {int(own.max())}")
    ignore = None if ignore_mask is None else ignore_mask.unsqueeze(2)
    found = _BlockwiseSums.apply(scores, own.unsqueeze(2), value.unsqueeze(2), class_weights, ignore)
    return _reduce(found, scores.dtype, normaliser, reduction)


def dense_class_bce(
    scores: Tensor, target_scores: Tensor, normaliser: Tensor | float = 1.0, *, reduction: str = "sum"
) -> Tensor:
    """`class_bce` against dense soft targets (B, A, C): for code that has built them.

    The targets take the dtype of the scores first, as upstream's do; errors and results are those of `class_bce`.
    Bytes moved for N float32 logits: 8 N forward, 12 N backward.
    """
    _check_scores(scores, reduction)
    if target_scores.shape != scores.shape:
        raise ValueError(
            f"target_scores must have the shape of scores, {tuple(scores.shape)}, got {tuple(target_scores.shape)}"
        )
    target = target_scores.detach().to(scores.dtype)
    return _reduce(_BlockwiseDenseSums.apply(scores, target), scores.dtype, normaliser, reduction)


def _wide(*tensors: Tensor) -> torch.dtype:
    wide = torch.float32
    for tensor in tensors:
        wide = torch.promote_types(wide, tensor.dtype)
    return wide


def _reduce(sums: Tensor, dtype: torch.dtype, normaliser: Tensor | float, reduction: str) -> Tensor:
    out = torch.promote_types(dtype, normaliser.dtype) if isinstance(normaliser, Tensor) else dtype
    return ((sums.sum() if reduction == "sum" else sums) / normaliser).to(out)


def _softplus(x: Tensor) -> Tensor:
    """``log(1 + e^x)``; beyond 40 it is x even in float64."""
    return functional.softplus(x, threshold=40)


def _own_loss(x: Tensor, t: Tensor) -> Tensor:
    """``bce(x, t)`` without cancellation; at t = 0 the softplus of all other classes, infinite x included."""
    wrong = _softplus(x)
    return torch.where(t == 0, wrong, ((1 - t) * wrong).addcmul_(t, _softplus(-x)))


def _own_slope(x: Tensor, t: Tensor) -> Tensor:
    """``sigmoid(x) - t`` without cancellation."""
    return torch.where(x > 0, (1 - t) - torch.sigmoid(-x), torch.sigmoid(x) - t)


def _logit(scores: Tensor, own: Tensor, dtype: torch.dtype) -> Tensor:
    """(B, A, 1) logit of each anchor's own class, `own` (B, A, 1)."""
    return scores.gather(2, own).to(dtype) if scores.shape[2] else scores.new_zeros(own.shape, dtype=dtype)


class _BlockwiseSums(torch.autograd.Function):
    """(B,) sums, block by block; the gradient is ``(sigmoid(x) - t) * weight`` times that of the sum."""

    @staticmethod
    def forward(
        ctx, scores: Tensor, own: Tensor, value: Tensor, weights: Tensor | None, ignore: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(scores, own, value, weights, ignore)
        loss = _own_loss(_logit(scores, own, value.dtype), value)
        sums = _zeros(scores, value.dtype)
        for block in blocks(scores):
            element = _softplus(scores[block].to(value.dtype)).scatter_(2, own[block], loss[block])
            sums[block[0]] += _weighted(element, weights, ignore, block).sum((1, 2))
        return sums.to(value.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        scores, own, value, weights, ignore = ctx.saved_tensors
        own_slope = _own_slope(_logit(scores, own, value.dtype), value)
        result, grad = empty_like(scores), grad[:, None, None]
        for block in blocks(scores):
            logits, part = scores[block], result[block]
            # Compilers take no out= that is a view.
            in_place = logits.dtype == value.dtype and data_dependent(logits)
            slope = torch.sigmoid(logits, out=part) if in_place else logits.to(value.dtype, copy=True).sigmoid_()
            slope.scatter_(2, own[block], own_slope[block]).mul_(grad[block[0]])
            _weighted(slope, weights, ignore, block)
            if slope is not part:
                part.copy_(slope)
        return result, None, None, None, None


def _weighted(block: Tensor, weights: Tensor | None, ignore: Tensor | None, place: Block) -> Tensor:
    """Apply weights and mask to a block in place."""
    if weights is not None:
        block *= weights.to(block.dtype)
    if ignore is not None:
        block.masked_fill_(ignore[place], 0)
    return block


class _BlockwiseDenseSums(torch.autograd.Function):
    """(B,) sums of the cross entropy against dense targets, block by block."""

    @staticmethod
    def forward(ctx, scores: Tensor, target: Tensor) -> Tensor:
        ctx.save_for_backward(scores, target)
        bce, wide = functional.binary_cross_entropy_with_logits, _wide(scores)
        sums = _zeros(scores, wide)
        for block in blocks(scores):
            sums[block[0]] += bce(scores[block].to(wide), target[block].to(wide), reduction="none").sum((1, 2))
        return sums.to(wide)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        scores, target = ctx.saved_tensors
        result, grad = empty_like(scores), grad[:, None, None]
        for block in blocks(scores):
            slope = scores[block].to(_wide(scores)).sigmoid()
            result[block] = slope.sub_(target[block]).mul_(grad[block[0]])
        return result, None


def _zeros(scores: Tensor, dtype: torch.dtype) -> Tensor:
    """(B,) accumulators: many blocks are summed on the CPU, one elsewhere."""
    return scores.new_zeros(len(scores), dtype=torch.float64 if scores.device.type == "cpu" else dtype)


def _check(
    scores: Tensor,
    labels: Tensor,
    values: Tensor,
    class_weights: Tensor | None,
    ignore_mask: Tensor | None,
    reduction: str,
) -> None:
    _check_scores(scores, reduction)
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"labels must be integers, got {labels.dtype}")
    if not values.is_floating_point():
        raise TypeError(f"values must be floating, got {values.dtype}")
    named = {"labels": labels, "values": values} | ({} if ignore_mask is None else {"ignore_mask": ignore_mask})
    for name, tensor in named.items():
        if tensor.shape != scores.shape[:2]:
            raise ValueError(f"{name} must be (B, A) = {tuple(scores.shape[:2])}, got {tuple(tensor.shape)}")
    if ignore_mask is not None and ignore_mask.dtype != torch.bool:
        raise TypeError(f"ignore_mask must be bool, got {ignore_mask.dtype}")
    if class_weights is not None and class_weights.shape != scores.shape[2:]:
        raise ValueError(f"class_weights must be (C,) = ({scores.shape[2]},), got {tuple(class_weights.shape)}")


def _check_scores(scores: Tensor, reduction: str) -> None:
    if scores.ndim != 3:
        raise ValueError(f"scores must be (B, A, C), got {tuple(scores.shape)}")
    if not scores.is_floating_point():
        raise TypeError(f"scores must be floating, got {scores.dtype}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
