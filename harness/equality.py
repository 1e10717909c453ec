"""Rounding: units in the last place, inputs moved by one of them, error budgets."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from harness.bars.bar import thresholds
from harness.operation import Tensors

BUDGET = thresholds()["error_budget"]
FLOOR_ULPS = BUDGET["floor_ulps"]
"""Error that any evaluation order may make, in units in the last place of the output's scale."""
MOVES = BUDGET["moves"]
"""Float64 evaluations on moved inputs that measure the truth's own sensitivity."""
SAFETY = BUDGET["safety"]
"""Moves sample directions, they do not bound them: the largest change seen counts this many times."""


def ulp(value: Tensor, dtype: torch.dtype) -> Tensor:
    """One unit in the last place of `dtype` at |value|, as float64; never below its smallest subnormal."""
    info = torch.finfo(dtype)
    magnitude = value.abs().double().clamp(min=info.tiny)
    return torch.exp2(torch.floor(torch.log2(magnitude))) * info.eps


def coarsest(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype of the largest rounding."""
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def moved(
    tensors: Tensors,
    names: tuple[str, ...],
    *,
    through: tuple[torch.dtype, ...] = (),
    moves: int = MOVES,
    seed: int = 0,
) -> Iterator[dict]:
    """The tensors in float64, `names` moved by -1, 0 or +1 ulp of their own dtype in every element.

    Inputs that cannot be told apart after rounding: a result that is exact for one of them is a right answer. They
    are rounded to dtypes that upstream's computation passes `through` too.
    """
    generator = torch.Generator().manual_seed(seed)
    exact = in_float64(tensors)
    for _ in range(moves):
        yield {
            name: value
            if name not in names
            else value
            + ulp(value.nan_to_num(0.0, 0.0, 0.0), coarsest(tensors[name].dtype, *through))
            * torch.randint(-1, 2, value.shape, generator=generator).to(value.device).double()
            for name, value in exact.items()
        }


def moved_alike(given: Tensors, tensors: Tensors, names: tuple[str, ...]) -> dict[str, Tensor]:
    """`given`, one of those that `moved` yields, with equal numbers of a tensor moved alike.

    What coincides in the tensors then still does: the two sides of a box without area, where upstream takes no box that
    is inside out.
    """
    found = dict(given)
    for name in names:
        exact = tensors[name].double()
        values, places = torch.unique(exact, return_inverse=True)
        moves = torch.full_like(values, -math.inf)
        change = (given[name] - exact).nan_to_num(0.0)  # infinity stays where it is
        moves.scatter_reduce_(0, places.flatten(), change.flatten(), "amax")
        found[name] = exact + moves[places]
    return found


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
    """Largest error allowed, element by element: the oracle's own and more, a floor of ulps, the sensitivity."""
    own = (oracle.double() - truth).abs().nan_to_num(0.0, posinf=0.0)
    return BUDGET["oracle_factor"] * own + FLOOR_ULPS * ulp(truth, dtype) + sensitivity
