"""What YOLOX's assigner asks of raw maps: boxes in pixels, objectness, and where the anchors are.

For cell (x, y) of stride s and raw values t: cx = (t0 + x) s, cy = (t1 + y) s, w = exp(t2) s, h = exp(t3) s, each step
rounded to the dtype of the maps, as upstream does. Bytes moved for maps of s bytes: five of 5 + C channels read and
written, 10 s an anchor. One launch a level, in place of the seven operations and the grid that PyTorch takes.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from cleanroom.kernels import runtime
from cleanroom.kernels.numbers import cast

BLOCK = 256
"""Anchors of a program."""


@triton.jit
def _decode_kernel(
    level, by_image, by_channel, by_row, by_column, width, cells, stride, first, anchors, boxes, objectness, grid,
    BLOCK: tl.constexpr,
):  # fmt: skip
    image = tl.program_id(1).to(tl.int64)
    cell = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = cell < cells
    kind = level.dtype.element_ty
    # Divided in 32 bits: a division in 64 is a function call.
    row, column = cell // width, cell % width
    place = level + image * by_image + row.to(tl.int64) * by_row + column.to(tl.int64) * by_column
    x, y = cast(column.to(tl.float32), kind).to(tl.float32), cast(row.to(tl.float32), kind).to(tl.float32)
    s = cast(0.0 * x + stride, kind).to(tl.float32)
    t0 = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    t1 = tl.load(place + by_channel, mask=inside, other=0.0).to(tl.float32)
    t2 = tl.load(place + 2 * by_channel, mask=inside, other=0.0).to(tl.float32)
    t3 = tl.load(place + 3 * by_channel, mask=inside, other=0.0).to(tl.float32)
    logit = tl.load(place + 4 * by_channel, mask=inside, other=0.0)
    at = first + cell
    box = boxes + image * 4 * anchors + at
    tl.store(box, cast(cast(t0 + x, kind).to(tl.float32) * s, kind), mask=inside)
    tl.store(box + anchors, cast(cast(t1 + y, kind).to(tl.float32) * s, kind), mask=inside)
    tl.store(box + 2 * anchors, cast(cast(tl.exp(t2), kind).to(tl.float32) * s, kind), mask=inside)
    tl.store(box + 3 * anchors, cast(cast(tl.exp(t3), kind).to(tl.float32) * s, kind), mask=inside)
    tl.store(objectness + image * anchors + at, logit, mask=inside)
    mine = cell < tl.where(image == 0, cells, 0)
    tl.store(grid + at, x.to(kind), mask=mine)
    tl.store(grid + anchors + at, y.to(kind), mask=mine)
    tl.store(grid + 2 * anchors + at, s.to(kind), mask=mine)


def _outputs(maps: Sequence[Tensor], allocate) -> tuple[Tensor, Tensor, Tensor]:
    first, anchors = maps[0], sum(level.shape[2] * level.shape[3] for level in maps)
    shapes = (len(first), 4, anchors), (len(first), anchors), (3, anchors)
    return tuple(allocate(shape, dtype=first.dtype, device=first.device) for shape in shapes)


def _fake(maps, strides):
    return _outputs(maps, torch.empty)


@runtime.operator("yolox_decode(Tensor[] maps, float[] strides) -> (Tensor, Tensor, Tensor)", _fake)
def _decode(maps: list[Tensor], strides: list[float]) -> tuple[Tensor, Tensor, Tensor]:
    boxes, objectness, grid = found = _outputs(maps, runtime.empty)
    first = 0
    for level, stride in zip(maps, strides, strict=True):
        images, _, height, width = level.shape
        cells = height * width
        runtime.launch(
            _decode_kernel, (triton.cdiv(cells, BLOCK), images), level, *level.stride(), width, cells, float(stride),
            first, boxes.shape[2], boxes, objectness, grid, BLOCK=BLOCK,
        )  # fmt: skip
        first += cells
    return found


def decoded(maps: Sequence[Tensor], strides: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
    """What the assigner asks of raw maps (B, 5 + C, H, W) in any memory order, without gradient.

    Args:
        maps: one of each level, float32, float16 or bfloat16.
        strides: pixels a cell of each level.

    Returns:
        Boxes (B, N, 4), (cx, cy, w, h) in pixels, a view of coordinates (B, 4, N); objectness logits (B, N); columns,
        rows and strides (3, N); all in the dtype of the maps.
    """
    boxes, objectness, grid = _decode([level.detach() for level in maps], [float(stride) for stride in strides])
    return boxes.mT, objectness, grid
