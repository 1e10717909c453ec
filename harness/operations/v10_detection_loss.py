"""`v10_detection_loss`: end-to-end criteria of YOLOv10 and YOLO26, two assignments included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from cases.case import Case
from cleanroom.losses.v10_detection import E2EDetectLoss, E2ELoss, EndToEndLoss, v10DetectLoss
from harness.candidates import by_path
from harness.operation import DropIn, Input, Operation, Output, Setting, Tensors, Upstream, release
from harness.operations import tal_answer
from harness.operations import v8_detection_loss as v8
from harness.relations import reasons
from harness.relations.declaration import Axis, Images, Relations, Rows, Scale
from harness.relations.positives import owned
from harness.relations.reasons import exempt
from harness.total import Part, comparing

CLASSES = {"ultralytics": E2EDetectLoss, "original": v10DetectLoss, "e2e": E2ELoss}
FORMS_SINCE = {"ultralytics": (8, 2, 39), "original": (), "e2e": (8, 4, 0)}
"""First release that has the class of a form; the original is made of two criteria (`spec/yolo_losses.md` 13)."""


def _options(version: str) -> dict[str, Any]:
    forms = tuple(form for form, since in FORMS_SINCE.items() if release(version) >= since)
    return {"forms": forms, **tal_answer.options(version)}


def _bind(
    batch_idx: Tensor,
    cls: Tensor,
    bboxes: Tensor,
    *,
    levels: list[list[int]],
    form: str,
    updates: int,
    o2m_boxes: Tensor,
    o2m_scores: Tensor,
    o2o_boxes: Tensor,
    o2o_scores: Tensor,
    **settings: Any,
) -> tuple[Callable[[], EndToEndLoss], Callable[[EndToEndLoss], Tensors]]:
    """The drop-in class of the form, after `updates` epochs; `evaluate` is its call before items are named."""
    criterion = CLASSES[form](v8.stand_in(settings), **v8.own(settings))
    for _ in range(updates if form == "e2e" else 0):
        criterion.update()
    feats = [o2m_boxes.new_empty(len(o2m_boxes), 0, *level) for level in levels]
    preds = {
        "one2many": {"boxes": o2m_boxes, "scores": o2m_scores, "feats": feats},
        "one2one": {"boxes": o2o_boxes, "scores": o2o_scores, "feats": feats},
    }
    batch = {"batch_idx": batch_idx, "cls": cls, "bboxes": bboxes}
    return lambda: criterion.evaluate(preds, batch), v8.read


def _branch(outputs: Tensors, index: int) -> Tensors:
    return {**outputs, **{name: outputs[name][index] for name in ("fg_mask", "target_gt_idx")}}


def _answer(inputs: Tensors, settings: dict[str, Any], outputs: Tensors, index: int) -> Tensors:
    branch = _branch(outputs, index)
    return tal_answer.answer(inputs, settings, branch["fg_mask"], branch["target_gt_idx"])


def invariants(case: Case, outputs: Tensors) -> str | None:
    """Those of the detection criterion, in both branches."""
    return next(filter(None, (v8.decided_well(case, _branch(outputs, index)) for index in range(2))), None)


def minimum_bytes(case: Case, outputs: Tensors) -> int:
    """Logits of the classes and labels once, outputs once; which box channels matter depends on the assignment."""
    read = sum(tensor.nbytes for name, tensor in case.tensors.items() if name not in ("o2m_boxes", "o2o_boxes"))
    return read + sum(tensor.nbytes for tensor in outputs.values())


BRANCHES = ("o2m_boxes", "o2m_scores", "o2o_boxes", "o2o_scores")


OPERATION = Operation(
    name="v10_detection_loss",
    summary="detection criterion of a one-to-many and a one-to-one branch, summed, concatenated or weighted",
    source="spec/yolo_losses.md section 4; YOLOv10 (Wang et al., arXiv:2405.14458)",
    inputs=(
        Input("o2m_boxes", "(B, 4R, A)", "floating", "box channels of the one-to-many branch"),
        Input("o2m_scores", "(B, C, A)", "floating", "its class logits"),
        Input("o2o_boxes", "(B, 4R, A)", "floating", "box channels of the one-to-one branch"),
        Input("o2o_scores", "(B, C, A)", "floating", "its class logits"),
        *v8.LABEL_INPUTS,
    ),
    settings=(
        *v8.HEAD_SETTINGS,
        Setting("form", "ultralytics", "sum of both (ultralytics), six items (original), weighted (e2e)"),
        Setting("updates", 0, "e2e: epochs that are over"),
        Setting("epochs", 100, "e2e: all epochs"),
        *v8.LAST_SETTINGS,
    ),
    outputs=(
        Output("total", "()", "float32", "loss of both branches, summed over components, times B"),
        Output("items", "(3,) or (6,)", "float32", "box, class and distance terms, detached"),
        Output("fg_mask", "(2, B, A)", "bool", "foreground with a target score above 0", decision=True),
        Output("target_gt_idx", "(2, B, A)", "int64", "its ground truth in the image, else 0", decision=True),
    ),
    upstreams={"ultralytics": Upstream(options=_options, era=tal_answer.era)},
    candidates=by_path(DropIn(_bind)),
    predictions=("o2m_boxes", "o2m_scores", "o2o_boxes", "o2o_scores"),
    gradients=("o2m_boxes", "o2m_scores", "o2o_boxes", "o2o_scores"),
    moved=("o2m_boxes", "o2m_scores", "o2o_boxes", "o2o_scores", "bboxes"),
    precision="float32",
    compare=comparing(Part("tal", ("fg_mask", "target_gt_idx"), _answer)),
    invariants=invariants,
    minimum_bytes=minimum_bytes,
    workloads=("coco-b1", "coco-b16", "coco-b64"),
    relations=Relations(
        images=Images(
            {**dict.fromkeys(BRANCHES, 0), "fg_mask": 1, "target_gt_idx": 1},
            blocks={"batch_idx": "", "cls": "", "bboxes": ""},
            member="batch_idx",
            normaliser="each",
            unsummed=("items",),
        ),
        truths=Rows(count=v8.objects, blocks=("cls", "bboxes"), counted={"target_gt_idx": 1}),
        classes=Axis({"o2m_scores": 1, "o2o_scores": 1}, counted={"cls": None}, lists=("class_weights",)),
        whole=("cls",),
        scale=Scale({}, settings=("strides",), exact=False),
        dense=owned,
        free=(*BRANCHES, "bboxes"),
        fits=v8.ordered,
        exempt=exempt(
            anchors=reasons.CELLS,
            levels="anchors of metric 0 tie for the last places of a selection, whose sizes are not settings",
            padding=reasons.RAGGED,
            leak=reasons.INTEGERS,
            gradcheck=reasons.TARGETS_HELD,
            optimality=reasons.NOTHING_MATCHED,
            monotony="its k are its own, not settings",
        ),
    ),
)
