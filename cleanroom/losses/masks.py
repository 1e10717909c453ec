"""Mask losses of set prediction: sigmoid focal loss and dice loss, under given pairs and as functions.

Specification: set_prediction.md, A7; Lin et al., Focal Loss for Dense Object Detection, 2017; Milletari et al., V-Net,
2016. Matched logits are resized to the size of the targets, which is mostly sixteen times theirs: here that is done for
a few pairs at a time and the gradient is brought back to the small size at once, so that no tensor of all pairs at the
large size exists. Everything is computed in float32 or wider.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from cleanroom.losses.set_terms import Pairs
from cleanroom.paths import data_dependent

#: Pixels that one thread works on at a time; half a dozen planes of them fit in a cache of 2 MiB.
_PIXELS = 1 << 16
#: Sides of mask logits up to which resizing by products of matrices is the faster, measured on a core: as fast at 40,
#: half as fast at 80; backward three times as fast at 80, 1.7 times at 160.
_DENSE_SIDE, _DENSE_SIDE_BACK = 40, 256
#: From here on softplus is its argument, in float64 too.
_FAR = 40
ALPHA, GAMMA = 0.25, 2.0


def sigmoid_focal_loss(
    inputs: Tensor, targets: Tensor, num_boxes: Tensor | float, alpha: float = ALPHA, gamma: float = GAMMA
) -> Tensor:
    """Focal loss: ``sum_i mean_pixels [a_t bce(z, m) (1 - p_t)^gamma] / num_boxes`` (A7).

    Args:
        inputs: (P, pixels) logits z, floating; only they get gradient.
        targets: (P, pixels) m in [0, 1], of any dtype.
        num_boxes: divisor.
        alpha: ``a_t = alpha m + (1 - alpha)(1 - m)``; below 0 there is no such factor.
        gamma: exponent.

    Returns:
        0-dim, in the dtype that inputs and targets promote to.

    Raises:
        ValueError: shapes that differ or have less than two dimensions.
    """
    logits, targets, dtype = _flat(inputs, targets)
    found, _ = _losses(logits, targets, alpha, gamma)
    # Upstream averages over the second dimension alone.
    return (found.sum() * (logits[:1].numel() / max(1, inputs.shape[1])) / num_boxes).to(dtype)


def dice_loss(inputs: Tensor, targets: Tensor, num_boxes: Tensor | float) -> Tensor:
    """Dice loss: ``sum_i [1 - (2 sum(p m) + 1) / (sum p + sum m + 1)] / num_boxes``, p the sigmoid (A7).

    Arguments, result and errors are those of `sigmoid_focal_loss`.
    """
    logits, targets, dtype = _flat(inputs, targets)
    _, found = _losses(logits, targets, None, 0.0)
    return (found.sum() / num_boxes).to(dtype)


class MaskTerms(NamedTuple):
    """Sums over pairs divided by D: 0-dim, or (B,) by image."""

    loss_mask: Tensor
    loss_dice: Tensor


def mask_terms(
    pred_masks: Tensor,
    masks: Sequence[Tensor],
    pairs: Pairs,
    normaliser: Tensor | float,
    *,
    ignore_mask: Tensor | None = None,
    reduction: str = "sum",
    sparse: bool | None = None,
) -> MaskTerms:
    """Focal and dice losses of the matched masks (A7).

    Args:
        pred_masks: (B, Q, h, w) logits, floating; only they get gradient.
        masks: tensors (some, H, W) of all targets in order, bool or number; they count as padded with background at
            the bottom and the right to the largest H and W.
        pairs: who belongs to whom.
        normaliser: D, a number or 0-dim.
        ignore_mask: (B, Q) bool: pairs of these queries take no part.
        reduction: "sum": 0-dim; "none": (B,), the share of each image.
        sparse: whether to work in blocks, without a tensor of all pairs at the large size; default: on the CPU.

    Returns:
        Both in the dtype of `pred_masks`.

    Raises:
        ValueError: shapes.
    """
    if pred_masks.ndim != 4:
        raise ValueError(f"pred_masks must have shape (B, Q, h, w), got {tuple(pred_masks.shape)}")
    if not masks or any(some.ndim != 3 for some in masks):
        raise ValueError(f"masks must be tensors (some, H, W), got {[tuple(some.shape) for some in masks]}")
    batch = len(pred_masks)
    logits = pred_masks.flatten(0, 1).index_select(0, pairs.rows)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if ignore_mask is not None:
        ignored = ignore_mask.flatten()[pairs.rows]
        logits = logits.masked_fill(ignored[:, None, None], 0)
    size = max(some.shape[1] for some in masks), max(some.shape[2] for some in masks)
    if data_dependent(pred_masks, *masks) if sparse is None else sparse:
        focal, dice = _ResizedLosses.apply(logits, _Targets(masks, pairs.targets, size, logits.dtype))
    else:
        padded = torch.cat([_padded(some, size) for some in masks])
        focal, dice = _in_one(_resized(logits, size).flatten(1), padded[pairs.targets].flatten(1))
    if ignore_mask is not None:
        focal, dice = focal.masked_fill(ignored, 0), dice.masked_fill(ignored, 0)
    if reduction == "none":
        focal, dice = (loss.new_zeros(batch).index_add(0, pairs.images, loss) for loss in (focal, dice))
    else:
        focal, dice = focal.sum(), dice.sum()
    return MaskTerms(*((loss / normaliser).to(pred_masks.dtype) for loss in (focal, dice)))


class _Targets:
    """Target masks of the pairs, brought to one size where they are asked for.

    `signed`: as +1 for background and -1 for foreground, where all are 0 or 1 and digits are not wanted as upstream
    rounds them (float64).
    """

    def __init__(self, masks: Sequence[Tensor], targets: Tensor, size: tuple[int, int], dtype: torch.dtype) -> None:
        self.masks, self.size, self.dtype = masks, size, dtype
        self.places = [(image, index) for image, some in enumerate(masks) for index in range(len(some))]
        self.targets = targets.tolist()
        self.signed = dtype == torch.float32 and all(map(_is_binary, masks))

    def __call__(self, first: int, last: int) -> Tensor:
        """(n, H, W) of the pairs from `first` to `last`."""
        found = torch.empty(last - first, *self.size, dtype=self.dtype)
        for own, target in zip(found, self.targets[first:last], strict=True):
            image, index = self.places[target]
            mask = self.masks[image][index]
            height, width = mask.shape
            if (height, width) != self.size:
                own[height:] = own[:, width:] = 0
            own[:height, :width] = mask
        return torch.rsub(found, 1, alpha=2) if self.signed else found


def _is_binary(masks: Tensor) -> bool:
    return masks.dtype == torch.bool or bool(((masks == 0) | (masks == 1)).all())


def _padded(masks: Tensor, size: tuple[int, int]) -> Tensor:
    return functional.pad(masks, (0, size[1] - masks.shape[2], 0, size[0] - masks.shape[1]))


def _resized(logits: Tensor, size: tuple[int, int]) -> Tensor:
    return functional.interpolate(logits.unsqueeze(1), size=size, mode="bilinear", align_corners=False).squeeze(1)


class _Resize:
    """`_resized` from (n, h, w) to (n, H, W) and what takes derivatives back, as products with (h, H) and (w, W).

    They round less than PyTorch's resizing, where the distance of a pixel to its neighbour carries the rounding of its
    coordinate, and take less time up to the sides below.
    """

    def __init__(self, logits: Tensor, large: tuple[int, int]) -> None:
        small = logits.shape[1:]
        self.large, self.weights = large, None
        if max(small) <= _DENSE_SIDE_BACK:
            down, across = (_axis(*sides) for sides in zip(small, large, strict=True))
            self.weights = down.to(logits.dtype), across
        # A product of matrices spreads what is not finite over its row and column.
        self.dense = max(small) <= _DENSE_SIDE and bool(logits.sum().isfinite())

    def __call__(self, logits: Tensor) -> Tensor:
        if not self.dense:
            return _resized(logits, self.large)
        down, across = self.weights
        with torch.autocast("cpu", enabled=False):
            return down.mT @ (logits.double() @ across).to(logits.dtype)

    def back(self, slopes: Tensor, like: Tensor) -> Tensor:
        """Derivatives (n, h, w) by logits `like`, from those by the resized ones."""
        if self.weights is not None:
            down, across = self.weights
            with torch.autocast("cpu", enabled=False):
                # The smaller product in float64, which halves what the weights themselves are rounded by.
                found = ((down @ slopes).double() @ across.mT).to(slopes.dtype)
            if bool(found.sum().isfinite()):
                return found
        with torch.enable_grad():
            like = like.detach().requires_grad_()
            large = _resized(like, self.large)
        return torch.autograd.grad(large, like, slopes)[0]


def _axis(short: int, long: int) -> Tensor:
    """(short, long) float64: what resizing an axis makes of unit vectors."""
    units = torch.eye(short, dtype=torch.float64).unsqueeze(0)
    return functional.interpolate(units, size=long, mode="linear", align_corners=False)[0]


def _flat(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, torch.dtype]:
    if inputs.shape != targets.shape or inputs.ndim < 2:
        raise ValueError(f"inputs {tuple(inputs.shape)} and targets {tuple(targets.shape)} must be of one (P, pixels)")
    dtype = torch.promote_types(inputs.dtype, targets.dtype)
    return inputs.flatten(1).to(torch.promote_types(dtype, torch.float32)), targets.detach().flatten(1), dtype


def _losses(logits: Tensor, targets: Tensor, alpha: float | None, gamma: float) -> tuple[Tensor, Tensor]:
    if data_dependent(logits, targets):
        return _Losses.apply(logits, targets, alpha, gamma)
    return _in_one(logits, targets, -1.0 if alpha is None else alpha, gamma)


def _in_one(logits: Tensor, targets: Tensor, alpha: float = ALPHA, gamma: float = GAMMA) -> tuple[Tensor, Tensor]:
    """Both losses of every row, by autograd: for compilers, which fuse, and accelerators."""
    targets = targets.to(logits.dtype)
    p = torch.sigmoid(logits)
    # Its own derivative is right at 0 too, where that of the formula has a kink in each of its parts.
    entropy = functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    losses = entropy * _missed(p, _rest(logits, p), targets) ** gamma
    losses = losses if alpha < 0 else losses * (targets * (2 * alpha - 1) + (1 - alpha))
    shared, total = (p * targets).sum(1), p.sum(1) + targets.sum(1)
    return losses.mean(1), 1 - (2 * shared + 1) / (total + 1)


# In float64 a difference from 1 has digits enough, and rounds as upstream's does.


def _rest(z: Tensor, p: Tensor) -> Tensor:
    """``1 - p`` with all its digits, p being the sigmoid of z."""
    return 1 - p if z.dtype == torch.float64 else torch.sigmoid(-z)


def _missed(p: Tensor, r: Tensor, m: Tensor) -> Tensor:
    """``1 - p_t`` with all its digits, p_t being the probability of the right answer and r = 1 - p."""
    return 1 - (p * m + r * (1 - m)) if p.dtype == torch.float64 else torch.lerp(p, r, m)


def _decay(z: Tensor, p: Tensor, r: Tensor) -> Tensor:
    """``exp(-|z|)``, from what is there already: the exponential of MKL takes ten times as long as a sigmoid."""
    return torch.exp(-z.abs()) if z.dtype == torch.float64 else torch.minimum(p, r).div_(torch.maximum(p, r))


class _Slopes(NamedTuple):
    """Derivatives of both losses by the logits of a block, but for a factor each: a number, or one a row (n, 1)."""

    focal: Tensor
    dice: Tensor
    focal_factor: Tensor | float = 1.0
    dice_factor: Tensor | float = 1.0


def _block(
    z: Tensor, m: Tensor, alpha: float | None, gamma: float, *, slopes: bool
) -> tuple[Tensor, Tensor, _Slopes | None]:
    """Focal and dice loss of rows (n, pixels), and their derivatives; no focal loss where `alpha` is None.

    With p = sigmoid(z), r = sigmoid(-z) and q = 1 - p_t the focal derivative is
    ``a_t q^(gamma-1) [(p - m) q + gamma bce (1 - 2m) p r]``. Neither q nor p - m is taken as a difference from 1, so a
    confident pixel keeps all its digits.
    """
    share = 1 / max(1, z.shape[1])
    p = torch.sigmoid(z)
    r = _rest(z, p)
    # One number a row, which all its pixels share: float64.
    numerator = (p * m).sum(1, keepdim=True, dtype=torch.float64).mul_(2).add_(1)
    denominator = (p.sum(1, keepdim=True, dtype=torch.float64)).add_(m.sum(1, keepdim=True)).add_(1)
    ratio = numerator / denominator
    dice = (1 - ratio).squeeze(1).to(z.dtype)
    spread = p * r if slopes else None
    by_focal = by_dice = None
    if slopes:
        outside, inside = ((ratio - miss).div_(denominator).to(z.dtype) for miss in (0, 2))
        by_dice = torch.lerp(outside.expand_as(z), inside.expand_as(z), m).mul_(spread)
    if alpha is None:
        return z.new_zeros(len(z)), dice, _Slopes(z, by_dice) if slopes else None

    cross = (1 - m).mul_(z).sub_(z.clamp(max=0)).add_(_decay(z, p, r).log1p_())
    q = _missed(p, r, m)
    power = q if gamma == GAMMA else q.pow(gamma - 1)
    balance = share if alpha < 0 else m.mul((2 * alpha - 1) * share).add_((1 - alpha) * share)
    power = power * balance
    if slopes:
        away = torch.lerp(p, r.neg_(), m).mul_(q)
        by_focal = m.mul(-2 * gamma).add_(gamma).mul_(cross).mul_(spread).add_(away).mul_(power)
    focal = cross.mul_(power).mul_(q).sum(1)
    return focal, dice, _Slopes(by_focal, by_dice) if slopes else None


def _signed_block(z: Tensor, s: Tensor, *, slopes: bool) -> tuple[Tensor, Tensor, _Slopes | None]:
    """`_block` of masks that are 0 or 1, given as signs (+1 and -1), with the usual alpha and gamma.

    With u = s z, q = sigmoid(u) is what the right answer lacks to 1 and c = softplus(u) its cross entropy:
    ``focal = a_t c q^2`` with ``a_t = (1 + s / 2) / 2``, and its derivative ``a_t s q^2 (q + 2 c (1 - q))``.
    """
    share = 1 / max(1, z.shape[1])
    u = z * s
    q, cross = torch.sigmoid(u), functional.softplus(u, threshold=_FAR)
    # One number a row, which all its pixels share: in float64, and NumPy's, as small tensor operations take longer.
    signs = s.sum(1).numpy().astype(np.float64)
    missed = q.sum(1, dtype=torch.float64).numpy()
    balance = torch.mul(q, s, out=None if slopes else u).sum(1, dtype=torch.float64).numpy()
    both = z.shape[1] - signs  # twice the foreground
    hit = both - missed + balance  # twice the sum of p m
    denominator = (both + hit + missed + balance) / 2 + 1
    ratio = (hit + 1) / denominator
    square = q * q if slopes else q.square_()
    focal = cross * square if slopes else cross.mul_(square)
    focal = focal.addcmul_(s, focal, value=0.5).sum(1).mul_(0.5 * share)
    found = None
    if slopes:
        rest = u.neg_().sigmoid_()
        by_focal = torch.addcmul(q, cross, rest, value=2).mul_(square)
        by_focal.addcmul_(s, by_focal, value=2)
        above, factor = (torch.from_numpy(part).to(s.dtype).unsqueeze(1) for part in (ratio - 1, 1 / denominator))
        found = _Slopes(by_focal, (s + above).mul_(q.mul_(rest)), 0.25 * share, factor)
    return focal, torch.from_numpy(1 - ratio), found


def _spans(count: int, pixels: int) -> Iterator[tuple[int, int]]:
    step = max(1, _PIXELS * torch.get_num_threads() // max(1, pixels))
    return ((first, min(first + step, count)) for first in range(0, count, step))


class _Losses(torch.autograd.Function):
    """(P, pixels) logits and targets -> focal and dice loss of each row (P,)."""

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, alpha: float | None, gamma: float) -> tuple[Tensor, Tensor]:
        focal, dice = logits.new_zeros(2, len(logits)).unbind()
        wanted = ctx.needs_input_grad[0]
        slope = torch.empty_like(logits, memory_format=torch.contiguous_format) if wanted else None
        # One function asks for one of the losses: the other's derivative would never be used.
        ctx.which = "dice" if alpha is None else "focal"
        for first, last in _spans(*logits.shape):
            span = slice(first, last)
            m = targets[span].to(logits.dtype)
            focal[span], dice[span], slopes = _block(logits[span], m, alpha, gamma, slopes=wanted)
            if wanted:
                slope[span] = getattr(slopes, ctx.which)
        if wanted:
            ctx.save_for_backward(slope)
        return focal, dice

    @staticmethod
    @once_differentiable
    def backward(ctx, by_focal: Tensor, by_dice: Tensor) -> tuple[Tensor, None, None, None]:
        (slope,) = ctx.saved_tensors
        grad = by_dice if ctx.which == "dice" else by_focal
        return slope * grad.unsqueeze(1), None, None, None


class _ResizedLosses(torch.autograd.Function):
    """(P, h, w) logits and their targets at another size -> focal and dice loss of each pair (P,).

    Kept for the backward pass are two tensors (P, h, w).
    """

    @staticmethod
    def forward(ctx, logits: Tensor, targets: _Targets) -> tuple[Tensor, Tensor]:
        focal, dice = logits.new_zeros(2, len(logits)).unbind()
        # A loss that is not differentiated must not reach the gradient as NaN times zero.
        ctx.set_materialize_grads(False)
        wanted = ctx.needs_input_grad[0]
        kept = logits.new_empty(2, *logits.shape) if wanted else None
        resize = _Resize(logits, targets.size)
        for first, last in _spans(len(logits), targets.size[0] * targets.size[1]):
            span = slice(first, last)
            large = resize(logits[span])
            z, m = large.flatten(1), targets(first, last).flatten(1)
            if targets.signed:
                focal[span], dice[span], slopes = _signed_block(z, m, slopes=wanted)
            else:
                focal[span], dice[span], slopes = _block(z, m, ALPHA, GAMMA, slopes=wanted)
            if wanted:
                for own, slope, factor in zip(kept, slopes[:2], slopes[2:], strict=True):
                    small = resize.back(slope.view(large.shape), logits[span])
                    own[span] = small.flatten(1).mul_(factor).view(small.shape)
        if wanted:
            ctx.save_for_backward(kept)
        return focal, dice

    @staticmethod
    @once_differentiable
    def backward(ctx, by_focal: Tensor | None, by_dice: Tensor | None) -> tuple[Tensor | None, None]:
        (kept,) = ctx.saved_tensors
        given = [
            (slope, grad[:, None, None])
            for slope, grad in zip(kept, (by_focal, by_dice), strict=True)
            if grad is not None
        ]
        found = given[0][0] * given[0][1]
        for slope, grad in given[1:]:
            found.addcmul_(slope, grad)
        return found, None
