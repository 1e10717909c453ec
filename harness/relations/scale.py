"""Image and strides twice as large: a power of two rounds nothing, so decisions and overlaps stay as they are."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from harness.relations.trial import Broken, Trial

FACTOR = 2


def scale(trial: Trial) -> bool:
    """All lengths doubled, on cases that half dtypes do not overflow."""
    if trial.case.dtype in ("float16", "bfloat16") or not trial.declared.scale.fits(trial.case):
        return False
    try:
        return _doubled(trial)
    except Broken:
        if not trial.declared.free:
            raise
    # An epsilon decides where boxes have no area or edges meet anchors.
    return _doubled(trial.stirred())


def _doubled(trial: Trial) -> bool:
    declared, case = trial.declared.scale, trial.case
    tensors, settings = dict(case.tensors), dict(case.settings)
    for name, columns in declared.tensors.items():
        if name in tensors:
            tensors[name] = _times(tensors[name], columns)
    for name in declared.settings:
        settings[name] = [FACTOR * value for value in settings[name]]
    own = trial.own()
    got = trial.of(replace(case, tensors=tensors, settings=settings))
    expected = {name: value for name, value in own.items() if not name.startswith("gradient of ")}
    for name, columns in declared.outputs.items():
        expected[name] = _times(expected[name], columns)
    trial.same(expected, got, through=() if declared.exact else (torch.float32,))
    return True


def _times(value: Tensor, columns: slice) -> Tensor:
    if value.dim() == 0:
        return value * FACTOR
    value = value.clone()
    value[..., columns] = value[..., columns] * FACTOR
    return value
