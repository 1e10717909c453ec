"""Box loss of YOLOv8 and later on foreground anchors: complete IoU, and the distances to the four sides."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cleanroom.box_iou import bbox_iou
from cleanroom.losses.dfl import distribution_focal_loss
from cleanroom.paths import data_dependent, take_sparse_path

REG1_DISTANCES = ("l1", "zero")


class BoxLosses(NamedTuple):
    """The two terms, 0-dim each."""

    loss_iou: Tensor
    loss_dfl: Tensor


def bbox_loss(
    pred_dist: Tensor,
    pred_bboxes: Tensor,
    anchor_points: Tensor,
    target_bboxes: Tensor,
    target_scores: Tensor,
    target_scores_sum: Tensor,
    fg_mask: Tensor,
    stride: Tensor | None = None,
    *,
    reg_max: int = 16,
    imgsz: Sequence[float] | Tensor | None = None,
    reg1_distance: str = "l1",
    ciou_alpha: str = "stable",
    path: str = "auto",
) -> BoxLosses:
    """Complete IoU and distance terms of the foreground anchors, weighted (yolo_losses.md, section 2.4).

    With w the sum of an anchor's target scores and S `target_scores_sum`: ``loss_iou = sum w (1 - CIoU) / S``;
    ``loss_dfl = sum w DFL / S`` over distances clamped to [0, R - 1.01], or for one bin ``sum w L1 / S`` of
    `distance_l1`. Computed in float64, but for the distributions, which are in float32 or wider.

    Args:
        pred_dist: (B, A, 4 R) logits, side-major; for R = 1 distances left, top, right, bottom in grid units.
        pred_bboxes, target_bboxes: (B, A, 4) xyxy, grid units. Only foreground anchors are read.
        anchor_points: (A, 2) anchor centres, grid units.
        target_scores: (B, A, C) of which only the sum of a foreground anchor matters.
        target_scores_sum: S, 0-dim, used as it is.
        fg_mask: (B, A) bool.
        stride: (A, 1) pixels a grid unit; needed for the L1 distance.
        reg_max: R, bins a side.
        imgsz: (height, width) of the image, pixels; needed for the L1 distance.
        reg1_distance: the distance term of one bin, "l1" (8.4.0 on) or "zero" (before: constant, float32).
        ciou_alpha: see `cleanroom.box_iou.bbox_iou`.
        path: "auto", "sparse" (foreground rows are gathered) or "static" (every anchor is computed with, and masked).

    Returns:
        Terms in the dtypes that their inputs promote to. Gradient reaches `pred_bboxes` by the first, `pred_dist` by
        the second; zeros where there is no foreground.

    Raises:
        ValueError: a shape or setting is wrong; on the CPU, a foreground target of the DFL is NaN.
        TypeError: a prediction or target is not floating.
    """
    _check(pred_dist, pred_bboxes, anchor_points, target_bboxes, target_scores, fg_mask, reg_max)
    if reg1_distance not in REG1_DISTANCES:
        raise ValueError(f"reg1_distance must be one of {REG1_DISTANCES}, got {reg1_distance!r}")
    fg_mask = fg_mask.bool()
    sparse = take_sparse_path(path, pred_dist, pred_bboxes, target_bboxes, fg_mask)
    rows = _Gathered(*fg_mask.nonzero(as_tuple=True)) if sparse else _Masked(fg_mask)
    # In float64: foreground rows are few, and the slopes of nearly equal boxes are differences of large numbers.
    target, weight = rows.take(target_bboxes.detach()).double(), rows.take(target_scores.detach()).double().sum(-1)
    boxes = rows.take(pred_bboxes).double()
    overlap = bbox_iou(boxes, target, xywh=False, CIoU=True, ciou_alpha=ciou_alpha).squeeze(-1)
    loss_iou = ((1 - overlap) * weight).sum() / target_scores_sum
    loss_iou = loss_iou.to(_promoted(pred_bboxes, target_bboxes, target_scores, target_scores_sum))
    if reg_max == 1 and reg1_distance == "zero":
        return BoxLosses(loss_iou, loss_iou.new_zeros((), dtype=torch.float32))

    points = rows.anchors(anchor_points).double()
    distances = torch.cat((points - target[..., :2], target[..., 2:] - points), -1)
    if reg_max == 1:
        if stride is None or imgsz is None:
            raise ValueError("stride and imgsz are needed where reg_max is 1")
        each = distance_l1(rows.take(pred_dist), distances, rows.anchors(stride), imgsz)
    else:
        if data_dependent(distances) and distances.isnan().any():
            raise ValueError("target_bboxes and anchor_points of foreground anchors must not be NaN")
        each = distribution_focal_loss(rows.take(pred_dist).unflatten(-1, (4, reg_max)), distances)
    loss_dfl = (each * weight).sum() / target_scores_sum
    dtype = _promoted(pred_dist, anchor_points, target_bboxes, target_scores, target_scores_sum)
    return BoxLosses(loss_iou, loss_dfl.to(dtype))


def distance_l1(pred_dist: Tensor, target: Tensor, stride: Tensor, imgsz: Sequence[float] | Tensor) -> Tensor:
    """Mean over the sides of ``|d - t| s / Q`` (...), with Q = (W, H, W, H): distances as shares of the image.

    Distances `pred_dist` and `target` (..., 4) left, top, right, bottom in grid units of `stride` (..., 1) pixels; not
    clamped. `imgsz` is (height, width), pixels.
    """
    height, width = imgsz[0], imgsz[1]
    error = (pred_dist - target).abs() * stride
    return ((error[..., 0] + error[..., 2]) / width + (error[..., 1] + error[..., 3]) / height) / 4


class BboxLoss(nn.Module):
    """Drop-in for ``ultralytics.utils.loss.BboxLoss`` of 8.2.60 and later: its constructor, its call, its two results.

    The settings behind ``*`` are this library's: see `bbox_loss`.
    """

    def __init__(
        self, reg_max: int = 16, *, reg1_distance: str = "l1", ciou_alpha: str = "stable", path: str = "auto"
    ) -> None:
        super().__init__()
        self.reg_max = reg_max
        self.reg1_distance, self.ciou_alpha, self.path = reg1_distance, ciou_alpha, path

    def forward(
        self,
        pred_dist: Tensor,
        pred_bboxes: Tensor,
        anchor_points: Tensor,
        target_bboxes: Tensor,
        target_scores: Tensor,
        target_scores_sum: Tensor,
        fg_mask: Tensor,
        imgsz: Tensor | None = None,
        stride: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The terms (loss_iou, loss_dfl); `imgsz` and `stride` are read for one bin only."""
        return bbox_loss(
            pred_dist,
            pred_bboxes,
            anchor_points,
            target_bboxes,
            target_scores,
            target_scores_sum,
            fg_mask,
            stride,
            reg_max=self.reg_max,
            imgsz=imgsz,
            reg1_distance=self.reg1_distance,
            ciou_alpha=self.ciou_alpha,
            path=self.path,
        )


