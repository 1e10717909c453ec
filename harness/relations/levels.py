"""Levels of a pyramid in another order: the same answers, level by level."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from cases.case import Case
from harness.operation import gradient_name
from harness.relations.declaration import Levels
from harness.relations.trial import Broken, Trial


def levels(trial: Trial) -> bool:
    """Levels and their strides in another order; the second stays where its stride means something."""
    try:
        return _moved(trial)
    except Broken:
        if not trial.declared.free:
            raise
    # Anchors of metric 0 tie for the last places of a selection, unless it has places for all.
    settings = trial.case.settings
    if "topk" in settings:
        settings = {**settings, "topk": sum(_sizes(trial.declared.levels, trial.case)), "topk2": None}
    return _moved(replace(trial, case=replace(trial.case, settings=settings), _known={}).stirred())


def _moved(trial: Trial) -> bool:
    declared, case = trial.declared.levels, trial.case
    sizes = _sizes(declared, case)
    count = len(sizes)
    if count < (3 if declared.second_stays else 2) or not _one_image(declared, case, count):
        return False
    order = list(range(count))
    if declared.second_stays:
        order[0], order[2] = order[2], order[0]
    else:
        order = order[1:] + order[:1]
    settings = {**case.settings, "strides": [case.settings["strides"][level] for level in order]}
    tensors = dict(case.tensors)
    if declared.sizes:
        settings[declared.sizes] = [case.settings[declared.sizes][level] for level in order]
    if declared.prefix:
        for place, level in enumerate(order):
            if f"{declared.prefix}{level}" in case.tensors:
                tensors[f"{declared.prefix}{place}"] = case.tensors[f"{declared.prefix}{level}"]
    for name, dim in declared.scattered.items():
        if name in tensors:
            tensors[name] = tensors[name].index_select(dim, torch.tensor(order))
    tensors = {name: _blocks(declared, name, value, sizes, order) for name, value in tensors.items()}
    own = trial.declared.certain(case, trial.own())
    following = replace(case, tensors=tensors, settings=settings)
    got = trial.declared.certain(following, trial.of(following))
    expected = {}
    for name, value in own.items():
        level = name.removeprefix(gradient_name(declared.prefix)) if declared.prefix else ""
        if level.isdigit():
            expected[gradient_name(f"{declared.prefix}{order.index(int(level))}")] = value
        else:
            expected[name] = _blocks(declared, name.removeprefix(gradient_name("")), value, sizes, order)
    trial.same(expected, got)
    return True


def _one_image(declared: Levels, case: Case, count: int) -> bool:
    """Every level has a stride, and where the first level says how large the image is, the others say the same."""
    strides = case.settings["strides"]
    if len(strides) != count or not declared.sizes:
        return len(strides) == count
    places = zip(case.settings[declared.sizes], strides, strict=True)
    return len({(rows * stride, columns * stride) for (rows, columns), stride in places}) == 1


def _sizes(declared: Levels, case: Case) -> list[int]:
    """Cells of each level."""
    if declared.sizes:
        return [rows * columns for rows, columns in case.settings[declared.sizes]]
    maps = sorted(name for name in case.tensors if declared.prefix and name.startswith(declared.prefix))
    if maps:
        return [case.tensors[name].shape[-2:].numel() for name in maps]
    [name] = declared.scattered
    return case.tensors[name].prod(-1).long().tolist()


def _blocks(declared: Levels, name: str, value: Tensor, sizes: list[int], order: list[int]) -> Tensor:
    if name not in declared.along:
        return value
    parts = value.split(sizes, declared.along[name])
    return torch.cat([parts[level] for level in order], declared.along[name])
