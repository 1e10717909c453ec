"""Which anchors lie inside rotated boxes, as a number: how deep (`spec/task_aligned.md` section 9)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def small_box(era: dict[str, Any], stride: list[float]) -> tuple[float, float]:
    """(threshold, side): sides strictly below the first number count as the second."""
    second = stride[min(1, len(stride) - 1)]
    return {"off": (0.0, 0.0), "first_stride": (stride[0], second), "min_side": (second, second)}[era["small_box"]]


def enlarged(boxes: Tensor, threshold: float, side: float) -> Tensor:
    """(..., 5) boxes with their short sides lengthened."""
    if not threshold:
        return boxes
    sides = boxes[..., 2:4]
    sides = torch.where(sides < threshold, torch.full_like(sides, side), sides)
    return torch.cat((boxes[..., :2], sides, boxes[..., 4:]), -1)


def rotated_sides(boxes: Tensor, points: Tensor, threshold: float, side: float) -> Tensor:
    """Smallest of the four distances (pixels) from points (A, 2) to the sides of boxes (B, n, 5), inside positive.

    (B, n, A), in the dtype of the boxes and from their rounded corners, as upstream asks.
    """
    x, y, width, height, angle = enlarged(boxes, threshold, side)[..., None].unbind(-2)
    cosine, sine = angle.cos(), angle.sin()
    across, along = (width / 2 * cosine, width / 2 * sine), (-height / 2 * sine, height / 2 * cosine)
    start, second, fourth = (
        tuple(centre + one * a + two * b for centre, a, b in zip((x, y), across, along, strict=True))
        for one, two in ((1, 1), (1, -1), (-1, 1))
    )
    found = []
    for corner in (second, fourth):
        way = corner[0] - start[0], corner[1] - start[1]
        inner = (points[:, 0] - start[0]) * way[0] + (points[:, 1] - start[1]) * way[1]
        square = way[0] * way[0] + way[1] * way[1]
        # A side without length: every anchor is on the edge.
        found += [torch.where(square == 0, 0, part / square.sqrt()) for part in (inner, square - inner)]
    return torch.stack(found).amin(0)
