"""Batched linear assignment: its public function, once for all problems where they have one size."""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from reference.bound import Bound


def bind(tensors: Mapping[str, Tensor], settings: Mapping[str, object]) -> Bound:
    """Prepare the call; problems of different sizes, which it does not know, are calls of their own."""
    from torch_linear_assignment import batch_linear_assignment

    cost, sizes = tensors["cost"], settings["sizes"]
    if all(tuple(size) == cost.shape[1:] for size in sizes) and cost.numel():
        return Bound(partial(batch_linear_assignment, cost), lambda raw: {"columns": raw})
    blocks = [cost[index : index + 1, :rows, :columns] for index, (rows, columns) in enumerate(sizes)]

    def call() -> list[Tensor | None]:
        return [batch_linear_assignment(block) if block.numel() else None for block in blocks]

    def translate(raw: list[Tensor | None]) -> dict[str, Tensor]:
        found = torch.full(cost.shape[:2], -1, dtype=torch.int64, device=cost.device)
        for index, part in enumerate(raw):
            if part is not None:
                found[index, : part.shape[1]] = part[0]
        return {"columns": found}

    return Bound(call, translate)
