"""The result that both Hungarian matchers give: pairs of index tensors, one pair an image."""

from collections.abc import Sequence

import torch
from torch import Tensor


def join_pairs(raw: Sequence[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Concatenate the images' (query indices, target indices) as they are: "queries", "targets" (P,)."""
    nothing = torch.empty(0, dtype=torch.int64)
    return {
        "queries": torch.cat([nothing, *(queries for queries, _ in raw)]),
        "targets": torch.cat([nothing, *(targets for _, targets in raw)]),
    }
