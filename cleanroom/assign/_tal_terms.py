"""What both paths of the task-aligned assigner share: its rules, who is a candidate, and what a pair is worth."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cleanroom.overlap import BoxTerms, box_terms, complete_iou

# A point must lie further inside than this (pixels). Not the `eps` setting, which only guards a division.
EDGE = 1e-9


class Corners(NamedTuple):
    """Regions of candidates whose sides lie along the axes; any shape of rows, pixels."""

    left: Tensor
    top: Tensor
    right: Tensor
    bottom: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> "Corners":
        """Apply a function of one tensor (an indexing, a reshape) to every edge."""
        return Corners(*map(function, self))

    def contains(self, x: Tensor, y: Tensor) -> Tensor:
        """Whether points lie strictly inside; broadcasts."""
        return inside(x, self.left, self.right) & inside(y, self.top, self.bottom)

    def bounds(self) -> "Corners":
        """Left, top, right and bottom between which all points inside lie strictly."""
        return self


class Geometry(NamedTuple):
    """What kind of boxes are assigned: `terms` of boxes for overlaps, and their `overlap` by terms (first the ground
    truth); `region` of ground truths in which anchors are candidates, which has `map`, `contains` and `bounds` as
    `Corners` has. `exact_bounds`: all points between the bounds are inside.
    """

    terms: Callable[[Tensor], Any]
    region: Callable[[Tensor, "Rules"], Any]
    overlap: Callable[[Any, Any, "Rules"], Tensor]
    exact_bounds: bool


@dataclass(frozen=True)
class Rules:
    """Settings of the assigner that both paths read."""

    topk: int
    topk2: int
    alpha: float
    beta: float
    eps: float
    small_below: float  # pixels; sides strictly below it count as `small_side` for membership; 0: no rule
    small_side: float
    edge_round_trip: bool
    ciou_alpha: str
    pair_domain: str = "candidates"  # or "all": a conflict is settled among all rows, wherever they lie
    geometry: Geometry | None = None  # None: boxes whose sides lie along the axes

    @property
    def all_pairs(self) -> bool:
        """Whether rows that do not contain an anchor, padding included, may win it from those that propose it."""
        return self.pair_domain == "all"


class Scene(NamedTuple):
    """Checked inputs: B images, A anchors, n ground-truth rows, C classes."""

    scores: Tensor  # (B, A, C), of any layout
    predictions: BoxTerms  # (B, A) each, float32 at least
    points: Tensor  # (A, 2)
    labels: Tensor  # (B, n) int64, may be negative or too large
    boxes: Tensor  # (B, n, 4)
    valid: Tensor  # (B, n) bool
    logits: bool = False  # scores are logits: probabilities are made of those that are looked at
    # Terms of the predictions at flat places b A + a, (P,) each. Where given, `predictions` are buffers that the
    # sparse path fills at the anchors inside some ground truth; it reads no others.
    decode: Callable[[Tensor], BoxTerms] | None = None


class Assignment(NamedTuple):
    """Who learns what: per anchor (B, A)."""

    foreground: Tensor  # bool
    gt_index: Tensor  # int64, 0 for background
    score: Tensor  # 0 for background


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which values given in `dtype` are computed with."""
    return torch.promote_types(dtype, torch.float32)


def geometry(rules: Rules) -> Geometry:
    """The kind of boxes that `rules` are for."""
    return rules.geometry or AXIS_ALIGNED


def gt_terms(scene: Scene, rules: Rules) -> BoxTerms:
    """Terms of the ground truths, (B, n) each, in the dtype of the predictions'."""
    return geometry(rules).terms(scene.boxes.to(scene.predictions[0].dtype))


def candidate_corners(boxes: Tensor, rules: Rules) -> Corners:
    """Left, top, right and bottom of the regions whose inner points are candidates; boxes (..., 4), their dtype.

    Boxes go to centre form and back even where nothing is enlarged, as upstream's do: it moves edges by a rounding.
    """
    x1, y1, x2, y2 = boxes.unbind(-1)
    if not rules.edge_round_trip:
        return Corners(x1, y1, x2, y2)
    low, high = [], []
    for start, stop in ((x1, x2), (y1, y2)):
        centre, side = (start + stop) / 2, stop - start
        half = torch.where(side < rules.small_below, rules.small_side, side) / 2
        low.append(centre - half)
        high.append(centre + half)
    return Corners(low[0], low[1], high[0], high[1])


def inside(points: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Strictly between two edges, along one axis; broadcasts."""
    return (points - low > EDGE) & (high - points > EDGE)


def class_index(labels: Tensor, classes: int) -> Tensor:
    """Where a label's score stands: a negative label counts from the end, as an index does."""
    return torch.where(labels < 0, labels + classes, labels)


def power(base: Tensor, exponent: float) -> Tensor:
    """`base ** exponent` whose bits depend on the value alone.

    torch.pow on the CPU gives other last bits in the tail of a tensor than in its vectorised body, so equal pairs
    would differ by where they lie. Roots and products are exact in that respect; other exponents of float32 go
    through float64, whose last bits do not survive the rounding.
    """
    if exponent == 1:
        return base
    if exponent == 0.5:
        return base.sqrt()
    wide = base.double()
    if exponent not in range(17):
        return wide.pow(exponent).to(base.dtype)
    if exponent == 0:
        return torch.ones_like(base)
    result = wide.clone()
    for bit in reversed(range(int(exponent).bit_length() - 1)):
        result.square_()
        if int(exponent) >> bit & 1:
            result.mul_(wide)
    return result.to(base.dtype)


def probability(logits: Tensor) -> Tensor:
    """Sigmoid in the dtype of the logits, its bits depending on the value alone: on the CPU as in `power`."""
    return logits.double().sigmoid_().to(logits.dtype) if logits.device.type == "cpu" else logits.sigmoid()


def weigh(gt: BoxTerms, prediction: BoxTerms, score: Tensor, rules: Rules) -> tuple[Tensor, Tensor, Tensor]:
    """Overlap, metric and whether they can be used, of broadcastable pairs.

    A metric that is NaN, infinite or negative (a prediction or score is) is never chosen.
    """
    overlap = geometry(rules).overlap(gt, prediction, rules).clamp_(min=0)
    score = score.to(at_least_float32(score.dtype))
    metric = power(score, rules.alpha) * power(overlap, rules.beta)
    usable = (metric >= 0) & (metric < torch.inf) & (overlap < torch.inf)
    return overlap, metric, usable


def _complete_iou(gt: BoxTerms, prediction: BoxTerms, rules: Rules) -> Tensor:
    return complete_iou(gt, prediction, rules.ciou_alpha)


AXIS_ALIGNED = Geometry(box_terms, candidate_corners, _complete_iou, exact_bounds=True)
