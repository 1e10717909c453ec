"""The test pattern of the specifications' worked examples."""

import math

import torch
from torch import Tensor


def pattern(shape: tuple[int, ...], a: float, b: float, c: float) -> Tensor:
    """S of yolo_losses.md: a sin(b n + c) over the row-major index n, float32."""
    index = torch.arange(math.prod(shape), dtype=torch.float64)
    return (a * torch.sin(b * index + c)).float().view(shape)
