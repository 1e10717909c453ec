"""`yolox_loss`: the training losses of YOLOX's head from raw maps and labels, assignment included."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cases.case import Case
from cleanroom.losses.yolox import yolox_loss
from harness.candidates import by_path
from harness.operation import Input, Operation, Output, Setting, Tensors, Upstream
from harness.operations.simota import _era
from harness.operations.yolox_decode import MAPS, levels, naming_levels
from harness.relations import reasons
from harness.relations.declaration import Axis, Images, Levels, Padding, Relations, Rows, Scale
from harness.relations.reasons import exempt
from harness.total import Part, comparing


def _torch(*, labels: Tensor, strides: Sequence[float], **given: Any) -> dict[str, Tensor]:
    maps = {name: given.pop(name) for name in tuple(given) if name.startswith("raw")}
    with naming_levels():
        return yolox_loss(labels, levels(maps), strides=strides, **given)._asdict()


def _answer(inputs: Tensors, _: dict[str, Any], outputs: Tensors, __: int) -> Tensors:
    """What SimOTA must have answered for the decisions to be these."""
    owner, mask = outputs["matched_gt"], outputs["fg_mask"]
    row = owner.clamp(min=0)
    return {
        "fg_mask": mask,
        "matched_gt": owner,
        "matched_classes": inputs["gt_classes"].gather(1, row).masked_fill(~mask, 0),
        "matched_iou": _overlap(inputs, row).masked_fill(~mask, 0),
        "num_fg": mask.sum(1),
    }


def _overlap(inputs: Tensors, row: Tensor) -> Tensor:
    """IoU (B, N) of each predicted box with ground truth `row`, in the promoted dtype; 0 where both have no area."""
    truths, boxes = inputs["gt_boxes"].gather(1, row[..., None].expand(-1, -1, 4)), inputs["pred_boxes"]
    dtype = torch.promote_types(truths.dtype, boxes.dtype)
    a, b = truths.double(), boxes.double()
    low = torch.maximum(a[..., :2] - a[..., 2:] / 2, b[..., :2] - b[..., 2:] / 2)
    high = torch.minimum(a[..., :2] + a[..., 2:] / 2, b[..., :2] + b[..., 2:] / 2)
    inner = (high - low).clamp(min=0).prod(-1)
    union = a[..., 2:].prod(-1) + b[..., 2:].prod(-1) - inner
    return (inner / torch.where(union == 0, 1, union)).to(dtype)


def invariants(case: Case, outputs: Tensors) -> str | None:
    """Decisions that agree with each other, and a sum that is the sum."""
    mask = outputs["fg_mask"]
    if not torch.equal(mask, outputs["matched_gt"] >= 0):
        return "fg_mask is not matched_gt >= 0"
    labels = case.tensors["labels"]
    truths = int((labels.sum(2) > 0).sum())
    mean = max(int(mask.sum()), 1) / max(truths, 1)
    if abs(outputs["num_fg"].item() - mean) > 1e-6 * mean:
        return f"num_fg is not foreground anchors over ground truths, {mean}"
    if not case.settings["use_l1"] and outputs["l1_loss"].item() != 0:
        return "l1_loss is not 0 without L1"
    return None


def minimum_bytes(case: Case, outputs: Tensors) -> int:
    """Labels, box and objectness channels of all anchors once, class channels of the foreground."""
    maps = [tensor for name, tensor in case.tensors.items() if name.startswith("raw")]
    size, channels = maps[0].element_size(), maps[0].shape[1]
    anchors = sum(raw.numel() // channels for raw in maps)
    classes = int(outputs["fg_mask"].sum()) * (channels - 5)
    return case.tensors["labels"].nbytes + (5 * anchors + classes) * size + sum(o.nbytes for o in outputs.values())


RAW = tuple(raw.name for raw in MAPS)


def _real(labels: Tensor) -> Tensor:
    """Rows that are ground truths."""
    return labels.sum(-1) > 0


def _whole_classes(case: Case) -> bool:
    """Classes are whole numbers, and rows of an image stand before its padding."""
    labels = case.tensors["labels"]
    real = labels.sum(2) > 0
    return bool((labels[..., 0] == labels[..., 0].trunc()).all() & (real[:, 1:] <= real[:, :-1]).all())


OPERATION = Operation(
    name="yolox_loss",
    summary="total loss of YOLOX's head: decoding, SimOTA, and box, objectness, class and L1 terms",
    source="spec/yolox_losses.md section 3; YOLOX (Ge et al., arXiv:2107.08430)",
    inputs=(
        Input("labels", "(B, M, 5)", "number", "rows (class, cx, cy, w, h) in pixels, zero rows after the real ones"),
        *MAPS,
    ),
    settings=(
        Setting("num_classes", 80, "number of classes C"),
        Setting("strides", [8, 16, 32], "pixels a cell of each level"),
        Setting("use_l1", False, "whether the L1 term is added"),
        Setting("autocast", None, "dtype under whose autocast both sides run"),
    ),
    outputs=(
        Output("total_loss", "()", "promoted", "sum of the terms"),
        Output("iou_loss", "()", "promoted", "5 times the box term"),
        Output("conf_loss", "()", "of the maps", "objectness"),
        Output("cls_loss", "()", "promoted", "classes"),
        Output("l1_loss", "()", "of the maps", "L1, or 0"),
        Output("num_fg", "()", "float32", "mean number of anchors a ground truth"),
        Output("fg_mask", "(B, N)", "bool", "foreground", decision=True),
        Output("matched_gt", "(B, N)", "int64", "ground-truth row, -1 for background", decision=True),
    ),
    upstreams={"yolox": Upstream(era=_era)},
    candidates=by_path(_torch),
    predictions=tuple(raw.name for raw in MAPS),
    gradients=tuple(raw.name for raw in MAPS),
    moved=("labels", *(raw.name for raw in MAPS)),
    compare=comparing(Part("simota", ("fg_mask", "matched_gt"), _answer)),
    invariants=invariants,
    minimum_bytes=minimum_bytes,
    workloads=("coco-b1", "coco-b16", "coco-b64", "crowd-b16"),
    relations=Relations(
        images=Images(
            {"labels": 0, **dict.fromkeys(RAW, 0), "fg_mask": 0, "matched_gt": 0},
            normaliser="one",
            unsummed=("num_fg",),
        ),
        truths=Rows(
            count=lambda case: (case.tensors["labels"].sum(2) > 0).sum(1).tolist(),
            dense={"labels": 1},
            counted={"matched_gt": 0},
        ),
        levels=Levels(prefix="raw", along={"fg_mask": 1, "matched_gt": 1}),
        classes=Axis(dict.fromkeys(RAW, 1), first=dict.fromkeys(RAW, 5), counted={"labels": 0}, real=_real),
        padding=Padding(rows={"labels": 0}, dims={"labels": (1,)}),
        scale=Scale({"labels": slice(1, None)}, settings=("strides",), exact=False),
        free=(*RAW, "labels"),
        fits=_whole_classes,
        exempt=exempt(
            anchors=reasons.CELLS,
            leak=reasons.INTEGERS,
            gradcheck=reasons.TARGETS_HELD,
            optimality=reasons.NOTHING_MATCHED,
            monotony="k is not a setting; that positives keep to it is shown of simota",
        ),
    ),
)
