"""`dfl_loss`: the distribution focal loss of YOLOv8 and later."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from cleanroom.losses.dfl import DFLoss
from harness.operation import DropIn, Input, Operation, Output, Tensors, Upstream
from harness.relations import reasons
from harness.relations.declaration import Axis, Relations
from harness.relations.reasons import exempt


def _bind(pred_dist: Tensor, target: Tensor) -> tuple[Callable[[], Any], Callable[[Any], Tensors]]:
    loss = DFLoss(pred_dist.shape[-1])
    return lambda: loss(pred_dist, target), lambda raw: {"loss": raw}


OPERATION = Operation(
    name="dfl_loss",
    summary="Distribution focal loss: cross entropy against the two bins beside a real-valued distance",
    source="spec/yolo_losses.md 2.3; Li et al., arXiv:2006.04388",
    inputs=(
        Input("pred_dist", "(4N, R)", "floating", "logits of the bins of each side"),
        Input("target", "(N, 4)", "floating", "distances in bins, clamped to [0, R - 1.01]"),
    ),
    settings=(),
    outputs=(Output("loss", "(N, 1)", "promoted", "mean over the sides"),),
    upstreams={"ultralytics": Upstream()},
    candidates={"torch": DropIn(_bind)},
    predictions=("pred_dist",),
    gradients=("pred_dist",),
    moved=("pred_dist", "target"),
    workloads=("coco-b1", "coco-b16", "crowd-b16"),
    relations=Relations(
        anchors=Axis({"target": 0, "pred_dist": 0, "loss": 0}, neighbours={"pred_dist": 4}),
        gradcheck=("pred_dist",),
        exempt=exempt(
            ground_truths=reasons.NO_ROWS,
            levels=reasons.NO_LEVELS,
            classes=reasons.NO_CLASSES,
            padding=reasons.NO_PADDING,
            scale=reasons.CELL_UNITS,
            leak=reasons.DIFFERENTIABLE,
            optimality=reasons.NOTHING_MATCHED,
            monotony=reasons.NOTHING_GROWS,
            images=reasons.NO_IMAGES,
        ),
    ),
)
