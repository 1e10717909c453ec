"""The one place that chooses between data-dependent shapes, static shapes and kernels."""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from cleanroom.kernels import runtime

PATHS = ("auto", "sparse", "static")
KERNEL_PATHS = (*PATHS, "triton")


def data_dependent(*tensors: Tensor) -> bool:
    """Tell whether shapes may depend on values: all tensors on the CPU, and not traced by torch.compile or export.

    On an accelerator a data-dependent shape makes the host wait for the device; fake tensors have no values.
    """
    return not torch.compiler.is_compiling() and all(
        tensor.device.type == "cpu" and not isinstance(tensor, FakeTensor) for tensor in tensors
    )


def take_sparse_path(path: str, *tensors: Tensor) -> bool:
    """Resolve the `path` keyword of what has no kernel: "auto" asks `data_dependent`, the others overrule it.

    Raises:
        ValueError: `path` is none of `PATHS`.
    """
    if path not in PATHS:
        raise ValueError(f"path must be one of {PATHS}, got {path!r}")
    return data_dependent(*tensors) if path == "auto" else path == "sparse"


def choose_path(path: str, *tensors: Tensor, has_kernel: bool = True) -> str:
    """Resolve the `path` keyword of what has a kernel to "sparse", "static" or "triton".

    "auto" takes kernels on CUDA where Triton is installed, data-dependent shapes on the CPU, and static ones
    elsewhere. Kernels compute in float32: where a tensor is float64, "auto" and "triton" are "static" on a device.
    `has_kernel` False: settings ask for a former era that kernels do not know; then "triton" is "static" too.

    Raises:
        ValueError: `path` is none of `KERNEL_PATHS`.
        RuntimeError: `path` is "triton", and kernels cannot run on these tensors; the text says why.
    """
    if path not in KERNEL_PATHS:
        raise ValueError(f"path must be one of {KERNEL_PATHS}, got {path!r}")
    if path == "auto":
        if all(tensor.device.type == "cuda" for tensor in tensors):
            return "triton" if has_kernel and runtime.runs_on(*tensors) else "static"
        return "sparse" if data_dependent(*tensors) else "static"
    if path == "triton" and not runtime.runs_on(*tensors):
        if runtime.ABSENT or not any(tensor.dtype == torch.float64 for tensor in tensors):
            raise RuntimeError(f"path 'triton' cannot run here: {runtime.why_not(*tensors)}")
        return "static"
    return "static" if path == "triton" and not has_kernel else path
