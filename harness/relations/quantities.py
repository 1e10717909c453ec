"""Quantities that only go one way: an overlap is largest with the box itself, a loss grows as answers get worse."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from cases.case import Case
from harness.relations.trial import Broken, Trial

WORSE = 0.5
"""Added to a logit that should be low."""


def largest_with_itself(first: str, second: str, output: str) -> Callable[[Trial], bool]:
    """No box overlaps another more than itself: `second` replaced by `first`."""

    def relation(trial: Trial) -> bool:
        case, own = trial.case, trial.own()[output]
        if not all(_proper(case, case.tensors[name]) for name in (first, second)):
            return False
        one, other = case.tensors[first], case.tensors[second]
        if one.dim() == 2 and own.shape[-1] == len(other) and len(one):  # every pair
            itself = trial.of(_with(case, {second: one.clone()}))[output].diagonal()[:, None]
        elif one.shape == other.shape and one.numel():
            itself = trial.of(_with(case, {second: one.clone()}))[output]
        else:
            return False
        slack = 64 * torch.finfo(trial.precision(own)).eps
        ordinary = itself.double() > 1 - 2**-6  # boxes without area, or beyond the dtype, overlap nothing
        worse = (own.double() > itself.double() + slack) & ordinary
        if bool(worse.any()):
            place = tuple(worse.nonzero()[0].tolist())
            raise Broken(f"{output}{list(place)} is {own[place].item():.9g}, more than a box with itself")
        return bool(ordinary.any())

    return relation


def grows_with_wrong_logits(name: str, wrong: Callable[[Case], Tensor], output: str) -> Callable[[Trial], bool]:
    """The loss `output` is larger when the logits `name` are larger where `wrong` says that they should be low."""

    def relation(trial: Trial) -> bool:
        case, own = trial.case, trial.own()[output].double()
        where = wrong(case)
        logits = case.tensors[name]
        if not bool(where.any()) or not bool(logits.isfinite().all()) or not bool(own.isfinite().all()):
            return False
        worse = torch.where(where, logits + WORSE, logits)
        got = trial.of(_with(case, {name: worse}))[output].double()
        slack = 64 * torch.finfo(trial.precision(logits)).eps * float(own.abs().max() if own.numel() else 0)
        if bool((got < own - slack).any()):
            raise Broken(f"{output} falls from {float(own):.9g} to {float(got):.9g} as wrong answers get surer")
        return True

    return relation


def _proper(case: Case, boxes: Tensor) -> bool:
    """Boxes that are finite and not inside out."""
    centres = case.settings.get("xywh", False) or not case.settings.get("xyxy", True)
    rotated = boxes.shape[-1] == 5  # centre, sides, angle
    sides = boxes[..., 2:4] if centres or rotated else boxes[..., 2:] - boxes[..., :2]
    return bool((boxes.isfinite().all(-1, keepdim=True) & (sides > 0)).all())


def _with(case: Case, tensors: dict[str, Tensor]) -> Case:
    return replace(case, tensors={**case.tensors, **tensors})
