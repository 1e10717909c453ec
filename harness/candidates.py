"""The built-in candidates: which there are, and how one function of `cleanroom` serves as each of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from harness.operation import DropIn, Implementation

BUILT_IN = ("torch", "triton")
INTERPRETER = "TRITON_INTERPRET"


@dataclass(frozen=True)
class _OnPath:
    """`call` with the keyword `path` chosen by where the tensors are, unless it is given."""

    call: Callable[..., Any]
    on_cpu: str
    on_device: str

    def __call__(self, **given: Any) -> Any:
        tensors = [value for value in given.values() if isinstance(value, Tensor)]
        path = self.on_cpu if all(tensor.device.type == "cpu" for tensor in tensors) else self.on_device
        return self.call(**{"path": path, **given})


def by_path(implementation: Implementation, *, on_device: str = "static") -> Mapping[str, Implementation]:
    """The candidates `torch` and `triton` of a function (or drop-in) that takes `path`.

    `torch` is what the library chooses on the CPU, and `on_device` where it would choose kernels.
    """
    if isinstance(implementation, DropIn):
        return {name: DropIn(call) for name, call in by_path(implementation.bind, on_device=on_device).items()}
    return {"torch": _OnPath(implementation, "auto", on_device), "triton": _OnPath(implementation, "triton", "triton")}


def default_candidates(device: str) -> tuple[str, ...]:
    """What a run tries when it is not told: kernels only where they are compiled, the interpreter only when asked."""
    from cleanroom.kernels.runtime import AVAILABLE

    return BUILT_IN if device == "cuda" and AVAILABLE else ("torch",)


def interprets(candidates: Mapping[str, str], device: str) -> bool:
    """Whether a run's kernels go through Triton's interpreter: there are no timings then."""
    return device == "cpu" and candidates.get("triton") == ""


def prepare_interpreter() -> str:
    """Make the workers started from here interpret kernels; why that cannot be, or nothing."""
    from cleanroom.kernels.runtime import ABSENT

    os.environ[INTERPRETER] = "1"
    return ABSENT
