"""Calls an implementation once, with the checks that need no oracle: inputs unchanged, nothing leaked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from harness.operation import Tensors


@dataclass(frozen=True)
class Failure:
    """An exception by type and message; never upstream's traceback, which quotes source."""

    kind: str
    message: str

    @property
    def text(self) -> str:
        """`Type: message` on one line."""
        return f"{self.kind}: {' '.join(self.message.split())}"[:500]

    @property
    def out_of_memory(self) -> bool:
        """Whether the machine, not the input, was the reason."""
        lowered = self.message.lower()
        return self.kind in {"MemoryError", "OutOfMemoryError"} or (
            "out of memory" in lowered or "can't allocate memory" in lowered
        )


@dataclass(frozen=True)
class Result:
    """What one call gave: outputs or an error, and what it did besides."""

    outputs: dict[str, Tensor] = field(default_factory=dict)
    error: Failure | None = None
    side_effects: tuple[str, ...] = ()


def execute(call: Callable[[Tensors], Mapping[str, Any]], tensors: Tensors, *, track: bool) -> Result:
    """Run `call` on copies of `tensors` that require gradient where they can, if `track`.

    Side effects found: inputs changed, outputs that share memory with an input, outputs that carry gradient
    back to an input, and a changed global random state.
    """
    given = {name: value.clone() for name, value in tensors.items()}
    if track:
        given = {n: v.requires_grad_() if v.is_floating_point() else v for n, v in given.items()}
    state = torch.get_rng_state()
    try:
        outputs = dict(call(given))
    except Exception as error:  # whatever an implementation raises is its result; the judge decides on it
        return Result(error=Failure(type(error).__name__, str(error)))
    effects = _effects(tensors, given, outputs, state) if track else ()
    return Result({n: v.detach() if isinstance(v, Tensor) else v for n, v in outputs.items()}, None, effects)


def _effects(before: Tensors, given: Tensors, outputs: Mapping[str, Any], state: Tensor) -> tuple[str, ...]:
    effects = [f"input {name} was changed" for name in before if not _same(before[name], given[name].detach())]
    memory = {value.untyped_storage().data_ptr(): name for name, value in given.items() if value.numel()}
    for name, value in outputs.items():
        if not isinstance(value, Tensor):
            continue
        if value.numel() and value.untyped_storage().data_ptr() in memory:
            effects.append(f"output {name} shares memory with input {memory[value.untyped_storage().data_ptr()]}")
        if value.requires_grad:
            effects.append(f"output {name} carries gradient")
    if not torch.equal(state, torch.get_rng_state()):
        effects.append("the global random state was changed")
    return tuple(effects)


def _same(a: Tensor, b: Tensor) -> bool:
    """Bitwise equality, NaN included."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(_bits(a), _bits(b))


def _bits(value: Tensor) -> Tensor:
    return value.contiguous().view(torch.uint8) if value.numel() and value.dim() else value.reshape(-1)
