"""The four terms of YOLOX's loss as sums an image, with their gradient.

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
    """(R, 4) matched boxes; None: no box term."""
    labels: Tensor
    """(R,) int64 classes in [0, C)."""
    values: Tensor
    """(R,) soft label of that class."""

    @property
    def foreground(self) -> Foreground:
        """The rows that learn more than objectness."""
        return Foreground(self.image, self.anchor, self.valid)


class Terms(NamedTuple):
    """Sums an image, (B,) each, in float32 or wider."""

    iou: Tensor
    obj: Tensor
    cls: Tensor
    l1: Tensor


def row_terms(outputs: Tensor, targets: Targets) -> Terms:
    """Terms of decoded rows (B, N, 5 + C); l1 is 0."""
    return Terms(*_RowTerms.apply(outputs, *targets))


def map_terms(
    rows: Tensor, targets: Targets, cells: tuple[Tensor, Tensor, Tensor] | None, stride: Tensor, maps: Sequence[Tensor]
) -> Terms:
    """Terms of raw maps whose decoded `rows` (B, N, 5 + C) are given, with gradient to the maps.

    `cells`: the raw box channels (B, N, 4), columns and rows (N,), for the L1 term; None: no such term.
    """
    raw, x, y = (None, None, None) if cells is None else cells
    return Terms(*_MapTerms.apply(rows, raw, x, y, stride, *targets, *maps))


def raw_terms(raw: Tensor, targets: Targets, x: Tensor, y: Tensor, stride: Tensor) -> Tensor:
    """The L1 term (B,) of raw boxes (B, N, 4); cells and strides (N,)."""
    return _RawTerms.apply(raw, x, y, stride, targets.image, targets.anchor, targets.valid, targets.boxes)


def working_dtype(outputs: Tensor, *others: Tensor | None) -> torch.dtype:
    """The dtype that everything is computed in: float64 if any is, else float32."""
    dtype = torch.promote_types(outputs.dtype, torch.float32)
    for other in others:
        if other is not None:
            dtype = torch.promote_types(dtype, other.dtype)
    return dtype


def _forward(outputs: Tensor, targets: Targets, slopes: bool) -> tuple[Terms, tuple[Tensor, Tensor, Tensor]]:
    """Terms without L1, and the slopes by boxes (R, 4), objectness (B, N) and classes (R, C)."""
    dtype = working_dtype(outputs, targets.boxes, targets.values)
    some, images = targets.foreground, len(outputs)
    rows = some.of(outputs).to(dtype)
    obj, by_obj = objectness_terms(outputs[..., 4].to(dtype), targets.positive, targets.ignore, slopes)
    cls, by_cls = class_terms(rows[:, 5:], targets.labels, targets.values, slopes)
    none = obj.new_zeros(images)
    if targets.boxes is None:
        iou, by_box = none, rows.new_zeros(len(rows) if slopes else 0, 4)
    else:
        losses, by_box = overlap_terms(rows[:, :4], targets.boxes.to(dtype), slopes)
        iou = some.per_image(losses, images)
    terms = Terms(iou, obj, some.per_image(cls, images), none)
    return terms, (some.keep(by_box) if slopes else by_box, by_obj, some.keep(by_cls) if slopes else by_cls)


def _block(some: Foreground, by_box: Tensor, by_cls: Tensor, grad_cls: Tensor) -> Tensor:
    """Gradient rows (R, 5 + C) with scaled box and class columns; the column between is written elsewhere."""
    return torch.cat([by_box, by_box.new_zeros(len(by_box), 1), by_cls * grad_cls[some.image, None]], 1)


class _RowTerms(torch.autograd.Function):
    @staticmethod
    def forward(ctx, outputs: Tensor, *given: Tensor | None) -> tuple[Tensor, ...]:
        targets = Targets(*given)
        terms, slopes = _forward(outputs, targets, ctx.needs_input_grad[0])
        ctx.save_for_backward(targets.image, targets.anchor, *slopes)
        ctx.like = outputs.shape, outputs.dtype
        return tuple(terms)

    @staticmethod
    @once_differentiable
    def backward(ctx, iou: Tensor, obj: Tensor, cls: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        image, anchor, by_box, by_obj, by_cls = ctx.saved_tensors
        some = Foreground(image, anchor, None)
        shape, dtype = ctx.like
        grad = obj.new_zeros(shape, dtype=dtype)
        grad[image, anchor] = _block(some, by_box * iou[image, None], by_cls, cls).to(dtype)
        grad[..., 4] = by_obj * obj[:, None]
        return grad, *[None] * len(Targets._fields)


class _MapTerms(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        rows: Tensor,
        raw: Tensor | None,
        x: Tensor | None,
        y: Tensor | None,
        stride: Tensor,
        *given: Tensor | None,
    ) -> tuple[Tensor, ...]:
        count = len(Targets._fields)
        targets, maps = Targets(*given[:count]), given[count:]
        slopes = any(ctx.needs_input_grad)
        terms, (by_box, by_obj, by_cls) = _forward(rows, targets, slopes)
        some = targets.foreground
        by_raw = by_box[:0]
        if raw is not None:
            l1, by_raw = _distance(raw, targets.boxes, x, y, stride, some)
            terms = terms._replace(l1=some.per_image(l1, len(rows)))
        if slopes:
            # d centre / d raw is the stride, d side / d raw the side.
            by_box = by_box.clone()
            by_box[:, :2] *= stride[some.anchor, None]
            by_box[:, 2:] *= some.keep(some.of(rows)[:, 2:4].to(by_box.dtype))
        ctx.save_for_backward(targets.image, targets.anchor, by_box, by_obj, by_cls, by_raw)
        ctx.like = (len(rows), rows.shape[2], rows.shape[1]), rows.dtype
        ctx.levels = [level.shape[2:] for level in maps]
        ctx.with_l1 = raw is not None
        return tuple(terms)

    @staticmethod
    @once_differentiable
    def backward(ctx, iou: Tensor, obj: Tensor, cls: Tensor, l1: Tensor) -> tuple[Tensor | None, ...]:
        image, anchor, by_box, by_obj, by_cls, by_raw = ctx.saved_tensors
        some = Foreground(image, anchor, None)
        shape, dtype = ctx.like
        by_box = by_box * iou[image, None]
        if ctx.with_l1:
            by_box = by_box + by_raw * l1[image, None]
        grad = obj.new_zeros(shape, dtype=dtype)
        grad[image, :, anchor] = _block(some, by_box, by_cls, cls).to(dtype)
        grad[:, 4] = by_obj * obj[:, None]
        return *[None] * (5 + len(Targets._fields)), *split_levels(grad, ctx.levels)


class _RawTerms(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        raw: Tensor,
        x: Tensor,
        y: Tensor,
        stride: Tensor,
        image: Tensor,
        anchor: Tensor,
        valid: Tensor | None,
        boxes: Tensor,
    ) -> Tensor:
        some = Foreground(image, anchor, valid)
        losses, slopes = _distance(raw, boxes, x, y, stride, some)
        ctx.save_for_backward(image, anchor, slopes)
        ctx.like = raw.shape, raw.dtype
        return some.per_image(losses, len(raw))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        image, anchor, slopes = ctx.saved_tensors
        shape, dtype = ctx.like
        result = grad.new_zeros(shape, dtype=dtype)
        result[image, anchor] = (slopes * grad[image, None]).to(dtype)
        return result, *[None] * 7


def _distance(
    raw: Tensor, boxes: Tensor, x: Tensor, y: Tensor, stride: Tensor, some: Foreground
) -> tuple[Tensor, Tensor]:
    dtype = working_dtype(raw, boxes)
    at = (cell[some.anchor].to(dtype) for cell in (x, y, stride))
    losses, slopes = distance_terms(some.of(raw).to(dtype), distance_targets(boxes.to(dtype), *at))
    return losses, some.keep(slopes)
