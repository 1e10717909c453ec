"""Comparator of `hungarian`: a different matching is valid if some costs inside the noise make it optimal.

The cost of every pair is an interval: its float64 value plus and minus the noise of the inputs and of
upstream's own arithmetic. The costs that favour a matching most are low on its pairs and high on all others;
if an exact solver finds nothing cheaper even there, rounding cannot tell it from the best.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cases.case import Case
from harness.equality import FLOOR_ULPS, budget, in_float64, ulp
from harness.operation import Settings, Tensors
from harness.operations.box_noise import corner_noise
from harness.verdict import Evidence, Finding

DEFAULT_POLICY = {"detr": "largest", "rtdetr": "zero"}
RTDETR_OVERLAP_EPS = 1e-7
RTDETR_LOG_EPS = 1e-8
SOLVER_SLACK = 1e-12
"""Rounding of a sum of float64 costs, as a share of their magnitude."""
SHOWN = 3
"""Pairs that a description lists; their number is always told."""


@dataclass(frozen=True)
class Block:
    """Costs of one image, (Q, G) float64, and the pairs whose cost is undefined, which are matched last."""

    cost: Tensor
    noise: Tensor
    surely_undefined: Tensor
    maybe_undefined: Tensor


@dataclass(frozen=True)
class Excess:
    """How far the total of a matching is above that of the best one, and what rounding explains of it."""

    total: float
    margin: float
    noise: float
    legal: bool

    @property
    def share(self) -> float:
        """Margin over noise."""
        return self.margin / self.noise if self.noise else (0.0 if self.legal else float("inf"))


def compare(evidence: Evidence) -> Finding:
    """Pairs by the cost of the matching they belong to, image by image."""
    ours, theirs = (by_image(evidence.case, outputs) for outputs in (evidence.candidate, evidence.oracle))
    decisions = sum(len(pairs) for pairs in theirs)
    open_images, tied = [], 0
    for b, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
        if mine == other:
            continue
        tied += len(mine - other)
        block = costs(evidence, b)
        # The oracle is held to the margin too: if it falls outside, the noise is wrong.
        for name, pairs in (("candidate", mine), ("oracle", other)):
            excess = above_best(block, pairs)
            open_images.append((excess, f"{name}: {_describe(b, mine, other, excess)}"))
    illegal = [found for found in open_images if not found[0].legal]
    if illegal:
        excess, detail = max(illegal, key=lambda found: found[0].share)
        return Finding("mismatch", detail, "queries, targets", excess.share, decisions, tied)
    if tied:
        share = max(excess.share for excess, _ in open_images)
        proof = " | ".join(detail for _, detail in open_images[: 2 * SHOWN])
        return Finding("tie", proof, "queries, targets", share, decisions, tied)
    return Finding("match", error=0.0, decisions=decisions)


@dataclass(frozen=True)
class Span:
    """Where the pairs of an image stand in the outputs, and the index of its first target there."""

    start: int
    end: int
    first: int
    targets: int


def spans(case: Case) -> list[Span]:
    """The span of every image."""
    queries, found, start, offset = case.tensors["logits"].shape[1], [], 0, 0
    for size in case.settings["sizes"]:
        end = start + min(queries, size)
        found.append(Span(start, end, offset if case.settings["variant"] == "rtdetr" else 0, size))
        start, offset = end, offset + size
    return found


def by_image(case: Case, outputs: Tensors) -> list[set[tuple[int, int]]]:
    """The (query, target) pairs of every image, targets counted from the image's first."""
    pairs = list(zip(outputs["queries"].tolist(), outputs["targets"].tolist(), strict=True))
    return [{(query, target - span.first) for query, target in pairs[span.start : span.end]} for span in spans(case)]


def costs(evidence: Evidence, image: int) -> Block:
    """The cost intervals of one image."""
    settings, tensors = evidence.case.settings, evidence.case.tensors
    first, size = sum(settings["sizes"][:image]), settings["sizes"][image]
    given = {
        "logits": tensors["logits"][image],
        "pred_boxes": tensors["pred_boxes"][image],
        "labels": tensors["labels"][first : first + size],
        "boxes": tensors["boxes"][first : first + size],
    }
    terms = {"detr": _detr_terms, "rtdetr": _rtdetr_terms}[settings["variant"]]
    value, sensitivity = corner_noise(
        lambda some: sum(terms(some, settings)), given, ("pred_boxes", "boxes"), ("logits",)
    )
    own = sum(terms(_as_upstream(given, settings["variant"]), settings))
    policy = evidence.era.get("non_finite", DEFAULT_POLICY[settings["variant"]])
    undefined, own_undefined = ~value.isfinite(), ~own.isfinite()
    value, upstream = value.masked_fill(undefined, 0.0), own.double().masked_fill(own_undefined, 0.0)
    if policy == "zero":
        undefined, own_undefined = torch.zeros_like(undefined), torch.zeros_like(own_undefined)
    # Terms cancel: a sum is rounded at the magnitude of its parts.
    size_of_terms = sum(term.abs() for term in terms(in_float64(given), settings)).nan_to_num(0.0, posinf=0.0)
    width = budget(value, upstream, sensitivity.nan_to_num(0.0), own.dtype) + FLOOR_ULPS * ulp(size_of_terms, own.dtype)
    return Block(value, width, undefined & own_undefined, undefined | own_undefined)


