"""Comparator of `tal`: the set of valid assignments inside the rounding margin, and the scores they imply.

Every deciding quantity is an interval: the float64 value plus and minus its noise. A proposal, an owner or a
background anchor is legal if some values inside the intervals decide so (`spec/task_aligned.md` section 6).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from harness.equality import FLOOR_ULPS, budget, in_float64, noise, ulp
from harness.operation import Tensors
from harness.operations.rotated_sides import rotated_sides, small_box
from harness.verdict import NON_FINITE, Evidence, Finding, worst

MEMBERSHIP_MARGIN = 1e-9
MOVED = ("pd_scores", "pd_bboxes", "anc_points", "gt_bboxes")
SHOWN_ROWS, SHOWN_PLACES = 4, 3


def compare(evidence: Evidence) -> Finding:
    """Decisions by their margins, then scores within the budget where the same anchors were chosen.

    Images in which the oracle's own scores are not finite are left to the list of divergences; the rest of
    the batch is judged as ever.
    """
    batch, rows = evidence.case.tensors["gt_bboxes"].shape[:2]
    if batch == 0 or rows == 0:
        return _exact(evidence)
    ours, theirs = evidence.candidate, evidence.oracle
    sound = theirs["target_scores"].isfinite().all(-1).all(-1)[:, None]
    differ = (ours["fg_mask"] != theirs["fg_mask"]) | (ours["target_gt_idx"] != theirs["target_gt_idx"])
    differ &= sound
    tied, count = int(differ.sum()), differ.numel()
    proof = ""
    if tied:
        judged = _Judged.of(evidence)
        illegal = judged.first_illegal(sound, differ)
        if illegal:
            return Finding("mismatch", illegal, "fg_mask, target_gt_idx", decisions=count, tied=tied)
        proof = judged.proof(differ)
    error, detail = _scores(evidence, differ, sound)
    if error > 1:
        return Finding("mismatch", detail, "target_scores", error, count, tied)
    if not bool(sound.all()):
        where = int((~sound[:, 0]).nonzero()[0])
        return Finding("mismatch", f"image {where}: the oracle's scores are not finite", NON_FINITE, error, count)
    if tied:
        return Finding("tie", proof, "fg_mask, target_gt_idx", error, count, tied)
    return Finding("match", "", "", error, count)


def _exact(evidence: Evidence) -> Finding:
    """Without ground truths nothing is computed, so nothing may differ."""
    for output in evidence.operation.outputs:
        if not torch.equal(evidence.candidate[output.name], evidence.oracle[output.name]):
            return Finding("mismatch", f"{output.name} differs although there is no ground truth", output.name)
    return Finding("match")


@dataclass(frozen=True)
class Interval:
    """Bounds of a quantity under rounding, each (n, A)."""

    low: Tensor
    high: Tensor


@dataclass(frozen=True)
class Scene:
    """Deciding quantities of one image, float64, ground-truth rows by anchors."""

    surely_inside: Tensor
    maybe_inside: Tensor
    overlap: Interval
    metric: Interval


def _sides(tensors: Tensors, era: dict[str, Any], stride: list[float]) -> Tensor:
    """Smallest of the four distances from an anchor to the sides of the (enlarged) box, (B, n, A)."""
    if _rotated(tensors):
        return rotated_sides(tensors["gt_bboxes"], tensors["anc_points"], *small_box(era, stride))
    boxes, points = tensors["gt_bboxes"], tensors["anc_points"]
    low, high = boxes[..., :2], boxes[..., 2:]
    centre, size = (low + high) / 2, high - low
    threshold, side = small_box(era, stride)
    if era["small_box"] != "off":
        size = torch.where(size < threshold, torch.full_like(size, side), size)
        low, high = centre - size / 2, centre + size / 2
    point = points[None, None]
    return torch.cat((point - low[:, :, None], high[:, :, None] - point), -1).amin(-1)


def _rotated(tensors: Tensors) -> bool:
    """Rotated boxes have an angle, and determinants that cancel: upstream's own error is part of their noise."""
    return tensors["gt_bboxes"].shape[-1] == len("xywhr")


def _own_error(function: Callable[[Tensors], Tensor], tensors: Tensors, truth: Tensor) -> Tensor:
    """How far a quantity is from the truth when it is computed in the dtypes at hand, twice."""
    return 2 * (function(tensors).double() - truth).abs().nan_to_num(0.0, posinf=0.0)


