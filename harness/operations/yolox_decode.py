"""`yolox_decode`: raw maps of YOLOX's head to rows with boxes in pixels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from cleanroom.yolox_boxes import yolox_decode
from harness.operation import Input, Operation, Output, Setting, Upstream
from harness.relations import reasons
from harness.relations.declaration import Images, Levels, Relations, Scale
from harness.relations.reasons import exempt


def levels(given: dict[str, Tensor]) -> list[Tensor]:
    """The maps raw0, raw1 and so on."""
    return [given[name] for name in sorted(given)]


@contextmanager
def naming_levels() -> Iterator[None]:
    """What a candidate says of its argument `maps`, it says of the case's raw0 and on."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("maps", "raw0 and on")) from None


def _torch(*, strides: Sequence[float], **maps: Tensor) -> dict[str, Tensor]:
    with naming_levels():
        found = yolox_decode(levels(maps), strides)
    return {"decoded": found.outputs, "grid": torch.stack([found.x_shifts, found.y_shifts], 2)}


MAPS = tuple(
    Input(f"raw{level}", "(B, 5+C, H, W)", "floating", f"raw map of level {level}, if it is: box, objectness, classes")
    for level in range(3)
)

OPERATION = Operation(
    name="yolox_decode",
    summary="raw maps to rows an anchor: (t + cell) * stride and exp(t) * stride, logits as they are",
    source="spec/simota.md section 3.1; YOLOX (Ge et al., arXiv:2107.08430)",
    inputs=MAPS,
    settings=(Setting("strides", [8, 16, 32], "pixels a cell of each level"),),
    outputs=(
        Output("decoded", "(B, N, 5+C)", "of the maps", "boxes cxcywh in pixels, then logits"),
        Output("grid", "(1, N, 2)", "of the maps", "column and row of each anchor"),
    ),
    upstreams={"yolox": Upstream()},
    candidates={"torch": _torch},
    predictions=tuple(raw.name for raw in MAPS),
    gradients=tuple(raw.name for raw in MAPS),
    workloads=("coco-b1", "coco-b16"),
    relations=Relations(
        images=Images({"raw0": 0, "raw1": 0, "raw2": 0, "decoded": 0}, unsummed=("grid",)),
        levels=Levels(prefix="raw", along={"decoded": 1, "grid": 1}),
        scale=Scale({}, settings=("strides",), outputs={"decoded": slice(4)}),
        gradcheck=("raw0", "raw1", "raw2"),
        exempt=exempt(
            ground_truths=reasons.NO_ROWS,
            classes=reasons.CLASSES_ALIKE,
            padding=reasons.NO_PADDING,
            leak=reasons.DIFFERENTIABLE,
            optimality=reasons.NOTHING_MATCHED,
            monotony=reasons.NOTHING_GROWS,
            anchors=reasons.CELLS,
        ),
    ),
)
