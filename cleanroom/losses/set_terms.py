"""Terms of the set criterion under given pairs: class, cardinality and box losses of DETR and YOLOS.

Specification: set_prediction.md, A4 to A6; Carion et al., End-to-End Object Detection with Transformers, 2020.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from cleanroom.paths import data_dependent
from cleanroom.set_boxes import paired_box_losses

IGNORED = -100
"""Class of a query that takes no part in the class loss, as in PyTorch's cross entropy."""

#: Logits from which the cross entropy has a way of its own on the CPU: below, the calls take longer than the numbers.
_LARGE = 1 << 16


class Pairs(NamedTuple):
    """Matched pairs of one layer, image after image: (P,) int64 each."""

    rows: Tensor
    """Row of the pair's prediction among (B * Q, ...)."""
    targets: Tensor
    """Row of its target among (G, ...)."""
    total: int
    """Q."""

    @property
    def images(self) -> Tensor:
        """Image of the pair."""
        return self.rows // self.total


def join_pairs(
    indices: Sequence[tuple[Tensor, Tensor]],
    sizes: Sequence[int],
    total: int,
    device: torch.device,
    *,
    check: bool = True,
) -> Pairs:
    """Pairs of (query, target) indices an image, both counted within the image, of `total` queries and `sizes` targets.

    Negative indices count from the end, as in PyTorch. Without `check` those of a single image are taken as they are:
    who uses them raises IndexError where they are out of range.

    Raises:
        ValueError: another number of images than in `sizes`.
        IndexError: a query or a target that its image does not have.
    """
    if len(indices) != len(sizes):
        raise ValueError(f"indices are of {len(indices)} images, targets of {len(sizes)}")
    if len(sizes) == 1 and not check:
        queries, targets = indices[0]
        return Pairs(queries.to(device), targets.to(device), total)
    counts = [len(queries) for queries, _ in indices]
    queries = _within("queries", [queries for queries, _ in indices], counts, [total] * len(sizes))
    targets = _within("targets", [targets for _, targets in indices], counts, sizes)
    rows, targets, _ = place_pairs(queries, targets, counts, sizes, total)
    return Pairs(rows.to(device), targets.to(device), total)


def place_pairs(
    queries: np.ndarray, targets: np.ndarray, counts: Sequence[int], sizes: Sequence[int], total: int
) -> Pairs:
    """`join_pairs`, on the CPU, of what is concatenated and in range: `counts` pairs an image."""
    # NumPy: a dozen tensor operations on so few numbers take longer than what is computed from them.
    if len(sizes) > 1:
        places = np.arange(len(sizes)) * total, np.cumsum([0, *sizes[:-1]])
        queries, targets = (
            part + np.repeat(place, counts) for part, place in zip((queries, targets), places, strict=True)
        )
    return Pairs(torch.from_numpy(queries), torch.from_numpy(targets), total)


def _within(name: str, parts: Sequence[Tensor], counts: Sequence[int], limits: Sequence[int]) -> np.ndarray:
    """Indices of all images, checked against the limit of each."""
    # The method of the tensor: `numpy.asarray` takes ten times as long.
    every = [part.cpu().numpy() if isinstance(part, Tensor) else np.asarray(part) for part in parts]
    indices = (np.concatenate(every) if len(every) != 1 else every[0]).astype(np.int64, copy=False)
    if not len(indices):
        return indices
    limit = np.repeat(limits, counts) if len(every) != 1 else limits[0]
    if indices.min() >= 0 and (indices < limit).all():
        return indices
    if not ((indices >= -limit) & (indices < limit)).all():
        raise IndexError(f"{name} (indices) name what an image does not have: {indices.tolist()}")
    return np.where(indices < 0, indices + limit, indices)


def class_weights(num_classes: int, eos_coef: float, device: torch.device | None = None) -> Tensor:
    """(C + 1,) float32: 1 for classes, `eos_coef` for no object, rounded as upstream's buffer is."""
    weights = torch.ones(num_classes + 1, device=device)
    weights[-1:].fill_(eos_coef)  # no copy from the host
    return weights


