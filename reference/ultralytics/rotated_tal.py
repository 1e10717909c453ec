"""Task-aligned assigner of rotated boxes of ultralytics (specification: task_aligned.md, section 9)."""

import inspect
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from reference.bound import Bound
from reference.errors import RequestError
from reference.ultralytics.modules import public
from reference.ultralytics.tal import ARGUMENTS, PAIRS_AT_ONCE, SETTINGS, translate


def bind(tensors: Mapping[str, Tensor], settings: Mapping[str, object]) -> Bound:
    """Prepare the call. Releases before 8.4.0 know neither `stride`, which is dropped, nor `topk2`.

    Raises RequestError where such a release is asked for a `topk2`, and for releases before 8.0.235.
    """
    holder = public("utils.tal", "RotatedTaskAlignedAssigner")
    chosen = {name: settings[name] for name in SETTINGS}
    if "topk2" in inspect.signature(holder).parameters:
        chosen |= {"topk2": settings["topk2"], "stride": settings["stride"]}
    elif settings["topk2"] is not None:
        raise RequestError(
            f"rotated_tal: this version of ultralytics has no topk2, and the case sets it to {settings['topk2']}"
        )
    assigner = holder(**chosen)
    return Bound(partial(assigner, *(tensors[name] for name in ARGUMENTS)), translate)


@torch.no_grad()
def quantities(tensors: Mapping[str, Tensor], settings: Mapping[str, object]) -> dict[str, Tensor]:
    """Return "overlap" (B, n, A): max(probabilistic IoU, 0) of every pair, also of pairs that are no candidates."""
    similarity = public("utils.metrics", "batch_probiou")
    gt_bboxes, pd_bboxes = tensors["gt_bboxes"], tensors["pd_bboxes"]
    rows = max(1, PAIRS_AT_ONCE // max(1, pd_bboxes.shape[1]))
    images = []
    for truths, predictions in zip(gt_bboxes, pd_bboxes, strict=True):
        images.append(torch.cat([similarity(some, predictions) for some in truths.split(rows)]).clamp_(min=0))
    shape = (*gt_bboxes.shape[:2], pd_bboxes.shape[1])
    return {"overlap": torch.stack(images) if images else pd_bboxes.new_zeros(shape)}
