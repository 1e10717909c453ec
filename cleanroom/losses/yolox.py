"""Losses of YOLOX's head (Ge et al., "YOLOX: Exceeding YOLO Series in 2021", arXiv:2107.08430).

A ground truth takes anchors by SimOTA; those learn its box (`1 - IoU^2`, times 5), its class softened by their overlap,
and in the last epochs the L1 distance of the raw values; every anchor learns whether it was taken. The sums are divided
by the number of taken anchors of the batch.

Per step the objectness of all anchors is read, class logits and raw values only where the assigner or a foreground
anchor asks, and the gradient is written once: 2 (5 + C) N values move upstream before the loss begins, C N of them here
never do.

Known divergences from yolox 0.3.0: those of `cleanroom.assign.simota`; so a loss is finite where a prediction without
area meets a ground truth without area, and where no anchor is near to any ground truth. Half-precision inputs are
computed in float32 and rounded once; without any ground truth upstream forgets the dtype of float32 labels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from cleanroom.assign._simota_logits import as_rows, class_logits
from cleanroom.kernels import runtime
from cleanroom.losses._yolox_terms import (
    Rows,
    box_dtype,
    map_terms,
    raw_targets,
    raw_terms,
    row_terms,
)
from cleanroom.losses._yolox_total import (
    Found,
    Rules,
    YOLOXLosses,
    check_labels,
    check_rows,
    divide,
    find,
    gather,
    make_losses,
    make_rules,
)
from cleanroom.paths import choose_path, data_dependent
from cleanroom.yolox_boxes import check_maps, decode_boxes, make_grid, raw_boxes

if runtime.AVAILABLE:
    from cleanroom.kernels.yolox_decode import decoded
    from cleanroom.kernels.yolox_loss import fused_terms

__all__ = ["YOLOXLoss", "YOLOXLosses", "yolox_decoded_loss", "yolox_loss"]


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
        path: "auto", "sparse", "static" (no data-dependent shape, nothing waits for the device) or "triton" (the same
            in fused kernels, which "auto" takes on CUDA); see `choose_path`.

    Returns:
        YOLOXLosses. Box, class and total loss have the promoted dtype of maps and labels, the L1 term that of the
        maps; under autocast half types become float32. num_fg is a tensor on every path.

    Raises:
        TypeError: a dtype is wrong.
        ValueError: a shape or a setting is wrong.
        IndexError: on the CPU, a class of labels is outside [0, C).

    Source: specification yolox_losses.md, section 3.
    """
    rules = make_rules(num_classes, radius, penalty, region, reduction, path)
    check_labels(labels)
    check_maps(maps, strides)
    check_rows("maps", maps[0].shape[0], maps[0].shape[1], labels, num_classes)
    classes, chosen = [level.detach()[:, 5:].flatten(2) for level in maps], choose_path(path, labels, *maps)
    if chosen == "triton":
        boxes, objectness, grid = decoded(maps, strides)
        found = find(labels, boxes, classes, objectness, grid, ignore_mask, rules)
        each = {"use_l1": use_l1, "each_image": rules.each_image, "ignore": ignore_mask}
        losses = fused_terms(maps, found.labels, found.matched_gt, found.positives, found.num_gt, strides, **each)
        return make_losses(losses, found, maps[0], labels, dtype or maps[0].dtype, use_l1)
    grid = make_grid(maps, strides)
    raw, objectness = raw_boxes(maps), torch.cat([level.detach()[:, 4].flatten(1) for level in maps], 1)
    boxes = decode_boxes(raw, *grid).mT
    if chosen == "static":
        classes = as_rows(classes)
    found = find(labels, boxes.contiguous(), classes, objectness, grid, ignore_mask, rules)
    assigned = gather(found, num_classes, sparse=chosen == "sparse")
    some = assigned.targets.foreground
    anchor = some.image * raw.shape[2] + some.anchor
    rows = Rows(objectness, some.of(raw.mT), class_logits(classes).rows(anchor), torch.stack(grid)[:, some.anchor])
    terms = map_terms(rows, assigned.targets, maps, use_l1=use_l1, each_image=rules.each_image)
    return make_losses(divide(terms, assigned, use_l1), found, raw, labels, dtype or raw.dtype, use_l1)


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
    rules = make_rules(num_classes, radius, penalty, region, reduction, path)
    cells = x_shifts[0], y_shifts[0], strides[0]
    return _of_rows(labels, outputs, cells, origin_preds, dtype, ignore_mask, rules)[0]


def _of_rows(
    labels: Tensor,
    outputs: Tensor,
    cells: tuple[Tensor, Tensor, Tensor],
    origin_preds: Tensor | None,
    dtype: torch.dtype | None,
    ignore_mask: Tensor | None,
    rules: Rules,
) -> tuple[YOLOXLosses, Found]:
    check_labels(labels)
    if outputs.ndim != 3 or not outputs.is_floating_point():
        raise ValueError(f"outputs must be floating (B, N, 5 + C), got {outputs.dtype} {list(outputs.shape)}")
    check_rows("outputs", outputs.shape[0], outputs.shape[2], labels, rules.num_classes)
    use_l1 = origin_preds is not None
    if use_l1 and origin_preds.shape != (*outputs.shape[:2], 4):
        raise ValueError(f"origin_preds must be {[*outputs.shape[:2], 4]}, got {list(origin_preds.shape)}")
    given = outputs.detach()
    found = find(labels, given[..., :4], given[..., 5:], given[..., 4], cells, ignore_mask, rules)
    chosen = choose_path(rules.path, labels, outputs, *cells, *(() if origin_preds is None else (origin_preds,)))
    if chosen == "triton":
        losses = fused_terms(
            [outputs.mT.unsqueeze(2)], found.labels, found.matched_gt, found.positives, found.num_gt, [1.0],
            cells=torch.stack(cells), raw=origin_preds, ignore=ignore_mask, use_l1=use_l1, each_image=rules.each_image,
        )  # fmt: skip
        return make_losses(losses, found, outputs, labels, dtype or outputs.dtype, use_l1), found
    assigned = gather(found, rules.num_classes, sparse=chosen == "sparse")
    terms = row_terms(outputs, assigned.targets, rules.each_image)
    if use_l1:
        wanted = raw_targets(assigned.targets, *cells, box_dtype(origin_preds, assigned.targets.boxes))
        terms = terms._replace(l1=raw_terms(origin_preds, wanted, assigned.targets, rules.each_image))
    losses = divide(terms, assigned, use_l1)
    return make_losses(losses, found, outputs, labels, dtype or outputs.dtype, use_l1), found


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
        self.use_l1 = use_l1
        self.rules = make_rules(num_classes, radius, penalty, region, reduction, path)

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
        cells = (torch.cat(list(levels), 1)[0] for levels in (x_shifts, y_shifts, expanded_strides))
        raw = torch.cat(list(origin_preds), 1) if use_l1 else None
        losses, found = _of_rows(labels, outputs, tuple(cells), raw, dtype, ignore_mask, self.rules)
        mean = losses.num_fg
        if data_dependent(outputs):
            mean = max(1, int(found.positives.sum())) / max(1, int(found.num_gt.sum()))
        return *losses[:4], losses.l1_loss if use_l1 else 0.0, mean
