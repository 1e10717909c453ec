"""The loss of DETR and YOLOS as a function of tensors: matching, class, box and mask losses of all decoder layers.

Specification: set_prediction.md, A2 to A9; Carion et al., End-to-End Object Detection with Transformers, 2020. The
classes and functions with upstream's calls are in `set_criterion.py`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cleanroom.assign._matching_checks import choose_matched_path
from cleanroom.assign.matching_cost import CostTerms
from cleanroom.losses._set_layers import (
    Criterion,
    Layer,
    Targets,
    loss_weights,
    match,
    match_on_device,
    pairs_of,
    weighted,
)
from cleanroom.losses.set_terms import class_weights

REDUCTIONS = ("sum", "none")


class SetLoss(NamedTuple):
    """The loss of a batch. With `reduction="none"` images are the last dimension: their sum is the usual value."""

    total: Tensor
    """0-dim: the weighted sum."""
    terms: Tensor
    """(K,): entries of upstream's dictionary in its order, unweighted; `term_names` has their names."""
    queries: Tensor
    """(P,) int64: matched queries, first the last layer's, then each auxiliary layer's; ascending in an image."""
    targets: Tensor
    """(P,) int64: their targets, counted within the image."""


def set_loss(
    logits: Tensor,
    pred_boxes: Tensor,
    labels: Tensor,
    boxes: Tensor,
    sizes: Sequence[int],
    *,
    aux_logits: Tensor | Sequence[Tensor] | None = None,
    aux_boxes: Tensor | Sequence[Tensor] | None = None,
    pred_masks: Tensor | None = None,
    masks: Tensor | None = None,
    num_classes: int | None = None,
    eos_coef: float = 0.1,
    class_cost: float = 1.0,
    bbox_cost: float = 5.0,
    giou_cost: float = 2.0,
    bbox_coef: float = 5.0,
    giou_coef: float = 2.0,
    mask_coef: float = 1.0,
    dice_coef: float = 1.0,
    auxiliary: bool = True,
    decoder_layers: int | None = None,
    num_boxes: Tensor | float | None = None,
    ignore_mask: Tensor | None = None,
    reduction: str = "sum",
    non_finite: str | None = None,
    path: str = "auto",
) -> SetLoss:
    """Match every layer and sum ``loss_ce + 5 loss_bbox + 2 loss_giou (+ loss_mask + loss_dice)`` (A9).

    All layers are matched by one operator (`cleanroom/assign/_matching_op.py`), and with kernels all their terms but
    masks computed by another (`cleanroom/kernels/set_loss.py`): the host waits for neither. Gradient reaches logits
    through `loss_ce`, boxes through the box losses, mask logits through the mask losses; matching and targets are
    constant.

    Differs from upstream where that is not finite though the inputs are: two boxes without area overlap by 0, the GIoU
    has no NaN gradient from other pairs, and the class loss is 0 where no query has a weight.

    Args:
        logits: (B, Q, C + 1) floating, no object last.
        pred_boxes: (B, Q, 4) floating, (cx, cy, w, h) normalised to the image.
        labels: (G,) int64, image by image, in [0, C].
        boxes: (G, 4) floating, (cx, cy, w, h) normalised.
        sizes: targets of each image, B numbers of sum G.
        aux_logits: (L - 1, B, Q, C + 1) of the former decoder layers, or L - 1 tensors.
        aux_boxes: (L - 1, B, Q, 4) likewise.
        pred_masks: (B, Q, h, w) mask logits of the last layer.
        masks: (G, H, W) bool or number, padded with background.
        num_classes: C; default: as many as `logits` have.
        eos_coef: weight of no object in the class loss.
        class_cost, bbox_cost, giou_cost: weights of the matching, not all 0.
        bbox_coef, giou_coef, mask_coef, dice_coef: weights in the total.
        auxiliary: whether auxiliary layers are looked at.
        decoder_layers: only the first `decoder_layers - 1` auxiliary layers count in the total; default: all.
        num_boxes: D, where it is not the number of targets here (at least 1): the mean over processes.
        ignore_mask: (B, Q) bool: these queries are matched, and then take no part in any term, nor do their targets in
            D and in the number of objects.
        reduction: "sum", or "none" for the share of each image: `total` (B,), `terms` (K, B).
        non_finite: what costs that are NaN or infinite become in the matching, see `hungarian_match`: "largest"
            (transformers 5.18.0 on) or "raise"; default: the former.
        path: "sparse" looks at values and works in blocks, "static" does neither, for compilers and accelerators,
            "triton" matches on the device and computes the terms in kernels; see `cleanroom.paths.choose_path`.

    Returns:
        See `SetLoss`; the class loss is in the dtype of `logits`, the box losses in that of the boxes but the GIoU at
        least float32, the mask losses in that of `pred_masks`, and `total` and `terms` in what these promote to.

    Raises:
        ValueError, TypeError: shapes and settings, and what the matcher rejects (`hungarian_match`).
        IndexError: on the CPU, a negative label.
    """
    _check(logits, labels, num_classes, pred_masks, masks, ignore_mask, reduction)
    path = choose_matched_path(path, logits.shape[1], logits, pred_boxes, labels, boxes)
    aux = (aux_logits, aux_boxes) if auxiliary else (None, None)
    layers = [Layer(logits, pred_boxes, pred_masks), *_auxiliary(*aux)]
    targets = Targets(labels, boxes, list(sizes), () if masks is None else [masks])
    costs = CostTerms("detr", class_cost, bbox_cost, giou_cost)
    weights = class_weights(logits.shape[-1] - 1, eos_coef, logits.device)
    sparse = path == "sparse"
    criterion = Criterion(weights, eos_coef, targets, num_boxes, ignore_mask, reduction, sparse)
    counted = len(layers) - 1 if decoder_layers is None else decoder_layers - 1
    if path == "triton":
        found = match_on_device(layers, targets, costs, non_finite=non_finite)
        fused = criterion.fused(layers, found, max(counted, 0) + 1, bbox_coef, giou_coef)
        total, terms = fused.total, fused.terms.flatten(0, 1)
        if masks is not None:
            pairs = pairs_of(found, len(layers), logits.shape[1])
            of_masks = criterion.layer(("masks",), layers[0], pairs[0])
            total = total + weighted(of_masks, {"loss_mask": mask_coef, "loss_dice": dice_coef})
            terms = torch.cat([terms[:4], torch.stack(list(of_masks.values())), terms[4:]])
        return SetLoss(total, terms, found.queries, fused.local.flatten())
    matching = match(layers, targets, costs, sparse=sparse, non_finite=non_finite)
    losses = ("labels", "boxes", "cardinality") if masks is None else ("labels", "boxes", "cardinality", "masks")
    terms = criterion.layers(losses, layers, matching.layers)
    coefficients = loss_weights(bbox_coef, giou_coef, mask_coef, dice_coef, auxiliary=counted, masks=masks is not None)
    total = weighted(terms, coefficients)
    return SetLoss(total, torch.stack(list(terms.values())), matching.queries, matching.targets)


