"""Task-aligned assigner of rotated boxes, as in the oriented heads of YOLOv8 and later.

That of `cleanroom.assign.tal` with another overlap, the probabilistic IoU of `cleanroom.probiou`, and another region:
an anchor is a candidate inside the rotated box or on its edge. Specification: task_aligned.md, section 9.

The two paths of PyTorch, "sparse" and "static", decide alike, bit for bit; there is no kernel. Choices are those of
`cleanroom.assign.tal`, and one more: where determinants of thin boxes cancel, so that upstream's overlap is NaN and
with it every score of the image, ours is the number that a form without cancellation gives (known divergence).
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from cleanroom.assign._tal_rotated import ROTATED, ROTATED_HALF, enlarged
from cleanroom.assign._tal_terms import Scene, at_least_float32
from cleanroom.assign.tal import (
    Eras,
    TaskAlignedAssigner,
    TaskAlignedResult,
    assign,
    check_inputs,
    learned,
    make_rules,
    promoted,
    small_box_sides,
    without_ground_truths,
)
from cleanroom.paths import take_sparse_path
from cleanroom.rotated_overlap import gaussian_terms

SMALL_BOX_SCOPES = ("membership", "boxes")


@torch.no_grad()
def rotated_task_aligned_assign(
    pd_scores: Tensor,
    pd_bboxes: Tensor,
    anc_points: Tensor,
    gt_labels: Tensor,
    gt_bboxes: Tensor,
    mask_gt: Tensor,
    *,
    topk: int = 13,
    topk2: int | None = None,
    alpha: float = 1.0,
    beta: float = 6.0,
    stride: Sequence[float] | None = None,
    eps: float = 1e-9,
    small_box: str = "min_side",
    small_box_scope: str = "membership",
    path: str = "auto",
) -> TaskAlignedResult:
    """Assign rotated ground truths to anchors; nothing of size B x A x C or B x n x A is built.

    Half boxes are computed with in float32, in the form without cancellation; membership is decided in their dtype.

    Args:
        pd_scores: (B, A, C) class probabilities.
        pd_bboxes: (B, A, 5) predicted centre x, centre y, width, height (pixels) and angle (radians); a dtype at
            least as wide as that of `gt_bboxes`.
        anc_points: (A, 2) anchor centres, pixels.
        gt_labels, mask_gt: as in `cleanroom.assign.tal.task_aligned_assign`.
        gt_bboxes: (B, n, 5), as the predictions.
        topk, topk2, alpha, beta, stride, eps: as there.
        small_box: which sides are enlarged, "min_side" (8.4.128 on), "first_stride" (8.4.8 to 8.4.127) or "off".
        small_box_scope: what the enlarged boxes serve for: "membership" alone (8.4.39 on), or "boxes", overlaps and
            target boxes too (8.4.8 to 8.4.38, where upstream wrote them into its input; ours is left alone).
        path: "auto", "sparse" or "static"; see `take_sparse_path`.

    Returns:
        As `task_aligned_assign`, boxes (B, A, 5).

    Raises:
        ValueError, TypeError, IndexError, RuntimeError: as `task_aligned_assign`.
    """
    tensors = pd_scores, pd_bboxes, anc_points, gt_labels, gt_bboxes, mask_gt
    check_inputs(*tensors, numbers=5)
    sides = small_box_sides(small_box, stride)
    if small_box_scope not in SMALL_BOX_SCOPES:
        raise ValueError(f"small_box_scope must be one of {SMALL_BOX_SCOPES}, got {small_box_scope!r}")
    path = "sparse" if take_sparse_path(path, *tensors) else "static"
    if gt_bboxes.shape[1] == 0:
        return without_ground_truths(pd_scores, pd_bboxes, gt_bboxes)

    half = {pd_bboxes.dtype, gt_bboxes.dtype} & {torch.float16, torch.bfloat16}
    # What concerns boxes along the axes is not read.
    eras = Eras(*sides, edge_round_trip=False, ciou_alpha="stable", pair_domain="candidates")
    rules = make_rules(topk, topk2, len(anc_points), alpha, beta, eps, eras)
    rules = replace(rules, geometry=ROTATED_HALF if half else ROTATED)
    valid = mask_gt[..., 0] != 0
    boxes = gt_bboxes
    if small_box_scope == "boxes":
        boxes = torch.where(valid[..., None], enlarged(boxes, rules), boxes)
    terms = gaussian_terms(pd_bboxes.to(at_least_float32(pd_bboxes.dtype)))
    scene = Scene(pd_scores, terms, anc_points, gt_labels[..., 0].long(), boxes, valid)
    return learned(scene, assign(scene, rules, path=path), promoted(pd_scores, pd_bboxes, gt_bboxes))


class RotatedTaskAlignedAssigner(TaskAlignedAssigner):
    """Drop-in for ``ultralytics.utils.tal.RotatedTaskAlignedAssigner``: its constructor, its call, its five outputs.

    The settings behind ``*`` are this library's: see `rotated_task_aligned_assign`. Boxes are (..., 5).
    """

    assign = staticmethod(rotated_task_aligned_assign)

    def __init__(
        self,
        topk: int = 13,
        num_classes: int = 80,
        alpha: float = 1.0,
        beta: float = 6.0,
        stride: Sequence[float] | None = None,
        eps: float = 1e-9,
        topk2: int | None = None,
        *,
        small_box: str = "min_side",
        small_box_scope: str = "membership",
        path: str = "auto",
    ) -> None:
        super().__init__(topk, num_classes, alpha, beta, stride, eps, topk2, small_box=small_box, path=path)
        for name in ("edge_round_trip", "ciou_alpha", "pair_domain"):
            del self.settings[name]
        self.settings["small_box_scope"] = small_box_scope
