"""An image size with its feature levels: the anchor grid that assigners work on."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class Frame:
    """An image of `width` x `height` pixels and one feature level a stride (pixels a cell).

    Anchors are ordered level by level, row-major inside a level. Raises ValueError where a stride does not
    divide the image, since feature maps have whole cells.
    """

    width: int
    height: int
    strides: tuple[int, ...]

    def __post_init__(self) -> None:
        for stride in self.strides:
            if stride < 1 or self.width % stride or self.height % stride:
                raise ValueError(f"strides: {stride} does not divide the image of {self.width}x{self.height}")

    @cached_property
    def cells(self) -> np.ndarray:
        """(A, 3) float64: column, row and stride of every anchor."""
        levels = []
        for stride in self.strides:
            rows, columns = np.mgrid[: self.height // stride, : self.width // stride]
            levels.append(np.stack([columns.ravel(), rows.ravel(), np.full(rows.size, stride)], axis=1))
        return np.concatenate(levels).astype(np.float64)

    @cached_property
    def points(self) -> np.ndarray:
        """(A, 2) float64: anchor centres in pixels."""
        return (self.cells[:, :2] + 0.5) * self.cells[:, 2:]

    @property
    def anchors(self) -> int:
        """Number of anchors over all levels."""
        return sum((self.width // stride) * (self.height // stride) for stride in self.strides)


#: The frame of the workloads and of real labels.
TRAINING_SIZE = 640
TRAINING_STRIDES = (8, 16, 32)