class _Gathered(NamedTuple):
    """Foreground rows, by their images and anchors (P,)."""

    images: Tensor
    places: Tensor

    def take(self, tensor: Tensor) -> Tensor:
        return tensor[self.images, self.places]

    def anchors(self, tensor: Tensor) -> Tensor:
        return tensor[self.places]


class _Masked(NamedTuple):
    """Every row, zeros in the background: nothing there, NaN included, reaches a value or a gradient."""

    mask: Tensor

    def take(self, tensor: Tensor) -> Tensor:
        return torch.where(self.mask.unsqueeze(-1), tensor, 0)

    def anchors(self, tensor: Tensor) -> Tensor:
        return tensor


def _promoted(*tensors: Tensor) -> torch.dtype:
    found = tensors[0].dtype
    for tensor in tensors[1:]:
        found = torch.promote_types(found, tensor.dtype)
    return found


def _check(
    pred_dist: Tensor,
    pred_bboxes: Tensor,
    anchor_points: Tensor,
    target_bboxes: Tensor,
    target_scores: Tensor,
    fg_mask: Tensor,
    reg_max: int,
) -> None:
    if fg_mask.ndim != 2:
        raise ValueError(f"fg_mask must be (B, A), got {tuple(fg_mask.shape)}")
    wanted = {
        "pred_dist": (pred_dist, 4 * reg_max),
        "pred_bboxes": (pred_bboxes, 4),
        "target_bboxes": (target_bboxes, 4),
        "target_scores": (target_scores, target_scores.shape[-1] if target_scores.ndim else 0),
    }
    for name, (tensor, channels) in wanted.items():
        if tensor.shape != (*fg_mask.shape, channels):
            raise ValueError(f"{name} must be {(*fg_mask.shape, channels)}, got {tuple(tensor.shape)}")
    if anchor_points.shape != (fg_mask.shape[1], 2):
        raise ValueError(f"anchor_points must be {(fg_mask.shape[1], 2)}, got {tuple(anchor_points.shape)}")
    for name, tensor in (("pred_dist", pred_dist), ("pred_bboxes", pred_bboxes), ("target_bboxes", target_bboxes)):
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating, got {tensor.dtype}")
