"""Box and distance loss of ultralytics (specification: yolo_losses.md, section 2.4)."""

import inspect
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from reference.bound import Bound
from reference.ultralytics.modules import public

ARGUMENTS = (
    "pred_dist",
    "pred_bboxes",
    "anchor_points",
    "target_bboxes",
    "target_scores",
    "target_scores_sum",
    "fg_mask",
)
OUTPUTS = ("loss_iou", "loss_dfl")


def bind(tensors: Mapping[str, Tensor], settings: Mapping[str, object]) -> Bound:
    """Prepare the call. Releases before 8.2.60 are constructed with R - 1; those before 8.4.0 need no image size."""
    holder = public("utils.loss", "BboxLoss")
    bins = settings["reg_max"]
    loss = holder(bins - 1, use_dfl=bins > 1) if "use_dfl" in inspect.signature(holder).parameters else holder(bins)
    arguments = [tensors[name] for name in ARGUMENTS]
    if "imgsz" in inspect.signature(loss.forward).parameters:
        size = torch.tensor(settings["imgsz"], dtype=tensors["anchor_points"].dtype)
        arguments += [size.to(tensors["anchor_points"].device), tensors["stride"]]
    return Bound(partial(loss, *arguments), translate)


def translate(raw: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """Name upstream's two losses."""
    return dict(zip(OUTPUTS, raw, strict=True))
