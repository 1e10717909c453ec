"""`cardinality_error`: how far the number of predicted objects is off, as DETR and YOLOS log it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from cases.case import Case
from cleanroom.losses.set_criterion import ImageLoss
from harness.operation import DropIn, Input, Operation, Output, Setting, Tensors, Upstream
from harness.relations import reasons
from harness.relations.declaration import Axis, Images, Relations, Rows
from harness.relations.reasons import exempt


def _bind(logits: Tensor, labels: Tensor, *, sizes: list[int]) -> tuple[Callable[[], Any], Callable[[Any], Tensors]]:
    criterion = ImageLoss(None, 1, 0.1, ["cardinality"])
    given = [{"class_labels": some} for some in labels.split(sizes)]
    return partial(criterion.loss_cardinality, {"logits": logits}, given, None, 1.0), dict


def minimum_bytes(case: Case, outputs: Tensors) -> int:
    """The logits; of the labels only their number counts."""
    return case.tensors["logits"].nbytes + sum(value.nbytes for value in outputs.values())


OPERATION = Operation(
    name="cardinality_error",
    summary="mean distance of the number of queries that answer an object from the number of ground truths",
    source="spec/set_prediction.md A5; DETR (Carion et al., arXiv:2005.12872)",
    inputs=(
        Input("logits", "(B, Q, C + 1)", "floating", "class logits, no object last"),
        Input("labels", "(G,)", "int64", "classes of the ground truths, image after image"),
    ),
    settings=(Setting("sizes", [], "ground truths of each image; their sum is G"),),
    outputs=(Output("cardinality_error", "()", "float32", "mean over images"),),
    upstreams={"transformers": Upstream()},
    candidates={"torch": DropIn(_bind)},
    predictions=("logits",),
    minimum_bytes=minimum_bytes,
    workloads=("detr-b16", "coco-b16", "coco-b1"),
    relations=Relations(
        images=Images({"logits": 0}, blocks={"labels": "sizes"}, lists=("sizes",), means=("cardinality_error",)),
        truths=Rows(count=lambda case: case.settings["sizes"], blocks=("labels",)),
        anchors=Axis({"logits": 1}),
        classes=Axis({"logits": 2}, last={"logits": 1}, counted={"labels": None}),
        exempt=exempt(
            levels=reasons.NO_LEVELS,
            padding=reasons.RAGGED,
            scale=reasons.LOGITS,
            gradcheck=reasons.NO_GRADIENT,
            optimality=reasons.NOTHING_MATCHED,
            monotony=reasons.NOTHING_GROWS,
        ),
    ),
)
