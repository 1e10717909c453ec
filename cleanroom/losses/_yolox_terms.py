"""The four terms of YOLOX's loss as sums over the batch or an image, with their gradient.

The forward pass reads the objectness of all anchors and the rows of foreground anchors, and keeps derivatives of just
that size; the backward pass fills one tensor of the predictions' size with zeros and writes them into it.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cleanroom.losses._yolox_rows import (
    Foreground,
    class_terms,
    distance_targets,
    distance_terms,
    objectness_terms,
    overlap_terms,
)
from cleanroom.yolox_boxes import split_levels


class Targets(NamedTuple):
    """What the assigner gives to the terms; every tensor is a constant."""

    positive: Tensor
    """(B, N) bool, anchors whose objectness target is 1."""
    ignore: Tensor | None
    """(B, N) bool, anchors that take no part."""
    image: Tensor
    """(R,), with `anchor` and `valid` a `Foreground`."""
    anchor: Tensor
    valid: Tensor | None
    boxes: Tensor | None
    """(R, 4) matched boxes; None: no box term, and `values` are given."""
    labels: Tensor
    """(R,) int64 classes in [0, C)."""
    values: Tensor | None = None
    """(R,) soft label of that class; None: the overlap with the matched box."""

    @property
    def foreground(self) -> Foreground:
        """The rows that learn more than objectness."""
        return Foreground(self.image, self.anchor, self.valid)


class Terms(NamedTuple):
    """Sums, 0-dim or (B,) each, in float32 or wider."""

    iou: Tensor
    obj: Tensor
    cls: Tensor
    l1: Tensor


def row_terms(outputs: Tensor, targets: Targets, each_image: bool) -> Terms:
    """Terms of decoded rows (B, N, 5 + C); l1 is 0."""
    return Terms(*_RowTerms.apply(torch.is_grad_enabled(), each_image, outputs, *targets))


class Rows(NamedTuple):
    """What is read of raw maps, constants: objectness of all anchors, the rest of the R rows that targets name."""

    objectness: Tensor
    """(B, N) logits."""
    raw: Tensor
    """(R, 4) raw box values."""
    classes: Tensor
    """(R, C) logits."""
    cells: Tensor
    """(3, R) columns, rows and strides."""


def map_terms(rows: Rows, targets: Targets, maps: Sequence[Tensor], *, use_l1: bool, each_image: bool) -> Terms:
    """Terms of raw maps of which `rows` were read, with gradient to the maps; l1 is 0 unless asked for."""
    return Terms(*_MapTerms.apply(torch.is_grad_enabled(), each_image, use_l1, *rows, *targets, *maps))


def raw_targets(targets: Targets, x: Tensor, y: Tensor, stride: Tensor, dtype: torch.dtype) -> Tensor:
    """Raw values (R, 4) that the boxes of the rows have, from cells and strides (N,)."""
    cells = torch.stack([x, y, stride])[:, targets.anchor].to(dtype)
    return distance_targets(targets.boxes.to(dtype), cells)


def raw_terms(raw: Tensor, wanted: Tensor, targets: Targets, each_image: bool) -> Tensor:
    """The L1 term of raw boxes (B, N, 4) against raw values (R, 4)."""
    some = targets.foreground
    losses = (some.of(raw).to(wanted.dtype) - wanted).abs()
    return some.total(losses, len(raw) if each_image else None)


def working_dtype(outputs: Tensor, *others: Tensor | None) -> torch.dtype:
    """The dtype of sums over many elements: float64 if any of these is, else float32."""
    dtype = torch.promote_types(outputs.dtype, torch.float32)
    for other in others:
        if other is not None:
            dtype = torch.promote_types(dtype, other.dtype)
    return dtype


def box_dtype(outputs: Tensor, boxes: Tensor) -> torch.dtype:
    """The dtype of what is computed of the few foreground boxes: float64 on the CPU."""
    return torch.float64 if outputs.device.type == "cpu" else working_dtype(outputs, boxes)


def _forward(
    objectness: Tensor, boxes: Tensor, classes: Tensor, targets: Targets, each_image: bool, slopes: bool
) -> tuple[Terms, tuple[Tensor, Tensor, Tensor]]:
    """Terms without L1 of logits (B, N), boxes (R, 4) and logits (R, C), and the slopes by the three of them."""
    some, images = targets.foreground, len(objectness) if each_image else None
    dtype = working_dtype(objectness, targets.boxes, targets.values)
    losses, by_obj = objectness_terms(objectness.to(dtype), targets.positive, targets.ignore, slopes)
    obj = losses.sum(1) if each_image else losses.sum()
    iou, by_box, values = torch.zeros_like(obj), boxes.new_zeros(boxes.shape if slopes else (0, 4)), targets.values
    if targets.boxes is not None:
        losses, by_box, overlaps = overlap_terms(boxes, targets.boxes, slopes)
        iou, values = some.total(losses, images), overlaps if values is None else values
    losses, by_cls = class_terms(classes.to(dtype), targets.labels, values, slopes)
    terms = Terms(iou, obj, some.total(losses, images), torch.zeros_like(obj))
    return terms, (by_obj, some.keep(by_box) if slopes else by_box, some.keep(by_cls) if slopes else by_cls)


def _block(by_box: Tensor, by_cls: Tensor, dtype: torch.dtype) -> Tensor:
    """Gradient rows (R, 5 + C) of box and class columns; the column between is written elsewhere."""
    return torch.cat([by_box, by_box.new_zeros(len(by_box), 1), by_cls], 1).to(dtype)


def _at(grad: Tensor, image: Tensor) -> Tensor:
    """The gradient of a term for rows of images (R,): 0-dim, or (R, 1)."""
    return grad if grad.ndim == 0 else grad[image, None]


def _of_objectness(by_obj: Tensor, grad: Tensor) -> Tensor:
    return by_obj * (grad if grad.ndim == 0 else grad[:, None])


class _RowTerms(torch.autograd.Function):
    @staticmethod
    def forward(ctx, track: bool, each_image: bool, outputs: Tensor, *given: Tensor | None) -> tuple[Tensor, ...]:
        targets = Targets(*given)
        rows = targets.foreground.of(outputs)
        read = outputs[..., 4], rows[:, :4], rows[:, 5:]
        terms, slopes = _forward(*read, targets, each_image, track and ctx.needs_input_grad[2])
        ctx.save_for_backward(targets.image, targets.anchor, *slopes)
        ctx.like = outputs.shape, outputs.dtype
        return tuple(terms)

    @staticmethod
    @once_differentiable
    def backward(ctx, iou: Tensor, obj: Tensor, cls: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        image, anchor, by_obj, by_box, by_cls = ctx.saved_tensors
        shape, dtype = ctx.like
        grad = obj.new_zeros(shape, dtype=dtype)
        grad[image, anchor] = _block(by_box * _at(iou, image), by_cls * _at(cls, image), dtype)
        grad[..., 4] = _of_objectness(by_obj, obj)
        return None, None, grad, *[None] * len(Targets._fields)


class _MapTerms(torch.autograd.Function):
    @staticmethod
    def forward(ctx, track: bool, each_image: bool, use_l1: bool, *given: Tensor | None) -> tuple[Tensor, ...]:
        first, second = len(Rows._fields), len(Rows._fields) + len(Targets._fields)
        rows, targets, maps = Rows(*given[:first]), Targets(*given[first:second]), given[second:]
        slopes, some = track and any(ctx.needs_input_grad), targets.foreground
        # Decoded again from the raw values: the assigner's boxes have been rounded to the maps' dtype, and where a
        # trained head meets its box that rounding would decide on which side.
        dtype = box_dtype(rows.raw, targets.boxes)
        cells, raw = rows.cells.to(dtype), rows.raw.to(dtype)
        scale = cells[2, :, None]
        boxes = torch.cat([(raw[:, :2] + cells[:2].mT) * scale, raw[:, 2:].exp() * scale], 1)
        read = rows.objectness, boxes, rows.classes
        terms, (by_obj, by_box, by_cls) = _forward(*read, targets, each_image, slopes)
        by_raw = by_box[:0]
        if use_l1:
            losses, by_raw = distance_terms(raw, distance_targets(targets.boxes.to(dtype), cells))
            by_raw = some.keep(by_raw)
            terms = terms._replace(l1=some.total(losses, len(rows.objectness) if each_image else None))
        if slopes:
            # d centre / d raw is the stride, d side / d raw the side.
            by_box = by_box * some.keep(torch.cat([scale, scale, boxes[:, 2:]], 1))
        ctx.save_for_backward(targets.image, targets.anchor, by_obj, by_box, by_cls, by_raw)
        ctx.like = (len(maps[0]), maps[0].shape[1], rows.objectness.shape[1]), maps[0].dtype
        ctx.levels = [level.shape[2:] for level in maps]
        ctx.use_l1, ctx.given = use_l1, second
        return tuple(terms)

    @staticmethod
    @once_differentiable
    def backward(ctx, iou: Tensor, obj: Tensor, cls: Tensor, l1: Tensor) -> tuple[Tensor | None, ...]:
        image, anchor, by_obj, by_box, by_cls, by_raw = ctx.saved_tensors
        shape, dtype = ctx.like
        by_box = by_box * _at(iou, image)
        if ctx.use_l1:
            by_box = by_box + by_raw * _at(l1, image)
        grad = obj.new_zeros(shape, dtype=dtype)
        grad[image, :, anchor] = _block(by_box, by_cls * _at(cls, image), dtype)
        grad[:, 4] = _of_objectness(by_obj, obj)
        return None, None, None, *[None] * ctx.given, *split_levels(grad, ctx.levels)
