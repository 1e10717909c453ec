"""Class logits of a batch, read where they lie: rows (B, N, C), or the channels (B, C, n) of each level of a head.

Anchors are b * N + a. Few anchors are ever asked about, so that putting levels together first would cost more than
all that is done with them.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class ClassLogits(Protocol):
    """What the sparse path asks of the logits of all anchors."""

    classes: int

    def rows(self, anchor: Tensor) -> Tensor:
        """Logits (P, C) of anchors (P,)."""

    def entries(self, anchor: Tensor, label: Tensor) -> Tensor:
        """Logits (P,) of one class of each anchor."""


class RowLogits:
    """Logits of rows (B, N, C)."""

    def __init__(self, logits: Tensor) -> None:
        self._logits = logits.flatten(0, 1)
        self.classes = logits.shape[2]

    def rows(self, anchor: Tensor) -> Tensor:
        """See ClassLogits."""
        return self._logits.index_select(0, anchor)

    def entries(self, anchor: Tensor, label: Tensor) -> Tensor:
        """See ClassLogits."""
        return self._logits[anchor, label]


class LevelLogits:
    """Logits of levels (B, C, n), one after the other."""

    def __init__(self, levels: Sequence[Tensor]) -> None:
        self._levels = levels
        self._anchors = sum(level.shape[2] for level in levels)
        self.classes = levels[0].shape[1]

    def rows(self, anchor: Tensor) -> Tensor:
        """See ClassLogits."""
        found = self._levels[0].new_empty(len(anchor), self.classes)
        for level, place, image, cell in self._places(anchor):
            found[place] = level[image, :, cell]
        return found

    def entries(self, anchor: Tensor, label: Tensor) -> Tensor:
        """See ClassLogits."""
        found = self._levels[0].new_empty(len(anchor))
        for level, place, image, cell in self._places(anchor):
            found[place] = level[image, label[place], cell]
        return found

    def _places(self, anchor: Tensor):
        """Of each level, which of the anchors it holds, and their images and cells."""
        image = anchor.div(self._anchors, rounding_mode="floor")
        cell = anchor - image * self._anchors
        start = 0
        for level in self._levels:
            end = start + level.shape[2]
            place = ((cell >= start) & (cell < end)).nonzero().squeeze(1)
            yield level, place, image[place], cell[place] - start
            start = end


def class_logits(logits: Tensor | Sequence[Tensor]) -> ClassLogits:
    """The logits, given as rows or as levels."""
    return RowLogits(logits) if isinstance(logits, Tensor) else LevelLogits(logits)


def as_rows(logits: Tensor | Sequence[Tensor]) -> Tensor:
    """The logits as rows (B, N, C)."""
    return logits if isinstance(logits, Tensor) else torch.cat([level.mT for level in logits], 1)
