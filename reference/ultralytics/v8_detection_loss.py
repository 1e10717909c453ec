"""Detection criterion of YOLOv8 and later (specification: yolo_losses.md, section 3)."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from reference.bound import Bound
from reference.ultralytics import detection


def bind(
    tensors: Mapping[str, Tensor],
    settings: Mapping[str, object],
    assignment: Mapping[str, Tensor] | None = None,
) -> Bound:
    """Prepare the call; with `assignment` ("fg_mask", "target_gt_idx") the assigner inside answers that.

    "total" is the sum of the loss vector, which before 8.3.100 is all that there is. Raises RequestError where this
    version lacks a setting that the case uses.
    """
    criterion = detection.criterion(settings, settings["topk"], settings["topk2"], assignment)
    predictions = detection.predictions(tensors["boxes"], tensors["scores"], settings["levels"])

    def losses(raw: tuple[Tensor, Any]) -> dict[str, Tensor]:
        return {"total": raw[0].sum()}

    def translate(raw: tuple[Tensor, Any]) -> dict[str, Tensor]:
        return losses(raw) | {"items": detection.items(raw[1]), **criterion.assigner.decisions()}

    return Bound(partial(criterion, predictions, detection.batch(tensors)), translate, losses)


@torch.no_grad()
def assigner_inputs(
    tensors: Mapping[str, Tensor], settings: Mapping[str, object]
) -> tuple[dict[str, Tensor], dict[str, object], dict[str, Tensor]]:
    """Return what the criterion hands to its assigner: (tensors, settings, answer) of the operation `tal`."""
    criterion = detection.criterion(settings, settings["topk"], settings["topk2"])
    criterion(detection.predictions(tensors["boxes"], tensors["scores"], settings["levels"]), detection.batch(tensors))
    return detection.assigner_call(criterion.assigner, settings, settings["topk"], settings["topk2"])


def quantities(tensors: Mapping[str, Tensor], settings: Mapping[str, object]) -> dict[str, Tensor]:
    """Return nothing: what decides is asked of the operation `tal`."""
    return {}
