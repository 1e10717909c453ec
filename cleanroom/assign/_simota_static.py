"""SimOTA with fixed shapes: the whole batch at once, streamed over ground-truth rows, no host synchronisation.

Memory is a small multiple of ROWS x images x anchors, whatever the number of ground truths or classes.
"""

import torch
from torch import Tensor

from cleanroom.assign._simota_cost import (
    Corners,
    Grid,
    Rules,
    background_cost,
    corners,
    dynamic_k,
    lowest,
    overlap,
    pair_cost,
    regions,
    widen,
)

ROWS = 8


def match_static(
    gt_boxes: Tensor,
    gt_classes: Tensor,
    labels: Tensor,
    real: Tensor,
    pred_boxes: Tensor,
    cls_logits: Tensor,
    obj_logits: Tensor,
    grid: Grid,
    rules: Rules,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the ground truth, class and overlap of each anchor, (B, N) each, with -1, 0 and 0 for background.

    gt_boxes (B, M, 4), gt_classes (B, M), labels (B, M) int64 in [0, C), real (B, M) bool; the rest as in
    simota_assign.
    """
    iou_dtype = torch.promote_types(gt_boxes.dtype, pred_boxes.dtype)
    gt_boxes, pred_boxes = widen(gt_boxes), widen(pred_boxes)
    images, boxes = real.shape
    anchors = pred_boxes.shape[1]
    chunks = [slice(start, min(start + ROWS, boxes)) for start in range(0, boxes, ROWS)]

    candidate = torch.zeros(images, anchors, dtype=torch.bool, device=real.device)
    for rows in chunks:
        near, _ = regions(gt_boxes[:, rows, None], grid, rules)
        candidate |= (near & real[:, rows, None]).any(1)

    background = _stream_background(cls_logits, obj_logits)[:, None]
    predicted = Corners(*(side[:, None] for side in corners(pred_boxes)))
    objectness = obj_logits[:, None, :, 0]
    claims = torch.zeros(images, anchors, dtype=torch.int64, device=real.device)
    claimant = torch.full_like(claims, -1)
    cheapest = torch.full_like(claims, -1)
    lowest_cost = torch.full_like(pred_boxes[..., 0], torch.inf, dtype=predicted.area.dtype)
    for rows in chunks:
        eligible = real[:, rows, None] & candidate[:, None]
        iou = overlap(corners(gt_boxes[:, rows, None]), predicted)
        k = dynamic_k(iou.masked_fill(~eligible, 0), iou_dtype)
        _, free = regions(gt_boxes[:, rows, None], grid, rules)
        label_logits = cls_logits.gather(2, labels[:, None, rows].expand(-1, anchors, -1)).mT
        cost = pair_cost(background, label_logits, objectness, iou, free, rules.penalty)
        cost = cost.masked_fill_(~eligible, torch.inf)
        chosen = lowest(cost, k)

        claims += chosen.sum(1)
        index = chosen.to(torch.uint8).argmax(1) + rows.start
        claimant = torch.where(chosen.any(1), index, claimant)
        cost_here, row_here = cost.min(1)
        cheaper = cost_here < lowest_cost
        cheapest = torch.where(cheaper, row_here + rows.start, cheapest)
        lowest_cost = torch.where(cheaper, cost_here, lowest_cost)
    owner = torch.where(claims > 1, cheapest, claimant)
    row, background = owner.clamp(min=0), owner < 0
    owned = gt_boxes.gather(1, row[..., None].expand(-1, -1, 4))
    iou = overlap(corners(owned), corners(pred_boxes)).masked_fill_(background, 0)
    return owner, gt_classes.gather(1, row).masked_fill_(background, 0), iou.to(iou_dtype)


def _stream_background(cls_logits: Tensor, obj_logits: Tensor) -> Tensor:
    anchors, classes = cls_logits.shape[1:]
    size = max(1, anchors * ROWS // classes)
    parts = zip(cls_logits.split(size, 1), obj_logits.split(size, 1), strict=True)
    return torch.cat([background_cost(cls, obj) for cls, obj in parts], 1)