def target_classes(logits: Tensor, labels: Tensor, pairs: Pairs, ignore_mask: Tensor | None = None) -> Tensor:
    """Class of every query (B, Q) int64: its target's, C (no object) without one, `IGNORED` under the mask.

    Raises:
        TypeError: labels that are not integers.
    """
    if labels.is_floating_point():
        raise TypeError(f"labels must be int64, got {labels.dtype}")
    batch, queries, columns = logits.shape
    classes = torch.full((batch * queries,), columns - 1, dtype=torch.int64, device=logits.device)
    own = labels.index_select(0, pairs.targets)
    classes.index_copy_(0, pairs.rows, own if own.dtype == torch.int64 else own.to(torch.int64))
    classes = classes.view(batch, queries)
    return classes if ignore_mask is None else classes.masked_fill_(ignore_mask, IGNORED)


def class_term(
    logits: Tensor,
    classes: Tensor,
    weights: Tensor,
    *,
    eos_coef: float,
    ignore_mask: Tensor | None = None,
    reduction: str = "sum",
) -> Tensor:
    """Weighted mean of the cross entropy over all queries (A4).

    Where the weights of all queries are 0 (nothing matched and `eos_coef` 0) the loss is 0, upstream's NaN.

    Args:
        logits: (B, Q, C + 1) floating; only they get gradient.
        classes: (B, Q) from `target_classes`.
        weights: (C + 1,), from `class_weights`.
        eos_coef: the last of them, known to the host.
        ignore_mask: (B, Q) bool: queries whose logits are not looked at.
        reduction: "sum": 0-dim; "none": (B,), the share of each image.

    Returns:
        In the dtype of the logits; float32 for half logits under autocast, as cross entropy is there.

    Raises:
        IndexError: on the CPU, a label outside [0, C] but for `IGNORED`.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    wide, weights = (value if value.dtype == dtype else value.to(dtype) for value in (logits, weights))
    if ignore_mask is not None:
        wide = wide.masked_fill(ignore_mask.unsqueeze(-1), 0)
    try:
        if ignore_mask is None and reduction == "sum":
            loss = _mean(wide, classes, weights, eos_coef)
        else:
            losses = functional.cross_entropy(
                wide.transpose(1, 2), classes, weights, ignore_index=IGNORED, reduction="none"
            )
            background = classes == weights.numel() - 1
            total = background.sum() * weights[-1] + (~background & (classes != IGNORED)).sum()
            losses = losses.sum(1) / total.masked_fill(total == 0, 1)
            loss = losses.sum() if reduction == "sum" else losses
    except IndexError as error:
        raise IndexError(f"labels must be in [0, {weights.numel() - 1}]: {error}") from None
    return loss if logits.dtype == dtype else loss.to(result_dtype(logits.dtype, logits.device))


def _mean(logits: Tensor, classes: Tensor, weights: Tensor, eos_coef: float) -> Tensor:
    """Weighted mean of the cross entropy over (B, Q), or 0 without any weight."""
    some_weight = None
    if not eos_coef:
        some_weight = (classes != weights.numel() - 1).any()
        weights = torch.where(some_weight, weights, 1)
    if logits.numel() >= _LARGE and logits.dtype == torch.float32 and data_dependent(logits):
        loss = _MeanCrossEntropy.apply(logits.flatten(0, 1), classes.flatten(), weights)
    else:
        # Classes before queries, as upstream hands them over: 1 - p of a confident query is all rounding, and in
        # another order of the sum it is another number.
        loss = functional.cross_entropy(logits.transpose(1, 2), classes, weights, ignore_index=IGNORED)
    return loss if some_weight is None else loss * some_weight


class _MeanCrossEntropy(torch.autograd.Function):
    """Weighted mean over (N, K) float32 logits as they lie, which PyTorch takes half the time for.

    In the derivative ``1 - p`` of the class is the sum of the other probabilities: no digit of it is lost.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, classes: Tensor, weights: Tensor) -> Tensor:
        logs = torch.log_softmax(logits, -1)
        ctx.save_for_backward(logs, classes, weights)
        return functional.nll_loss(logs, classes, weights, ignore_index=IGNORED)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        logs, classes, weights = ctx.saved_tensors
        own = classes.clamp(min=0)
        share = weights[own].masked_fill_(classes == IGNORED, 0)
        share.mul_(grad / share.sum())
        slope, own = logs.exp(), own.unsqueeze(-1)
        others = slope.scatter_(-1, own, 0).sum(-1, keepdim=True)
        return slope.scatter_(-1, own, others.neg_()).mul_(share.unsqueeze(-1)), None, None


