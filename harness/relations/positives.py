"""Anchors under relations: owners below 0 for background, what ties decide, and positives that grow with k."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from cases.case import Case
from harness.relations.trial import Broken, Trial

TOP_OVERLAPS = 10


def scored(case: Case, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Outputs of `tal` at anchors with a score: those without are foreground by a tie among zeros, or background."""
    positive = (outputs["target_scores"] != 0).any(-1)
    return {
        "target_gt_idx": torch.where(positive, outputs["target_gt_idx"], -1),
        "target_labels": torch.where(positive, outputs["target_labels"], -1),
        "target_bboxes": outputs["target_bboxes"].masked_fill(~positive[..., None], 0),
        "target_scores": outputs["target_scores"],
    }


def owned(case: Case, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Outputs of a criterion with -1 for the ground truth of background anchors."""
    return {**outputs, "target_gt_idx": torch.where(outputs["fg_mask"], outputs["target_gt_idx"], -1)}


def matched(case: Case, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Outputs of `simota` with -1 for the class of background anchors."""
    return {**outputs, "matched_classes": torch.where(outputs["fg_mask"], outputs["matched_classes"], -1)}


def grow_with_topk(trial: Trial) -> bool:
    """An anchor that has a score under a smaller k is foreground under a larger one."""
    trial = trial.stirred() if trial.declared.free else trial
    case = trial.case
    most = case.tensors["scores"].shape[2] if "scores" in case.tensors else case.tensors["pd_scores"].shape[1]
    small = case.settings["topk"]
    large = min(most, 2 * small + 1)
    if large <= small:
        small = small // 2
    trial.own()
    if small < 1:
        return False
    few, many = (trial.of(replace(case, settings={**case.settings, "topk": k, "topk2": None})) for k in (small, large))
    scored = few["fg_mask"]
    if "target_scores" in few:
        scored = scored & (few["target_scores"] != 0).any(-1)
    lost = scored & ~many["fg_mask"]
    if bool(lost.any()):
        place = lost.nonzero()[0].tolist()
        raise Broken(f"anchor {place[1]} of image {place[0]} is foreground with topk {small}, not with {large}")
    return bool(scored.any())


def within_dynamic_k(trial: Trial) -> bool:
    """No image has more positives than its ground truths' dynamic k together, nor any more than ten for each.

    k is at most the sum of the ten largest overlaps with all anchors, cut off to a whole number, and at least 1.
    """
    case, own = trial.case, trial.own()
    tried = False
    for image, rows in enumerate(case.tensors["num_gt"].tolist()):
        if not rows:
            continue
        overlap = _overlap(case.tensors["gt_boxes"][image, :rows].double(), case.tensors["pred_boxes"][image].double())
        if not bool(overlap.isfinite().all()):
            continue
        eps = torch.finfo(getattr(torch, case.dtype)).eps
        largest = overlap.topk(min(TOP_OVERLAPS, overlap.shape[1])).values.sum(1) * (1 + 64 * eps) + 64 * eps
        most = int(largest.trunc().clamp(min=1, max=TOP_OVERLAPS).sum())
        found = int(own["fg_mask"][image].sum())
        tried = True
        if found > most:
            raise Broken(f"image {image} has {found} positives, its ground truths' k are {most} together")
    return tried


def tal_quantities(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Complete IoU of every row and anchor, at least 0 (`spec/boxes.md` section 9)."""
    a, b, eps = tensors["gt_bboxes"][:, :, None], tensors["pd_bboxes"][:, None], 1e-7
    low, high = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    inner = (high - low).clamp(min=0).prod(-1)
    (w1, h1), (w2, h2) = (((box[..., 2] - box[..., 0]), (box[..., 3] - box[..., 1] + eps)) for box in (a, b))
    overlap = inner / (w1 * h1 + w2 * h2 - inner + eps)
    hull = torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])
    diagonal = hull.pow(2).sum(-1) + eps
    apart = (b[..., :2] + b[..., 2:] - a[..., :2] - a[..., 2:]).pow(2).sum(-1) / 4
    aspect = 4 / torch.pi**2 * (torch.atan(w2 / h2) - torch.atan(w1 / h1)).pow(2)
    weight = aspect / (aspect - overlap + (1 + eps))
    return {"overlap": (overlap - (apart / diagonal + aspect * weight)).clamp(min=0)}


def tal_background(case: Case, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Outputs of `tal` in which background anchors have row 0, wherever it went."""
    return {**outputs, "target_gt_idx": torch.where(outputs["fg_mask"], outputs["target_gt_idx"], 0)}


def simota_quantities(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Overlap of every row and anchor."""
    images = zip(tensors["gt_boxes"], tensors["pred_boxes"], strict=True)
    return {"iou": torch.stack([_overlap(truths, boxes) for truths, boxes in images])}


def _overlap(truths: Tensor, boxes: Tensor) -> Tensor:
    """IoU (G, N) of centre-form boxes."""
    a, b = truths[:, None], boxes[None]
    low = torch.maximum(a[..., :2] - a[..., 2:] / 2, b[..., :2] - b[..., 2:] / 2)
    high = torch.minimum(a[..., :2] + a[..., 2:] / 2, b[..., :2] + b[..., 2:] / 2)
    inner = (high - low).clamp(min=0).prod(-1)
    union = a[..., 2:].prod(-1) + b[..., 2:].prod(-1) - inner
    return inner / torch.where(union == 0, 1, union)
