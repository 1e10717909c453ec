"""Faults that were reported in the field (`cases/field.toml`), each as it was reported, beside controls without one.

A fault is a keyword of a formula written out, a setting of another era, or one function of the library replaced.
`FAULTS` says which row each reproduces and by which pinned cases it must be caught.
"""

import math
from dataclasses import dataclass
from itertools import pairwise
from unittest import mock

import numpy as np
import torch
from torch.nn.functional import one_hot

from cases import probiou as probiou_cases
from cleanroom.assign import _simota_sparse, hungarian
from cleanroom.losses import v8_detection
from tests.loss_faults import ciou, literal_bbox_loss, right
from tests.loss_faults import v8_detection_loss_gradient_through_assigner as v8_not_detached
from tests.loss_faults import v8_detection_loss_no_floor as v8_divides_by_no_objects

__all__ = ["v8_divides_by_no_objects", "v8_not_detached"]

TAL, SIMOTA, HUNGARIAN, V8, BOX = "tal", "simota", "hungarian", "v8_detection_loss", "bbox_loss"
ROTATED, ROTATED_TAL = "probiou", "rotated_tal"
CONTROLS = {
    TAL: "tal",
    SIMOTA: "simota",
    HUNGARIAN: "matched",
    V8: "v8_detection_loss",
    BOX: "bbox_loss",
    ROTATED: "probiou",
    ROTATED_TAL: "rotated_tal",
}
"""A candidate of each operation without a fault, written in the way of the faults where those are written out."""
ELSEWHERE = "meta"
"""A device that no host's tensors lie on, as the second GPU is for whom has one."""


@dataclass(frozen=True, init=False)
class Fault:
    """A faulty candidate of this module: the row and operation it belongs to, what is said of it, and by which cases.

    `cases` are the names of pinned cases behind "OPERATION-field-"; an `output` of "" stands for any.
    """

    row: str
    operation: str
    candidate: str
    verdict: str
    output: str
    cases: tuple[str, ...]

    def __init__(self, row, operation, candidate, told, *cases) -> None:
        given = (row, operation, candidate, *told, cases)
        for name, value in zip(self.__dataclass_fields__, given, strict=True):
            object.__setattr__(self, name, value)

    def __str__(self) -> str:
        return f"{self.row}-{self.candidate}"


DECIDED = ("mismatch", "fg_mask, target_gt_idx")
REJECTED = ("candidate-error", "rejection")


def _both(name: str) -> tuple[str, str]:
    """The case of each matcher."""
    row, _, case = name.partition("*")
    return f"{row}detr{case}", f"{row}rtdetr{case}"


