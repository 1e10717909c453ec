"""Rows that mean nothing are added, whatever they hold: nothing changes."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from harness.relations.declaration import Padding
from harness.relations.trial import Trial

ADDED = 2


def padding(trial: Trial) -> bool:
    """Rows of the declared content after the last."""
    declared = trial.declared.padding
    case, tensors = trial.case, dict(trial.case.tensors)
    grown = {name: content for name, content in declared.rows.items() if name in tensors}
    for name, content in grown.items():
        for dim in declared.dims[name]:
            tensors[name] = _grown(tensors[name], dim, content)
    own = trial.own()
    got = trial.of(replace(case, tensors=tensors))
    expected = {name: value for name, value in own.items() if not _gone(name, declared)}
    trial.same(expected, {name: _cut(got[name], own[name], declared.outputs.get(name)) for name in expected})
    return True


def _grown(value: Tensor, dim: int, content: float) -> Tensor:
    shape = list(value.shape)
    shape[dim] = ADDED
    return torch.cat((value, value.new_full(shape, content)), dim)


def _gone(name: str, declared: Padding) -> bool:
    return any(name == f"gradient of {grown}" for grown in declared.rows)


def _cut(got: Tensor, own: Tensor, dim: int | None) -> Tensor:
    return got if dim is None else got.narrow(dim, 0, own.shape[dim])
