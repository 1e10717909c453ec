"""`set_loss`: the set criterion of DETR and YOLOS, with the matcher inside."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cleanroom.losses.set_prediction import set_loss
from harness.candidates import by_path
from harness.operation import Input, Operation, Output, Setting, Settings, Tensors, Upstream, release
from harness.operations.hungarian import TOLERATED_SINCE
from harness.relations import reasons
from harness.relations.declaration import Axis, Images, Relations, Rows
from harness.relations.matching import set_pairs
from harness.relations.reasons import exempt
from harness.total import Part, comparing


def _torch(mask_sizes: list[list[int]] | None = None, **given: Any) -> dict[str, Tensor]:
    """What an image's masks lack to the common size is background already."""
    return set_loss(**given)._asdict()


def _era(version: str) -> dict[str, str]:
    return {} if release(version) >= TOLERATED_SINCE["transformers"] else {"non_finite": "raise"}


def _answer(inputs: Tensors, settings: Settings, outputs: Tensors, index: int) -> dict[str, Tensor]:
    """The pairs of one layer: every layer has as many."""
    queries = inputs["logits"].shape[1]
    count = sum(min(queries, size) for size in settings["sizes"])
    return {name: outputs[name][index * count : (index + 1) * count] for name in ("queries", "targets")}


OPERATION = Operation(
    name="set_loss",
    summary="matching, class loss, L1 and GIoU of every decoder layer, and mask losses of the last one",
    source="spec/set_prediction.md A2 to A9; DETR (Carion et al., arXiv:2005.12872)",
    inputs=(
        Input("logits", "(B, Q, C + 1)", "floating", "class logits, no object last"),
        Input("pred_boxes", "(B, Q, 4)", "floating", "predicted boxes, cxcywh normalised"),
        Input("labels", "(G,)", "int64", "classes of the ground truths, image after image"),
        Input("boxes", "(G, 4)", "floating", "ground truths, cxcywh normalised, image after image"),
        Input("aux_logits", "(L - 1, B, Q, C + 1)", "floating", "class logits of former layers; may be absent"),
        Input("aux_boxes", "(L - 1, B, Q, 4)", "floating", "predicted boxes of former layers"),
        Input("pred_masks", "(B, Q, h, w)", "floating", "mask logits; may be absent"),
        Input("masks", "(G, H, W)", "number", "masks of the ground truths, padded with background"),
    ),
    settings=(
        Setting("sizes", [], "ground truths of each image; their sum is G"),
        Setting("num_classes", 80, "C"),
        Setting("eos_coef", 0.1, "weight of no object in the class loss"),
        Setting("class_cost", 1.0, "weight of the class term in the matching"),
        Setting("bbox_cost", 5.0, "weight of the L1 distance there"),
        Setting("giou_cost", 2.0, "weight of the GIoU there"),
        Setting("bbox_coef", 5.0, "weight of the L1 loss in the total"),
        Setting("giou_coef", 2.0, "weight of the GIoU loss"),
        Setting("mask_coef", 1.0, "weight of the focal loss of masks"),
        Setting("dice_coef", 1.0, "weight of the dice loss"),
        Setting("auxiliary", True, "whether former layers are looked at"),
        Setting("decoder_layers", 1, "layers that count in the total, the last one among them"),
        Setting("mask_sizes", [], "height and width of each image's masks before they are padded"),
        Setting("autocast", None, "dtype under whose autocast both sides run"),
    ),
    outputs=(
        Output("total", "()", "promoted", "weighted sum of the terms"),
        Output("terms", "(K,)", "promoted", "entries of the dictionary in its order"),
        Output("queries", "(P,)", "int64", "matched queries, last layer first", decision=True),
        Output("targets", "(P,)", "int64", "their ground truths, counted within the image", decision=True),
    ),
    upstreams={"transformers": Upstream(era=_era)},
    candidates=by_path(_torch),
    predictions=("logits", "pred_boxes", "aux_logits", "aux_boxes", "pred_masks"),
    gradients=("logits", "pred_boxes", "aux_logits", "aux_boxes", "pred_masks"),
    moved=("logits", "pred_boxes", "aux_logits", "aux_boxes", "pred_masks", "boxes"),
    compare=comparing(Part("hungarian", ("queries", "targets"), _answer)),
    workloads=("detr-b16", "coco-b1"),
    relations=Relations(
        images=Images(
            {"logits": 0, "pred_boxes": 0, "aux_logits": 1, "aux_boxes": 1, "pred_masks": 0, "owner": 1},
            blocks={"labels": "sizes", "boxes": "sizes", "masks": "sizes"},
            lists=("sizes", "mask_sizes"),
            normaliser="each",
            alike=("mask_sizes",),
        ),
        truths=Rows(
            count=lambda case: case.settings["sizes"], blocks=("labels", "boxes", "masks"), counted={"owner": 1}
        ),
        anchors=Axis({"logits": 1, "pred_boxes": 1, "aux_logits": 2, "aux_boxes": 2, "pred_masks": 1, "owner": 2}),
        classes=Axis({"logits": 2, "aux_logits": 3}, last={"logits": 1, "aux_logits": 1}, counted={"labels": None}),
        gradcheck=("logits", "pred_boxes", "aux_logits", "aux_boxes", "pred_masks"),
        dense=set_pairs,
        free=("logits", "pred_boxes", "aux_logits", "aux_boxes", "boxes"),
        exempt=exempt(
            levels=reasons.NO_LEVELS,
            padding=reasons.RAGGED,
            scale=reasons.NORMALISED,
            leak=reasons.INTEGERS,
            optimality=reasons.MATCHER,
            monotony=reasons.NOTHING_GROWS,
        ),
    ),
)
