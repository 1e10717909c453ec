"""Noise of quantities that are computed from the corners of centre-form boxes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from harness.equality import MOVES, SAFETY, in_float64, ulp
from harness.operation import Tensors


def corner_noise(
    function: Callable[[Tensors], Tensor],
    tensors: Tensors,
    boxes: tuple[str, ...],
    others: tuple[str, ...] = (),
    *,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """(value, noise) of a float64 quantity of `boxes` (..., 4) cxcywh and `others`, as `equality.noise` has it.

    A box moves by units of its farthest corner: upstream rounds corners, so a small box far from the origin
    has a size that is known no better than they are.
    """
    exact = in_float64(tensors)
    units = {name: ulp(exact[name], tensors[name].dtype) for name in others}
    for name in boxes:
        reach = exact[name][..., :2].abs() + exact[name][..., 2:].abs() / 2
        units[name] = ulp(reach.amax(-1, keepdim=True), tensors[name].dtype)
    generator = torch.Generator().manual_seed(seed)
    value = function(exact)
    change = torch.zeros_like(value)
    for _ in range(MOVES):
        steps = {
            name: unit * torch.randint(-1, 2, exact[name].shape, generator=generator).to(unit)
            for name, unit in units.items()
        }
        moved = {name: item + steps[name] if name in steps else item for name, item in exact.items()}
        change = torch.maximum(change, (function(moved) - value).abs().nan_to_num(0.0, posinf=0.0))
    return value, SAFETY * change
