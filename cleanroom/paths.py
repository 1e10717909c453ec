"""The one place that chooses between data-dependent and static shapes."""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

PATHS = ("auto", "sparse", "static")


def data_dependent(*tensors: Tensor) -> bool:
    """Tell whether shapes may depend on values: all tensors on the CPU, and not traced by torch.compile or export.

    On an accelerator a data-dependent shape makes the host wait for the device; fake tensors have no values.
    """
    return not torch.compiler.is_compiling() and all(
        tensor.device.type == "cpu" and not isinstance(tensor, FakeTensor) for tensor in tensors
    )


def take_sparse_path(path: str, *tensors: Tensor) -> bool:
    """Resolve a `path` keyword: "auto" asks `data_dependent`, "sparse" and "static" overrule it.

    Raises:
        ValueError: `path` is none of `PATHS`.
    """
    if path not in PATHS:
        raise ValueError(f"path must be one of {PATHS}, got {path!r}")
    return data_dependent(*tensors) if path == "auto" else path == "sparse"
