"""What an implementation may do besides answering, found by looking twice: at its call's end, and later.

An answer must stand when the call returns, lie in memory of its own, and leave the process as it was.
"""

from __future__ import annotations

import random
import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from harness.execute import Result

KEPT = 4
"""Results of a candidate that are kept: so many buffers given out in turn are noticed."""
LOOSE = 0.01
"""What a call may do otherwise when it is timed: a share of the largest value, and of the elements."""


@dataclass(frozen=True)
class Surroundings:
    """The global random states and the threads of the process."""

    states: Mapping[str, Any]
    threads: frozenset[int]

    @classmethod
    def now(cls) -> Surroundings:
        """As they are."""
        states = {"PyTorch": torch.get_rng_state().numpy().tobytes(), "Python": random.getstate()}
        numpy = np.random.get_state(legacy=False)["state"]
        states["NumPy"] = (numpy["key"].tobytes(), numpy["pos"])
        if torch.cuda.is_available():
            states["CUDA"] = [state.numpy().tobytes() for state in torch.cuda.get_rng_state_all()]
        return cls(states, frozenset(thread.ident for thread in threading.enumerate()))

    def changes(self) -> list[str]:
        """What is no longer so, a sentence each."""
        after = Surroundings.now()
        said = [
            f"the global random state of {name} was changed"
            for name, state in self.states.items()
            if state != after.states[name]
        ]
        names = [thread.name for thread in threading.enumerate() if thread.ident in after.threads - self.threads]
        return said + [f"thread {name} was left running" for name in names]


@dataclass(frozen=True)
class Held:
    """A result as it was returned, beside copies of its outputs."""

    result: Result
    copies: Mapping[str, Tensor]
    inputs: Mapping[str, Tensor]
    """Copies of the inputs."""

    def settled(self) -> Result:
        """The result, with what has changed in it since it was returned among its side effects.

        Everything that was left running on the device has ended when this looks.
        """
        if torch.cuda.is_available() and any(copy.is_cuda for copy in self.copies.values()):
            torch.cuda.synchronize()
        late = tuple(
            f"output {name} was still written after the call had returned"
            for name, copy in self.copies.items()
            if not same(copy, self.result.outputs[name])
        )
        late += tuple(
            f"input {name} was still written after the call had returned"
            for name, copy in self.inputs.items()
            if not same(copy, self.result.given[name])
        )
        return replace(self.result, side_effects=(*self.result.side_effects, *late))


class Watch:
    """Looks at one candidate's results in turn; the last ones are kept, so that their memory is not given out again."""

    def __init__(self) -> None:
        self._last: deque[dict[str, Tensor]] = deque(maxlen=KEPT)

    def hold(self, result: Result) -> Held:
        """Take a result right after the call: memory of the one before among its side effects, and copies of it."""
        tensors = {name: value for name, value in result.outputs.items() if isinstance(value, Tensor)}
        before = {
            value.untyped_storage().data_ptr(): f"{call} call's {name}"
            for call, outputs in zip(("the last", *["a former"] * KEPT), reversed(self._last), strict=False)
            for name, value in outputs.items()
            if value.numel()
        }
        again = tuple(
            f"output {name} lies in the memory of {before[value.untyped_storage().data_ptr()]}"
            for name, value in tensors.items()
            if value.numel() and value.untyped_storage().data_ptr() in before
        )
        self._last.append(tensors)
        inputs = {name: value.clone() for name, value in result.given.items()}
        copies = {name: value.clone() for name, value in tensors.items()}
        return Held(replace(result, side_effects=(*result.side_effects, *again)), copies, inputs)


def disagreement(timed: Mapping[str, Tensor], judged: Mapping[str, Tensor]) -> str:
    """How far a call that is timed answers otherwise than the same call when it is judged, or nothing.

    Sums in another order may end otherwise, and turn a decision here and there: no more than 1% of either.
    """
    for name in judged:
        if name not in timed:
            return f"{name} is missing from what the call gives when timed"
        one, other = (value.detach() for value in (timed[name], judged[name]))
        if one.shape != other.shape:
            return f"{name} has shape {tuple(one.shape)} when timed, {tuple(other.shape)} when judged"
        if one.is_floating_point():
            scale = other.double().nan_to_num(posinf=0, neginf=0).abs().amax() if other.numel() else 0.0
            differs = ~torch.isclose(
                one.double(), other.double(), rtol=LOOSE, atol=float(scale) * LOOSE, equal_nan=True
            )
        else:
            differs = one != other
        if int(differs.sum()) > LOOSE * differs.numel():
            return (
                f"{name} differs in {int(differs.sum())} of {differs.numel()} elements from what the call gives untimed"
            )
    return ""


def same(a: Tensor, b: Tensor) -> bool:
    """Bitwise equality, NaN included."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def bits(value: Tensor) -> Tensor:
    """The bytes of a tensor in the order of its elements, flat; a copy, as one element may have any stride."""
    flat = value.detach().clone(memory_format=torch.contiguous_format).view(-1)
    return flat.view(torch.uint8) if len(flat) else flat
