"""Losses of YOLOX's head (Ge et al., "YOLOX: Exceeding YOLO Series in 2021", arXiv:2107.08430).

A ground truth takes anchors by SimOTA; those learn its box (`1 - IoU^2`, times 5), its class softened by their overlap,
and in the last epochs the L1 distance of the raw values; every anchor learns whether it was taken. The sums are divided
by the number of taken anchors of the batch.

Known divergences from yolox 0.3.0: those of `cleanroom.assign.simota`; so a loss is finite where a prediction without
area meets a ground truth without area, and where no anchor is near to any ground truth. Half-precision inputs are
computed in float32 and rounded once.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cleanroom.assign.simota import simota_assign
from cleanroom.losses._yolox_rows import distance_targets, foreground
from cleanroom.losses._yolox_terms import Targets, Terms, map_terms, raw_terms, row_terms
from cleanroom.losses.yolox_iou import result_dtype
from cleanroom.paths import data_dependent, take_sparse_path
from cleanroom.yolox_boxes import check_maps, decode_rows, make_grid

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


class YOLOXBCE(NamedTuple):
    """Objectness and class term, 0-dim."""

    loss_obj: Tensor
    loss_cls: Tensor


class YOLOXL1(NamedTuple):
    """The L1 term, 0-dim, and the targets (F, 4) of the foreground anchors in ascending order."""

    loss_l1: Tensor
    l1_target: Tensor


class _Rules(NamedTuple):
    num_classes: int
    assigner: dict[str, Any]
    reduction: str
    path: str


class _Assigned(NamedTuple):
    targets: Targets
    positives: Tensor
    """0-dim, anchors that learn a box, at least 1."""
    ground_truths: Tensor
    """0-dim, at least 1."""
    fg_mask: Tensor
    matched_gt: Tensor


def yolox_loss(
    labels: Tensor,
    maps: Sequence[Tensor],
    *,
    strides: Sequence[float],
    num_classes: int,
    use_l1: bool = False,
    radius: float = 2.5,
    penalty: float = 1e5,
    region: str = "union",
    dtype: torch.dtype | None = None,
    reduction: str = "sum",
    ignore_mask: Tensor | None = None,
    path: str = "auto",
) -> YOLOXLosses:
    """Training losses of the raw maps of a head, assignment included; gradient reaches the maps.

    Args:
        labels: (B, M, 5 or more) rows (class, cx, cy, w, h) in pixels, any number dtype. As many leading rows of an
            image are ground truths as it has rows whose sum over all columns is above 0.
        maps: (B, 5 + C, H, W) of each level, floating: box, objectness and class channels.
        strides: pixels a cell of each level.
        num_classes: C.
        use_l1: whether to add the L1 term.
        radius: as penalty and region of `simota_assign`.
        penalty: see radius.
        region: see radius.
        dtype: dtype of the objectness term; default: that of the maps.
        reduction: "sum", or "none" for the contribution of each image.
        ignore_mask: (B, N) bool; True: the anchor takes no part in any term nor in the number of positives. The
            assignment is made as without it, and returned so.
        path: "auto", "sparse" or "static" (no data-dependent shape, nothing waits for the device).

    Returns:
        YOLOXLosses. Box, class and total loss have the promoted dtype of maps and labels, the L1 term that of the
        maps; under autocast half types become float32. num_fg is a tensor on every path.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape or a setting is wrong.
        IndexError: on the CPU, a class of labels is outside [0, C).

    Source: specification yolox_losses.md, section 3.
    """
    rules = _rules(num_classes, radius, penalty, region, reduction, path)
    _check_labels(labels)
    check_maps(maps, strides)
    _check_rows("maps", maps[0].shape[0], maps[0].shape[1], labels, num_classes)
    x, y, stride = make_grid(maps, strides)
    rows = decode_rows(maps, x, y, stride)
    assigned = _assign(labels, rows, x, y, stride, ignore_mask, rules)
    cells = (torch.cat([raw.detach()[:, :4].flatten(2).mT for raw in maps], 1), x, y) if use_l1 else None
    terms = map_terms(rows, assigned.targets, cells, stride, maps)
    return _losses(terms, assigned, rows, labels, dtype or rows.dtype, use_l1, rules.reduction)


def yolox_decoded_loss(
    labels: Tensor,
    outputs: Tensor,
    x_shifts: Tensor,
    y_shifts: Tensor,
    strides: Tensor,
    origin_preds: Tensor | None = None,
    *,
    num_classes: int,
    radius: float = 2.5,
    penalty: float = 1e5,
    region: str = "union",
    dtype: torch.dtype | None = None,
    reduction: str = "sum",
    ignore_mask: Tensor | None = None,
    path: str = "auto",
) -> YOLOXLosses:
    """Training losses of decoded rows; gradient reaches outputs and origin_preds.

    Args:
        labels: as for `yolox_loss`.
        outputs: (B, N, 5 + C) floating: boxes (cx, cy, w, h) in pixels, objectness and class logits.
        x_shifts: (1, N) column of each anchor in its level.
        y_shifts: (1, N) row of each anchor in its level.
        strides: (1, N) pixels.
        origin_preds: (B, N, 4) raw box values for the L1 term; None: no such term.
        num_classes: as all other settings, see `yolox_loss`.
        radius: see num_classes.
        penalty: see num_classes.
        region: see num_classes.
        dtype: see num_classes.
        reduction: see num_classes.
        ignore_mask: see num_classes.
        path: see num_classes.

    Returns:
        What yolox_loss returns.

    Raises:
        What yolox_loss raises.
    """
    rules = _rules(num_classes, radius, penalty, region, reduction, path)
    _check_labels(labels)
    if outputs.ndim != 3 or not outputs.is_floating_point():  # noqa: PLR2004 - B, N, 5 + C
        raise ValueError(f"outputs must be floating (B, N, 5 + C), got {outputs.dtype} {list(outputs.shape)}")
    _check_rows("outputs", outputs.shape[0], outputs.shape[2], labels, num_classes)
    cells = x_shifts[0], y_shifts[0], strides[0]
    assigned = _assign(labels, outputs, *cells, ignore_mask, rules)
    terms = row_terms(outputs, assigned.targets)
    if origin_preds is not None:
        if origin_preds.shape != (*outputs.shape[:2], 4):
            raise ValueError(f"origin_preds must be {[*outputs.shape[:2], 4]}, got {list(origin_preds.shape)}")
        terms = terms._replace(l1=raw_terms(origin_preds, assigned.targets, *cells))
    return _losses(terms, assigned, outputs, labels, dtype or outputs.dtype, origin_preds is not None, rules.reduction)


class YOLOXLoss:
    """The loss of YOLOX's head with its arguments and results: `head.get_losses = YOLOXLoss(head.num_classes)`.

    Settings are those of `yolox_loss`. `use_l1` None: whether the head gives raw boxes, which it does exactly when its
    own `use_l1` is set, so that the trainer's switch in the last epochs is followed.
    """

    def __init__(
        self,
        num_classes: int,
        use_l1: bool | None = None,
        *,
        radius: float = 2.5,
        penalty: float = 1e5,
        region: str = "union",
        reduction: str = "sum",
        path: str = "auto",
    ) -> None:
        _rules(num_classes, radius, penalty, region, reduction, path)
        self.use_l1 = use_l1
        self.settings = {
            "num_classes": num_classes,
            "radius": radius,
            "penalty": penalty,
            "region": region,
            "reduction": reduction,
            "path": path,
        }

    def __call__(
        self,
        imgs: object,
        x_shifts: Sequence[Tensor],
        y_shifts: Sequence[Tensor],
        expanded_strides: Sequence[Tensor],
        labels: Tensor,
        outputs: Tensor,
        origin_preds: Sequence[Tensor],
        dtype: torch.dtype,
        ignore_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | float, Tensor | float]:
        """Return the six training outputs of a batch.

        Args:
            imgs: ignored.
            x_shifts: (1, n) of each level, columns of its anchors.
            y_shifts: (1, n) of each level, rows of its anchors.
            expanded_strides: (1, n) of each level, pixels.
            labels: (B, M, 5) rows (class, cx, cy, w, h) in pixels, as for `yolox_loss`.
            outputs: (B, N, 5 + C) decoded rows of all levels.
            origin_preds: (B, n, 4) of each level, raw boxes; empty without L1.
            dtype: dtype of the objectness term.
            ignore_mask: as for `yolox_loss`.

        Returns:
            total, 5 * box, objectness, class and L1 loss, and the mean number of anchors a ground truth. Without L1
            the fifth is the float 0.0. The last is a float on the CPU, else (and under torch.compile) a 0-dim tensor,
            so that nothing waits for the device.

        Raises:
            What yolox_loss raises.
        """
        use_l1 = bool(len(origin_preds)) if self.use_l1 is None else self.use_l1
        if use_l1 and not len(origin_preds):
            raise ValueError("origin_preds must hold the raw boxes of every level for the L1 term")
        found = yolox_decoded_loss(
            labels,
            outputs,
            torch.cat(list(x_shifts), 1),
            torch.cat(list(y_shifts), 1),
            torch.cat(list(expanded_strides), 1),
            torch.cat(list(origin_preds), 1) if use_l1 else None,
            dtype=dtype,
            ignore_mask=ignore_mask,
            **self.settings,
        )
        mean = float(found.num_fg) if data_dependent(outputs) else found.num_fg
        return *found[:4], found.l1_loss if use_l1 else 0.0, mean


def yolox_bce(
    outputs: Tensor, fg_mask: Tensor, matched_classes: Tensor, matched_iou: Tensor, *, num_classes: int
) -> YOLOXBCE:
    """Objectness and class term of a given assignment: sums divided by the number of foreground anchors or 1.

    Objectness is 1 on foreground and 0 elsewhere; the class target is the overlap at the matched class. Gradient
    reaches outputs only.

    Args:
        outputs: (B, N, 5 + C) floating; columns 4 and up are logits, the others are not read.
        fg_mask: (B, N) bool.
        matched_classes: (B, N), truncated toward zero; read on foreground only, as matched_iou.
        matched_iou: (B, N) floating.
        num_classes: C.

    Returns:
        YOLOXBCE: the objectness term in the dtype of outputs, the class term in that of matched_iou.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape is wrong.
        IndexError: on the CPU, a class is outside [0, C).

    Source: specification yolox_losses.md, sections 3.3 and 3.4.
    """
    if outputs.ndim != 3 or outputs.shape[2] != 5 + num_classes or not len(outputs):  # noqa: PLR2004 - B, N, 5 + C
        raise ValueError(f"outputs must be (B, N, {5 + num_classes}) with B >= 1, got {list(outputs.shape)}")
    given = {"fg_mask": fg_mask, "matched_classes": matched_classes, "matched_iou": matched_iou}
    _check_anchors(given, outputs.shape[:2])
    if not matched_iou.is_floating_point():
        raise TypeError(f"matched_iou must be floating, got {matched_iou.dtype}")
    sparse = data_dependent(outputs, *given.values())
    some = foreground(fg_mask, None if sparse else fg_mask.shape[1])
    classes = some.keep(some.of(matched_classes)).long()
    if sparse and len(classes) and not 0 <= classes.min() <= classes.max() < num_classes:
        raise IndexError(f"matched_classes must lie in [0, {num_classes}), got {classes.min()} to {classes.max()}")
    targets = Targets(fg_mask, None, *some, None, classes, some.of(matched_iou))
    terms = row_terms(outputs, targets)
    positives = fg_mask.sum().clamp(min=1)
    return YOLOXBCE(
        (terms.obj.sum() / positives).to(result_dtype(outputs)),
        (terms.cls.sum() / positives).to(result_dtype(matched_iou)),
    )


def yolox_l1(
    origin_preds: Tensor,
    fg_mask: Tensor,
    matched_gt: Tensor,
    gt_boxes: Tensor,
    strides: Tensor,
    x_shifts: Tensor,
    y_shifts: Tensor,
) -> YOLOXL1:
    """L1 term of a given assignment, `sum |raw - target| / max(F, 1)`, and its targets.

    The target of box (cx, cy, w, h) at cell (x, y) of stride s is (cx/s - x, cy/s - y, ln(w/s + 1e-8), ln(h/s + 1e-8)).
    Gradient reaches origin_preds only: a sign, 0 at equality.

    Args:
        origin_preds: (B, N, 4) raw box values, floating.
        fg_mask: (B, N) bool.
        matched_gt: (B, N) integer, row of the ground truth; read on foreground only.
        gt_boxes: (B, M, 4) boxes (cx, cy, w, h) in pixels.
        strides: (1, N) pixels.
        x_shifts: (1, N) columns.
        y_shifts: (1, N) rows.

    Returns:
        YOLOXL1, both in the dtype of origin_preds (the loss in float32 for half types under autocast). The targets
        are (F, 4) whatever the device: asking for F makes the host wait for it; `yolox_loss` never does.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape is wrong.
        IndexError: on the CPU, a row is outside [0, M).

    Source: specification yolox_losses.md, sections 3.3 and 3.4.
    """
    if origin_preds.ndim != 3 or origin_preds.shape[2] != 4 or not origin_preds.is_floating_point():  # noqa: PLR2004
        raise ValueError(f"origin_preds must be floating (B, N, 4), got {list(origin_preds.shape)}")
    _check_anchors({"fg_mask": fg_mask, "matched_gt": matched_gt}, origin_preds.shape[:2])
    some = foreground(fg_mask, None)
    row = some.of(matched_gt).long()
    if data_dependent(row) and len(row) and not 0 <= row.min() <= row.max() < gt_boxes.shape[1]:
        raise IndexError(f"matched_gt must lie in [0, {gt_boxes.shape[1]}), got {row.min()} to {row.max()}")
    boxes = gt_boxes[some.image, row]
    cells = x_shifts[0], y_shifts[0], strides[0]
    targets = Targets(fg_mask, None, *some, boxes, row, row)
    loss = raw_terms(origin_preds, targets, *cells).sum() / fg_mask.sum().clamp(min=1)
    wide = torch.promote_types(torch.promote_types(origin_preds.dtype, boxes.dtype), torch.float32)
    found = distance_targets(boxes.to(wide), *(cell[some.anchor].to(wide) for cell in cells))
    return YOLOXL1(loss.to(result_dtype(origin_preds)), found.to(origin_preds.dtype))


def _rules(num_classes: int, radius: float, penalty: float, region: str, reduction: str, path: str) -> _Rules:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {REDUCTIONS}, got {reduction!r}")
    take_sparse_path(path)  # refuses an unknown path
    return _Rules(num_classes, {"radius": radius, "penalty": penalty, "region": region}, reduction, path)


def _check_labels(labels: Tensor) -> None:
    if labels.ndim != 3 or labels.shape[2] < 5:  # noqa: PLR2004 - class and box
        raise ValueError(f"labels must be (B, M, 5), got {list(labels.shape)}")


def _check_rows(name: str, images: int, channels: int, labels: Tensor, num_classes: int) -> None:
    if images == 0:
        raise ValueError(f"{name} must hold at least one image")
    if channels != 5 + num_classes:
        raise ValueError(f"{name} must have 5 + {num_classes} channels, got {channels}")
    if len(labels) != images:
        raise ValueError(f"labels are of {len(labels)} images, {name} of {images}")


def _check_anchors(given: dict[str, Tensor], shape: Sequence[int]) -> None:
    for name, tensor in given.items():
        if tensor.shape != shape:
            raise ValueError(f"{name} must be {list(shape)}, got {list(tensor.shape)}")
    if given["fg_mask"].dtype != torch.bool:
        raise TypeError(f"fg_mask must be bool, got {given['fg_mask'].dtype}")


@torch.no_grad()
def _assign(
    labels: Tensor, rows: Tensor, x: Tensor, y: Tensor, stride: Tensor, ignore: Tensor | None, rules: _Rules
) -> _Assigned:
    """Ask SimOTA, and gather what its foreground anchors learn."""
    if ignore is not None and (ignore.shape != rows.shape[:2] or ignore.dtype != torch.bool):
        raise ValueError(f"ignore_mask must be bool {list(rows.shape[:2])}, got {ignore.dtype} {list(ignore.shape)}")
    num_gt = (labels.sum(2) > 0).sum(1)
    if labels.shape[1] == 0:  # one padding row, so that gathering has something to read
        labels = labels.new_zeros(len(labels), 1, labels.shape[2])
    boxes, classes = labels[..., 1:5], labels[..., 0]
    logits = rows[..., 5:], rows[..., 4:5]
    grid = stride[None], x[None], y[None]
    try:
        found = simota_assign(
            boxes, classes, num_gt, rows[..., :4], *logits, *grid,
            num_classes=rules.num_classes, path=rules.path, **rules.assigner,
        )  # fmt: skip
    except IndexError as error:
        raise IndexError(f"labels: {error}") from None
    positive = found.fg_mask if ignore is None else found.fg_mask & ~ignore
    sparse = take_sparse_path(rules.path, labels, rows)
    some = foreground(positive, None if sparse else ANCHORS_A_GROUND_TRUTH * labels.shape[1])
    row = some.of(found.matched_gt).clamp(min=0)
    label = labels[some.image, row, 0].long().clamp(0, rules.num_classes - 1)
    targets = Targets(positive, ignore, *some, boxes[some.image, row], label, some.of(found.matched_iou))
    positives, ground_truths = positive.sum().clamp(min=1), num_gt.sum().clamp(min=1)
    return _Assigned(targets, positives, ground_truths, found.fg_mask, found.matched_gt)


def _losses(
    terms: Terms,
    assigned: _Assigned,
    rows: Tensor,
    labels: Tensor,
    objectness: torch.dtype,
    use_l1: bool,
    reduction: str,
) -> YOLOXLosses:
    """Divide, weigh and add the terms, and round each to the dtype that upstream gives it."""
    reduce: Callable[[Tensor], Tensor] = torch.sum if reduction == "sum" else torch.clone
    iou, obj, cls, l1 = (reduce(term) / assigned.positives for term in terms)
    iou = IOU_WEIGHT * iou
    total = iou + obj + cls
    if use_l1:
        total = total + l1
    both, own = result_dtype(rows, labels), result_dtype(rows)
    objectness = torch.promote_types(objectness, torch.float32) if own != rows.dtype else objectness
    summed = torch.promote_types(torch.promote_types(both, objectness), own)
    return YOLOXLosses(
        total.to(summed),
        iou.to(both),
        obj.to(objectness),
        cls.to(both),
        l1.to(own) if use_l1 else torch.zeros_like(total, dtype=summed, requires_grad=False),
        assigned.positives / assigned.ground_truths,
        assigned.fg_mask,
        assigned.matched_gt,
    )