def _scene(evidence: Evidence) -> Scene:
    case, tensors = evidence.case, evidence.case.tensors
    settings, dtype = case.settings, tensors["pd_bboxes"].dtype
    valid = (tensors["mask_gt"][..., 0] != 0)[..., None]
    stride = list(settings["stride"] or (8, 16, 32))

    def sides(given: Tensors) -> Tensor:
        return _sides(given, evidence.era, stride)

    def overlap(given: Tensors) -> Tensor:
        return evidence.quantities(given)["overlap"].double().nan_to_num(0.0, posinf=0.0, neginf=0.0)

    side, side_noise = noise(sides, tensors, MOVED)
    # Side lengths are rounded at the magnitude of the coordinates, not of the difference. A size within
    # rounding of the small-box threshold moves the side by half the stride: `noise` sees that by itself.
    side_noise = side_noise + 2 * ulp(tensors["gt_bboxes"].abs().amax(-1)[..., None].double(), dtype)
    value, value_noise = noise(overlap, tensors, MOVED)
    if _rotated(tensors):
        side_noise = side_noise + _own_error(sides, tensors, side)
        value_noise = value_noise + _own_error(overlap, tensors, value)
    value_noise = value_noise + 4 * ulp(value, dtype).clamp(min=torch.finfo(dtype).eps)
    score = _own_class_scores(tensors)
    score_noise = ulp(score, tensors["pd_scores"].dtype)
    margin = 0.0 if _rotated(tensors) else MEMBERSHIP_MARGIN
    maybe, surely = valid & (side > margin - side_noise), valid & (side > margin + side_noise)
    low, high = (value - value_noise).clamp(min=0), torch.where(value > 0, value + value_noise, value_noise)
    exact_zero = (value == 0) & (value_noise <= 8 * torch.finfo(dtype).eps)
    high = torch.where(exact_zero, torch.zeros_like(high), high)
    alpha, beta = settings["alpha"], settings["beta"]
    slack = FLOOR_ULPS * torch.finfo(dtype).eps

    def metric(score: Tensor, overlap: Tensor, factor: float) -> Tensor:
        return score.clamp(min=0) ** alpha * overlap**beta * factor

    # Products below the smallest subnormal of the dtype vanish there and live in float64.
    vanish = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    metric_low = (metric(score - score_noise, low, 1 - slack) - vanish).clamp(min=0)
    metric_high = metric(score + score_noise, high, 1 + slack)
    metric_high = torch.where(metric_high > 0, metric_high + vanish, metric_high)
    nothing = torch.zeros_like(value)
    rivals = Interval(torch.where(surely, low, nothing), torch.where(maybe, high, nothing))
    return Scene(
        surely,
        maybe,
        Interval(low, high) if _all_pairs(evidence) else rivals,
        Interval(torch.where(surely, metric_low, nothing), torch.where(maybe, metric_high, nothing)),
    )


def _all_pairs(evidence: Evidence) -> bool:
    """Whether rows that do not contain an anchor may win it, and then with their metric."""
    return evidence.era.get("pair_domain") == "all"


def _own_class_scores(tensors: Tensors) -> Tensor:
    """Predicted score of each ground truth's class at each anchor, float64, (B, n, A)."""
    scores = tensors["pd_scores"].double()
    labels = tensors["gt_labels"][..., 0].long().clamp(-scores.shape[-1], scores.shape[-1] - 1)
    labels = torch.where(labels < 0, labels + scores.shape[-1], labels)
    index = labels[:, None, :].expand(-1, scores.shape[1], -1)
    return scores.gather(2, index).transpose(1, 2).nan_to_num(0.0, posinf=0.0)


def _kth(values: Tensor, k: int) -> Tensor:
    """The k-th largest of each row, minus infinity where there are fewer, (..., 1)."""
    if k > values.shape[-1]:
        return torch.full_like(values[..., :1], -torch.inf)
    return values.topk(k, -1).values[..., -1:]


