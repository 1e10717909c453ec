"""`v8_detection_loss`: the detection criterion of YOLOv8 and later, task-aligned assigner included."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cases.case import Case
from cleanroom.losses.v8_detection import DetectionLoss, v8DetectionLoss
from harness.candidates import by_path
from harness.operation import DropIn, Input, Operation, Output, Setting, Tensors, Upstream
from harness.operations import tal_answer
from harness.relations import reasons
from harness.relations.declaration import Axis, Images, Levels, Relations, Rows, Scale
from harness.relations.positives import grow_with_topk, owned
from harness.relations.reasons import exempt
from harness.total import Part, comparing


def bind(
    boxes: Tensor,
    scores: Tensor,
    batch_idx: Tensor,
    cls: Tensor,
    bboxes: Tensor,
    *,
    levels: list[list[int]],
    topk: int,
    topk2: int | None,
    **settings: Any,
) -> tuple[Callable[[], DetectionLoss], Callable[[DetectionLoss], Tensors]]:
    """The drop-in class on a model that has no more than it reads; `evaluate` is its call before items are named."""
    criterion = v8DetectionLoss(stand_in(settings), topk, topk2, **own(settings))
    feats = [boxes.new_empty(len(boxes), 0, *level) for level in levels]
    preds = {"boxes": boxes, "scores": scores, "feats": feats}
    batch = {"batch_idx": batch_idx, "cls": cls, "bboxes": bboxes}
    return lambda: criterion.evaluate(preds, batch), read


def read(found: NamedTuple) -> Tensors:
    """Outputs by name: `total` is what is differentiated."""
    outputs = found._asdict()
    return {"total": outputs.pop("loss").sum(), **outputs}


def stand_in(settings: dict[str, Any]) -> SimpleNamespace:
    """What a criterion reads of a model (`spec/yolo_losses.md` section 12)."""
    head = SimpleNamespace(
        stride=torch.tensor([float(stride) for stride in settings["strides"]]),
        nc=settings["num_classes"],
        reg_max=settings["reg_max"],
    )
    weights = settings["class_weights"]
    return SimpleNamespace(
        args=SimpleNamespace(**settings["gains"], epochs=settings.get("epochs")),
        model=[head],
        class_weights=None if weights is None else torch.tensor(weights),
    )


def own(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings among them that are the class's own: what `tal_answer.era` gives, and the path."""
    names = ("small_box", "edge_round_trip", "ciou_alpha", "pair_domain", "reg1_distance", "score_sum_floor", "path")
    return {name: settings[name] for name in names if name in settings}


def decided_well(case: Case, outputs: Tensors) -> str | None:
    """A foreground anchor carries a ground truth of its image, a background anchor 0."""
    index, foreground = outputs["target_gt_idx"], outputs["fg_mask"]
    if bool((index[~foreground] != 0).any()):
        return "target_gt_idx of a background anchor is not 0"
    images = len(index)
    counts = case.tensors["batch_idx"].view(-1).long().bincount(minlength=images)
    if bool((foreground & ((index < 0) | (index >= counts[:, None]))).any()):
        return "target_gt_idx of a foreground anchor is no ground truth of its image"
    return None


def minimum_bytes(case: Case, outputs: Tensors) -> int:
    """Logits of the classes and labels once, outputs once; which box channels matter depends on the assignment."""
    read = sum(case.tensors[name].nbytes for name in ("scores", "batch_idx", "cls", "bboxes"))
    return read + sum(tensor.nbytes for tensor in outputs.values())


def _answer(inputs: Tensors, settings: dict[str, Any], outputs: Tensors, index: int) -> Tensors:
    return tal_answer.answer(inputs, settings, outputs["fg_mask"], outputs["target_gt_idx"])