FAULTS = (
    Fault("PaddleDetection#5710", TAL, "tal_padding_counts", DECIDED, "paddledetection-5710-padding-votes"),
    Fault("PaddleDetection#5710", TAL, "tal_padding_votes", DECIDED, "paddledetection-5710-padding-proposes"),
    Fault(
        *("Tencent/YOLO-Master#253", TAL, "tal_conflict_of_all_pairs", DECIDED),
        "tencent-yolo-master-253-outsider-overlaps-most",
    ),
    Fault(
        *("Tencent/YOLO-Master#253", TAL, "tal_conflict_adds_positives", DECIDED),
        "multimediatechlab-yolo-103-positives-never-grow",
    ),
    Fault(
        *("Tencent/YOLO-Master#253", TAL, "tal_zero_overlap_scores", ("mismatch", "target_scores")),
        "tencent-yolo-master-253-zero-overlap-conflict",
        "multimediatechlab-yolo-103-all-metrics-zero",
    ),
    Fault(
        *("MultimediaTechLab/YOLO#48", TAL, "tal_not_detached", ("mismatch", "side effects")),
        "multimediatechlab-yolo-48-predictions-detached",
    ),
    Fault(
        *("MultimediaTechLab/YOLO#48", V8, "v8_not_detached", ("mismatch", "gradient of scores")),
        "multimediatechlab-yolo-48-predictions-detached",
    ),
    Fault(
        *("DETA#8", HUNGARIAN, "query_for_several_targets", ("mismatch", "invariants")),
        *_both("deta-8-*-one-query-two-targets"),
    ),
    Fault(
        *("DETA#8", SIMOTA, "simota_first_keeps_it", ("mismatch", "matched_gt")),
        "clrernet-78-one-anchor-two-ground-truths",
    ),
    Fault("U#25912", TAL, "tal_small_box_not_monotonic", DECIDED, "u-25912-small-box-size-sweep"),
    Fault("U#24260", TAL, "tal_lengthens_its_input", ("mismatch", "side effects"), "u-24260-small-box"),
    Fault(
        *("U#24260", ROTATED_TAL, "rotated_tal_lengthens_its_input", ("mismatch", "side effects")),
        "u-24260-input-unchanged",
    ),
    Fault(
        *("U#10108", ROTATED, "probiou_unguarded", ("mismatch", "")),
        *(f"u-10108-{kind}" for kind in probiou_cases.THIN),
        *(f"u-24933-{kind}-among-others" for kind in probiou_cases.THIN),
        *(f"u-25007-{kind}-in-the-loss" for kind in probiou_cases.THIN),
    ),
    Fault("U#490", V8, "v8_divides_by_no_objects", ("mismatch", "total"), "u-490-no-objects"),
    Fault("U#490", V8, "v8_mean_of_each_image", ("mismatch", "total"), "u-490-empty-image"),
    Fault("U#4848", TAL, "tal_small_box_keeps_its_anchor", DECIDED, "u-4848-neighbour-starves-small-box"),
    Fault("U#4848", TAL, "tal_small_box_off", DECIDED, "u-19514-between-anchor-centres"),
    Fault("U#4848", TAL, "tal_small_box_nearest", DECIDED, "u-19514-no-anchor-centre"),
    Fault("U#25990", V8, "v8_assigned_in_half", DECIDED, "u-25990-autocast-bfloat16", "u-25990-autocast-float16"),
    Fault("U#25941", V8, "v8_no_l1_term", ("mismatch", "total"), "u-25941-no-dfl-head"),
    Fault("U#25941", V8, "v8_topk2_lost", DECIDED, "u-25209-one-class-topk2"),
    Fault(
        *("YX#811", SIMOTA, "simota_topk_of_nothing", REJECTED),
        "yx-811-no-candidate-anchor",
        "md-6731-box-outside-the-image",
        "pixeltable-yolox-16-zero-area",
    ),
    Fault(
        *("RF#431", HUNGARIAN, "nan_replaced_with_nan", REJECTED),
        *_both("rf-431-*-nan-cell"),
        *_both("rf-431-*-nan-row"),
        *_both("rf-431-*-nan-everywhere"),
        *_both("rf-431-*-infinite-row"),
    ),
    # Every hang takes a whole time limit: one is enough.
    Fault("U#25508", HUNGARIAN, "never_ends", ("timeout", "candidate never_ends"), "u-25508-rtdetr-no-finite-cost"),
    Fault("U#25508", HUNGARIAN, "nan_replaced_with_nan", REJECTED, "u-25508-detr-no-finite-cost"),
    Fault(
        *("HF#28865", HUNGARIAN, "first_targets_only", ("mismatch", "queries, targets")),
        *_both("hf-28865-*-more-targets-than-queries"),
    ),
    Fault("HF#28865", HUNGARIAN, "fewer_targets_only", REJECTED, *_both("hf-28865-*-as-many-targets")),
    Fault("HF#28865", HUNGARIAN, "some_target_only", REJECTED, *_both("hf-28865-*-no-target")),
    Fault("HF#47000", HUNGARIAN, "focal_cost_in_half", REJECTED, "hf-47000-rtdetr-saturated-half-logits"),
    Fault("yolov7#306", V8, "v8_device_written_down", REJECTED, "yolov7-306-one-device"),
    Fault("ultralytics==8.0.100", BOX, "box_loss_n_by_n", ("mismatch", "loss_iou"), "ultralytics-8.0.100-two-anchors"),
)


