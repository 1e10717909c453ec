"""What the two forms of YOLOX's total share: the assignment, and what becomes of the terms."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cleanroom.assign.simota import REGIONS, simota_assign
from cleanroom.losses._yolox_rows import foreground
from cleanroom.losses._yolox_terms import Targets, Terms
from cleanroom.losses.yolox_iou import result_dtype
from cleanroom.paths import choose_path

IOU_WEIGHT = 5.0
#: SimOTA sums ten overlaps of at most 1 for the number of anchors that a ground truth takes.
ANCHORS_A_GROUND_TRUTH = 10
REDUCTIONS = ("sum", "none")


class YOLOXLosses(NamedTuple):
    """The six training outputs, and the decisions behind them.

    The first five are 0-dim, or (B,) with reduction "none": contributions whose sum over images is the usual value.
    """

    total_loss: Tensor
    iou_loss: Tensor
    """5 times the box term."""
    conf_loss: Tensor
    """Objectness."""
    cls_loss: Tensor
    l1_loss: Tensor
    """0 without L1, without gradient."""
    num_fg: Tensor
    """Mean number of anchors a ground truth, 0-dim float32; 1 for a batch without ground truths."""
    fg_mask: Tensor
    """(B, N) bool, anchors that were taken."""
    matched_gt: Tensor
    """(B, N) int64, row of the ground truth in labels, -1 on background."""


class Rules(NamedTuple):
    """Settings of the loss and of the assigner inside."""

    num_classes: int
    assigner: dict[str, Any]
    each_image: bool
    path: str


class Assigned(NamedTuple):
    """What the foreground of a batch learns."""

    targets: Targets
    positives: Tensor
    """0-dim, anchors that learn a box, at least 1."""
    ground_truths: Tensor
    """0-dim, at least 1."""


def make_rules(num_classes: int, radius: float, penalty: float, region: str, reduction: str, path: str) -> Rules:
    """Settings that are sound; ValueError names the one that is not."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
    if region not in REGIONS:
        raise ValueError(f"region must be one of {REGIONS}, got {region!r}")
    choose_path(path)  # refuses an unknown path
    return Rules(num_classes, {"radius": radius, "penalty": penalty, "region": region}, reduction == "none", path)


def check_labels(labels: Tensor) -> None:
    """Refuse what holds no rows of class and box."""
    if labels.ndim != 3 or labels.shape[2] < 5:
        raise ValueError(f"labels must be (B, M, 5), got {list(labels.shape)}")


def check_rows(name: str, images: int, channels: int, labels: Tensor, num_classes: int) -> None:
    """Refuse predictions called `name` of another number of images or classes."""
    if images == 0:
        raise ValueError(f"{name} must hold at least one image")
    if channels != 5 + num_classes:
        raise ValueError(f"{name} must have 5 + {num_classes} channels, got {channels}")
    if len(labels) != images:
        raise ValueError(f"labels are of {len(labels)} images, {name} of {images}")


class Found(NamedTuple):
    """What SimOTA says of a batch, and what it was asked."""

    fg_mask: Tensor
    matched_gt: Tensor
    positive: Tensor
    """(B, N) bool, anchors that were taken and are not ignored."""
    positives: Tensor
    """(B,) how many they are."""
    ignore: Tensor | None
    num_gt: Tensor
    """(B,)"""
    labels: Tensor
    """(B, M, 5 or more) floating, M at least 1."""


@torch.no_grad()
def find(
    labels: Tensor,
    pred_boxes: Tensor,
    cls_logits: Tensor | Sequence[Tensor],
    obj_logits: Tensor,
    grid: Sequence[Tensor],
    ignore: Tensor | None,
    rules: Rules,
) -> Found:
    """Ask SimOTA; obj_logits (B, N), grid x, y and stride (N,)."""
    shape = obj_logits.shape
    if ignore is not None and (ignore.shape != shape or ignore.dtype != torch.bool):
        raise ValueError(f"ignore_mask must be bool {list(shape)}, got {ignore.dtype} {list(ignore.shape)}")
    num_gt = (labels.sum(2) > 0).sum(1)
    labels = _floating(labels)
    x, y, stride = (part[None] for part in grid)
    try:
        found = simota_assign(
            labels[..., 1:5], labels[..., 0], num_gt, pred_boxes, cls_logits, obj_logits[..., None], stride, x, y,
            num_classes=rules.num_classes, path=rules.path, **rules.assigner,
        )  # fmt: skip
    except IndexError as error:
        raise IndexError(f"labels: {error}") from None
    positive, positives = found.fg_mask, found.num_fg
    if ignore is not None:
        positive = positive & ~ignore
        positives = positive.sum(1)
    return Found(found.fg_mask, found.matched_gt, positive, positives, ignore, num_gt, labels)


@torch.no_grad()
def gather(found: Found, num_classes: int, *, sparse: bool) -> Assigned:
    """Gather what the foreground anchors learn."""
    labels, slots = found.labels, None if sparse else ANCHORS_A_GROUND_TRUTH * found.labels.shape[1]
    some = foreground(found.positive, slots)
    row = some.of(found.matched_gt).clamp(min=0)
    label = labels[some.image, row, 0].long().clamp(0, num_classes - 1)
    targets = Targets(found.positive, found.ignore, *some, labels[some.image, row, 1:5], label)
    positives, ground_truths = (some.sum().clamp(min=1) for some in (found.positives, found.num_gt))
    return Assigned(targets, positives, ground_truths)


def _floating(labels: Tensor) -> Tensor:
    """Whole numbers count as float32, as upstream's first division makes them."""
    return labels if labels.is_floating_point() else labels.float()


def divide(terms: Terms, assigned: Assigned, use_l1: bool) -> tuple[Tensor, ...]:
    """Divide, weigh and add the terms: the six losses."""
    iou, obj, cls, l1 = (term / assigned.positives for term in terms)
    iou = IOU_WEIGHT * iou
    total = iou + obj + cls
    return total + l1 if use_l1 else total, iou, obj, cls, l1, assigned.positives / assigned.ground_truths


def make_losses(
    losses: Sequence[Tensor],
    found: Found,
    predictions: Tensor,
    labels: Tensor,
    objectness: torch.dtype,
    use_l1: bool,
) -> YOLOXLosses:
    """Round each of the six to the dtype that upstream gives it; without L1 that term is 0 and has no gradient."""
    total, iou, obj, cls, l1, mean = losses
    both, own = result_dtype(predictions, _floating(labels)), result_dtype(predictions)
    objectness = torch.promote_types(objectness, torch.float32) if own != predictions.dtype else objectness
    summed = torch.promote_types(torch.promote_types(both, objectness), own)
    return YOLOXLosses(
        total.to(summed),
        iou.to(both),
        obj.to(objectness),
        cls.to(both),
        l1.to(own) if use_l1 else l1.detach().to(summed),
        mean,
        found.fg_mask,
        found.matched_gt,
    )
