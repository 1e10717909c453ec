"""Terms of YOLOX's loss for an assignment that is given: objectness and classes, and L1."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cleanroom.losses._yolox_rows import foreground
from cleanroom.losses._yolox_terms import Targets, box_dtype, raw_targets, raw_terms, row_terms
from cleanroom.losses.yolox_iou import result_dtype
from cleanroom.paths import data_dependent


class YOLOXBCE(NamedTuple):
    """Objectness and class term, 0-dim."""

    loss_obj: Tensor
    loss_cls: Tensor


class YOLOXL1(NamedTuple):
    """The L1 term, 0-dim, and the targets (F, 4) of the foreground anchors in ascending order."""

    loss_l1: Tensor
    l1_target: Tensor


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
    if outputs.ndim != 3 or outputs.shape[2] != 5 + num_classes or not len(outputs):
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
    terms = row_terms(outputs, targets, each_image=False)
    positives = fg_mask.sum().clamp(min=1)
    return YOLOXBCE(
        (terms.obj / positives).to(result_dtype(outputs)),
        (terms.cls / positives).to(result_dtype(matched_iou)),
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
    if origin_preds.ndim != 3 or origin_preds.shape[2] != 4 or not origin_preds.is_floating_point():
        raise ValueError(f"origin_preds must be floating (B, N, 4), got {list(origin_preds.shape)}")
    _check_anchors({"fg_mask": fg_mask, "matched_gt": matched_gt}, origin_preds.shape[:2])
    some = foreground(fg_mask, None)
    row = some.of(matched_gt).long()
    try:
        boxes = gt_boxes[some.image, row]
    except IndexError:
        raise IndexError(f"matched_gt must lie in [0, {gt_boxes.shape[1]}) on foreground") from None
    targets = Targets(fg_mask, None, *some, boxes, row)
    wanted = raw_targets(targets, x_shifts[0], y_shifts[0], strides[0], box_dtype(origin_preds, boxes))
    loss = raw_terms(origin_preds, wanted, targets, each_image=False) / max(len(row), 1)
    return YOLOXL1(loss.to(result_dtype(origin_preds)), wanted.to(origin_preds.dtype))


def _check_anchors(given: dict[str, Tensor], shape: Sequence[int]) -> None:
    for name, tensor in given.items():
        if tensor.shape != shape:
            raise ValueError(f"{name} must be {list(shape)}, got {list(tensor.shape)}")
    if given["fg_mask"].dtype != torch.bool:
        raise TypeError(f"fg_mask must be bool, got {given['fg_mask'].dtype}")
