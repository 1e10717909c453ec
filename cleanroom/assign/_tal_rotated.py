"""What the assigner of rotated boxes has of its own: who is a candidate, and how pairs overlap (task_aligned.md, 9)."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from cleanroom.assign._tal_terms import Geometry, Rules
from cleanroom.rotated_overlap import PLAIN, GaussianTerms, gaussian_iou, gaussian_terms, stable_form

# Regions with shorter sides (pixels) or flatter angles (sine) are no better than their rounding: they are looked for
# among all anchors.
SHORTEST_SIDE = 1e-12
FLATTEST_ANGLE = 0.01
# Roundings of the two products and the sum that put a point on one side of an edge, with room to spare.
ROUNDINGS = 8
# Anchors on the edges of a region belong to it, those on the edges of its bounds do not (pixels).
BEYOND_EDGES = 1e-6


class Parallelogram(NamedTuple):
    """Regions of candidates: a corner and the ways from it to its two neighbours, pixels; any shape of rows.

    As computed from rounded corners the two ways are not quite perpendicular; for boxes thinner than that rounding
    the region is a strip across the whole image.
    """

    x: Tensor
    y: Tensor
    first_x: Tensor
    first_y: Tensor
    second_x: Tensor
    second_y: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> "Parallelogram":
        """Apply a function of one tensor (an indexing, a reshape) to every number."""
        return Parallelogram(*map(function, self))

    def contains(self, x: Tensor, y: Tensor) -> Tensor:
        """Whether points lie inside or on an edge; broadcasts."""
        dx, dy = x - self.x, y - self.y
        found = None
        for way_x, way_y in ((self.first_x, self.first_y), (self.second_x, self.second_y)):
            along = dx * way_x + dy * way_y
            within = (along >= 0) & (along <= way_x * way_x + way_y * way_y)
            found = within if found is None else found & within
        return found

    def bounds(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Left, top, right and bottom between which all points inside lie strictly, float64; infinite if unknown."""
        eps = torch.finfo(self.x.dtype).eps
        x, y, ex, ey, fx, fy = (number.double() for number in self)
        first, second = torch.hypot(ex, ey), torch.hypot(fx, fy)
        cross = ex * fy - ey * fx
        flat = cross / (first * second)
        known = (flat.abs() > FLATTEST_ANGLE) & (torch.minimum(first, second) > SHORTEST_SIDE) & (x + y).isfinite()
        room = ROUNDINGS * eps * (first + second) / flat.square() + BEYOND_EDGES
        # With p and q from 0 to the squares of the ways, the points inside are x + (p fy - q ey) / cross, and so on.
        a, b = first.square() / cross, second.square() / cross
        found = []
        for start, one, two in ((x, a * fy, -b * ey), (y, -a * fx, b * ex)):
            low = start + one.clamp(max=0) + two.clamp(max=0) - room
            high = start + one.clamp(min=0) + two.clamp(min=0) + room
            found.append((torch.where(known, low, -torch.inf), torch.where(known, high, torch.inf)))
        (left, right), (top, bottom) = found
        return left, top, right, bottom


def enlarged(boxes: Tensor, rules: Rules) -> Tensor:
    """Boxes (..., 5) whose sides below `rules.small_below` are `rules.small_side` long."""
    sides = boxes[..., 2:4]
    sides = torch.where(sides < rules.small_below, rules.small_side, sides) if rules.small_below else sides
    return torch.cat((boxes[..., :2], sides, boxes[..., 4:]), -1)


def rotated_regions(boxes: Tensor, rules: Rules) -> Parallelogram:
    """Regions of boxes (..., 5), their dtype; corners in the order of operations of boxes.md, section 8."""
    x, y, width, height, angle = enlarged(boxes, rules).unbind(-1)
    cosine, sine = angle.cos(), angle.sin()
    across_x, across_y = width / 2 * cosine, width / 2 * sine
    along_x, along_y = -height / 2 * sine, height / 2 * cosine
    corner_x, corner_y = x + across_x + along_x, y + across_y + along_y
    return Parallelogram(
        corner_x,
        corner_y,
        x + across_x - along_x - corner_x,
        y + across_y - along_y - corner_y,
        x - across_x + along_x - corner_x,
        y - across_y + along_y - corner_y,
    )


def _overlap(gt: GaussianTerms, prediction: GaussianTerms, rules: Rules) -> Tensor:
    return gaussian_iou(gt, prediction)


def _stable_overlap(gt: GaussianTerms, prediction: GaussianTerms, rules: Rules) -> Tensor:
    return stable_form(gt, prediction, PLAIN)


ROTATED = Geometry(gaussian_terms, rotated_regions, _overlap, exact_bounds=False)
# For boxes given in half: upstream's bits are those of other numbers, so that only accuracy counts.
ROTATED_HALF = ROTATED._replace(overlap=_stable_overlap)
