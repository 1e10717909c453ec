"""`class_bce`: the class term of detection criteria, from at most one soft target an anchor."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from cases.case import Case
from cleanroom.losses.class_bce import class_bce
from harness.operation import DropIn, Input, Operation, Output, Tensors, Upstream
from harness.relations import reasons
from harness.relations.declaration import Axis, Images, Relations
from harness.relations.quantities import grows_with_wrong_logits
from harness.relations.reasons import exempt


def _bind(**tensors: Tensor) -> tuple[Callable[[], Any], Callable[[Any], Tensors]]:
    return partial(class_bce, **tensors), lambda raw: {"loss": raw}


def _background(case: Case) -> Tensor:
    """Logits of anchors without a target."""
    return (case.tensors["values"] == 0)[..., None].expand_as(case.tensors["scores"])


OPERATION = Operation(
    name="class_bce",
    summary="Binary cross entropy of class logits against at most one soft target an anchor, summed and divided",
    source="spec/yolo_losses.md 0 and 3",
    inputs=(
        Input("scores", "(B, A, C)", "floating", "class logits"),
        Input("labels", "(B, A)", "int64", "class of the target, not read in the background"),
        Input("values", "(B, A)", "floating", "target at that class, 0 in the background"),
        Input("normaliser", "()", "floating", "divisor"),
    ),
    settings=(),
    outputs=(Output("loss", "()", "promoted", "sum over all logits, over the divisor"),),
    upstreams={"ultralytics": Upstream()},
    candidates={"torch": DropIn(_bind)},
    predictions=("scores",),
    gradients=("scores",),
    moved=("scores", "values", "normaliser"),
    workloads=("coco-b1", "coco-b16"),
    relations=Relations(
        images=Images({"scores": 0, "labels": 0, "values": 0}),
        anchors=Axis({"scores": 1, "labels": 1, "values": 1}),
        classes=Axis({"scores": 2}, counted={"labels": None}),
        gradcheck=("scores",),
        monotony=grows_with_wrong_logits("scores", _background, "loss"),
        exempt=exempt(
            ground_truths=reasons.NO_ROWS,
            levels=reasons.NO_LEVELS,
            padding=reasons.NO_PADDING,
            scale=reasons.LOGITS,
            leak=reasons.DIFFERENTIABLE,
            optimality=reasons.NOTHING_MATCHED,
        ),
    ),
)
