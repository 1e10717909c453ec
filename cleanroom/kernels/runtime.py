"""What every kernel stands on: whether Triton is there, allocation, launch, and registration as an operator.

Importable without Triton. The modules of the kernels are not: import them only where `AVAILABLE` is true.
"""

import importlib.util
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

MINIMUM = (3, 4)
"""Oldest release of Triton that the kernels are written for."""

#: Whether the operators of the kernels are registered with PyTorch; tests that load a module twice switch it off.
REGISTERED = True
_LIBRARY = torch.library.Library("cleanroom", "FRAGMENT")


def _find_triton() -> str:
    """Why Triton cannot be used here, or nothing."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    import triton

    version = getattr(triton, "__version__", "0")
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    if numbers < MINIMUM:
        return f"Triton {version} is older than {'.'.join(map(str, MINIMUM))}"
    return ""


ABSENT = _find_triton()
"""Why there are no kernels here; empty where there are."""
AVAILABLE = not ABSENT
INTERPRETED = AVAILABLE and os.environ.get("TRITON_INTERPRET", "0").lower() in {"1", "true", "on", "yes", "y"}
"""Whether kernels run on the CPU, step by step: Triton decides it by the same variable when a kernel is defined."""


def describe() -> str:
    """What the library computes with where it would pick kernels, in a line."""
    if ABSENT:
        return f"none, CUDA takes PyTorch's static path: {ABSENT}"
    if INTERPRETED:
        return "interpreted step by step on the CPU (TRITON_INTERPRET is set), when asked for by path='triton'"
    found = "CUDA takes them" if torch.cuda.is_available() else "no CUDA device is here to take them"
    return f"compiled by Triton; {found}"


def runs_on(*tensors: Tensor) -> bool:
    """Tell whether kernels take these tensors: all on CUDA (or ROCm) devices, or anywhere under the interpreter.

    Kernels compute in float32: where one of the tensors is float64, the `torch` path does.
    """
    if not AVAILABLE or any(tensor.dtype == torch.float64 for tensor in tensors):
        return False
    return INTERPRETED or all(tensor.device.type == "cuda" for tensor in tensors)


def why_not(*tensors: Tensor) -> str:
    """Why kernels do not take these tensors, for an error's text."""
    if ABSENT:
        return ABSENT
    others = sorted({str(tensor.device) for tensor in tensors if tensor.device.type != "cuda"})
    return f"tensors are on {', '.join(others)}, and TRITON_INTERPRET=1 was not set when cleanroom was imported"


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Uninitialised memory. Every tensor that a kernel writes comes from here or from `zeros`: tests poison it."""
    return torch.empty(tuple(shape), dtype=dtype, device=device)


def zeros(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeroed memory, for counters and what is reduced into by atomics."""
    return torch.zeros(tuple(shape), dtype=dtype, device=device)


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **meta: Any) -> None:
    """Launch on the current stream of the device of the first tensor; no program: no launch.

    Products and sums are not contracted, so that the order of rounding is the one that is written down.
    """
    if 0 in grid:
        return
    first = next(value for value in args if isinstance(value, Tensor))
    with _on(first.device), _quiet():
        kernel[grid](*args, **{"enable_fp_fusion": False} | meta)


def _on(device: torch.device) -> AbstractContextManager:
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _quiet() -> AbstractContextManager:
    """The interpreter computes masked-out lanes with NumPy, which would warn of each logarithm of 0 in them."""
    if not INTERPRETED:
        return nullcontext()
    import numpy as np

    return np.errstate(all="ignore")


def operator(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as the operator `cleanroom::NAME` of this schema, for all devices.

    `fake` gives its outputs' shapes and dtypes, so that `torch.compile` and export keep the call as one node.
    """
    name = schema.partition("(")[0]

    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        if not REGISTERED:
            return function
        _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"cleanroom::{name}", fake, lib=_LIBRARY)
        return getattr(torch.ops.cleanroom, name).default

    return register
