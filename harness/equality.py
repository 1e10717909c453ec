"""Rounding: units in the last place, inputs moved by one of them, error budgets."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from harness.operation import Tensors

FLOOR_ULPS = 8
"""Error that any evaluation order may make, in units in the last place of the output's scale."""
MOVES = 4
"""Float64 evaluations on moved inputs that measure the truth's own sensitivity."""
SAFETY = 2
"""Moves sample directions, they do not bound them: the largest change seen counts this many times."""


def ulp(value: Tensor, dtype: torch.dtype) -> Tensor:
    """One unit in the last place of `dtype` at |value|, as float64; never below its smallest subnormal."""
    info = torch.finfo(dtype)
    magnitude = value.abs().double().clamp(min=info.tiny)
    return torch.exp2(torch.floor(torch.log2(magnitude))) * info.eps


def moved(tensors: Tensors, names: tuple[str, ...], *, moves: int = MOVES, seed: int = 0) -> Iterator[dict]:
    """The tensors in float64, `names` moved by -1, 0 or +1 ulp of their own dtype in every element.

    Inputs that cannot be told apart after rounding: a result that is exact for one of them is a right answer.
    """
    generator = torch.Generator().manual_seed(seed)
    exact = in_float64(tensors)
    for _ in range(moves):
        yield {
            name: value
            if name not in names
            else value
            + ulp(value, tensors[name].dtype)
            * torch.randint(-1, 2, value.shape, generator=generator).to(value.device).double()
            for name, value in exact.items()
        }


def in_float64(tensors: Tensors) -> dict[str, Tensor]:
    """Every floating tensor cast to float64, the rest as it is."""
    return {name: value.double() if value.is_floating_point() else value for name, value in tensors.items()}


def noise(function: Callable[[Tensors], Tensor], tensors: Tensors, names: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """(value, noise) of a float64 quantity: its value, and its largest change under `moved`."""
    value = function(in_float64(tensors))
    change = torch.zeros_like(value)
    for other in moved(tensors, names):
        change = torch.maximum(change, (function(other) - value).abs().nan_to_num(0.0, posinf=0.0))
    return value, SAFETY * change


def budget(truth: Tensor, oracle: Tensor, sensitivity: Tensor, dtype: torch.dtype) -> Tensor:
    """Largest error allowed, element by element: twice the oracle's own, a floor of ulps, the sensitivity."""
    own = (oracle.double() - truth).abs().nan_to_num(0.0, posinf=0.0)
    return 2 * own + FLOOR_ULPS * ulp(truth, dtype) + sensitivity
