"""Gradients are slopes: central differences of single elements, in float64.

Kinks (where a clamp, a maximum or an absolute value turns) are avoided by what they are: the slopes on the two sides
differ there, or the difference changes when the step is halved. Such elements are left out; of those that are looked
at at least one must remain, or the case counts for nothing.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from cases.case import Case
from harness.equality import in_float64
from harness.operation import gradient_name
from harness.relations.trial import Broken, Rejected, Trial

LARGEST = 4096
"""Numbers of a case beyond which it is not small."""
ELEMENTS = 4
"""Elements of each input that are moved."""
TOLERANCE = 1e-4
"""Share of the gradient by which a slope may differ: the step's own error, far below any wrong formula's."""


def gradcheck(trial: Trial) -> bool:
    """Some elements of every differentiable input: those of the largest gradients, and others at random."""
    case = replace(trial.case, tensors=in_float64(trial.case.tensors))
    names = [name for name in trial.declared.gradcheck if name in case.tensors]
    if sum(value.numel() for value in case.tensors.values()) > LARGEST or case.settings.get("autocast"):
        return False
    finite = all(bool(value.isfinite().all()) for value in case.tensors.values() if value.is_floating_point())
    if not finite or not trial.declared.smooth(trial.case):
        return False
    result = trial.ask(case)
    if result.error:
        raise Rejected(result.error.text)
    precise = torch.finfo(getattr(torch, trial.operation.precision or "float64")).eps
    tried = 0
    for name in names:
        gradient = result.outputs.get(gradient_name(name))
        if gradient is None or not gradient.numel():
            continue
        flat = gradient.double().flatten()
        generator = trial.generator(name)
        largest = flat.abs().topk(min(ELEMENTS // 2, len(flat))).indices
        random = torch.randperm(len(flat), generator=generator)[: ELEMENTS // 2]
        for place in torch.cat((largest, random)).unique().tolist():
            tried += _element(trial, case, name, place, float(flat[place]), precise)
    return tried > 0


def _element(trial: Trial, case: Case, name: str, place: int, found: float, precise: float) -> bool:
    """Whether the slope at an element was looked at: False at a kink. Broken where it is another than the gradient."""
    value = float(case.tensors[name].flatten()[place])
    step = precise ** (1 / 3) * max(1.0, abs(value)) * (1 if precise < 1e-10 else 4)
    sums, size = {}, 0.0
    for times in (-1.0, -0.5, 0.0, 0.5, 1.0):
        sums[times], size = _sum(trial, case, name, place, times * step)
    whole, half = (sums[1.0] - sums[-1.0]) / (2 * step), (sums[0.5] - sums[-0.5]) / step
    left, right = (sums[0.0] - sums[-0.5]) / (0.5 * step), (sums[0.5] - sums[0.0]) / (0.5 * step)
    if not math.isfinite(half):
        return False
    # What rounds on the way is of size 1, even where nearly nothing is left of it.
    noise = 16 * precise * max(size, 1.0) / step
    scale = max(abs(found), abs(half))
    curved = abs(right - left) > max(2e-3, 10 * step) * scale + 4 * noise or abs(found) * step > 0.01 * max(size, 1.0)
    if abs(whole - half) > TOLERANCE / 2 * scale + noise or curved:
        return False
    if not abs(half - found) <= TOLERANCE * scale + noise:
        raise Broken(f"gradient of {name} at element {place} is {found:.9g}, the slope {half:.9g}")
    return True


def _sum(trial: Trial, case: Case, name: str, place: int, step: float) -> tuple[float, float]:
    moved = case.tensors[name].clone(memory_format=torch.contiguous_format)
    moved.view(-1)[place] += step
    result = trial.ask(replace(case, tensors={**case.tensors, name: moved}))
    if result.error:
        raise Rejected(result.error.text)
    outputs = [
        value.double()
        for key, value in result.outputs.items()
        if isinstance(value, Tensor) and value.is_floating_point() and not key.startswith("gradient of ")
    ]
    terms = outputs
    return sum(float(term.sum()) for term in terms), sum(float(term.abs().sum()) for term in terms)
