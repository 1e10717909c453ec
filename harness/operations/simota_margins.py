"""What rounding leaves open in SimOTA: every deciding quantity of an image as an interval.

The four quantities of `spec/simota.md` section 4.8 decide everything: signed distances to region edges, the
sum of the ten largest overlaps, and the costs along a row (selection) and along a column (conflict). Each is
its float64 value plus and minus the noise of the inputs and of upstream's own arithmetic. A decision that
holds for all values inside the intervals is sure, one that holds for some is possible.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harness.equality import FLOOR_ULPS, budget, noise, ulp
from harness.operation import Tensors
from harness.operations.box_noise import corner_noise
from harness.verdict import Evidence

PACKAGE = {"radius": 2.5, "penalty": 1e5, "region": "union"}
"""Settings of the released 0.3.0; the defaults of a candidate."""
HEAD = {"radius": 1.5, "penalty": 1e6, "region": "centre"}
"""Settings of the repository since 2023-01, under the same version string."""
TOP_OVERLAPS = 10
IOU_WEIGHT = 3.0
IOU_OFFSET = 1e-8
LOG_FLOOR = 100.0
OVERLAP_INPUTS = ("gt_boxes", "pred_boxes")
SUM_ULPS = 5
"""Nine additions of at most half a unit each."""
REGION_ULPS = 2
"""Centre, edge and their difference, each rounded at the magnitude of the coordinates."""


@dataclass(frozen=True)
class Interval:
    """Bounds of a quantity under rounding."""

    low: Tensor
    high: Tensor

    @property
    def middle(self) -> Tensor:
        """The value in float64 arithmetic, about."""
        return (self.low + self.high) / 2

    @property
    def noise(self) -> Tensor:
        """Half the width."""
        return (self.high - self.low) / 2


@dataclass(frozen=True)
class Scene:
    """One image with G ground truths and N anchors: quantities (G, N), sums and k (G,), candidates (N,)."""

    region: Interval
    """Signed distance in pixels of an anchor to the edge of a ground truth's candidate region."""
    sure_candidate: Tensor
    maybe_candidate: Tensor
    free: Interval
    """Signed distance to the region where the pair bears no penalty."""
    overlap_sum: Interval
    k_low: Tensor
    k_high: Tensor
    cost: Interval
    surely: Tensor
    """Pairs that ground truth g selects whatever the rounding."""
    maybe: Tensor
    """Pairs that it selects under some rounding."""


def overlaps(evidence: Evidence, tensors: Tensors) -> Tensor:
    """Upstream's IoU of every pair in the dtype of the tensors given, as float64, (B, M, N)."""
    needed = {name: tensors[name] for name in (*OVERLAP_INPUTS, "num_gt")}
    return evidence.quantities(needed)["iou"].double()


def overlap_noise(evidence: Evidence) -> tuple[Tensor, Tensor, Tensor]:
    """(float64 value, its sensitivity to the inputs' rounding, upstream's own value), each (B, M, N)."""
    needed = {name: evidence.case.tensors[name] for name in (*OVERLAP_INPUTS, "num_gt")}
    truth, sensitivity = corner_noise(lambda given: overlaps(evidence, given), needed, OVERLAP_INPUTS)
    return truth, sensitivity, overlaps(evidence, needed)


def sides(boxes: Tensor, tensors: Tensors, radius: float | None) -> Tensor:
    """Signed distance of anchor centres (N,) to the edges of boxes (G, 4) or of their centre squares."""
    stride = tensors["strides"][0]
    centres = torch.stack([tensors[f"{axis}_shifts"][0] * stride + 0.5 * stride for axis in "xy"], -1)
    half = 0.5 * boxes[:, None, 2:] if radius is None else (radius * stride)[None, :, None]
    away = (centres[None] - boxes[:, None, :2]).abs()
    return (half - away).amin(-1)


