"""Terms of the set criterion under given pairs: class, cardinality and box losses of DETR and YOLOS.

Specification: set_prediction.md, A4 to A6; Carion et al., End-to-End Object Detection with Transformers, 2020.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from cleanroom.paths import data_dependent
from cleanroom.set_boxes import paired_box_losses

IGNORED = -100
"""Class of a query that takes no part in the class loss, as in PyTorch's cross entropy."""


class Pairs(NamedTuple):
    """Matched pairs of one layer, (P,) int64 each, image after image."""

    images: Tensor
    """Image of the pair."""
    queries: Tensor
    """Its query, counted within the image."""
    targets: Tensor
    """Its target, counted through the batch."""

    def rows(self, queries: int) -> Tensor:
        """Row of each pair's prediction among (B * Q, ...), Q being `queries`."""
        return torch.add(self.queries, self.images, alpha=queries)


def join_pairs(
    indices: Sequence[tuple[Tensor, Tensor]], sizes: Sequence[int], total: int, device: torch.device
) -> Pairs:
    """Pairs of (query, target) indices an image, both counted within the image, of `total` queries and `sizes` targets.

    Negative indices count from the end, as in PyTorch.

    Raises:
        ValueError: another number of images than in `sizes`.
        IndexError: on the CPU, a query or a target that its image does not have.
    """
    if len(indices) != len(sizes):
        raise ValueError(f"indices are of {len(indices)} images, targets of {len(sizes)}")
    nothing = torch.empty(0, dtype=torch.int64)
    queries = torch.cat([nothing, *(torch.as_tensor(some, dtype=torch.int64) for some, _ in indices)])
    targets = torch.cat([nothing, *(torch.as_tensor(some, dtype=torch.int64) for _, some in indices)])
    images = np.arange(len(sizes)).repeat([len(some) for some, _ in indices])
    limits, firsts = np.array(sizes, dtype=np.int64), np.cumsum([0, *sizes[:-1]], dtype=np.int64)
    queries = _within("queries", queries, torch.full_like(queries, total))
    targets = _within("targets", targets, torch.from_numpy(limits[images]).to(targets.device))
    places = torch.from_numpy(np.stack([images, firsts[images]])).to(device)
    return Pairs(places[0], queries.to(device), targets.to(device) + places[1])


def _within(name: str, indices: Tensor, limits: Tensor) -> Tensor:
    if data_dependent(indices) and not bool(((indices < limits) & (indices >= -limits)).all()):
        raise IndexError(f"{name} (indices) are out of range: {indices.tolist()}")
    return torch.where(indices < 0, indices + limits, indices)


def class_weights(num_classes: int, eos_coef: float, device: torch.device | None = None) -> Tensor:
    """(C + 1,) float32: 1 for classes, `eos_coef` for no object, rounded as upstream's buffer is."""
    weights = torch.ones(num_classes + 1, device=device)
    weights[-1] = eos_coef
    return weights


def target_classes(
    logits: Tensor, labels: Tensor, pairs: Pairs, ignore_mask: Tensor | None = None, *, check: bool = True
) -> Tensor:
    """Class of every query (B, Q) int64: its target's, C (no object) without one, `IGNORED` under the mask.

    Raises:
        IndexError: on the CPU and with `check`, a label outside [0, C] but for `IGNORED`.
    """
    batch, queries, columns = logits.shape
    own = labels.to(torch.int64)[pairs.targets]
    if check and data_dependent(own) and not bool(((own >= 0) & (own < columns) | (own == IGNORED)).all()):
        raise IndexError(f"labels must be in [0, {columns - 1}], got {int(own.min())} to {int(own.max())}")
    classes = torch.full((batch * queries,), columns - 1, dtype=torch.int64, device=logits.device)
    classes = classes.index_put_((pairs.rows(queries),), own).view(batch, queries)
    return classes if ignore_mask is None else classes.masked_fill_(ignore_mask, IGNORED)


