"""One step of an operation as it is timed: forward without a graph, or forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harness.execute import weights
from harness.operation import Tensors, gradient_name


@dataclass
class Step:
    """`step()` runs `call`, and where there are leaves the backward pass from the outputs that `read` finds.

    The weights of the backward pass are made at the first call, which is never timed.
    """

    call: Callable[[], Any]
    read: Callable[[Any], Tensors]
    leaves: Sequence[Tensor]
    track: bool = True
    """Whether autograd may record; a loss forward only runs as in validation, without."""

    keep: bool = False
    """Whether to hold on to what the last call gave."""

    def __post_init__(self) -> None:
        self._weights: list[Tensor] | None = None
        self._kept: tuple[Any, Any] = None, ()

    def __call__(self) -> Any:
        """The raw result, or the gradients."""
        with nullcontext() if self.track else torch.no_grad():
            raw = self.call()
        if not self.leaves:
            self._kept = (raw, ()) if self.keep else self._kept
            return raw
        used = [value for value in self.read(raw).values() if value.requires_grad]
        if self._weights is None:
            self._weights = [weights(value.detach()) for value in used]
        found = torch.autograd.grad(used, self.leaves, self._weights, allow_unused=True)
        self._kept = (raw, found) if self.keep else self._kept
        return found

    def kept(self, names: Sequence[str]) -> Tensors:
        """Outputs of the call that was kept, and the gradients of the leaves, which are called `names`."""
        raw, found = self._kept
        gradients = {gradient_name(name): value for name, value in zip(names, found, strict=False)}
        return {**self.read(raw), **{name: value for name, value in gradients.items() if value is not None}}

    def outputs(self) -> Tensors:
        """The outputs of one more call, without a graph."""
        with torch.no_grad():
            return self.read(self.call())
