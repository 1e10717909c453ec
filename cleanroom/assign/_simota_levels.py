"""Regions of SimOTA on a regular grid: which cells a box reaches, without testing boxes against all anchors.

Inside a level the cells in a box are a rectangle of columns and rows, found by bisection of the centres. Bisection
compares the same numbers as the definition does, so that edges fall alike.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from cleanroom.assign._simota_cost import Grid, Rules


class Levels(NamedTuple):
    """The levels of an anchor grid whose anchors are ordered by level, row and column."""

    start: Tensor
    """(L,) int64, first anchor of each level."""
    width: Tensor
    """(L,) int64, columns of each level."""
    stride: Tensor
    """(L,) pixels."""
    centres: Tensor
    """(L, 2, S) pixels, x of the columns and y of the rows in ascending order, padded with infinity."""


def find_levels(grid: Grid, x_shifts: Tensor, y_shifts: Tensor) -> Levels | None:
    """Return the levels of a grid with cell indices (1, N), or None where the anchors are in another order."""
    stride, counts = grid.stride.unique_consecutive(return_counts=True)
    start, starts, widths, axes = 0, [], [], []
    for count in counts.tolist():
        level = slice(start, start + count)
        height = int((x_shifts[0, level] == 0).sum())
        if height == 0 or count % height:
            return None
        width = count // height
        x, y = x_shifts[0, level].view(height, width), y_shifts[0, level].view(height, width)
        if not (torch.equal(x, _cells(x, width)) and torch.equal(y.mT, _cells(y.mT, height))):
            return None
        starts.append(start)
        widths.append(width)
        axes += [grid.x[start : start + width], grid.y[level][::width]]
        start += count
    centres = torch.nn.utils.rnn.pad_sequence(axes, batch_first=True, padding_value=torch.inf)
    device = grid.x.device
    return Levels(
        torch.tensor(starts, device=device),
        torch.tensor(widths, device=device),
        stride,
        centres.view(len(starts), 2, -1),
    )


def _cells(like: Tensor, size: int) -> Tensor:
    return torch.arange(size, dtype=like.dtype, device=like.device).expand_as(like)


def spread(counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return (item, position) of each unit of ragged items: [2, 0, 1] gives [0, 0, 2] and [0, 1, 0]."""
    item = torch.repeat_interleave(counts)
    first = counts.cumsum(0) - counts
    return item, torch.arange(len(item), device=counts.device) - first[item]


def search(
    gt_boxes: Tensor, image: Tensor, shape: tuple[int, int], levels: Levels, rules: Rules
) -> tuple[Tensor, Tensor, Tensor]:
    """Find the candidates of each image and the free pairs of each ground truth.

    Takes the boxes (T, 4) of all images, the image (T,) of each, and shape (B, N). Returns the mask of candidates
    (B * N,) bool, and of each free pair the ground truth and the anchor b * N + a, in ascending order.
    """
    first, last = _ranges(gt_boxes, levels, rules)
    base = image[:, None] * shape[1] + levels.start
    return _paint(first, last, base, levels, shape), *_free_pairs(first, last, base, levels)


def _ranges(gt_boxes: Tensor, levels: Levels, rules: Rules) -> tuple[Tensor, Tensor]:
    """Return the first cell of each box's regions and the one after the last, (T, R, L, 2) int64, x and y."""
    centre, size = gt_boxes.mT.view(2, 1, 2, 1, -1)
    reach = (rules.radius * levels.stride)[:, None, None, None]
    half = reach.expand(-1, 2, 1, centre.shape[-1])
    if rules.region != "centre":
        half = torch.cat([half, (0.5 * size).expand_as(half)], 2)
    low, high = centre - half, centre + half
    low, high = low.masked_fill_(low.isnan(), torch.inf), high.masked_fill_(high.isnan(), -torch.inf)
    axes = levels.centres.flatten(0, 1)
    first = torch.searchsorted(axes, low.flatten(0, 1).flatten(1), right=True)
    last = torch.searchsorted(axes, high.flatten(0, 1).flatten(1))
    return first.view(half.shape).permute(3, 2, 0, 1), last.view(half.shape).permute(3, 2, 0, 1)


def _paint(first: Tensor, last: Tensor, base: Tensor, levels: Levels, shape: tuple[int, int]) -> Tensor:
    """Mark the cells of the rectangles: +1 where a row of one begins, -1 where it ends, and a running sum."""
    columns, rows = (last - first).clamp_(min=0).unbind(-1)
    rectangle, row = spread((rows * (columns > 0)).flatten())
    offset = base[:, None] + first[..., 0] + first[..., 1] * levels.width
    begin = offset.flatten()[rectangle] + row * levels.width.expand_as(offset).flatten()[rectangle]
    end = begin + columns.flatten()[rectangle]
    step = torch.ones_like(begin, dtype=torch.int32)
    depth = step.new_zeros(shape[0] * shape[1] + 1)
    depth.index_add_(0, begin, step).index_add_(0, end, step, alpha=-1)
    return depth[:-1].cumsum(0, dtype=torch.int32) > 0


def _free_pairs(first: Tensor, last: Tensor, base: Tensor, levels: Levels) -> tuple[Tensor, Tensor]:
    first, last = first.amax(1), last.amin(1)
    columns, rows = (last - first).clamp_(min=0).unbind(-1)
    rectangle, cell = spread((rows * columns).flatten())
    width = columns.flatten()[rectangle]
    row = first[..., 1].flatten()[rectangle] + cell // width
    column = first[..., 0].flatten()[rectangle] + cell % width
    level = rectangle % len(levels.start)
    return rectangle // len(levels.start), base.flatten()[rectangle] + row * levels.width[level] + column