@dataclass(frozen=True)
class _Judged:
    """The candidate's decisions beside what the intervals allow; masks are (B, n, A)."""

    evidence: Evidence
    scene: Scene
    maybe: Tensor
    """Rows that may propose an anchor."""
    surely: Tensor
    """Rows that propose it whatever the rounding."""

    @classmethod
    def of(cls, evidence: Evidence) -> _Judged:
        scene, topk = _scene(evidence), evidence.case.settings["topk"]
        maybe = scene.maybe_inside & (scene.metric.high >= _kth(scene.metric.low, topk))
        surely = scene.surely_inside & (scene.metric.low > _kth(scene.metric.high, topk + 1))
        return cls(evidence, scene, maybe, surely)

    def first_illegal(self, sound: Tensor, differ: Tensor) -> str | None:
        """The first decision that no values inside the margins justify, in words; else None."""
        settings, overlap = self.evidence.case.settings, self.scene.overlap
        topk, topk2 = settings["topk"], settings.get("topk2") or settings["topk"]
        foreground, owner = self.evidence.candidate["fg_mask"], self.evidence.candidate["target_gt_idx"]
        anchors = torch.arange(owner.shape[1], device=owner.device)
        image = torch.arange(owner.shape[0], device=owner.device)[:, None]

        def of_owner(value: Tensor) -> Tensor:
            return value[image, owner, anchors]

        sole = of_owner(self.maybe) & (self.surely.sum(1) == of_owner(self.surely).long())
        # The winner of a conflict is any row of the largest overlap, proposing or not.
        wins = (self.maybe.sum(1) >= 2) & (of_owner(overlap.high) >= overlap.low.amax(1))
        background = ~self.surely.any(1)
        if topk2 != topk:
            # An anchor that the second top-k drops is never given to another row.
            background |= ~self._surely_kept(topk2)
        bad = ~torch.where(foreground, sole | wins, background) & sound
        if _rotated(self.evidence.case.tensors) or self.evidence.ask.evaluate is None:
            # Float64 sees thin boxes otherwise than upstream's own dtype does; and without an oracle the quantities are
            # the specification's, not its own: only other decisions are judged.
            bad &= differ
        if bool(bad.any()):
            # A differing anchor explains more than one whose neighbours were displaced.
            bad = bad & differ if bool((bad & differ).any()) else bad
            return self.describe(*(int(i) for i in bad.nonzero()[0]))
        return self._wrong_count(sound, topk, topk2)

    def _surely_kept(self, topk2: int) -> Tensor:
        """Anchors that survive the second top-k whatever the rounding, (B, A)."""
        uncontested = self.surely & (self.maybe.sum(1, keepdim=True) == 1)
        metric = self.scene.metric
        # Anchors that were not selected compete too, with 0.
        rivals = torch.where(self.maybe, metric.high, torch.zeros_like(metric.high))
        return (uncontested & (metric.low > _kth(rivals, topk2 + 1))).any(1)

    def _wrong_count(self, sound: Tensor, topk: int, topk2: int) -> str | None:
        """Each row takes at most `topk` anchors by its own proposals, and all of them where k are positive."""
        foreground, owner = self.evidence.candidate["fg_mask"], self.evidence.candidate["target_gt_idx"]
        owned = torch.nn.functional.one_hot(owner, self.maybe.shape[1]).bool().transpose(1, 2) & foreground[:, None]
        contested = (self.maybe.sum(1) >= 2)[:, None]
        most = topk if topk2 == topk else min(topk, topk2)
        alone = (owned & ~contested).sum(-1)
        few = (owned | (self.maybe & contested)).sum(-1) < topk
        few &= (_kth(self.scene.metric.low, topk) > 0)[..., 0] & (topk2 == topk)
        for wrong, words in ((alone > most, "too many"), (few, "too few")):
            if bool((wrong & sound).any()):
                b, g = (int(i) for i in (wrong & sound).nonzero()[0])
                return f"image {b}, ground truth {g}: {words} proposals, {int(alone[b, g])} uncontested, topk {topk}"
        return None

    def describe(self, b: int, a: int) -> str:
        """Both decisions on an anchor, and the quantities of the rows that contain it."""

        def decision(outputs: Tensors) -> str:
            owner = int(outputs["target_gt_idx"][b, a])
            return f"ground truth {owner}" if bool(outputs["fg_mask"][b, a]) else "background"

        ours, theirs = decision(self.evidence.candidate), decision(self.evidence.oracle)
        lines = [f"image {b}, anchor {a}: oracle {theirs}, candidate {ours}"]
        metric, overlap = self.scene.metric, self.scene.overlap
        for g in self.scene.maybe_inside[b, :, a].nonzero()[:, 0].tolist()[:SHOWN_ROWS]:
            may = "may propose" if self.maybe[b, g, a] else "does not propose"
            lines.append(
                f"ground truth {g} {'proposes' if self.surely[b, g, a] else may}: "
                f"metric {metric.low[b, g, a]:.9g} to {metric.high[b, g, a]:.9g}, "
                f"overlap {overlap.low[b, g, a]:.9g} to {overlap.high[b, g, a]:.9g}"
            )
        return "; ".join(lines)

    def proof(self, differ: Tensor) -> str:
        """Why the first differing anchors may go either way."""
        places = differ.nonzero()[:SHOWN_PLACES].tolist()
        return f"{int(differ.sum())} anchors inside the margin: " + " | ".join(self.describe(*p) for p in places)