def _region(boxes: Tensor, tensors: Tensors, radius: float | None) -> Interval:
    names = ("strides", "x_shifts", "y_shifts")
    given = {"boxes": boxes, **{name: tensors[name] for name in names}}
    value, change = noise(lambda moved: sides(moved["boxes"], moved, radius), given, ("boxes",))
    dtype = torch.promote_types(boxes.dtype, tensors["strides"].dtype)
    stride = given["strides"][0].double()
    reach = torch.maximum(*(given[f"{axis}_shifts"][0].double().abs() * stride + stride for axis in "xy"))
    half = 0.5 * boxes[:, 2:].double().abs().amax(-1)[:, None] if radius is None else (radius * stride)[None]
    largest = torch.maximum(reach[None], boxes[:, :2].double().abs().amax(-1)[:, None] + half)
    change = change + REGION_ULPS * ulp(largest, dtype)
    # NaN compares as outside, whatever the rounding.
    return Interval((value - change).nan_to_num(-torch.inf), (value + change).nan_to_num(-torch.inf))


def _larger(a: Interval, b: Interval) -> Interval:
    return Interval(torch.maximum(a.low, b.low), torch.maximum(a.high, b.high))


def _smaller(a: Interval, b: Interval) -> Interval:
    return Interval(torch.minimum(a.low, b.low), torch.minimum(a.high, b.high))


def regions(boxes: Tensor, tensors: Tensors, rule: Mapping[str, Any]) -> tuple[Interval, Interval]:
    """Signed distances (G, N): above 0 an anchor is a candidate; above 0 a pair bears no penalty."""
    centre = _region(boxes, tensors, rule["radius"])
    if rule["region"] == "centre":
        return centre, centre
    inside = _region(boxes, tensors, None)
    return _larger(inside, centre), _smaller(inside, centre)


def _float32_sigmoid(logits: Tensor) -> Interval:
    """Float64 sigmoid with the roundings that float32 may give; what is surely 0 or 1 there is exact."""
    info, value = torch.finfo(torch.float32), logits.double().sigmoid()
    low = torch.where(1 - value < info.eps / 8, torch.ones_like(value), value * (1 - 2 * info.eps))
    high = (value * (1 + 2 * info.eps)).clamp(max=1)
    # Below the smallest normal number float32 may flush to 0.
    return Interval(torch.where(value < info.tiny, torch.zeros_like(low), low), high)


def _joint_probability(cls_logits: Tensor, obj_logits: Tensor) -> Interval:
    """sqrt(sigmoid * sigmoid) as float32 computes it, where the product may underflow, (N, C)."""
    info = torch.finfo(torch.float32)
    a, b = _float32_sigmoid(cls_logits), _float32_sigmoid(obj_logits)
    low, high = a.low * b.low, a.high * b.high
    subnormal = info.tiny * info.eps
    low = torch.where(low < info.tiny, torch.zeros_like(low), low)
    high = torch.where(high < subnormal / 8, torch.zeros_like(high), high + subnormal)
    low = torch.where(low == 1, low, low.sqrt() * (1 - info.eps))
    return Interval(low, (high.sqrt() * (1 + info.eps)).clamp(max=1))


def class_cost(cls_logits: Tensor, obj_logits: Tensor, classes: Tensor) -> Interval:
    """Clamped binary cross-entropy summed over classes in float32, (G, N), from (N, C), (N, 1), (G,)."""
    p = _joint_probability(cls_logits, obj_logits)
    hit = Interval(-p.high.log().clamp(min=-LOG_FLOOR), -p.low.log().clamp(min=-LOG_FLOOR))
    miss = Interval(-torch.log1p(-p.low).clamp(min=-LOG_FLOOR), -torch.log1p(-p.high).clamp(min=-LOG_FLOOR))
    index = classes.long()

    def total(hit: Tensor, miss: Tensor) -> Tensor:
        return (miss.sum(-1, keepdim=True) + (hit - miss)[:, index]).T

    low, high = total(hit.low, miss.low), total(hit.high, miss.high)
    rounding = FLOOR_ULPS * ulp(high, torch.float32)
    return Interval(low - rounding, high + rounding)


