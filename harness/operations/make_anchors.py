"""`make_anchors`: the anchor grid of ultralytics' heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cases.case import Case
from cleanroom.boxes import make_anchors
from harness.operation import DropIn, Input, Operation, Output, Setting, Tensors, Upstream, release
from harness.relations import reasons
from harness.relations.declaration import Levels, Relations, Scale
from harness.relations.reasons import exempt

NAMES = ("points", "point_strides")
SIZES_SINCE = (8, 3, 50)
LEVELS_SINCE = (8, 3, 253)


def _options(version: str) -> dict[str, Any]:
    number = release(version)
    return {"sizes": number >= SIZES_SINCE, "more_strides": number >= LEVELS_SINCE}


def _bind(
    *, strides: list[float], strides_as: str, grid_cell_offset: float, sizes: Tensor | None = None, **maps: Tensor
) -> tuple[Callable[[], Any], Callable[[Any], Tensors]]:
    feats = [maps[name] for name in sorted(maps)] if sizes is None else sizes
    if strides_as == "tensor":
        strides = torch.tensor(strides, dtype=torch.float32)
    return lambda: make_anchors(feats, strides, grid_cell_offset), lambda raw: dict(zip(NAMES, raw, strict=True))


def minimum_bytes(case: Case, outputs: Tensors) -> int:
    """What is written: of the maps only shapes are read."""
    return sum(tensor.nbytes for tensor in outputs.values())


OPERATION = Operation(
    name="make_anchors",
    summary="Centre and stride of every cell of every feature map",
    source="spec/boxes.md section 1",
    inputs=(
        Input("feats", "(B, C, h, w)", "floating", "maps feat0, feat1, ..., of which shapes count, the first's dtype"),
        Input("sizes", "(L, 2)", "floating", "in their place: rows and columns of each map"),
    ),
    settings=(
        Setting("strides", [8, 16, 32], "one number a map"),
        Setting("strides_as", "list", "how they are handed over: list or tensor"),
        Setting("grid_cell_offset", 0.5, "where the point lies in its cell"),
    ),
    outputs=(
        Output("points", "(N, 2)", "of the first map", "x and y in cells"),
        Output("point_strides", "(N, 1)", "of the first map", "stride of the map"),
    ),
    upstreams={"ultralytics": Upstream(options=_options)},
    candidates={"torch": DropIn(_bind)},
    predictions=(),
    minimum_bytes=minimum_bytes,
    workloads=("coco-b1", "coco-b16"),
    relations=Relations(
        levels=Levels(prefix="feat", along={"points": 0, "point_strides": 0}, scattered={"sizes": 0}),
        scale=Scale({}, settings=("strides",), outputs={"point_strides": slice(None)}),
        exempt=exempt(
            ground_truths=reasons.NO_ROWS,
            classes=reasons.NO_CLASSES,
            padding=reasons.NO_PADDING,
            leak=reasons.NO_GRADIENT,
            optimality=reasons.NOTHING_MATCHED,
            monotony=reasons.NOTHING_GROWS,
            images="of its maps only their sizes count",
            alone="a level alone is a call of its own; the order of levels is tried",
            anchors=reasons.CELLS,
            gradcheck=reasons.NO_GRADIENT,
        ),
    ),
)
