"""End-to-end detection criteria of YOLOv10 and YOLO26 (specification: yolo_losses.md, section 4).

The original YOLOv10 class is not part of ultralytics; its form is made of two criteria, run one after the other.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from reference.bound import Bound
from reference.errors import RequestError
from reference.ultralytics import detection
from reference.ultralytics.modules import public

BRANCHES = {"o2m": "one2many", "o2o": "one2one"}
#: Upstream's classes of the forms; from 8.2.39 and 8.4.0 on.
CLASSES = {"ultralytics": "E2EDetectLoss", "e2e": "E2ELoss"}
#: topk and topk2 of both branches, as those classes set them.
SELECTIONS = {"ultralytics": ((10, None), (1, None)), "original": ((10, None), (1, None)), "e2e": ((10, None), (7, 1))}


def bind(
    tensors: Mapping[str, Tensor],
    settings: Mapping[str, object],
    assignment: Mapping[str, Tensor] | None = None,
) -> Bound:
    """Prepare the call; with `assignment` ("fg_mask", "target_gt_idx", (2, B, A)) the assigners inside answer that.

    Raises RequestError where this version lacks the form or a setting that the case uses.
    """
    call, assigners = _call(tensors, settings, assignment)

    def losses(raw: tuple[Tensor, Any]) -> dict[str, Tensor]:
        return {"total": raw[0].sum()}

    def translate(raw: tuple[Tensor, Any]) -> dict[str, Tensor]:
        decisions = [assigner.decisions() for assigner in assigners]
        stacked = {name: torch.stack([one[name] for one in decisions]) for name in decisions[0]}
        return losses(raw) | {"items": detection.items(raw[1]), **stacked}

    return Bound(call, translate, losses)


@torch.no_grad()
def assigner_inputs(
    tensors: Mapping[str, Tensor], settings: Mapping[str, object]
) -> list[tuple[dict[str, Tensor], dict[str, object], dict[str, Tensor]]]:
    """Return what the two criteria hand to their assigners: (tensors, settings, answer) of `tal`, one-to-many first."""
    call, assigners = _call(tensors, settings, None)
    call()
    return [
        detection.assigner_call(assigner, settings, *selection)
        for assigner, selection in zip(assigners, SELECTIONS[settings["form"]], strict=True)
    ]


def quantities(tensors: Mapping[str, Tensor], settings: Mapping[str, object]) -> dict[str, Tensor]:
    """Return nothing: what decides is asked of the operation `tal`."""
    return {}


def _call(tensors, settings, assignment):
    """Upstream's call and its two assigners, one-to-many first."""
    given = [None, None]
    if assignment is not None:
        given = [{name: value[index] for name, value in assignment.items()} for index in range(2)]
    branches = [
        detection.predictions(tensors[f"{name}_boxes"], tensors[f"{name}_scores"], settings["levels"])
        for name in BRANCHES
    ]
    batch = detection.batch(tensors)
    if settings["form"] == "original":
        criteria = [
            detection.criterion(settings, *selection, answer)
            for selection, answer in zip(SELECTIONS["original"], given, strict=True)
        ]
        return partial(_one_after_the_other, criteria, branches, batch), [one.assigner for one in criteria]
    criterion = _end_to_end(settings)
    criteria = [getattr(criterion, name) for name in BRANCHES.values()]
    for one, answer in zip(criteria, given, strict=True):
        one.assigner = detection.Recorder(one.assigner if answer is None else detection.Answering(answer))
    preds = dict(zip(BRANCHES.values(), branches, strict=True))
    return partial(criterion, preds, batch), [one.assigner for one in criteria]


def _end_to_end(settings: Mapping[str, object]):
    form = settings["form"]
    try:
        holder = public("utils.loss", CLASSES[form])
    except RequestError:
        raise RequestError(f"v10_detection_loss: this version of ultralytics has no form {form!r}") from None
    criterion = holder(detection.model(settings, epochs=settings["epochs"]))
    for _ in range(settings["updates"] if form == "e2e" else 0):
        criterion.update()
    return criterion


def _one_after_the_other(criteria, branches, batch) -> tuple[Tensor, Tensor]:
    """The form of the YOLOv10 repository: the sum of both scalars, both triples of items."""
    losses, items = zip(*(one(preds, batch) for one, preds in zip(criteria, branches, strict=True)), strict=True)
    return sum(loss.sum() for loss in losses), torch.cat([detection.items(one) for one in items])
