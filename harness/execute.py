"""Calls an implementation once, with its gradients and the checks that need no oracle: nothing changed or leaked."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from harness.operation import Tensors, gradient_name
from harness.watch import Surroundings, same


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
    """What one call gave: outputs and gradients by name, or an error, and what it did besides.

    A gradient that does not exist (no output depends on the input) is left out.
    """

    outputs: dict[str, Tensor] = field(default_factory=dict)
    error: Failure | None = None
    side_effects: tuple[str, ...] = ()
    given: dict[str, Tensor] = field(default_factory=dict)
    """The inputs as they were handed over, if the call was tracked."""


def execute(
    call: Callable[[Tensors], Mapping[str, Any]],
    tensors: Tensors,
    *,
    track: bool,
    gradients: tuple[str, ...] = (),
    autocast: str | None = None,
    weigh: Callable[[Tensor], Tensor] | None = None,
) -> Result:
    """Run `call` on copies of `tensors`; with `gradients`, those inputs require gradient and theirs are outputs too.

    `autocast` names the dtype under whose autocast the call, not the backward pass, runs; `weigh` gives the weights
    with which outputs are contracted, `weights` by default.

    Side effects found, if `track`: inputs changed, outputs that share memory with an input, outputs that carry
    gradient though no input is meant to, changed global random states, and threads left running.
    """
    given = {name: value.clone() for name, value in tensors.items()}
    tracked = gradients if gradients or not track else tuple(n for n, v in given.items() if v.is_floating_point())
    for name in tracked:
        given[name].requires_grad_()
    before = Surroundings.now()
    try:
        with autocasting(given, autocast):
            outputs = dict(call(given))
        found = differentiate(outputs, {name: given[name] for name in gradients}, weigh or weights)
        # After the backward pass, which may do as much as the call.
        effects = _effects(tensors, given, outputs, before, bool(gradients)) if track else ()
    except Exception as error:  # whatever an implementation raises is its result; the judge decides on it
        return Result(error=Failure(type(error).__name__, str(error)))
    outputs = {n: v.detach() if isinstance(v, Tensor) else v for n, v in outputs.items()}
    found = {gradient_name(name): value for name, value in found.items() if value is not None}
    return Result(outputs | found, None, effects, {n: v.detach() for n, v in given.items()} if track else {})


def differentiate(
    outputs: Mapping[str, Any], leaves: Tensors, weigh: Callable[[Tensor], Tensor]
) -> dict[str, Tensor | None]:
    """Gradients of the leaves, of all outputs contracted with fixed weights; None where nothing depends on a leaf.

    The weights differ from element to element, so that faults cannot cancel in a sum, and are exact in every dtype.
    """
    used = [value for value in outputs.values() if isinstance(value, Tensor) and value.requires_grad]
    if not leaves or not used:
        return dict.fromkeys(leaves)
    found = torch.autograd.grad(used, list(leaves.values()), [weigh(value) for value in used], allow_unused=True)
    return dict(zip(leaves, found, strict=True))


def weights(value: Tensor) -> Tensor:
    """Eighths from 5/8 to 15/8, one an element."""
    index = torch.arange(value.numel(), device=value.device)
    return ((index * 7 % 11 + 5) / 8).to(value.dtype).view(value.shape)


def autocasting(tensors: Tensors, dtype: str | None) -> AbstractContextManager:
    """The context under which a case with the setting `autocast` runs."""
    if dtype is None:
        return nullcontext()
    device = next(iter(tensors.values())).device.type
    return torch.autocast(device, getattr(torch, dtype))


def _effects(
    tensors: Tensors, given: Tensors, outputs: Mapping[str, Any], before: Surroundings, differentiable: bool
) -> tuple[str, ...]:
    effects = [f"input {name} was changed" for name in tensors if not same(tensors[name], given[name].detach())]
    memory = {value.untyped_storage().data_ptr(): name for name, value in given.items() if value.numel()}
    for name, value in outputs.items():
        if not isinstance(value, Tensor):
            continue
        if value.numel() and value.untyped_storage().data_ptr() in memory:
            effects.append(f"output {name} shares memory with input {memory[value.untyped_storage().data_ptr()]}")
        if value.requires_grad and not differentiable:
            effects.append(f"output {name} carries gradient")
    return (*effects, *before.changes())
