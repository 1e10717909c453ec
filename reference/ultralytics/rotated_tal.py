"""Task-aligned assigner of rotated boxes of ultralytics (specification: task_aligned.md, section 9)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from reference.bound import Bound
from reference.ultralytics.modules import public
from reference.ultralytics.tal import pairwise, prepared


def bind(tensors: Mapping[str, Tensor], settings: Mapping[str, object]) -> Bound:
    """Prepare the call. Releases before 8.4.0 know neither `stride`, which is dropped, nor `topk2`.

    Raises RequestError where such a release is asked for a `topk2`, and for releases before 8.0.235.
    """
    return prepared("rotated_tal", "RotatedTaskAlignedAssigner", tensors, settings)


@torch.no_grad()
def quantities(tensors: Mapping[str, Tensor], settings: Mapping[str, object]) -> dict[str, Tensor]:
    """Return "overlap" (B, n, A): max(probabilistic IoU, 0) of every pair, also of pairs that are no candidates."""
    similarity = public("utils.metrics", "batch_probiou")
    return {"overlap": pairwise(similarity, tensors["gt_bboxes"], tensors["pd_bboxes"])}
