"""Comparator of `simota`: the valid assignments inside the rounding margin, and the overlaps they imply.

An assignment is legal if selections exist that the intervals of `simota_margins` allow and that lead to it:
each ground truth selects between its least and greatest k of the cheapest candidates; an anchor that one
ground truth selects is its own; one that several select goes to a lowest cost of its column.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from harness.equality import budget, in_float64
from harness.operation import Tensors
from harness.operations.simota_explain import nearest
from harness.operations.simota_margins import Scene, overlap_noise, overlaps, scenes
from harness.verdict import NON_FINITE, Evidence, Finding, worst

COMPARED = 16
"""Contradictions among which the worst is looked for."""
SHOWN = 3
"""Places that a proof describes; their number is always told."""


@dataclass(frozen=True)
class Violation:
    """A decision that nothing inside the margins justifies: the pair it is about, and why."""

    row: int
    anchor: int
    reason: str


def compare(evidence: Evidence) -> Finding:
    """Decisions by their margins, then the matched overlaps within their budget.

    Images in which an overlap or a cost of upstream's is not finite, and answered otherwise, are left to the
    list of divergences; the rest of the batch is judged as ever.
    """
    ours, theirs = evidence.candidate, evidence.oracle
    differ = ours["matched_gt"] != theirs["matched_gt"]
    found = scenes(evidence, differ.any(1).nonzero()[:, 0].tolist()) if bool(differ.any()) else {}
    undefined = (theirs["matched_iou"].isnan() & ~ours["matched_iou"].isnan()).any(1)
    undefined[[b for b, scene in found.items() if scene is None]] = True
    differ, decisions = differ & ~undefined[:, None], differ.numel()
    tied = int(differ.sum())
    judged = {b: scene for b, scene in found.items() if scene is not None and not undefined[b]}
    for outputs, name in ((ours, "candidate"), (theirs, "oracle")):
        wrong = _first_illegal(evidence, judged, outputs, name)
        if wrong:
            return Finding("mismatch", wrong, "matched_gt", decisions=decisions, tied=tied)
    error, detail = _overlaps(evidence, differ, ~undefined)
    if error > 1:
        return Finding("mismatch", detail, "matched_iou", error, decisions, tied)
    if bool(undefined.any()):
        where = f"image {int(undefined.nonzero()[0])}: an overlap or a cost of a candidate is not finite upstream"
        return Finding("mismatch", where, NON_FINITE, error, decisions, tied)
    if tied:
        return Finding("tie", _proof(evidence, judged, differ), "matched_gt", error, decisions, tied)
    return Finding("match", "", "", error, decisions)


def _first_illegal(evidence: Evidence, judged: dict[int, Scene], outputs: Tensors, name: str) -> str | None:
    """In words, the first decision in `outputs` outside the margin; else None.

    The oracle's own decisions are held to it too: if one falls outside, the intervals are wrong.
    """
    for b, scene in judged.items():
        violation = illegal(scene, outputs["matched_gt"][b])
        if violation:
            place = _describe(evidence, scene, b, violation.anchor, (violation.row,))
            return f"{name}: {violation.reason}; {place}"
    return None


def illegal(scene: Scene, owner: Tensor) -> Violation | None:
    """What makes `owner` (N,), -1 for background, impossible inside the margins of an image; else None."""
    rows = len(scene.k_low)
    owned = owner[None] == torch.arange(rows, device=owner.device)[:, None]
    lowest = scene.cost.low <= scene.cost.high.amin(0)
    # An anchor that its owner may have won need not have been selected by it: rule 2 of section 4.5.
    selectors = scene.maybe.sum(0)
    won = (owned & lowest).any(0) & (selectors >= 2)
    third_party = owned & won & (selectors - scene.maybe.long() >= 2)
    must = scene.surely | (owned & ~third_party)
    never = ~scene.maybe | (owner < 0)[None] | (~won[None] & ~owned)
    if bool((must & never).any()):
        g, a = _worst_pair(scene, must & never)
        return Violation(g, a, _contradiction(scene, g, a, int(owner[a])))
    return _wrong_row(scene, must, never)


def _contradiction(scene: Scene, g: int, a: int, owner: int) -> str:
    if not scene.maybe[g, a]:
        return f"anchor {a} goes to ground truth {g}, which does not select it"
    if owner < 0:
        return f"anchor {a} is background although ground truth {g} selects it"
    return f"anchor {a} goes to ground truth {owner}, whose cost is not the lowest, although {g} selects it too"


def _wrong_row(scene: Scene, must: Tensor, never: Tensor) -> Violation | None:
    """A ground truth that passes over a cheaper candidate, or takes more or fewer than its k."""
    certain = scene.sure_candidate[None]
    outside = torch.where(never & certain, scene.cost.high, torch.inf)
    inside = torch.where(must, scene.cost.low, -torch.inf)
    ceiling, floor = outside.amin(1, keepdim=True), inside.amax(1, keepdim=True)
    cheapest, dearest = outside.argmin(1), inside.argmax(1)
    least = (must | (certain & (scene.cost.high < floor))).sum(1)
    most = (~never & (scene.cost.low <= ceiling)).sum(1)
    for bad, anchors, reason in (
        ((ceiling < floor)[:, 0], cheapest, "passes over a cheaper candidate"),
        (least > scene.k_high, dearest, "takes more candidates than its k"),
        (most < scene.k_low, cheapest, "takes fewer candidates than its k"),
    ):
        if bool(bad.any()):
            g = int(bad.nonzero()[0])
            count = f" ({int(least[g])} to {int(most[g])}; k {int(scene.k_low[g])} to {int(scene.k_high[g])})"
            return Violation(g, int(anchors[g]), f"ground truth {g} {reason}{count}")
    return None


def _worst_pair(scene: Scene, bad: Tensor) -> tuple[int, int]:
    """The contradicted pair that is farthest outside its margin, among the first of them."""
    places = [tuple(place) for place in bad.nonzero()[:COMPARED].tolist()]
    return max(places, key=lambda place: nearest(scene, place[:1], place[1]).share)


def _describe(evidence: Evidence, scene: Scene, b: int, a: int, rows: tuple[int, ...]) -> str:
    def decision(outputs: Tensors) -> str:
        owner = int(outputs["matched_gt"][b, a])
        return "background" if owner < 0 else f"ground truth {owner}"

    deciding = nearest(scene, rows, a)
    return (
        f"image {b}, anchor {a}: oracle {decision(evidence.oracle)}, "
        f"candidate {decision(evidence.candidate)}; {deciding}"
    )


def _proof(evidence: Evidence, judged: dict[int, Scene], differ: Tensor) -> str:
    texts = []
    for b, a in differ.nonzero()[:SHOWN].tolist():
        owners = {int(outputs["matched_gt"][b, a]) for outputs in (evidence.oracle, evidence.candidate)}
        texts.append(_describe(evidence, judged[b], b, a, tuple(sorted(owners - {-1}))))
    return f"{int(differ.sum())} anchors inside the margin: " + " | ".join(texts)


def _overlaps(evidence: Evidence, differ: Tensor, judged: Tensor) -> tuple[float, str]:
    """Worst error of matched_iou in the judged images as a share of its budget, and in words where above 1."""
    ours, theirs = evidence.candidate["matched_iou"], evidence.oracle["matched_iou"]
    owner = evidence.candidate["matched_gt"]
    of_interest = (owner >= 0) & judged[:, None]
    if not bool(of_interest.any()):
        return 0.0, ""

    def owned(values: Tensor) -> Tensor:
        chosen = values.gather(1, owner.clamp(min=0)[:, None])[:, 0]
        return torch.where(of_interest, chosen, torch.zeros_like(chosen))

    truth = owned(overlaps(evidence, in_float64(evidence.case.tensors)))
    wrong = torch.where(of_interest, (ours.double() - truth).abs(), torch.zeros_like(truth))
    # Upstream's NaN answered by NaN is upstream's answer.
    wrong = wrong.masked_fill(~differ & theirs.isnan() & ours.isnan(), 0.0)
    own = torch.where(differ | ~of_interest, truth, theirs.double())
    allowed = budget(truth, own, torch.zeros_like(truth), ours.dtype)
    error, place = worst(wrong, allowed)
    if error > 1:
        _, sensitivity, upstream = overlap_noise(evidence)
        own = torch.where(differ, owned(upstream), own)
        allowed = budget(truth, own, owned(sensitivity), ours.dtype)
        error, place = worst(wrong, allowed)
    if error <= 1:
        return error, ""
    b, a = place
    return error, (
        f"image {b}, anchor {a}, ground truth {int(owner[b, a])}: candidate {ours[b, a].item():.9g}, oracle "
        f"{theirs[b, a].item():.9g}, truth {truth[b, a].item():.9g}, error {wrong[b, a].item():.3g}, "
        f"budget {allowed[b, a].item():.3g}"
    )
