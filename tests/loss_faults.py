"""Losses with a fault planted in each, beside controls without one (`tests/faults.py` has those of the assigners).

The controls of small terms are the specification's formulas written out with autograd; a fault is one of their
keywords. Faults of totals spoil the built-in candidate in one place.
"""

import math
from unittest import mock

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from cleanroom.losses import v8_detection
from harness.operations import operation

EPS = 1e-7


def right(name):
    """The built-in candidate, unspoiled."""
    return operation(name).candidates["torch"]


def checked(name, literal, given):
    """The outputs of a literal formula, after the built-in candidate has had its say on bad input."""
    with torch.no_grad():
        right(name)(**given)
    return literal(**given)


def ciou(box1, box2, alpha_of=Tensor.detach, factor=4 / math.pi**2):
    """Complete IoU of corners (N, 4), boxes.md section 9."""
    x1, y1, x2, y2 = box1.unbind(-1)
    a1, b1, a2, b2 = box2.unbind(-1)
    w, h, v_w, v_h = x2 - x1, y2 - y1 + EPS, a2 - a1, b2 - b1 + EPS
    inner = (x2.minimum(a2) - x1.maximum(a1)).clamp(0) * (y2.minimum(b2) - y1.maximum(b1)).clamp(0)
    iou = inner / (w * h + v_w * v_h - inner + EPS)
    diagonal = (x2.maximum(a2) - x1.minimum(a1)) ** 2 + (y2.maximum(b2) - y1.minimum(b1)) ** 2 + EPS
    distance = ((a1 + a2 - x1 - x2) ** 2 + (b1 + b2 - y1 - y2) ** 2) / 4
    v = factor * ((v_w / v_h).atan() - (w / h).atan()) ** 2
    alpha = alpha_of(v / (1 - iou + v + EPS))
    return iou - (distance / diagonal + v * alpha)


def dfl(logits, target, highest=1.01, swapped=False):
    """Distribution focal loss (N, sides) of logits (N, sides, R), yolo_losses.md section 2.3."""
    bins = logits.shape[-1]
    target = target.clamp(0, bins - highest)
    low = target.long().clamp(max=bins - 2)
    share = target - low
    left, right_ = (1 - share, share) if not swapped else (share, 1 - share)
    log_p = logits.log_softmax(-1)
    at = [log_p.gather(-1, (low + step)[..., None])[..., 0] for step in (0, 1)]
    return -(left * at[0] + right_ * at[1])


def literal_bbox_loss(
    *,
    pred_dist,
    pred_bboxes,
    anchor_points,
    target_bboxes,
    target_scores,
    target_scores_sum,
    fg_mask,
    stride,
    reg_max,
    imgsz,
    reg1_distance="l1",
    ciou_alpha="stable",
    weighted=True,
    axis=-1,
    overlap=ciou,
    distribution=dfl,
):
    """`bbox_loss`, yolo_losses.md section 2.4, in float32 or wider."""
    wide = [value.to(torch.promote_types(value.dtype, torch.float32)) for value in (pred_dist, pred_bboxes)]
    dist, boxes = (value[fg_mask] for value in wide)
    points, sides = anchor_points.expand(*fg_mask.shape, 2)[fg_mask], stride.expand(*fg_mask.shape, 1)[fg_mask]
    target, weight = target_bboxes[fg_mask], target_scores.sum(-1)[fg_mask]
    weight = weight if weighted else torch.ones_like(weight)
    loss_iou = (weight * (1 - overlap(boxes, target))).sum() / target_scores_sum
    wanted = torch.cat((points - target[:, :2], target[:, 2:] - points), -1)
    if reg_max > 1:
        each = distribution(dist.view(-1, 4, reg_max), wanted)
    else:
        size = torch.tensor([imgsz[1], imgsz[0]] * 2, dtype=dist.dtype)
        each = (dist - wanted).abs() * sides / size
    each = each.mean(axis) if axis == -1 else each.mean(axis).mean().expand(len(weight))
    loss_dfl = (weight * each).sum() / target_scores_sum
    return {"loss_iou": loss_iou, "loss_dfl": loss_dfl}


def bbox_loss(**given):
    return checked("bbox_loss", literal_bbox_loss, given)


def bbox_loss_alpha_not_constant(**given):
    return literal_bbox_loss(**given, overlap=lambda a, b: ciou(a, b, alpha_of=lambda alpha: alpha))


def bbox_loss_v_without_factor(**given):
    return literal_bbox_loss(**given, overlap=lambda a, b: ciou(a, b, factor=1.0))


def bbox_loss_dfl_weights_swapped(**given):
    return literal_bbox_loss(**given, distribution=lambda x, t: dfl(x, t, swapped=True))


def bbox_loss_dfl_clamp_at_reg_max(**given):
    return literal_bbox_loss(**given, distribution=lambda x, t: dfl(x, t, highest=1.0))


def bbox_loss_unweighted(**given):
    return literal_bbox_loss(**given, weighted=False)


def bbox_loss_wrong_axis(**given):
    """The mean over anchors instead of sides, before the weights."""
    return literal_bbox_loss(**given, axis=0)


def v8_detection_loss(**given):
    return right("v8_detection_loss")(**given)


def v8_detection_loss_static(**given):
    """The path that CUDA takes, on the CPU."""
    return right("v8_detection_loss")(**given, path="static")