def term_names(auxiliary: int = 0, *, masks: bool = False) -> tuple[str, ...]:
    """Names of `SetLoss.terms` with so many auxiliary layers."""
    own = ("loss_ce", "loss_bbox", "loss_giou", "cardinality_error")
    others = tuple(f"{name}_{layer}" for layer in range(auxiliary) for name in own)
    return own + (("loss_mask", "loss_dice") if masks else ()) + others


def _auxiliary(logits: Tensor | Sequence[Tensor] | None, boxes: Tensor | Sequence[Tensor] | None) -> list[Layer]:
    if (logits is None) != (boxes is None):
        raise ValueError("aux_logits and aux_boxes: one is given without the other")
    if logits is None:
        return []
    if len(logits) != len(boxes):
        raise ValueError(f"aux_logits are of {len(logits)} layers, aux_boxes of {len(boxes)}")
    return [Layer(*predictions) for predictions in zip(logits, boxes, strict=True)]


def _check(
    logits: Tensor,
    labels: Tensor,
    num_classes: int | None,
    pred_masks: Tensor | None,
    masks: Tensor | None,
    ignore_mask: Tensor | None,
    reduction: str,
) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
    if logits.ndim != 3:
        raise ValueError(f"logits must have shape (B, Q, C + 1), got {tuple(logits.shape)}")
    if num_classes is not None and num_classes + 1 != logits.shape[2]:
        raise ValueError(f"num_classes is {num_classes}, but logits have {logits.shape[2]} columns")
    if (pred_masks is None) != (masks is None):
        raise ValueError("pred_masks and masks: one is given without the other")
    if pred_masks is not None and (pred_masks.ndim != 4 or pred_masks.shape[:2] != logits.shape[:2]):
        raise ValueError(f"pred_masks must have shape (B, Q, h, w), got {tuple(pred_masks.shape)}")
    if masks is not None and (masks.ndim != 3 or masks.shape[0] != labels.shape[0]):
        raise ValueError(f"masks must have shape (G, H, W), got {tuple(masks.shape)}")
    if ignore_mask is not None and (ignore_mask.shape != logits.shape[:2] or ignore_mask.dtype != torch.bool):
        raise ValueError(f"ignore_mask must be bool (B, Q), got {ignore_mask.dtype} {tuple(ignore_mask.shape)}")