def result_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Dtype of a loss that autocast computes in float32."""
    return torch.promote_types(dtype, torch.float32) if torch.is_autocast_enabled(device.type) else dtype


@torch.no_grad()
def cardinality_term(
    logits: Tensor, counts: Tensor, *, ignore_mask: Tensor | None = None, reduction: str = "sum"
) -> Tensor:
    """Mean distance of the number of queries that predict an object from the number of targets (A5), float32.

    Args:
        logits: (B, Q, C + 1); equal logits go to the lower class, NaN counts as the largest.
        counts: (B,) targets of each image.
        ignore_mask: (B, Q) bool: queries that are not counted.
        reduction: "sum": 0-dim; "none": (B,), the share of each image.
    """
    # What argmax would answer, at the price of a maximum: no object wins only if it beats every class.
    last = logits[..., -1]
    if logits.shape[-1] == 1:
        empty = torch.ones_like(last, dtype=torch.bool)
    else:
        best = logits[..., :-1].amax(-1)
        empty = (last > best) | (last.isnan() & ~best.isnan())
    if ignore_mask is not None:
        empty = empty | ignore_mask
    errors = ((~empty).sum(1) - counts).abs().to(torch.float32)
    return errors.mean() if reduction == "sum" else errors / len(errors)


class BoxTerms(NamedTuple):
    """Sums over pairs divided by D: 0-dim, or (B,) by image."""

    loss_bbox: Tensor
    loss_giou: Tensor


def box_terms(
    pred_boxes: Tensor,
    boxes: Tensor,
    pairs: Pairs,
    normaliser: Tensor | float,
    *,
    ignore_mask: Tensor | None = None,
    reduction: str = "sum",
    check: bool = True,
) -> BoxTerms:
    """L1 and GIoU losses of the matched boxes (A6): ``sum |p - t| / D`` and ``sum (1 - giou) / D``.

    Args:
        pred_boxes: (B, Q, 4) floating, (cx, cy, w, h); only they get gradient.
        boxes: (G, 4) likewise.
        pairs: who belongs to whom.
        normaliser: D, a number or 0-dim.
        ignore_mask: (B, Q) bool: pairs of these queries take no part.
        reduction: "sum": 0-dim; "none": (B,), the share of each image.
        check: whether to look at the matched boxes, on the CPU.

    Returns:
        `loss_bbox` in the promoted dtype of both (under autocast at least float32), `loss_giou` at least float32.

    Raises:
        ValueError: on the CPU, a matched box that is inverted or NaN.
    """
    batch = len(pred_boxes)
    predicted, target = pred_boxes.flatten(0, 1).index_select(0, pairs.rows), boxes.index_select(0, pairs.targets)
    if ignore_mask is not None:
        # The target in the place of the prediction costs nothing, and passes no gradient, finite or not.
        ignored = ignore_mask.flatten()[pairs.rows]
        predicted = torch.where(ignored.unsqueeze(-1), target, predicted)
    distance, overlap = paired_box_losses(predicted, target, check=check)
    if ignore_mask is not None:
        overlap = overlap.masked_fill(ignored, 0)
    distance, overlap = (_by_image(loss, pairs, batch, reduction) / normaliser for loss in (distance, overlap))
    dtype = result_dtype(torch.promote_types(pred_boxes.dtype, boxes.dtype), pred_boxes.device)
    return BoxTerms(distance.to(dtype), overlap)


def _by_image(losses: Tensor, pairs: Pairs, batch: int, reduction: str) -> Tensor:
    """Sum of losses (P,): over all of them, or (B,) over each image."""
    return losses.sum() if reduction == "sum" else losses.new_zeros(batch).index_add(0, pairs.images, losses)


def class_error(logits: Tensor, labels: Tensor, pairs: Pairs) -> Tensor:
    """100 minus the percentage of matched queries whose largest logit is their class; 100 without pairs (A8)."""
    if not pairs.rows.numel():
        return torch.tensor(100.0, device=logits.device)
    right = logits.flatten(0, 1).index_select(0, pairs.rows).argmax(-1) == labels[pairs.targets]
    return 100 - 100 * right.float().mean()