HEAD_SETTINGS = (
    Setting("levels", [], "rows and columns of every level"),
    Setting("strides", [8, 16, 32], "pixels a cell of every level"),
    Setting("num_classes", 80, "classes C"),
    Setting("reg_max", 16, "bins R of a box side; 1: the distance itself"),
    Setting("gains", {"box": 7.5, "cls": 0.5, "dfl": 1.5}, "factors of the three terms"),
)
LABEL_INPUTS = (
    Input("batch_idx", "(n,) or (n, 1)", "real", "image of each object, ascending"),
    Input("cls", "(n,) or (n, 1)", "real", "class of each object"),
    Input("bboxes", "(n, 4)", "float32", "objects, cxcywh as shares of the image"),
)
LAST_SETTINGS = (
    Setting("class_weights", None, "factor of each class in the class term"),
    Setting("autocast", None, "dtype of the autocast around the call"),
)


def objects(case: Case) -> list[int]:
    """Objects of each image."""
    images = next(tensor for name, tensor in case.tensors.items() if name.endswith("scores"))
    return case.tensors["batch_idx"].flatten().long().bincount(minlength=len(images)).tolist()


def ordered(case: Case) -> bool:
    """Objects stand image after image, and each has its image."""
    index = case.tensors["batch_idx"].flatten()
    images = next(tensor for name, tensor in case.tensors.items() if name.endswith("scores"))
    return bool((index.diff() >= 0).all() & (index >= 0).all() & (index < len(images)).all())


OPERATION = Operation(
    name="v8_detection_loss",
    summary="task-aligned assignment, class BCE, CIoU and distribution focal loss (L1 for one bin)",
    source="spec/yolo_losses.md sections 0, 1 and 3; TOOD (Feng et al., ICCV 2021), GFL (Li et al., NeurIPS 2020)",
    inputs=(
        Input("boxes", "(B, 4R, A)", "floating", "logits of the sides' distances, or the distances in cells (R = 1)"),
        Input("scores", "(B, C, A)", "floating", "class logits"),
        *LABEL_INPUTS,
    ),
    settings=(
        *HEAD_SETTINGS,
        Setting("topk", 10, "anchors each ground truth proposes"),
        Setting("topk2", None, "anchors each ground truth keeps after conflicts; None: all"),
        *LAST_SETTINGS,
    ),
    outputs=(
        Output("total", "()", "float32", "sum of box, class and distance term, times B"),
        Output("items", "(3,)", "float32", "the three terms, gains in, detached"),
        Output("fg_mask", "(B, A)", "bool", "foreground with a target score above 0", decision=True),
        Output("target_gt_idx", "(B, A)", "int64", "its ground truth in the image, else 0", decision=True),
    ),
    upstreams={"ultralytics": Upstream(options=tal_answer.options, era=tal_answer.era)},
    candidates=by_path(DropIn(bind)),
    predictions=("boxes", "scores"),
    gradients=("boxes", "scores"),
    moved=("boxes", "scores", "bboxes"),
    precision="float32",
    compare=comparing(Part("tal", ("fg_mask", "target_gt_idx"), _answer)),
    invariants=decided_well,
    minimum_bytes=minimum_bytes,
    workloads=("coco-b1", "coco-b16", "coco-b64", "crowd-b16", "dense-b4", "dense-xview"),
    relations=Relations(
        images=Images(
            {"boxes": 0, "scores": 0, "fg_mask": 0, "target_gt_idx": 0},
            blocks={"batch_idx": "", "cls": "", "bboxes": ""},
            member="batch_idx",
            normaliser="one",
            unsummed=("items",),
        ),
        truths=Rows(count=objects, blocks=("cls", "bboxes"), counted={"target_gt_idx": 0}),
        levels=Levels(
            sizes="levels",
            along={"boxes": 2, "scores": 2, "fg_mask": 1, "target_gt_idx": 1},
            second_stays=True,
        ),
        classes=Axis({"scores": 1}, counted={"cls": None}, lists=("class_weights",)),
        whole=("cls",),
        scale=Scale({}, settings=("strides",), exact=False),
        monotony=grow_with_topk,
        dense=owned,
        free=("boxes", "scores", "bboxes"),
        fits=ordered,
        exempt=exempt(
            anchors=reasons.CELLS,
            padding=reasons.RAGGED,
            leak=reasons.INTEGERS,
            gradcheck=reasons.TARGETS_HELD,
            optimality=reasons.NOTHING_MATCHED,
        ),
    ),
)
