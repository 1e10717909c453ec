"""Decoding of raw maps by YOLOX's head (specification: simota.md, section 3.1)."""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from reference.bound import Bound
from reference.yolox.head import bare_head, decode, levels


def bind(tensors: Mapping[str, Tensor], settings: Mapping[str, object]) -> Bound:
    """Prepare the call for every level: raw maps (B, 5 + C, H, W) become rows, level after level."""
    maps = levels(tensors)
    head = bare_head(maps[0].shape[1] - 5, settings["strides"])
    return Bound(partial(_run, head, maps), _translate, _losses)


def _run(head: object, maps: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    rows, grids = decode(head, maps)
    return torch.cat(rows, 1), grids


def _translate(raw: tuple[Tensor, list[Tensor]]) -> dict[str, Tensor]:
    return {"decoded": raw[0], "grid": torch.cat(raw[1], 1)}


def _losses(raw: tuple[Tensor, list[Tensor]]) -> dict[str, Tensor]:
    return {"decoded": raw[0]}
