"""`set_box_loss`: L1 distance and GIoU of matched boxes, as DETR and YOLOS have them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from cases.case import Case
from cleanroom.losses.set_criterion import ImageLoss
from harness.operation import DropIn, Input, Operation, Output, Setting, Tensors, Upstream
from harness.relations import reasons
from harness.relations.declaration import Axis, Images, Relations, Rows, Scale
from harness.relations.reasons import exempt


def _bind(
    pred_boxes: Tensor,
    boxes: Tensor,
    queries: Tensor,
    targets: Tensor,
    *,
    sizes: list[int],
    pairs: list[int],
    num_boxes: float,
) -> tuple[Callable[[], Any], Callable[[Any], Tensors]]:
    criterion = ImageLoss(None, 1, 0.1, ["boxes"])
    given = [{"boxes": some} for some in boxes.split(sizes)]
    indices = list(zip(queries.split(pairs), targets.split(pairs), strict=True))
    return partial(criterion.loss_boxes, {"pred_boxes": pred_boxes}, given, indices, num_boxes), dict


def minimum_bytes(case: Case, outputs: Tensors) -> int:
    """The boxes of pairs and their indices once."""
    tensors = case.tensors
    boxes = sum(4 * tensors[name].element_size() for name in ("pred_boxes", "boxes"))
    return len(tensors["queries"]) * (boxes + 16) + sum(value.nbytes for value in outputs.values())


OPERATION = Operation(
    name="set_box_loss",
    summary="L1 distance and 1 - GIoU of matched boxes, divided by the number of ground truths",
    source="spec/set_prediction.md A6; DETR (Carion et al., arXiv:2005.12872)",
    inputs=(
        Input("pred_boxes", "(B, Q, 4)", "floating", "predicted boxes, cxcywh normalised"),
        Input("boxes", "(G, 4)", "floating", "ground truths, cxcywh normalised, image after image"),
        Input("queries", "(P,)", "int64", "matched queries, image after image"),
        Input("targets", "(P,)", "int64", "their ground truths, counted within the image"),
    ),
    settings=(
        Setting("sizes", [], "ground truths of each image; their sum is G"),
        Setting("pairs", [], "pairs of each image; their sum is P"),
        Setting("num_boxes", 1.0, "the divisor"),
        Setting("autocast", None, "dtype under whose autocast both sides run"),
    ),
    outputs=(
        Output("loss_bbox", "()", "promoted", "sum of L1 distances"),
        Output("loss_giou", "()", "float32 or wider", "sum of 1 - GIoU"),
    ),
    upstreams={"transformers": Upstream()},
    candidates={"torch": DropIn(_bind)},
    predictions=("pred_boxes",),
    gradients=("pred_boxes",),
    moved=("pred_boxes", "boxes"),
    minimum_bytes=minimum_bytes,
    workloads=("detr-b16", "coco-b16", "coco-b1"),
    relations=Relations(
        images=Images(
            {"pred_boxes": 0},
            blocks={"boxes": "sizes", "queries": "pairs", "targets": "pairs"},
            lists=("sizes", "pairs"),
        ),
        truths=Rows(count=lambda case: case.settings["sizes"], blocks=("boxes",), listed={"targets": "pairs"}),
        anchors=Axis({"pred_boxes": 1}, counted={"queries": None}),
        scale=Scale({"pred_boxes": slice(None), "boxes": slice(None)}, outputs={"loss_bbox": slice(None)}),
        gradcheck=("pred_boxes",),
        exempt=exempt(
            levels=reasons.NO_LEVELS,
            classes=reasons.NO_CLASSES,
            padding=reasons.RAGGED,
            leak=reasons.DIFFERENTIABLE,
            optimality=reasons.NOTHING_MATCHED,
            monotony=reasons.NOTHING_GROWS,
        ),
    ),
)