def v8_detection_loss_no_floor(**given):
    """The normaliser without its floor of 1."""
    clamp = Tensor.clamp

    def unfloored(value, *bounds, **named):
        return value if value.dim() == 0 and named == {"min": 1} else clamp(value, *bounds, **named)

    with mock.patch.object(Tensor, "clamp", unfloored):
        return right("v8_detection_loss")(**given)


def v8_detection_loss_no_batch_factor(*, scores, **given):
    outputs = dict(right("v8_detection_loss")(scores=scores, **given))
    return {**outputs, "total": outputs["total"] / max(1, len(scores))}


def v8_detection_loss_no_gain(*, gains, **given):
    return right("v8_detection_loss")(gains={**gains, "cls": 1.0}, **given)


def v8_detection_loss_sigmoid_twice(**given):
    bce = v8_detection.class_bce
    with mock.patch.object(v8_detection, "class_bce", lambda x, *rest, **named: bce(x.sigmoid(), *rest, **named)):
        return right("v8_detection_loss")(**given)


def v8_detection_loss_gradient_through_assigner(*, scores, **given):
    """The scores that the assigner saw keep their gradient in the targets; the value is right."""
    outputs = dict(right("v8_detection_loss")(scores=scores, **given))
    leak = (outputs["fg_mask"][:, None] * scores.float().sigmoid()).sum()
    return {**outputs, "total": outputs["total"] + (leak - leak.detach())}


def literal_iou_loss(*, pred, target, reduction, loss_type, squared=True):
    """`iou_loss`, yolox_losses.md section 2."""
    dtype = torch.promote_types(pred.dtype, target.dtype)
    p, t = (value.reshape(-1, 4).to(torch.promote_types(dtype, torch.float32)) for value in (pred, target))
    low = torch.maximum(p[:, :2] - p[:, 2:] / 2, t[:, :2] - t[:, 2:] / 2)
    high = torch.minimum(p[:, :2] + p[:, 2:] / 2, t[:, :2] + t[:, 2:] / 2)
    inner = (high - low).prod(1) * (low < high).all(1)
    union = p[:, 2:].prod(1) + t[:, 2:].prod(1) - inner
    iou = inner / (union + 1e-16)
    if loss_type == "iou":
        loss = 1 - (iou**2 if squared else iou)
    else:
        low = torch.minimum(p[:, :2] - p[:, 2:] / 2, t[:, :2] - t[:, 2:] / 2)
        high = torch.maximum(p[:, :2] + p[:, 2:] / 2, t[:, :2] + t[:, 2:] / 2)
        hull = (high - low).prod(1)
        loss = 1 - (iou - (hull - union) / hull.clamp(1e-16)).clamp(-1, 1)
    loss = loss.to(dtype)
    return {"loss": {"mean": loss.mean, "sum": loss.sum}.get(reduction, lambda: loss)()}


def iou_loss(**given):
    return checked("iou_loss", literal_iou_loss, given)


def iou_loss_not_squared(**given):
    return literal_iou_loss(**given, squared=False)


def literal_yolox_bce(*, outputs, fg_mask, matched_classes, matched_iou, num_classes, everywhere=True, soft=True):
    """`yolox_bce`, yolox_losses.md sections 3.3 and 3.4."""
    logits = outputs[..., 4:].to(torch.promote_types(outputs.dtype, torch.float32))
    count = fg_mask.sum().clamp(min=1)
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    objectness = bce(logits[..., 0], fg_mask.to(logits.dtype), reduction="none")
    target = one_hot(matched_classes[fg_mask].long(), num_classes).to(logits.dtype)
    target = target * (matched_iou[fg_mask][:, None].to(logits.dtype) if soft else 1)
    classes = bce(logits[fg_mask][:, 1:], target, reduction="sum")
    return {
        "loss_obj": ((objectness if everywhere else objectness * fg_mask).sum() / count).to(outputs.dtype),
        "loss_cls": (classes / count).to(torch.promote_types(outputs.dtype, matched_iou.dtype)),
    }


def yolox_bce(**given):
    return checked("yolox_bce", literal_yolox_bce, given)


def yolox_bce_objectness_over_positives(**given):
    return literal_yolox_bce(**given, everywhere=False)


def yolox_bce_hard_classes(**given):
    """The class target without its factor, the overlap."""
    return literal_yolox_bce(**given, soft=False)


def set_class_loss(**given):
    return right("set_class_loss")(**given)


def set_class_loss_no_object_weight_dropped(*, eos_coef, **given):
    return right("set_class_loss")(eos_coef=1.0, **given)


def generalized_box_iou(**given):
    return right("generalized_box_iou")(**given)


def generalized_box_iou_over_union(*, boxes1, boxes2):
    """The penalty divided by the union instead of the hull."""
    a, b = boxes1[:, None], boxes2[None]
    inner = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(0).prod(-1)
    union = sum((box[..., 2:] - box[..., :2]).prod(-1) for box in (a, b)) - inner
    hull = (torch.maximum(a[..., 2:], b[..., 2:]) - torch.minimum(a[..., :2], b[..., :2])).clamp(0).prod(-1)
    return {"giou": inner / union - (hull - union) / union}


def set_loss(**given):
    return right("set_loss")(**given)


def set_loss_auxiliary_layers_skipped(**given):
    """Only the last layer's terms enter the total."""
    outputs = dict(right("set_loss")(**given))
    alone = {name: value for name, value in given.items() if not name.startswith("aux_")}
    return {**outputs, "total": dict(right("set_loss")(**{**alone, "auxiliary": False}))["total"]}
