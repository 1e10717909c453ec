"""Boxes of YOLOX: overlap of every pair, and decoding of raw maps.

Both keep their gradient, and neither changes its arguments.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Pairs that one thread works on at a time: PyTorch splits an operation over threads from this size on, and four
# float32 temporaries of it stay in a core's own cache.
BLOCK = 1 << 15


class YOLOXDecoded(NamedTuple):
    """Rows of all anchors, level by level, row-major inside a level."""

    outputs: Tensor
    """(B, N, 5 + C): box (cx, cy, w, h) in pixels, then the logits as they were."""
    x_shifts: Tensor
    """(1, N) column of each anchor, in the dtype of the maps."""
    y_shifts: Tensor
    """(1, N) row of each anchor."""
    strides: Tensor
    """(1, N) stride of each anchor in pixels."""


def bboxes_iou(bboxes_a: Tensor, bboxes_b: Tensor, xyxy: bool = True) -> Tensor:
    """Intersection over union of every pair, without epsilon.

    Half precision is computed in float32. Two boxes whose union is 0 overlap by 0, with gradient 0 (upstream: NaN).
    Gradient reaches both arguments; at equal edges each box takes half of it.

    Args:
        bboxes_a: (N, 4) corners (x1, y1, x2, y2), or with `xyxy` false (cx, cy, w, h), any number dtype.
        bboxes_b: (M, 4) likewise.
        xyxy: whether boxes are given by their corners.

    Returns:
        (N, M) in the promoted dtype. Integers alone give float32; in centre form they count as float32.

    Raises:
        IndexError: a second dimension is not 4.

    Source: specification yolox_losses.md, section 1.
    """
    for name, boxes in (("bboxes_a", bboxes_a), ("bboxes_b", bboxes_b)):
        if boxes.ndim != 2 or boxes.shape[1] != 4:
            raise IndexError(f"{name} must be (N, 4), got {list(boxes.shape)}")
    return _Overlap.apply(bboxes_a, bboxes_b, xyxy)


class _Sides(NamedTuple):
    """Corners and areas of boxes, (N,) each and contiguous."""

    left: Tensor
    top: Tensor
    right: Tensor
    bottom: Tensor
    area: Tensor

    def rows(self, part: slice) -> "_Sides":
        """Some boxes, each a row of its own."""
        return _Sides(*(side[part, None] for side in self))


def _sides(boxes: Tensor, xyxy: bool, dtype: torch.dtype) -> _Sides:
    first, second = boxes.detach().to(dtype).mT.contiguous().view(2, 2, -1)
    if xyxy:
        low, high, size = first, second, second - first
    else:
        half = second / 2
        low, high, size = first - half, first + half, second
    return _Sides(*low, *high, size[0] * size[1])


def _working_dtype(a: Tensor, b: Tensor) -> torch.dtype:
    """Float32 or wider; integers are exact in float64, as upstream's products of them are."""
    if not (a.is_floating_point() or b.is_floating_point()):
        return torch.float64
    return torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)


def _result_dtype(a: Tensor, b: Tensor, xyxy: bool) -> torch.dtype:
    """The promoted dtype; an integer side in centre form is halved to float32 first."""
    kinds = [boxes.dtype if boxes.is_floating_point() or xyxy else torch.float32 for boxes in (a, b)]
    result = torch.promote_types(*kinds)
    return result if result.is_floating_point else torch.float32