def _implied_scores(given: Tensors, evidence: Evidence, outputs: Tensors) -> Tensor:
    """Score of each anchor, (B, A), that the definition gives for the decisions in `outputs`."""
    settings, foreground, owner = evidence.case.settings, outputs["fg_mask"], outputs["target_gt_idx"]
    overlap = evidence.quantities(given)["overlap"].double()
    metric = _own_class_scores(given) ** settings["alpha"] * overlap ** settings["beta"]
    chosen = torch.nn.functional.one_hot(owner, overlap.shape[1]).bool().transpose(1, 2) & foreground[:, None]
    if not _all_pairs(evidence):
        # A tie among zeros can hand an anchor to a row that does not contain it; its metric is 0 by definition.
        stride = list(settings["stride"] or (8, 16, 32))
        sides = _sides(in_float64(evidence.case.tensors), evidence.era, stride)
        if _rotated(given):
            # Corners of thin boxes are rounded: what contains an anchor there need not do so in truth.
            sides = torch.maximum(sides, _sides(evidence.case.tensors, evidence.era, stride).double())
        chosen &= sides > -1e-3
    zero = torch.zeros_like(metric)
    metric, overlap = torch.where(chosen, metric, zero), torch.where(chosen, overlap, zero)
    best_metric, best_overlap = metric.amax(-1, keepdim=True), overlap.amax(-1, keepdim=True)
    return (metric * best_overlap / (best_metric + settings["eps"])).amax(1)


def _truth(evidence: Evidence, outputs: Tensors) -> Tensor:
    """Scores that are right for the decisions in `outputs`, (B, A), float64.

    Where the oracle in float64 decides alike over the whole image they are its own scores; its decisions may
    differ by a tie, and then they are what the definition gives for the decisions at hand.
    """
    implied = _implied_scores(in_float64(evidence.case.tensors), evidence, outputs)
    if evidence.truth is None:
        return implied
    alike = (evidence.truth["fg_mask"] == outputs["fg_mask"]) & (
        evidence.truth["target_gt_idx"] == outputs["target_gt_idx"]
    )
    return torch.where(alike.all(-1, keepdim=True), _anchor_score(evidence.truth["target_scores"]), implied)


def _scores(evidence: Evidence, differ: Tensor, sound: Tensor) -> tuple[float, str]:
    """Worst score error as a share of its budget, and in words where it exceeds it."""
    tensors, ours, theirs = evidence.case.tensors, evidence.candidate, evidence.oracle
    dtype = ours["target_scores"].dtype
    truth = _truth(evidence, ours)
    candidate, oracle = _anchor_score(ours["target_scores"]), _anchor_score(theirs["target_scores"])
    own = torch.where(differ, truth, truth + (oracle - _truth(evidence, theirs)))
    difference = torch.where(sound, (candidate - truth).abs(), torch.zeros_like(truth))
    allowed = budget(truth, own, torch.zeros_like(truth), dtype) + torch.finfo(dtype).smallest_normal
    error, where = worst(difference, allowed)
    if error > 1:
        # Only now the dear part: how much the truth itself moves when inputs move by one ulp.
        allowed += _sensitivity(tensors, evidence)
        error, where = worst(difference, allowed)
    if error <= 1:
        return error, ""
    b, a = where
    return (
        error,
        f"image {b}, anchor {a}: candidate {candidate[b, a].item():.9g}, oracle {oracle[b, a].item():.9g}, "
        f"truth {truth[b, a].item():.9g}, budget {allowed[b, a].item():.3g}",
    )


def _sensitivity(tensors: Tensors, evidence: Evidence) -> Tensor:
    def implied(given: Tensors) -> Tensor:
        return _implied_scores(given, evidence, evidence.candidate)

    value, change = noise(implied, tensors, MOVED)
    return change + _own_error(implied, tensors, value) if _rotated(tensors) else change


def _anchor_score(scores: Tensor) -> Tensor:
    """The one non-zero score of each anchor, (B, A), NaN where any is NaN."""
    if scores.shape[-1] == 0:
        return scores.new_zeros(scores.shape[:-1], dtype=torch.float64)
    return scores.double().sum(-1)