def tal(
    *,
    pd_scores,
    pd_bboxes,
    anc_points,
    gt_labels,
    gt_bboxes,
    mask_gt,
    topk,
    topk2,
    num_classes,
    alpha,
    beta,
    stride,
    eps,
    small_box="min_side",
    votes="rows",
    rows="valid",
    pairs="candidates",
    contested="proposed",
    detached=True,
    least=0.0,
    keep_last=False,
    nearest=False,
    **_era,
):
    """`tal` by the text of task_aligned.md, section 4, for float32 rows without a second selection."""
    if gt_bboxes.shape[1] == 0:
        return right(TAL)(
            pd_scores=pd_scores, pd_bboxes=pd_bboxes, anc_points=anc_points, gt_labels=gt_labels, gt_bboxes=gt_bboxes,
            mask_gt=mask_gt, topk=topk, topk2=topk2, num_classes=num_classes, alpha=alpha, beta=beta, stride=stride,
            eps=eps, small_box=small_box, **_era,
        )  # fmt: skip
    with torch.set_grad_enabled(not detached):
        valid = mask_gt[..., 0] > 0
        centre, side = (gt_bboxes[..., :2] + gt_bboxes[..., 2:]) / 2, gt_bboxes[..., 2:] - gt_bboxes[..., :2]
        longer = stride[1] if len(stride) > 1 else stride[0]
        below = {"min_side": longer, "first_stride": stride[0], "off": 0}[small_box]
        side = torch.where(side < below, float(longer), side)
        low, high = centre - side / 2, centre + side / 2
        inside = torch.cat((anc_points - low[:, :, None], high[:, :, None] - anc_points), -1).amin(-1) > 1e-9
        if nearest:
            near = (anc_points - centre[:, :, None]).square().sum(-1)
            inside |= (near == near.amin(-1, keepdim=True)) & ~inside.any(-1, keepdim=True)
        if rows == "valid":
            inside &= valid[..., None]
        shape = inside.shape
        truth = gt_bboxes[:, :, None].expand(*shape, 4).reshape(-1, 4)
        predicted = pd_bboxes[:, None].expand(*shape, 4).reshape(-1, 4)
        overlap = ciou(truth, predicted).clamp(min=least).view(shape)
        overlap = torch.where(inside, overlap, 0) if pairs == "candidates" else overlap
        label = gt_labels[..., 0].long()
        score = pd_scores.gather(2, label.clamp(0, pd_scores.shape[2] - 1)[:, None].expand(-1, shape[2], -1)).mT
        metric = torch.where(inside, (score**alpha * overlap**beta).clamp(min=least), 0)
        chosen = torch.zeros(shape, dtype=torch.bool).scatter(2, metric.topk(topk).indices, True) & inside
        if votes == "padding too":
            chosen[..., 0] |= ~valid
        claims = (inside if contested == "contained" else chosen).sum(1)
        best = one_hot(overlap.argmax(1), shape[1]).bool().mT
        if keep_last:
            alone = (inside.sum(-1, keepdim=True) == 1) & inside
            best = torch.where(alone.any(1, keepdim=True), alone, best)
        chosen = torch.where(claims[:, None] > 1, best, chosen)
        foreground, owner = chosen.any(1), chosen.long().argmax(1)
        metric, overlap = metric * chosen, overlap * chosen
        value = (metric * overlap.amax(-1, keepdim=True) / (metric.amax(-1, keepdim=True) + eps)).amax(1)
        labels = label.gather(1, owner).clamp(min=0)
        scores = value[..., None] * foreground[..., None] * one_hot(labels, num_classes)
    return {
        "target_labels": labels,
        "target_bboxes": gt_bboxes.detach().gather(1, owner[..., None].expand(-1, -1, 4)),
        "target_scores": scores,
        "fg_mask": foreground,
        "target_gt_idx": owner,
    }


def tal_padding_counts(**given):
    """Padded rows are rows like others."""
    return tal(**given, rows="all")


def tal_padding_votes(**given):
    """Every padded row proposes anchor 0."""
    return tal(**given, votes="padding too")


def tal_conflict_of_all_pairs(**given):
    """A contested anchor goes to the row of largest overlap, whether or not that contains it."""
    return tal(**given, pairs="all")


def tal_conflict_adds_positives(**given):
    """Every anchor inside several rows is taken for contested, proposed or not."""
    return tal(**given, contested="contained")


def tal_zero_overlap_scores(**given):
    """Overlaps and metrics of zero are lifted, so that what never overlapped is a positive of some score."""
    return tal(**given, least=1e-2)


def tal_not_detached(**given):
    return tal(**given, detached=False)


