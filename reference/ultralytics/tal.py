"""Task-aligned assigner of ultralytics (specification: task_aligned.md)."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Tensor

from reference.bound import Bound
from reference.errors import RequestError
from reference.ultralytics.modules import public

ARGUMENTS = ("pd_scores", "pd_bboxes", "anc_points", "gt_labels", "gt_bboxes", "mask_gt")
OUTPUTS = ("target_labels", "target_bboxes", "target_scores", "fg_mask", "target_gt_idx")
SETTINGS = ("topk", "num_classes", "alpha", "beta", "eps")
PAIRS_AT_ONCE = 1 << 20  # the overlap has about 20 temporaries of a number a pair: 160 MiB in float64


def bind(tensors: Mapping[str, Tensor], settings: Mapping[str, object]) -> Bound:
    """Prepare the call. Releases before 8.4.0 know neither `stride`, which is dropped, nor `topk2`.

    Raises RequestError where such a release is asked for a `topk2`.
    """
    return prepared("tal", "TaskAlignedAssigner", tensors, settings)


def prepared(operation: str, name: str, tensors: Mapping[str, Tensor], settings: Mapping[str, object]) -> Bound:
    """The call of the assigner class of that name; RequestError names the operation."""
    holder = public("utils.tal", name)
    chosen = {setting: settings[setting] for setting in SETTINGS}
    if "topk2" in inspect.signature(holder).parameters:
        chosen |= {"topk2": settings["topk2"], "stride": settings["stride"]}
    elif settings["topk2"] is not None:
        raise RequestError(
            f"{operation}: this version of ultralytics has no topk2, and the case sets it to {settings['topk2']}"
        )
    assigner = holder(**chosen)
    return Bound(partial(assigner, *(tensors[argument] for argument in ARGUMENTS)), translate)


def translate(raw: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Name upstream's five outputs; with no ground truth their dtypes are those of section 5."""
    return dict(zip(OUTPUTS, raw, strict=True))


@torch.no_grad()
def quantities(tensors: Mapping[str, Tensor], settings: Mapping[str, object]) -> dict[str, Tensor]:
    """Return "overlap" (B, n, A): max(CIoU, 0) of every pair, also of pairs that are no candidates."""
    bbox_iou = public("utils.metrics", "bbox_iou")

    def overlap(truths: Tensor, predictions: Tensor) -> Tensor:
        return bbox_iou(truths[:, None], predictions, xywh=False, CIoU=True).squeeze(-1)

    return {"overlap": pairwise(overlap, tensors["gt_bboxes"], tensors["pd_bboxes"])}


def pairwise(overlap: Callable[[Tensor, Tensor], Tensor], gt_bboxes: Tensor, pd_bboxes: Tensor) -> Tensor:
    """(B, n, A) overlaps, at least 0, of every pair in an image, some rows at a time."""
    rows = max(1, PAIRS_AT_ONCE // max(1, pd_bboxes.shape[1]))
    images = [
        torch.cat([overlap(some, predictions) for some in truths.split(rows)]).clamp_(min=0)
        for truths, predictions in zip(gt_bboxes, pd_bboxes, strict=True)
    ]
    return torch.stack(images) if images else pd_bboxes.new_zeros(*gt_bboxes.shape[:2], pd_bboxes.shape[1])
