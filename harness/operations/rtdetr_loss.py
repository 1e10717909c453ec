"""`rtdetr_loss`: the set losses of RT-DETR, with the matcher and the denoising queries."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from cases.case import Case
from cleanroom.losses.rtdetr import rtdetr_loss
from harness.candidates import by_path
from harness.operation import Input, Operation, Output, Setting, Settings, Tensors, Upstream, release
from harness.relations import reasons
from harness.relations.declaration import Axis, Images, Relations, Rows
from harness.relations.matching import rtdetr_pairs
from harness.relations.reasons import exempt
from harness.total import Part, comparing

FOCAL_SINCE = (8, 3, 117)
SUBSET_SINCE = (8, 4, 125)
FORMER_VARIFOCAL = {"vfl_gamma": 2.0, "vfl_alpha": 0.75}


def _options(version: str) -> dict[str, Any]:
    return {"focal": release(version) >= FOCAL_SINCE, "subset": release(version) >= SUBSET_SINCE}


def _era(version: str) -> dict[str, Any]:
    return {} if release(version) >= FOCAL_SINCE else FORMER_VARIFOCAL


def _answer(inputs: Tensors, settings: Settings, outputs: Tensors, index: int) -> dict[str, Tensor]:
    """The pairs of one matching: every matching of a case has as many."""
    queries = inputs["logits"].shape[1]
    count = sum(min(queries, size) for size in settings["sizes"])
    return {name: outputs[name][index * count : (index + 1) * count] for name in ("queries", "targets")}


def minimum_bytes(case: Case, outputs: Tensors) -> int:
    """Everything once, but of the denoising queries' boxes only those that are paired."""
    tensors = case.tensors
    paired = tensors["dn_pos_idx"].numel() if "dn_bboxes" in tensors else 0
    layers = len(tensors["dn_bboxes"]) if paired else 0
    read = sum(value.nbytes for name, value in tensors.items() if name != "dn_bboxes")
    written = sum(value.nbytes for value in outputs.values())
    return read + written + 4 * paired * layers * tensors["bboxes"].element_size()


def _groups(case: Case) -> list[int]:
    """Ground truths that may change places: none where denoising queries name them by number."""
    return [0 if "dn_gt_idx" in case.tensors else size for size in case.settings["gt_groups"]]


def _all_images(case: Case) -> bool:
    """Every image says how many ground truths it has."""
    return len(case.settings["gt_groups"]) == case.tensors["pred_scores"].shape[1]


OPERATION = Operation(
    name="rtdetr_loss",
    summary="varifocal, focal or BCE class loss, L1 and GIoU of matched queries of every decoder layer, with denoising",
    source="spec/set_prediction.md part B; RT-DETR (Zhao et al., arXiv:2304.08069)",
    inputs=(
        Input("pred_bboxes", "(L, B, Q, 4)", "floating", "predicted boxes of every layer, cxcywh normalised"),
        Input("pred_scores", "(L, B, Q, C)", "floating", "class logits of every layer"),
        Input("cls", "(M,)", "int64", "classes of the ground truths, image after image"),
        Input("bboxes", "(M, 4)", "floating", "ground truths, cxcywh normalised, image after image"),
        Input("dn_bboxes", "(L', B, R, 4)", "floating", "predicted boxes of denoising queries; may be absent"),
        Input("dn_scores", "(L', B, R, C)", "floating", "class logits of denoising queries"),
        Input("dn_pos_idx", "(P,)", "int64", "positives of each image among the denoising queries"),
        Input("dn_gt_idx", "(N,)", "int64", "their ground truths in one group, counted through the batch"),
    ),
    settings=(
        Setting("gt_groups", [], "ground truths of each image; their sum is M"),
        Setting("num_classes", 80, "C"),
        Setting("loss_gain", {"class": 1.0, "bbox": 5.0, "giou": 2.0}, "weights of the three terms"),
        Setting("aux_loss", True, "layers before the last have terms too"),
        Setting("use_fl", True, "focal class loss, else binary cross-entropy against the IoU"),
        Setting("use_vfl", False, "with use_fl: varifocal where something is matched"),
        Setting("use_uni_match", False, "one matching for all layers before the last"),
        Setting("uni_match_ind", 0, "the layer of that matching"),
        Setting("gamma", 1.5, "exponent of focal and varifocal loss"),
        Setting("alpha", 0.25, "balance of focal and varifocal loss"),
        Setting("dn_pos_counts", [], "entries of dn_pos_idx of each image"),
        Setting("dn_gt_counts", [], "entries of dn_gt_idx of each image"),
        Setting("dn_num_group", 1, "how often dn_gt_idx of an image repeats along its dn_pos_idx"),
        Setting("autocast", None, "dtype under whose autocast both sides run"),
    ),
    outputs=(
        Output("total", "()", "promoted", "sum of the terms"),
        Output("terms", "(K,)", "promoted", "class, bbox, giou; of the layers before the last; both of denoising"),
        Output("queries", "(P,)", "int64", "matched queries, last layer first", decision=True),
        Output("targets", "(P,)", "int64", "their ground truths, counted through the batch", decision=True),
    ),
    upstreams={"ultralytics": Upstream(options=_options, era=_era, since=(8, 0, 119))},
    candidates=by_path(rtdetr_loss),
    predictions=("pred_bboxes", "pred_scores", "dn_bboxes", "dn_scores"),
    gradients=("pred_bboxes", "pred_scores", "dn_bboxes", "dn_scores"),
    moved=("pred_bboxes", "pred_scores", "dn_bboxes", "dn_scores", "bboxes"),
    precision="float32",
    compare=comparing(Part("hungarian", ("queries", "targets"), _answer)),
    minimum_bytes=minimum_bytes,
    workloads=("detr-b16", "coco-b1"),
    relations=Relations(
        images=Images(
            {"pred_bboxes": 1, "pred_scores": 1, "dn_bboxes": 1, "dn_scores": 1, "owner": 1},
            blocks={
                "cls": "gt_groups",
                "bboxes": "gt_groups",
                "dn_pos_idx": "dn_pos_counts",
                "dn_gt_idx": "dn_gt_counts",
            },
            lists=("gt_groups", "dn_pos_counts", "dn_gt_counts"),
            shifted={"dn_gt_idx": "gt_groups"},
            normaliser="each",
            # Where nothing is matched the class term has another form.
            filled="gt_groups",
        ),
        truths=Rows(count=_groups, blocks=("cls", "bboxes"), counted={"owner": 1}),
        anchors=Axis({"pred_bboxes": 2, "pred_scores": 2, "owner": 2}),
        classes=Axis({"pred_scores": 3, "dn_scores": 3}, counted={"cls": None}),
        dense=rtdetr_pairs,
        free=("pred_bboxes", "pred_scores", "bboxes"),
        fits=_all_images,
        exempt=exempt(
            levels=reasons.NO_LEVELS,
            padding=reasons.RAGGED,
            scale=reasons.NORMALISED,
            leak=reasons.INTEGERS,
            gradcheck=reasons.TARGETS_HELD,
            optimality=reasons.MATCHER,
            monotony=reasons.NOTHING_GROWS,
        ),
    ),
)
