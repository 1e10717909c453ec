"""A release's recorded answer in the place of a candidate: outputs as they were, gradients too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harness.operation import Tensors, gradient_name

PREFIX = gradient_name("")


class _Replay(torch.autograd.Function):
    """Gives stored values forward, and stored gradients backward whatever the outputs are contracted with."""

    @staticmethod
    def forward(context: Any, gradients: tuple[Tensor | None, ...], outputs: tuple[Tensor, ...], *leaves: Tensor):
        context.gradients = gradients
        return tuple(value.clone() for value in outputs)

    @staticmethod
    def backward(context: Any, *_: Tensor):
        return None, None, *context.gradients


@dataclass(frozen=True)
class Recording:
    """Called as a candidate, it answers `outputs`; those named `gradient of NAME` are the gradients of inputs."""

    outputs: Tensors

    def __call__(self, **given: Any) -> dict[str, Tensor]:
        """The recorded outputs by name, tied to the inputs that had a gradient."""
        gradients = {name.removeprefix(PREFIX): g for name, g in self.outputs.items() if name.startswith(PREFIX)}
        outputs = {name: value for name, value in self.outputs.items() if not name.startswith(PREFIX)}
        if not gradients:
            return outputs
        real = [name for name, value in outputs.items() if value.is_floating_point()]
        leaves = [given[name] for name in gradients]
        tied = _Replay.apply(tuple(gradients.values()), tuple(outputs[name] for name in real), *leaves)
        return outputs | dict(zip(real, tied, strict=True))
