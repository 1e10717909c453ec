"""Foreground anchors of a YOLO criterion as rows: their predicted boxes, target scores, box and distance terms.

They are few, so the CPU computes with them in float64, whatever the predictions are: gradients of bins beside the
expectation are what is left of a cancellation, and target scores are sixth powers. Decisions are not made here.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from cleanroom.assign._tal_terms import at_least_float32, class_index, power
from cleanroom.box_iou import bbox_iou
from cleanroom.losses._yolo_head import Geometry, boxes_around, distances, rows_at
from cleanroom.losses._yolo_targets import Targets
from cleanroom.losses.bbox import distance_l1
from cleanroom.losses.dfl import distribution_focal_loss
from cleanroom.overlap import box_terms, complete_iou

ALPHA, BETA, EPS = 0.5, 6.0, 1e-9  # of the task-aligned assigner in the criteria


class Places(NamedTuple):
    """Foreground anchors (N,); on the static path others follow them, which are not real."""

    image: Tensor
    anchor: Tensor  # no anchor of an image twice
    row: Tensor  # of the ground truth, counted through the batch
    real: Tensor  # bool


class Predicted(NamedTuple):
    """What the head says at the places, with gradient."""

    channels: Tensor  # (N, 4 R)
    sides: Tensor  # (N, 4) distances in cells
    boxes: Tensor  # (N, 4) xyxy in cells


def find_places(foreground: Tensor, gt_index: Tensor, objects: int, slots: int | None) -> Places:
    """Places of a mask (B, A) whose anchors learn row `gt_index` (B, A) of the `objects` of their image.

    With `slots`, the number of foreground anchors that cannot be exceeded, shapes do not depend on values.
    """
    anchors = foreground.shape[1]
    mask = foreground.flatten()
    place = mask.nonzero()[:, 0] if slots is None else mask.byte().sort(descending=True, stable=True).indices[:slots]
    image = place // anchors
    row = gt_index.flatten().index_select(0, place) + image * objects
    return Places(image, place % anchors, row, mask.index_select(0, place))


def predict(channels: Tensor, places: Places, geometry: Geometry, reg_max: int, *, sparse: bool) -> Predicted:
    """Predictions of box channels (B, 4 R, A) at the places."""
    rows = rows_at(channels, places.image, places.anchor)
    rows = rows.to(torch.float64 if sparse else at_least_float32(rows.dtype))
    # A place that is not real may hold NaN, whose gradient would be NaN although it has no weight.
    rows = torch.where(places.real[:, None], rows, 0)
    sides = distances(rows, reg_max, exact=True)
    return Predicted(rows, sides, boxes_around(geometry.points[places.anchor], sides))


@torch.no_grad()
def target_scores(
    places: Places, predicted: Predicted, scores: Tensor, targets: Targets, geometry: Geometry, ciou_alpha: str
) -> Tensor:
    """Target scores (N,) by the definition (task_aligned.md, section 4, step 7), 0 where a place is not real.

    From class logits (B, C, A); in their dtype, at least float32.
    """
    _, classes, _ = scores.shape
    column = class_index(targets.labels.flatten()[places.row], classes).clamp_(0, classes - 1)
    score = scores[places.image, column, places.anchor].to(predicted.boxes.dtype).sigmoid_()
    # As upstream: boxes are cast to the dtype of the targets before they are compared with them.
    boxes = (predicted.boxes * geometry.strides[places.anchor]).float()
    truths = box_terms(targets.boxes.flatten(0, 1)[places.row])
    overlap = complete_iou(truths, box_terms(boxes), ciou_alpha).clamp_(min=0).to(score.dtype)
    metric = torch.where(places.real, power(score, ALPHA) * power(overlap, BETA), 0)
    none = metric.new_zeros(targets.labels.numel())
    best_metric = none.scatter_reduce(0, places.row, metric, "amax")[places.row]
    best_overlap = none.scatter_reduce(0, places.row, torch.where(places.real, overlap, 0), "amax")[places.row]
    return (metric * best_overlap / (best_metric + EPS)).to(at_least_float32(scores.dtype))


def box_losses(
    places: Places,
    predicted: Predicted,
    targets: Targets,
    geometry: Geometry,
    reg_max: int,
    ciou_alpha: str,
    reg1_distance: str,
) -> tuple[Tensor, Tensor]:
    """``1 - CIoU`` and the distance loss (N,) of the places (yolo_losses.md, section 2.4)."""
    points, strides = geometry.points[places.anchor], geometry.strides[places.anchor]
    # What is not real carries the image's first row, which may hold NaN.
    target = torch.where(places.real[:, None], targets.boxes.flatten(0, 1)[places.row], 0) / strides
    target = target.to(predicted.boxes.dtype)
    overlap = bbox_iou(predicted.boxes, target, xywh=False, CIoU=True, ciou_alpha=ciou_alpha)[:, 0]
    wanted = torch.cat((points - target[:, :2], target[:, 2:] - points), 1)
    if reg_max > 1:
        distance = distribution_focal_loss(predicted.channels.unflatten(1, (4, reg_max)), wanted)
    elif reg1_distance == "l1":
        width, height = geometry.size
        distance = distance_l1(predicted.sides, wanted, strides, (height, width))
    else:
        distance = torch.zeros_like(overlap)
    return 1 - overlap, distance