def _row_blocks(rows: int, columns: int, device: torch.device) -> Iterator[slice]:
    """Slices of rows whose pairs stay in the cache; everything at once elsewhere than on the CPU."""
    if device.type != "cpu" or torch.compiler.is_compiling():
        yield slice(0, rows)
        return
    size = max(1, BLOCK * torch.get_num_threads() // max(1, columns))
    for start in range(0, rows, size):
        yield slice(start, start + size)


def _shared(low: Tensor, high: Tensor, other_low: Tensor, other_high: Tensor) -> Tensor:
    return torch.minimum(high, other_high).sub_(torch.maximum(low, other_low)).clamp_(min=0)


class _Overlap(torch.autograd.Function):
    """Nothing of the size of the pairs is kept for the backward pass; it forms them anew, block by block."""

    @staticmethod
    def forward(ctx, bboxes_a: Tensor, bboxes_b: Tensor, xyxy: bool) -> Tensor:
        ctx.save_for_backward(bboxes_a, bboxes_b)
        ctx.xyxy = xyxy
        dtype = _working_dtype(bboxes_a, bboxes_b)
        a, b = _sides(bboxes_a, xyxy, dtype), _sides(bboxes_b, xyxy, dtype)
        iou = bboxes_a.new_empty(len(bboxes_a), len(bboxes_b), dtype=_result_dtype(bboxes_a, bboxes_b, xyxy))
        for part in _row_blocks(*iou.shape, iou.device):
            row = a.rows(part)
            inner = _shared(row.left, row.right, b.left, b.right).mul_(_shared(row.top, row.bottom, b.top, b.bottom))
            union = (row.area + b.area).sub_(inner)
            iou[part] = inner.div_(union).masked_fill_(union == 0, 0)
        return iou

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        bboxes_a, bboxes_b = ctx.saved_tensors
        # Edges and areas pull against each other, and only their difference counts.
        dtype = torch.float64 if grad.device.type == "cpu" else _working_dtype(bboxes_a, bboxes_b)
        a, b = _sides(bboxes_a, ctx.xyxy, dtype), _sides(bboxes_b, ctx.xyxy, dtype)
        of_a = torch.empty(5, len(bboxes_a), dtype=dtype, device=grad.device)
        of_b = torch.zeros(5, len(bboxes_b), dtype=dtype, device=grad.device)
        for part in _row_blocks(*grad.shape, grad.device):
            _accumulate(a.rows(part), b, grad[part].to(dtype), of_a[:, part], of_b)
        return (
            _to_boxes(of_a, bboxes_a, ctx.xyxy) if ctx.needs_input_grad[0] else None,
            _to_boxes(of_b, bboxes_b, ctx.xyxy) if ctx.needs_input_grad[1] else None,
            None,
        )


def _accumulate(a: _Sides, b: _Sides, grad: Tensor, of_a: Tensor, of_b: Tensor) -> None:
    """Write the gradient of a block of rows to left, top, right, bottom and area: (5, rows) and, added, (5, M)."""
    # What a box that is not finite shares is 0 here: its finite partners have a gradient nonetheless.
    width = _shared(a.left, a.right, b.left, b.right).nan_to_num_(0, 0, 0)
    height = _shared(a.top, a.bottom, b.top, b.bottom).nan_to_num_(0, 0, 0)
    inner = width * height
    union = (a.area + b.area).sub_(inner)
    none = (union.abs() > 0).logical_not_()
    scaled = (grad / union).masked_fill_(none, 0)
    iou = inner.div_(union).masked_fill_(none, 0)
    to_area = (scaled * iou).neg_()
    of_a[4] = to_area.sum(1)
    of_b[4] += to_area.sum(0)
    # d IoU / d I = (1 + IoU) / U. A side that is 0 stands for one that was negative: no overlap, no gradient.
    to_inner = scaled.mul_(iou.add_(1)).mul_((width > 0).logical_and_(height > 0))
    for axis, length in ((0, height), (1, width)):
        side = to_inner * length
        _share(side, b[axis + 2] - a[axis + 2], of_a[axis + 2], of_b[axis + 2])
        _share(side.neg_(), a[axis] - b[axis], of_a[axis], of_b[axis])


def _share(side: Tensor, lead: Tensor, of_a: Tensor, of_b: Tensor) -> None:
    """Give the gradient of an inner edge to the box that sets it: a where `lead` > 0, half to each where it is 0."""
    own = torch.heaviside(lead, lead.new_full((), 0.5)).mul_(side)
    of_a.copy_(own.sum(1))
    of_b += torch.sub(side, own, out=own).sum(0)


def _to_boxes(grad: Tensor, boxes: Tensor, xyxy: bool) -> Tensor:
    low, high, area = grad[:2], grad[2:4], grad[4]
    first, second = boxes.to(grad.dtype).mT.reshape(2, 2, -1)
    if xyxy:
        by_size = (second - first).flip(0).mul_(area)
        parts = low - by_size, high + by_size
    else:
        parts = low + high, (high - low).div_(2).add_(second.flip(0) * area)
    return torch.cat(parts).mT.to(boxes.dtype)


def yolox_decode(maps: Sequence[Tensor], strides: Sequence[float]) -> YOLOXDecoded:
    """Turn the raw maps of the levels into rows with boxes in pixels, and give the cells.

    For cell (x, y) and raw values t: cx = (t0 + x) s, cy = (t1 + y) s, w = exp(t2) s, h = exp(t3) s; logits stay.
    Every step is rounded in the maps' dtype, in upstream's order. Gradient reaches the maps.

    Args:
        maps: (B, 5 + C, H, W) of each level, floating, of one dtype; in any memory order.
        strides: pixels a cell of each level.

    Returns:
        Rows (B, N, 5 + C) and cells and strides (1, N), all in the maps' dtype.

    Raises:
        TypeError: a map is not floating.
        ValueError: the numbers of maps and strides differ, shapes of maps do not fit together, or there is no image.

    Bytes moved: the maps once in and once out, forward as backward. Source: specification simota.md, section 3.1.
    """
    check_maps(maps, strides)
    grid = make_grid(maps, strides)
    return YOLOXDecoded(_Decode.apply(*grid, *maps), *(part[None] for part in grid))


def check_maps(maps: Sequence[Tensor], strides: Sequence[float]) -> None:
    """Refuse maps that are not the levels of one head; TypeError or ValueError names `maps` or `strides`."""
    if len(maps) != len(strides) or not maps:
        raise ValueError(f"strides must have one entry a map, got {len(strides)} for {len(maps)} maps")
    first = maps[0]
    for level, raw in enumerate(maps):
        if not raw.is_floating_point() or raw.dtype != first.dtype:
            raise TypeError(f"maps must be floating and of one dtype, got {raw.dtype} at level {level}")
        if raw.ndim != 4 or raw.shape[1] < 5 or raw.shape[:2] != first.shape[:2]:
            raise ValueError(f"maps must be (B, 5 + C, H, W) of one B and C, got {list(raw.shape)} at level {level}")
    if first.shape[0] == 0:
        raise ValueError("maps must hold at least one image")


def make_grid(maps: Sequence[Tensor], strides: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
    """Columns, rows and strides (N,) of all anchors of the maps, in their dtype."""
    first, shapes = maps[0], tuple(tuple(raw.shape[2:]) for raw in maps)
    if first.device.type == "cpu" and type(first) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling():
        # Training asks for few shapes again and again.
        return torch.from_numpy(_cells(shapes, tuple(strides))).to(first.dtype, copy=True).unbind(0)
    columns, rows, sizes = [], [], []
    cell = {"dtype": first.dtype, "device": first.device}
    for (height, width), stride in zip(shapes, strides, strict=True):
        columns.append(torch.arange(width, **cell).repeat(height))
        rows.append(torch.arange(height, **cell).repeat_interleave(width))
        sizes.append(torch.full((height * width,), stride, **cell))
    return torch.cat(columns), torch.cat(rows), torch.cat(sizes)


@lru_cache(maxsize=64)
def _cells(shapes: tuple[tuple[int, int], ...], strides: tuple[float, ...]) -> np.ndarray:
    """(3, N) columns, rows and strides."""
    levels = [
        np.stack([*np.indices(shape)[::-1], np.full(shape, stride)]).reshape(3, -1)
        for shape, stride in zip(shapes, strides, strict=True)
    ]
    return np.concatenate(levels, axis=1).astype(np.float64)


def raw_boxes(maps: Sequence[Tensor]) -> Tensor:
    """Raw box values (B, 4, N) of the maps, without gradient."""
    return torch.cat([raw.detach()[:, :4].flatten(2) for raw in maps], 2)


def decode_boxes(raw: Tensor, x: Tensor, y: Tensor, stride: Tensor) -> Tensor:
    """Boxes (B, 4, N) in pixels of raw values (B, 4, N) on a grid (N,), each step rounded in their dtype."""
    return torch.cat([raw[:, :2] + torch.stack([x, y]), raw[:, 2:].exp()], 1).mul_(stride)


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *given: Tensor) -> Tensor:
        # Not spelt out: Dynamo takes a function of as many parameters as there are arguments for one without ctx.
        (x, y, stride), maps = given[:3], given[3:]
        raw = raw_boxes(maps)
        ctx.save_for_backward(stride, raw)
        ctx.shapes = [level.shape[2:] for level in maps]
        rows = torch.cat([level.flatten(2).mT for level in maps], 1)
        rows[..., :4] = decode_boxes(raw, x, y, stride).mT
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        stride, raw = ctx.saved_tensors
        columns = grad.mT.contiguous()
        columns[:, :4] *= stride
        columns[:, 2:4] *= raw[:, 2:].exp()
        return None, None, None, *split_levels(columns, ctx.shapes)


def split_levels(columns: Tensor, shapes: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Views (B, 5 + C, H, W) of the levels of (B, 5 + C, N)."""
    sizes = [height * width for height, width in shapes]
    parts = columns.split(sizes, 2)
    return [part.unflatten(2, tuple(shape)) for part, shape in zip(parts, shapes, strict=True)]