def above_best(block: Block, pairs: set[tuple[int, int]]) -> Excess:
    """The excess of a matching under the costs inside the noise that favour it most."""
    rows, columns = torch.tensor(sorted(pairs)).T
    mine = torch.zeros_like(block.surely_undefined)
    mine[rows, columns] = True
    undefined = torch.where(mine, block.surely_undefined, block.maybe_undefined)
    total = float(block.cost[mine].sum())
    fewest = undefined[_solve(undefined.double())].sum()
    if fewest or undefined[mine].any():
        # A forced undefined pair's huge stand-in swallows the other costs: the rest is free (A3).
        more = float(undefined[mine].sum() - fewest)
        return Excess(total, more, 0.0, legal=more == 0)
    favourable = torch.where(mine, block.cost - block.noise, block.cost + block.noise)
    # No sum of defined costs reaches the stand-in.
    forbidden = 2 * len(pairs) * (1 + float(favourable.abs().max()))
    slack = SOLVER_SLACK * float(block.cost.abs().sum(0).max())

    def against(cost: Tensor) -> tuple[float, float]:
        best = torch.zeros_like(mine)
        best[_solve(cost.masked_fill(undefined, forbidden))] = True
        return total - float(block.cost[best].sum()), float(block.noise[mine ^ best].sum())

    margin, width = against(favourable)
    if margin > width + slack:
        return Excess(total, margin, width, legal=False)
    # Legal: the proof is against the best in float64, where the margin is largest.
    return Excess(total, *against(block.cost), legal=True)


def _solve(cost: Tensor) -> tuple[Tensor, Tensor]:
    from scipy.optimize import linear_sum_assignment

    return tuple(torch.from_numpy(index) for index in linear_sum_assignment(cost.cpu().numpy()))


def _describe(image: int, ours: set[tuple[int, int]], theirs: set[tuple[int, int]], excess: Excess) -> str:
    def listed(pairs: set[tuple[int, int]]) -> str:
        return ", ".join(f"{query}-{target}" for query, target in sorted(pairs)[:SHOWN]) or "none"

    return (
        f"image {image}, {len(ours - theirs)} pairs differ (query-target: oracle {listed(theirs - ours)}, "
        f"candidate {listed(ours - theirs)}); total cost {excess.total:.9g} above the best: "
        f"margin {excess.margin:.3g}, noise {excess.noise:.3g}"
    )


def _as_upstream(given: Tensors, variant: str) -> Tensors:
    """The tensors in the dtype upstream computes in; RT-DETR's matcher kept half until 8.4.175."""
    if variant == "detr":
        return given
    return {n: given[n].float() if given[n].dtype == torch.float64 and n != "boxes" else given[n] for n in given}


def _detr_terms(given: Tensors, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """`spec/set_prediction.md` A1, A2: L1, minus the class's probability, minus GIoU; (Q, G) each."""
    probability = given["logits"].softmax(-1)[:, given["labels"]]
    return (
        settings["bbox_cost"] * _distance(given),
        -settings["class_cost"] * probability,
        -settings["giou_cost"] * _giou(given, corner_areas=True, eps=0.0),
    )


def _rtdetr_terms(given: Tensors, settings: Settings) -> tuple[Tensor, Tensor, Tensor]:
    """`spec/set_prediction.md` B1, B2: focal class cost, L1, 1 - GIoU; (Q, G) each."""
    alpha, gamma = settings["alpha"], settings["gamma"]
    if settings["use_fl"]:
        p = given["logits"].sigmoid()[:, given["labels"]]
        present = alpha * (1 - p) ** gamma * -(p + RTDETR_LOG_EPS).log()
        absent = (1 - alpha) * p**gamma * -(1 - p + RTDETR_LOG_EPS).log()
        term = present - absent
    else:
        term = -given["logits"].softmax(-1)[:, given["labels"]]
    overlap = _giou(given, corner_areas=False, eps=RTDETR_OVERLAP_EPS)
    return (
        settings["class_cost"] * term,
        settings["bbox_cost"] * _distance(given),
        settings["giou_cost"] * (1 - overlap),
    )


def _distance(given: Tensors) -> Tensor:
    return (given["pred_boxes"][:, None] - given["boxes"][None]).abs().sum(-1)


def _giou(given: Tensors, *, corner_areas: bool, eps: float) -> Tensor:
    a, b = given["pred_boxes"][:, None], given["boxes"][None]
    low_a, high_a = a[..., :2] - 0.5 * a[..., 2:], a[..., :2] + 0.5 * a[..., 2:]
    low_b, high_b = b[..., :2] - 0.5 * b[..., 2:], b[..., :2] + 0.5 * b[..., 2:]
    sides_a, sides_b = (high_a - low_a, high_b - low_b) if corner_areas else (a[..., 2:], b[..., 2:])
    shared = (torch.minimum(high_a, high_b) - torch.maximum(low_a, low_b)).clamp(min=0).prod(-1)
    hull = (torch.maximum(high_a, high_b) - torch.minimum(low_a, low_b)).prod(-1) + eps
    union = sides_a.prod(-1) + sides_b.prod(-1) - shared + eps
    return shared / union - (hull - union) / hull