def tal_lengthens_its_input(*, gt_bboxes, stride, **given):
    """Short sides are lengthened where they lie, after upstream's rotated assigner of 8.4.8 to 8.4.38."""
    found = right(TAL)(gt_bboxes=gt_bboxes, stride=stride, **given)
    with torch.no_grad():
        side = gt_bboxes[..., 2:] - gt_bboxes[..., :2]
        missing = (stride[-2:][0] - side).clamp(min=0) / 2
        gt_bboxes += torch.cat((-missing, missing), -1)
    return found


def tal_small_box_not_monotonic(**given):
    return right(TAL)(**{**given, "small_box": "first_stride"})


def tal_small_box_off(**given):
    return right(TAL)(**{**given, "small_box": "off"})


def tal_small_box_nearest(**given):
    """A row without an anchor takes the nearest."""
    return tal(**given, nearest=True)


def tal_small_box_keeps_its_anchor(**given):
    """A row keeps its only anchor from a neighbour that overlaps it more."""
    return tal(**given, keep_last=True)


def v8_detection_loss(**given):
    return right(V8)(**given)


def v8_mean_of_each_image(*, batch_idx, **given):
    """The normaliser of each image: nothing, for one without objects."""
    found = dict(right(V8)(batch_idx=batch_idx, **given))
    objects = batch_idx.view(-1).long().bincount(minlength=len(found["fg_mask"]))
    return {**found, "total": found["total"] * (objects / objects).mean()}


def v8_assigned_in_half(**given):
    """The assigner sees probabilities in the dtype of the autocast, the losses the logits as they are."""
    assign, half = v8_detection._assign, torch.bfloat16

    def in_half(scores, *others, **named):
        return assign(scores.to(half).to(scores.dtype), *others, **named)

    with mock.patch.object(v8_detection, "_assign", in_half):
        return right(V8)(**given)


def v8_no_l1_term(**given):
    return right(V8)(**{**given, "reg1_distance": "zero"})


def v8_topk2_lost(**given):
    return right(V8)(**{**given, "topk2": None})


def v8_device_written_down(*, scores, **given):
    return right(V8)(scores=scores + torch.zeros((), device=ELSEWHERE).expand(scores.shape[1:]), **given)


def rotated_tal(**given):
    return right(ROTATED_TAL)(**given)


def rotated_tal_lengthens_its_input(*, gt_bboxes, stride, **given):
    """Short sides are lengthened where they lie."""
    found = right(ROTATED_TAL)(gt_bboxes=gt_bboxes, stride=stride, **given)
    with torch.no_grad():
        gt_bboxes[..., 2:4].clamp_(min=stride[-2:][0])
    return found


def probiou(**given):
    return right(ROTATED)(**given)


def probiou_unguarded(*, obb1, obb2, floor, eps, **_settings):
    """The formula of boxes.md, section 11, without what keeps it from 0/0: no floor, no epsilon, no clamp."""

    def gaussian(box):
        one, other = box[:, 2] ** 2 / 12, box[:, 3] ** 2 / 12
        cos, sin = box[:, 4].cos(), box[:, 4].sin()
        return one * cos**2 + other * sin**2, one * sin**2 + other * cos**2, (one - other) * cos * sin

    (a1, b1, c1), (a2, b2, c2) = gaussian(obb1), gaussian(obb2)
    a, b, c = a1 + a2, b1 + b2, c1 + c2
    (dx, dy), determinant = (obb1[:, :2] - obb2[:, :2]).unbind(1), a * b - c**2
    distance = (a * dy**2 + b * dx**2) / determinant / 4 - c * dx * dy / determinant / 2
    distance = distance + (determinant / (4 * ((a1 * b1 - c1**2) * (a2 * b2 - c2**2)).sqrt())).log() / 2
    return {"similarity": 1 - (1 - (-distance).exp()).sqrt()[:, None]}


def bbox_loss(**given):
    return literal_bbox_loss(**given)


def box_loss_n_by_n(**given):
    """Overlaps as a column beside weights as a row."""
    return literal_bbox_loss(**given, overlap=lambda first, second: ciou(first, second)[:, None])


def simota(**given):
    return right(SIMOTA)(**given)


