"""`set_class_loss`: weighted cross entropy of set prediction, as DETR and YOLOS have it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from cleanroom.losses.set_criterion import ImageLoss
from harness.operation import DropIn, Input, Operation, Output, Setting, Tensors, Upstream
from harness.relations import reasons
from harness.relations.declaration import Axis, Images, Relations, Rows
from harness.relations.reasons import exempt


def _bind(
    logits: Tensor,
    labels: Tensor,
    queries: Tensor,
    targets: Tensor,
    *,
    sizes: list[int],
    pairs: list[int],
    num_classes: int,
    eos_coef: float,
) -> tuple[Callable[[], Any], Callable[[Any], Tensors]]:
    criterion = ImageLoss(None, num_classes, eos_coef, ["labels"]).to(logits.device)
    given = [{"class_labels": some} for some in labels.split(sizes)]
    indices = list(zip(queries.split(pairs), targets.split(pairs), strict=True))
    return partial(criterion.loss_labels, {"logits": logits}, given, indices, 1.0), dict


OPERATION = Operation(
    name="set_class_loss",
    summary="cross entropy of every query against its target's class or no object, a weighted mean",
    source="spec/set_prediction.md A4; DETR (Carion et al., arXiv:2005.12872)",
    inputs=(
        Input("logits", "(B, Q, C + 1)", "floating", "class logits, no object last"),
        Input("labels", "(G,)", "int64", "classes of the ground truths, image after image"),
        Input("queries", "(P,)", "int64", "matched queries, image after image"),
        Input("targets", "(P,)", "int64", "their ground truths, counted within the image"),
    ),
    settings=(
        Setting("sizes", [], "ground truths of each image; their sum is G"),
        Setting("pairs", [], "pairs of each image; their sum is P"),
        Setting("num_classes", 80, "C"),
        Setting("eos_coef", 0.1, "weight of no object"),
        Setting("autocast", None, "dtype under whose autocast both sides run"),
    ),
    outputs=(Output("loss_ce", "()", "of logits", "class loss"),),
    upstreams={"transformers": Upstream()},
    candidates={"torch": DropIn(_bind)},
    predictions=("logits",),
    gradients=("logits",),
    workloads=("detr-b16", "coco-b16", "coco-b1"),
    relations=Relations(
        images=Images(
            {"logits": 0},
            blocks={"labels": "sizes", "queries": "pairs", "targets": "pairs"},
            lists=("sizes", "pairs"),
            normaliser="one",
        ),
        truths=Rows(count=lambda case: case.settings["sizes"], blocks=("labels",), listed={"targets": "pairs"}),
        anchors=Axis({"logits": 1}, counted={"queries": None}),
        classes=Axis({"logits": 2}, last={"logits": 1}, counted={"labels": None}),
        gradcheck=("logits",),
        exempt=exempt(
            levels=reasons.NO_LEVELS,
            scale=reasons.LOGITS,
            padding=reasons.RAGGED,
            leak=reasons.DIFFERENTIABLE,
            optimality=reasons.NOTHING_MATCHED,
            monotony=reasons.NOTHING_GROWS,
        ),
    ),
)
