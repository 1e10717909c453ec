"""Probabilistic IoU of rotated boxes, values only: what the assigner needs, and what `probiou` gives without gradient.

Boxes are seen as Gaussians of their centre and the covariance of a uniform rectangle, and their similarity is 1 minus
the Hellinger distance (Llerena et al., 2021, arXiv:2106.06072; specification: boxes.md, section 11).

Two forms of one number. The ordered form has the order of operations of the specification, hence upstream's bits: its
determinants are differences that cancel, and for thin boxes they turn negative and the logarithm NaN. The stable form
writes the same determinants as sums of squares, with the angle between the boxes, and is accurate, with finite slopes,
wherever the boxes are. The ordered form is the rule; the stable one stands in for NaN.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from cleanroom.overlap import ASPECT, EPS
from cleanroom.paths import data_dependent

LARGEST_DISTANCE = 100.0


class GaussianRule(NamedTuple):
    """Settings of the similarity; see `cleanroom.boxes.probiou`."""

    complete: bool = False
    eps: float = EPS
    floor: float = 0.0


PLAIN = GaussianRule()


class GaussianTerms(NamedTuple):
    """What the similarity of a pair needs of one of its boxes; computed once a box, not once a pair."""

    x: Tensor
    y: Tensor
    across: Tensor  # variance along the x axis
    along: Tensor  # variance along the y axis
    mixed: Tensor  # covariance
    determinant: Tensor  # of the covariance matrix, at least 0
    width: Tensor
    height: Tensor
    angle: Tensor

    def map(self, function: Callable[[Tensor], Tensor]) -> "GaussianTerms":
        """Apply a function of one tensor (an indexing, a reshape) to every term."""
        return GaussianTerms(*map(function, self))


def gaussian_terms(boxes: Tensor, rule: GaussianRule = PLAIN) -> GaussianTerms:
    """Terms of boxes (..., 5): centre x, centre y, width, height and angle in radians."""
    x, y, width, height, angle = torch.stack(boxes.unbind(-1)).unbind(0)
    # The floor, 0 or not, is added: it changes no bit where it is 0.
    first, second = width.square() / 12 + rule.floor, height.square() / 12 + rule.floor
    cosine, sine = angle.cos(), angle.sin()
    cosine2, sine2 = cosine.square(), sine.square()
    across, along = first * cosine2 + second * sine2, first * sine2 + second * cosine2
    mixed = (first - second) * cosine * sine
    return GaussianTerms(x, y, across, along, mixed, _own_determinant(across, along, mixed), width, height, angle)


def gaussian_iou(first: GaussianTerms, second: GaussianTerms, rule: GaussianRule = PLAIN) -> Tensor:
    """Similarity of broadcastable terms, in their dtype, without gradient.

    Returns:
        The ordered form, and the stable one where that is NaN. NaN where a number of either box is NaN or infinite
        (an infinite centre may give 0), and where squares of sides overflow.
    """
    value = ordered_form(first, second, rule)
    undefined = value.isnan()
    if not data_dependent(value):
        return torch.where(undefined, stable_form(first, second, rule), value)
    if undefined.any():
        one, two = (terms.map(lambda term: term.expand_as(value)[undefined]) for terms in (first, second))
        value[undefined] = stable_form(one, two, rule)
    return value


def ordered_form(first: GaussianTerms, second: GaussianTerms, rule: GaussianRule, *, anew: bool = False) -> Tensor:
    """Similarity in the order of operations of the specification; differentiable, NaN where determinants cancel.

    `anew` adds the matrices anew wherever a term reads them: the same values, but autograd then adds up slopes in the
    order that upstream's does, which decides about their bits where they cancel.
    """
    eps = rule.eps
    joint = _Joint(first, second, anew)
    across, along, _ = joint.entries()
    distance = across * (first.y - second.y).square() + along * (first.x - second.x).square()
    distance = distance / (joint.determinant() + eps) * 0.25
    mixed = joint.entries()[2]
    distance = distance + mixed * (second.x - first.x) * (first.y - second.y) / (joint.determinant() + eps) * 0.5
    determinant = joint.determinant()
    own = [_own_determinant(*box[2:5]) if anew else box.determinant for box in (first, second)]
    distance = distance + (determinant / (4 * (own[0] * own[1]).sqrt() + eps) + eps).log() * 0.5
    similarity = 1 - (1 - (-distance.clamp(eps, LARGEST_DISTANCE)).exp() + eps).sqrt()
    if not rule.complete:
        return similarity
    turn = (second.width / second.height).atan() - (first.width / first.height).atan()
    return _less_aspect(similarity, turn, eps)


def _own_determinant(across: Tensor, along: Tensor, mixed: Tensor) -> Tensor:
    return _determinant(across, along, mixed).clamp(min=0)


def _determinant(across: Tensor, along: Tensor, mixed: Tensor) -> Tensor:
    return across * along - mixed.square()


class _Joint:
    """The sum of both covariance matrices, added up once, or `anew` whenever it is read."""

    def __init__(self, first: GaussianTerms, second: GaussianTerms, anew: bool) -> None:
        self._boxes = first, second
        self._entries = self._determinant = None
        if not anew:
            self._entries = self.entries()
            self._determinant = self.determinant()

    def entries(self) -> tuple[Tensor, Tensor, Tensor]:
        """Variances along the x and the y axis, and the covariance."""
        first, second = self._boxes
        if self._entries is not None:
            return self._entries
        return first.across + second.across, first.along + second.along, first.mixed + second.mixed

    def determinant(self) -> Tensor:
        """Its determinant, a difference."""
        if self._determinant is not None:
            return self._determinant
        return _determinant(*self.entries())


def stable_form(first: GaussianTerms, second: GaussianTerms, rule: GaussianRule) -> Tensor:
    """The same number without cancellation, accurate to a few roundings; differentiable, with finite slopes.

    With d the angle between the boxes and s, s', t, t' the standard deviations along their sides,

        |S + S'| = 4 s s' t t' + (s s' - t t')^2 + cos^2 d (s t' - t s')^2 + sin^2 d (s t - s' t')^2,

    here s, s' of the first box and t, t' of the second; the quadratic form of the shift in the adjugate of S is
    s'^2 u^2 + s^2 v^2, u and v the shift in the box's own axes; and 1 - H = (e - eps) / (1 + H), e the exponential.
    """
    eps = rule.eps
    s, s2, t, t2 = (_deviation(side, rule.floor) for side in (first.width, first.height, second.width, second.height))
    angle = first.angle - second.angle
    own = 4 * (s * s2) * (t * t2)
    excess = (s * s2 - t * t2).square()
    excess = excess + (angle.cos() * (s * t2 - t * s2)).square() + (angle.sin() * (s * t - s2 * t2)).square()
    dx, dy = first.x - second.x, first.y - second.y
    quadratic = _quadratic(dx, dy, first.angle, s, s2) + _quadratic(dx, dy, second.angle, t, t2)
    # An infinite centre is as undefined as it mostly is in the ordered form.
    distance = quadratic / (own + excess + eps) * 0.25 + (dx + dy) * 0
    above_one = (excess - eps) / (own + eps) + eps
    ratio = (own + excess) / (own + eps) + eps
    distance = distance + torch.where(above_one > -0.5, above_one.log1p(), ratio.log()) * 0.5
    distance = distance.clamp(eps, LARGEST_DISTANCE)
    hellinger = (eps - (-distance).expm1()).sqrt()
    similarity = ((-distance).exp() - eps) / (1 + hellinger)
    if not rule.complete:
        return similarity
    point = ((first.width == 0) & (first.height == 0)) | ((second.width == 0) & (second.height == 0))
    turn = _aspect_angle(second, point) - _aspect_angle(first, point)
    return _less_aspect(similarity, torch.where(point, 0, turn), eps)


def _less_aspect(similarity: Tensor, turn: Tensor, eps: float) -> Tensor:
    """Less the aspect term of complete IoU, whose weight is a constant to the gradient."""
    aspect = ASPECT * turn.square()
    weight = aspect.detach() / (aspect.detach() - similarity.detach() + (1 + eps))
    return similarity - aspect * weight


def _quadratic(dx: Tensor, dy: Tensor, angle: Tensor, first: Tensor, second: Tensor) -> Tensor:
    cosine, sine = angle.cos(), angle.sin()
    return (second * (dx * cosine + dy * sine)).square() + (first * (dy * cosine - dx * sine)).square()


def _deviation(side: Tensor, floor: float) -> Tensor:
    """Standard deviation along a side; without floor its gradient at 0 is 0, where that of a root is infinite."""
    return (side.square() / 12 + floor).sqrt() if floor > 0 else side.abs() / math.sqrt(12)


def _aspect_angle(box: GaussianTerms, point: Tensor) -> Tensor:
    """Arc tangent of width over height, its gradient finite without height too; anything for a point."""
    height = torch.where(point, 1, box.height)
    return torch.atan2(torch.where(height < 0, -box.width, box.width), height.abs())