def simota_first_keeps_it(**given):
    """An anchor that several ground truths took stays with the first."""

    def first(costs, anchor, image, shape):
        number = image.bincount(minlength=shape[0])
        return (number.cumsum(0) - number)[anchor // shape[1]]

    with mock.patch.object(_simota_sparse, "_cheapest", first):
        return right(SIMOTA)(**given)


def simota_topk_of_nothing(**given):
    """Each ground truth takes the best of the anchors inside it, of which there may be none."""
    boxes, strides = given["gt_boxes"], given["strides"]
    points = torch.stack(((given["x_shifts"] + 0.5) * strides, (given["y_shifts"] + 0.5) * strides), -1)
    for image, count in enumerate(given["num_gt"].tolist()):
        for x, y, width, height in boxes[image, :count].tolist():
            away = (points[0] - torch.tensor([x, y])).abs() * 2
            within = (away < torch.tensor([width, height])).all(-1)
            away[within].sum(-1).topk(1)
    return right(SIMOTA)(**given)


def matched(*, solve=None, **given):
    """The matchers with another solver of (Q, T) costs, which are not repaired for it."""
    if solve is None:
        return right(HUNGARIAN)(**given)

    def solve_image(costs, firsts, image):
        return solve(costs[firsts[image] : firsts[image + 1]].T.copy())

    with mock.patch.object(hungarian, "_solve_image", solve_image):
        return right(HUNGARIAN)(**given)


def query_for_several_targets(**given):
    """Each target takes its cheapest query."""

    def cheapest(cost):
        queries = torch.from_numpy(cost.argmin(0)).sort()
        return queries.values.numpy(), queries.indices.numpy()

    return matched(**given, solve=cheapest)


def nan_replaced_with_nan(**given):
    """What is not finite becomes the largest cost, which is not finite either."""

    def repaired(cost):
        cost[~(abs(cost) < math.inf)] = cost.max()
        return hungarian.scipy_solver()(cost)

    return matched(**{**given, "non_finite": "raise"}, solve=repaired)


def never_ends(**given):
    """An auction: a target bids for its cheapest query until all have one, which costs that are infinite never let."""

    # An infinite side makes the overlap NaN and the distance infinite: either forbids the pair.
    forbidden = math.inf if given["variant"] == "rtdetr" and not given["pred_boxes"].isfinite().all() else 0

    def auction(cost):
        if not len(cost) >= cost.shape[1] > 0:
            return hungarian.scipy_solver()(cost)
        cost[np.isnan(cost)] = forbidden
        price, owner, waiting = torch.zeros(len(cost)), {}, list(range(cost.shape[1]))
        while waiting:
            target = waiting.pop()
            value = -torch.from_numpy(cost[:, target]) - price
            best = value.topk(min(2, len(value)))
            query = int(best.indices[0])
            waiting += [owner[query]] if query in owner else []
            if value[query] > -math.inf:
                price[query] += best.values[0] - best.values[-1] + 1e-6
                owner[query] = target
            else:
                waiting.append(target)
        queries = sorted(owner)
        return torch.tensor(queries).numpy(), torch.tensor([owner[query] for query in queries]).numpy()

    return matched(**{**given, "non_finite": "raise"}, solve=auction)


def first_targets_only(**given):
    """As many targets as there are queries are looked at."""
    return matched(**given, solve=lambda cost: hungarian.scipy_solver()(cost[:, : len(cost)]))


def fewer_targets_only(**given):
    """A query more than targets is needed."""

    def fewer(cost):
        if cost.shape[1] >= len(cost):
            raise AssertionError("too many")
        return hungarian.scipy_solver()(cost)

    return matched(**given, solve=fewer)


def some_target_only(*, sizes, **given):
    """The fullest image is looked for among those that have a target."""
    max(size for size in sizes if size)
    return matched(sizes=sizes, **given)


def focal_cost_in_half(*, logits, labels, sizes, variant, **given):
    """The focal cost of half logits in half: its constant is 0 there, and the logarithm of a saturated one infinite."""
    if logits.dtype == torch.float16 and variant == "rtdetr":
        probability = logits.detach().sigmoid()
        small = torch.tensor(1e-8, dtype=logits.dtype)
        cost = (1 - probability) ** 2 * -(probability + small).log() - probability**2 * -(1 - probability + small).log()
        firsts = torch.tensor([0, *sizes]).cumsum(0).tolist()
        for image, (start, end) in enumerate(pairwise(firsts)):
            hungarian.scipy_solver()(cost[image][:, labels[start:end]].float().numpy())
    return matched(logits=logits, labels=labels, sizes=sizes, variant=variant, **given)
