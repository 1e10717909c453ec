"""`set_mask_loss`: focal and dice loss of matched masks, as DETR has them."""

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


def _bind(
    pred_masks: Tensor,
    masks: Tensor,
    queries: Tensor,
    targets: Tensor,
    *,
    sizes: list[int],
    pairs: list[int],
    mask_sizes: list[list[int]],
    num_boxes: float,
) -> tuple[Callable[[], Any], Callable[[Any], Tensors]]:
    criterion = ImageLoss(None, 1, 0.1, ["masks"])
    places = zip(masks.split(sizes), mask_sizes, strict=True)
    given = [{"masks": some[:, :height, :width].contiguous()} for some, (height, width) in places]
    indices = list(zip(queries.split(pairs), targets.split(pairs), strict=True))
    return partial(criterion.loss_masks, {"pred_masks": pred_masks}, given, indices, num_boxes), dict


def minimum_bytes(case: Case, outputs: Tensors) -> int:
    """The masks of pairs and their indices once."""
    tensors = case.tensors
    pair = sum(tensors[name].shape[-2:].numel() * tensors[name].element_size() for name in ("pred_masks", "masks"))
    return len(tensors["queries"]) * (pair + 16) + sum(value.nbytes for value in outputs.values())


OPERATION = Operation(
    name="set_mask_loss",
    summary="sigmoid focal and dice loss of matched masks at the size of the targets",
    source="spec/set_prediction.md A7; DETR (Carion et al., arXiv:2005.12872)",
    inputs=(
        Input("pred_masks", "(B, Q, h, w)", "floating", "mask logits"),
        Input("masks", "(G, H, W)", "number", "masks of the ground truths, padded with background"),
        Input("queries", "(P,)", "int64", "matched queries, image after image"),
        Input("targets", "(P,)", "int64", "their ground truths, counted within the image"),
    ),
    settings=(
        Setting("sizes", [], "ground truths of each image; their sum is G"),
        Setting("pairs", [], "pairs of each image; their sum is P"),
        Setting("mask_sizes", [], "height and width of each image's masks before they are padded"),
        Setting("num_boxes", 1.0, "the divisor"),
    ),
    outputs=(
        Output("loss_mask", "()", "of pred_masks", "focal loss"),
        Output("loss_dice", "()", "of pred_masks", "dice loss"),
    ),
    upstreams={"transformers": Upstream()},
    candidates={"torch": DropIn(_bind)},
    predictions=("pred_masks",),
    gradients=("pred_masks",),
    minimum_bytes=minimum_bytes,
    workloads=("coco-b16", "coco-b1"),
    relations=Relations(
        images=Images(
            {"pred_masks": 0},
            blocks={"masks": "sizes", "queries": "pairs", "targets": "pairs"},
            lists=("sizes", "pairs", "mask_sizes"),
            alike=("mask_sizes",),
        ),
        truths=Rows(count=lambda case: case.settings["sizes"], blocks=("masks",), listed={"targets": "pairs"}),
        anchors=Axis({"pred_masks": 1}, counted={"queries": None}),
        gradcheck=("pred_masks",),
        exempt=exempt(
            levels=reasons.NO_LEVELS,
            classes=reasons.NO_CLASSES,
            scale=reasons.LOGITS,
            padding=reasons.RAGGED,
            leak=reasons.DIFFERENTIABLE,
            optimality=reasons.NOTHING_MATCHED,
            monotony=reasons.NOTHING_GROWS,
        ),
    ),
)