def _cost(iou: Interval, classes: Interval, free: Interval, penalty: float, dtype: torch.dtype) -> Interval:
    """(K + 3 E) + penalty of pairs that are not free, with the rounding of each step, (G, N)."""
    # float16 cannot hold the offset: there an overlap of 0 costs infinity.
    offset = 0.0 if dtype == torch.float16 else IOU_OFFSET
    low, high = -IOU_WEIGHT * (iou.high + IOU_OFFSET).log(), -IOU_WEIGHT * (iou.low + offset).log()
    low, high = low - 3 * ulp(low, dtype), high + torch.where(high.isinf(), high, 3 * ulp(high, dtype))
    low, high = classes.low + low, classes.high + high
    low, high = low + penalty * (free.high <= 0), high + penalty * (free.low <= 0)
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    return Interval(low - ulp(low, kept), high + torch.where(high.isinf(), high, ulp(high, kept)))


def _nth(values: Tensor, n: Tensor) -> Tensor:
    """The n-th smallest of each row (n from 1, one a row), infinity where there are fewer, (G, 1)."""
    padded = torch.nn.functional.pad(values.sort(-1).values, (0, 1), value=torch.inf)
    return padded.gather(1, (n - 1).clamp(max=values.shape[1])[:, None])


def _dynamic_k(iou: Interval, sure: Tensor, maybe: Tensor, dtype: torch.dtype) -> tuple[Interval, Tensor, Tensor]:
    """Sum of the ten largest overlaps, and the least and greatest k that its rounding allows, each (G,)."""
    count = min(TOP_OVERLAPS, iou.low.shape[1])
    low, high = ((some * among).topk(count, -1).values.sum(-1) for some, among in ((iou.low, sure), (iou.high, maybe)))
    total = Interval(low - SUM_ULPS * ulp(low, dtype), high + SUM_ULPS * ulp(high, dtype))
    least = torch.minimum(total.low.trunc().long(), sure.sum()).clamp(min=1)
    greatest = torch.minimum(total.high.trunc().long().clamp(min=1), maybe.sum())
    return total, least, greatest


def scenes(evidence: Evidence, images: Sequence[int]) -> dict[int, Scene | None]:
    """The intervals of some images; None where the cost of a candidate is not finite, so that nothing decides."""
    tensors, rule = evidence.case.tensors, {**PACKAGE, **evidence.era}
    dtype = evidence.oracle["matched_iou"].dtype
    truth, sensitivity, own = overlap_noise(evidence)
    allowed = budget(truth, own, sensitivity, dtype)
    found = {}
    for b in images:
        rows = int(tensors["num_gt"][b])
        region, free = regions(tensors["gt_boxes"][b, :rows], tensors, rule)
        sure, maybe = (region.low > 0).any(0), (region.high > 0).any(0)
        classes = class_cost(tensors["cls_logits"][b], tensors["obj_logits"][b], tensors["gt_classes"][b, :rows])
        undefined = ~(truth[b, :rows].isfinite() & own[b, :rows].isfinite() & classes.high.isfinite())
        if bool((undefined & maybe).any()):
            found[b] = None
            continue
        low, high = ((truth + side * allowed)[b, :rows].masked_fill(undefined, 0.0) for side in (-1, 1))
        iou = Interval(low.clamp(min=0), high)
        total, k_low, k_high = _dynamic_k(iou, sure, maybe, dtype)
        cost = _cost(iou, classes, free, rule["penalty"], dtype)
        first, last = cost.low.masked_fill(~maybe, torch.inf), cost.high.masked_fill(~sure, torch.inf)
        surely = sure & ((last < _nth(first, k_low + 1)) | (maybe.sum() <= k_low)[:, None])
        possible = maybe & (first <= _nth(last, k_high))
        found[b] = Scene(region, sure, maybe, free, total, k_low, k_high, cost, surely, possible)
    return found


def candidates(tensors: Tensors, *, possible: bool = False) -> Tensor:
    """Candidate anchors of each image under the released region, which holds the repository's too, (B, N) bool.

    `possible` ones are so under some rounding; the others as the dtype of the tensors has it.
    """
    found = torch.zeros(tensors["pred_boxes"].shape[:2], dtype=torch.bool, device=tensors["pred_boxes"].device)
    for b, rows in enumerate(tensors["num_gt"].tolist()):
        boxes = tensors["gt_boxes"][b, :rows]
        if possible:
            distance = regions(boxes, tensors, PACKAGE)[0].high
        else:
            distance = torch.maximum(sides(boxes, tensors, None), sides(boxes, tensors, PACKAGE["radius"]))
        found[b] = (distance > 0).any(0)
    return found