def class_term(
    logits: Tensor, classes: Tensor, weights: Tensor, *, ignore_mask: Tensor | None = None, reduction: str = "sum"
) -> Tensor:
    """Weighted mean of the cross entropy over all queries (A4).

    Where the weights of all queries are 0 (nothing matched and `eos_coef` 0) the loss is 0, upstream's NaN.

    Args:
        logits: (B, Q, C + 1) floating; only they get gradient.
        classes: (B, Q) from `target_classes`.
        weights: (C + 1,), from `class_weights`.
        ignore_mask: (B, Q) bool: queries whose logits are not looked at.
        reduction: "sum": 0-dim; "none": (B,), the share of each image.

    Returns:
        In the dtype of the logits; float32 for half logits under autocast, as cross entropy is there.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    # Classes before queries, as upstream hands them over: 1 - p of a confident query is all rounding, and in another
    # order of the sum it is another number. Half logits are widened first.
    wide, weights = logits.to(dtype).transpose(1, 2), weights.to(dtype)
    background = classes == weights.numel() - 1
    if ignore_mask is None and reduction == "sum":
        some_weight = (weights[-1] != 0) | ~background.all()
        loss = functional.cross_entropy(wide, classes, torch.where(some_weight, weights, 1), ignore_index=IGNORED)
        loss = loss * some_weight
    else:
        if ignore_mask is not None:
            wide = wide.masked_fill(ignore_mask.unsqueeze(1), 0)
        loss = functional.cross_entropy(wide, classes, weights, ignore_index=IGNORED, reduction="none").sum(1)
        total = background.sum() * weights[-1] + (~background & (classes != IGNORED)).sum()
        loss = loss / total.masked_fill(total == 0, 1)
        loss = loss.sum() if reduction == "sum" else loss
    return loss.to(_result_dtype(logits.dtype, logits.device))


def _result_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
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
    best = logits[..., :-1].amax(-1) if logits.shape[-1] > 1 else torch.full_like(last, -torch.inf)
    empty = (last > best) | (last.isnan() & ~best.isnan())
    if logits.shape[-1] == 1:
        empty = torch.ones_like(empty)
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
    batch, queries, _ = pred_boxes.shape
    rows = pairs.rows(queries)
    predicted, target = pred_boxes.flatten(0, 1).index_select(0, rows), boxes.index_select(0, pairs.targets)
    if ignore_mask is not None:
        # The target in the place of the prediction costs nothing, and passes no gradient, finite or not.
        ignored = ignore_mask.flatten()[rows]
        predicted = torch.where(ignored.unsqueeze(-1), target, predicted)
    distance, overlap = paired_box_losses(predicted, target, check=check)
    if ignore_mask is not None:
        overlap = overlap.masked_fill(ignored, 0)
    distance, overlap = (_by_image(loss, pairs.images, batch, reduction) / normaliser for loss in (distance, overlap))
    dtype = _result_dtype(torch.promote_types(pred_boxes.dtype, boxes.dtype), pred_boxes.device)
    return BoxTerms(distance.to(dtype), overlap)


def _by_image(losses: Tensor, images: Tensor, batch: int, reduction: str) -> Tensor:
    """Sum of losses (P,): over all of them, or (B,) over each image."""
    return losses.sum() if reduction == "sum" else losses.new_zeros(batch).index_add(0, images, losses)


@torch.no_grad()
def class_error(logits: Tensor, labels: Tensor, pairs: Pairs) -> Tensor:
    """100 minus the percentage of matched queries whose largest logit is their class; 100 without pairs (A8)."""
    rows = pairs.rows(logits.shape[1])
    if not rows.numel():
        return torch.tensor(100.0, device=logits.device)
    right = logits.flatten(0, 1).index_select(0, rows).argmax(-1) == labels[pairs.targets]
    return 100 - 100 * right.float().mean()
