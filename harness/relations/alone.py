"""A batch split: each image (or element) alone gets the same answers, and sums add up.

A loss divides by a number of the whole batch. Its terms and gradients of an image alone therefore differ from those in
the batch by a factor, which is the same for everything of that image that is divided alike; nothing else may differ.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from harness.operation import gradient_name
from harness.relations import moving
from harness.relations.declaration import Axis, Images
from harness.relations.trial import Broken, Trial

MOST = 4
"""Elements that are taken alone where an operation has no images."""


def alone(trial: Trial) -> bool:
    """Each image alone, or some elements where there are no images."""
    declared = trial.declared
    if declared.images is None:
        return _elements(trial, declared.anchors)
    count = moving.number(declared.images, trial.case)
    case, alike = trial.case, declared.images.alike
    if count < 2 or any(len({str(some) for some in case.settings.get(name) or ()}) > 1 for name in alike):
        return False
    if declared.images.filled and 0 in case.settings[declared.images.filled]:
        return False
    own, parts, factors = trial.own(), [], []
    for image in range(count):
        part = trial.of(moving.with_images(declared.images, trial.case, [image]))
        factors.append(_same_of_image(trial, declared.images, own, part, image))
        parts.append(part)
    _sums(trial, declared.images, own, parts, factors)
    return True


def _elements(trial: Trial, axis: Axis) -> bool:
    count = moving.length(axis, trial.case.tensors)
    if count < 2:
        return False
    own = trial.own()
    if any(value.dim() == 0 for value in own.values()):
        return False  # reduced: an element alone has another share
    chosen = torch.randperm(count, generator=trial.generator("elements"))[:MOST]
    for element in chosen.tolist():
        order = torch.tensor([element])
        part = trial.of(moving.with_axis(axis, trial.case, order))
        names = moving.named(axis.along)
        expected = {name: value for name, value in moving.take(axis, own, order, count).items() if name in names}
        # What is broadcast over elements has a gradient that sums over them.
        broadcast = {gradient_name(n) for n, d in axis.along.items() if trial.case.tensors.get(n, _ONES).shape[d] == 1}
        trial.same({name: value for name, value in expected.items() if name not in broadcast}, part)
    return True


_ONES = torch.ones(2, 2, 2, 2, 2, 2)


def _same_of_image(
    trial: Trial, images: Images, own: Mapping[str, Tensor], part: Mapping[str, Tensor], image: int
) -> dict[str, float | None]:
    """Broken unless decisions are the same and gradients the same but for a factor; returns the factors."""
    expected = moving.of_images(images, own, [image])
    gradients = {name: value for name, value in expected.items() if name.startswith("gradient of ")}
    plain = {name: value for name, value in expected.items() if name not in gradients}
    if "owner" in plain and bool((plain["owner"] < 0).all() & (part["owner"] < 0).all()):
        del plain["owner"]  # nothing to match: how many matchings were made cannot be told
    trial.same(plain, part)
    factors: dict[str, float | None] = {}
    floor = trial.scale(own)(gradient_name(""))
    for name, value in gradients.items():
        factor = {"given": 1.0, "one": factors.get("all"), "each": None}[images.normaliser]
        alone = part[name].double()
        # Found where the gradient is largest, so that it is as exact as any.
        finite = torch.where(alone.isfinite() & value.isfinite(), alone.abs(), torch.zeros_like(alone))
        if factor is None and alone.numel() and bool(finite.max() > 0):
            place = int(finite.argmax())
            factor = float(value.double().flatten()[place] / alone.flatten()[place])
            if not factor > 0:
                raise Broken(f"{name} of image {image} in the batch is {factor:.6g} times that of the image alone")
            factors["all"] = factor
        scaled = (alone * (1.0 if factor is None else factor)).to(value.dtype)
        problem = trial.difference(scaled, value, floor=floor)
        if problem:
            raise Broken(f"{name} of image {image} is not that of the image alone times one factor: it{problem}")
    return factors


def _sums(trial, images, own, parts, factors) -> None:
    """Totals are the images' totals, each by the factor of its gradients."""
    if images.normaliser == "each":
        return
    for name, value in own.items():
        counted = name in moving.named(images.along) or name in images.unsummed or name.startswith("gradient of ")
        if counted or not value.is_floating_point():
            continue
        terms = [part[name].double() for part in parts]
        if name in images.means:
            total = sum(terms) / len(terms)
        else:
            known = [1.0 if images.normaliser == "given" else factor.get("all") for factor in factors]
            silent = [factor is None and bool((term != 0).any()) for factor, term in zip(known, terms, strict=True)]
            if any(silent):
                continue  # without a gradient its factor is not known
            total = sum(term * (1.0 if factor is None else factor) for factor, term in zip(known, terms, strict=True))
        problem = trial.difference(total.to(value.dtype), value)
        if problem:
            raise Broken(f"{name} is not the sum of the images alone: it{problem}")
