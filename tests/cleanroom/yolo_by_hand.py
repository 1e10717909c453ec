"""The detection criterion written down densely, in float64, under given decisions: what results are held against."""

import torch
from torch.nn import functional

from cleanroom.boxes import bbox_iou


def by_hand(boxes, scores, batch_idx, cls, bboxes, *, found, settings, ignore=None, floor=1.0):
    """(B, 3) terms of each image, gains in, not times B, under the decisions of `found`; yolo_losses.md, section 3.

    Differentiable by `boxes` and `scores`; decisions and target scores are constants.
    """
    boxes, scores = boxes.double(), scores.double()
    images, classes, anchors = scores.shape
    points, strides = grid(settings)
    height, width = (side * settings["strides"][0] for side in settings["levels"][0])
    sides = expectation(boxes, settings["reg_max"])
    predicted = torch.cat((points - sides[..., :2], points + sides[..., 2:]), -1)

    size = torch.tensor([width, height, width, height])
    truths = torch.zeros(images, anchors, 4)
    labels = torch.zeros(images, anchors, dtype=torch.int64)
    for image in range(images):
        rows = (batch_idx.view(-1) == image).nonzero()[:, 0]
        if len(rows):
            own = rows[found.target_gt_idx[image]]
            scaled = (bboxes * size).float()[own]
            truths[image] = torch.cat((scaled[:, :2] - scaled[:, 2:] / 2, scaled[:, :2] + scaled[:, 2:] / 2), 1)
            labels[image] = cls.view(-1).long()[own]
    value = target_values(found, predicted.detach() * strides, truths, scores.detach(), labels)
    kept = torch.ones(images, anchors) if ignore is None else (~ignore).double()
    value = value * kept
    total = value.sum().clamp(min=floor)

    target = torch.zeros(images, anchors, classes, dtype=torch.float64)
    target.scatter_(2, labels.clamp(min=0)[..., None], value[..., None])
    weights = torch.as_tensor(settings["class_weights"] or [1.0] * classes, dtype=torch.float64)
    bce = functional.binary_cross_entropy_with_logits(scores.mT, target, reduction="none")
    class_term = (bce * weights).sum(-1) * kept
    target_cells = truths.double() / strides
    overlap = bbox_iou(predicted, target_cells, xywh=False, CIoU=True)[..., 0]
    wanted = torch.cat((points - target_cells[..., :2], target_cells[..., 2:] - points), -1)
    distance = distances(boxes, sides, wanted, strides, (width, height), settings["reg_max"])
    gains = settings["gains"]
    terms = [
        gains["box"] * (value * (1 - overlap)).sum(1),
        gains["cls"] * class_term.sum(1),
        gains["dfl"] * (value * distance).sum(1),
    ]
    return torch.stack(terms, 1) / total


def grid(settings):
    points, strides = [], []
    for (rows, columns), stride in zip(settings["levels"], settings["strides"], strict=True):
        y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        points.append(torch.stack((x.flatten(), y.flatten()), 1).double() + 0.5)
        strides.append(torch.full((rows * columns, 1), float(stride), dtype=torch.float64))
    return torch.cat(points), torch.cat(strides)


def expectation(boxes, reg_max):
    channels = boxes.mT
    if reg_max == 1:
        return channels
    return channels.unflatten(2, (4, reg_max)).softmax(3) @ torch.arange(reg_max, dtype=torch.float64)


def target_values(found, predicted, truths, scores, labels):
    """Step 7 of task_aligned.md, section 4, ground truth by ground truth; the overlap in float32."""
    overlap = bbox_iou(truths, predicted.float(), xywh=False, CIoU=True)[..., 0].clamp(min=0).double()
    score = scores.gather(1, (labels % scores.shape[1])[:, None])[:, 0].sigmoid()
    metric = score.sqrt() * overlap**6
    value = torch.zeros_like(metric)
    for image in range(len(value)):
        for row in found.target_gt_idx[image].unique().tolist():
            mine = found.fg_mask[image] & (found.target_gt_idx[image] == row)
            if mine.any():
                best = overlap[image, mine].max() / (metric[image, mine].max() + 1e-9)
                value[image, mine] = metric[image, mine] * best
    return value


def distances(boxes, sides, wanted, strides, size, reg_max):
    if reg_max == 1:
        return ((sides - wanted).abs() * strides / torch.tensor([*size, *size])).mean(-1)
    target = wanted.clamp(0, reg_max - 1.01)
    low = target.long()
    log_p = boxes.mT.unflatten(2, (4, reg_max)).log_softmax(3)
    left, right = (log_p.gather(3, (low + step)[..., None])[..., 0] for step in (0, 1))
    share = target - low
    return -((1 - share) * left + share * right).mean(-1)
