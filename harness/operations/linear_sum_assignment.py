"""`linear_sum_assignment`: rows to columns at least total cost, a batch of problems at once."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from cases.case import Case
from cleanroom.assign.linear_sum_assignment import linear_sum_assignment
from harness.candidates import by_path
from harness.operation import Input, Operation, Output, Setting, Tensors, Upstream
from harness.relations import reasons
from harness.relations.declaration import Images, Margins, Padding, Relations, Rows, Scale
from harness.relations.matching import certified, no_quantities
from harness.relations.reasons import exempt
from harness.verdict import Evidence, Finding

ULPS = 4.0
"""Units of the costs' dtype, of the magnitude of the costs chosen, by which rounding may miss the optimum."""


def _solve(*, cost: Tensor, sizes: list[list[int]], path: str) -> dict[str, Tensor]:
    return {"columns": linear_sum_assignment(cost, sizes, duals=False, path=path).columns}


def total(block: Tensor, columns: Tensor) -> tuple[float, float]:
    """Exact total of the chosen costs, and the sum of their magnitudes."""
    rows = (columns >= 0).nonzero().squeeze(1)
    chosen = block.double()[rows, columns[rows]].tolist()
    return math.fsum(chosen), math.fsum(map(abs, chosen))


def compare(evidence: Evidence) -> Finding:
    """Another matching is legal where its exact total is the oracle's, but for the rounding of the costs' dtype."""
    cost, sizes = evidence.case.tensors["cost"], evidence.case.settings["sizes"]
    ours, theirs = (outputs["columns"].to(cost.device) for outputs in (evidence.candidate, evidence.oracle))
    decisions, tied, worst, told = sum(min(size) for size in sizes), 0, 0.0, []
    for problem, (rows, columns) in enumerate(sizes):
        mine, other, block = ours[problem, :rows], theirs[problem, :rows], cost[problem, :rows, :columns]
        if torch.equal(mine, other):
            continue
        (own, magnitude), (best, _) = total(block, mine), total(block, other)
        allowed = ULPS * torch.finfo(cost.dtype).eps * magnitude
        share = (own - best) / allowed if allowed else math.inf if own > best else 0.0
        tied, worst = tied + int((mine != other).sum()), max(worst, share)
        told.append(f"problem {problem}: total {own:.9g}, the oracle's {best:.9g}, rounding {allowed:.3g}")
    if worst > 1:
        return Finding("mismatch", " | ".join(told[:3]), "columns", worst, decisions, tied)
    if tied:
        return Finding("tie", " | ".join(told[:3]), "columns", max(worst, 0.0), decisions, tied)
    return Finding("match", error=0.0, decisions=decisions)


def invariants(case: Case, outputs: Tensors) -> str | None:
    """As many pairs as fit, each column once, -1 elsewhere and in the padding."""
    for problem, (rows, columns) in enumerate(case.settings["sizes"]):
        found = outputs["columns"][problem].tolist()
        chosen = sorted(column for column in found[:rows] if column >= 0)
        if any(column != -1 for column in found[rows:]) or min(found, default=-1) < -1:
            return f"columns of problem {problem} are not -1 where no row is matched"
        if len(chosen) != min(rows, columns) or (chosen and chosen[-1] >= columns):
            return f"problem {problem} has {len(chosen)} pairs, expected {min(rows, columns)} below column {columns}"
        if any(column == following for column, following in pairwise(chosen)):
            return f"problem {problem} takes a column twice"
    return None


def minimum_bytes(case: Case, outputs: Tensors) -> int:
    """Costs of the problems once, and the answer."""
    element = case.tensors["cost"].element_size()
    return sum(rows * columns for rows, columns in case.settings["sizes"]) * element + outputs["columns"].nbytes


OPERATION = Operation(
    name="linear_sum_assignment",
    summary="rows matched to columns at least total cost, a batch of problems of any size at once",
    source="Jonker and Volgenant (1987); Crouse, On implementing 2D rectangular assignment algorithms (2016)",
    inputs=(Input("cost", "(P, T, Q)", "floating", "finite costs; rows and columns beyond a problem's are ignored"),),
    settings=(Setting("sizes", None, "(rows, columns) of each problem"),),
    outputs=(Output("columns", "(P, T)", "int64", "column of each row, -1 where it has none", decision=True),),
    upstreams={"torch_linear_assignment": Upstream()},
    candidates=by_path(_solve, on_device="scipy"),
    predictions=(),
    compare=compare,
    invariants=invariants,
    minimum_bytes=minimum_bytes,
    workloads=("detr-b16", "crowd-b16", "coco-b1"),
    relations=Relations(
        images=Images({"cost": 0, "columns": 0}, lists=("sizes",)),
        truths=Rows(count=lambda case: [rows for rows, _ in case.settings["sizes"]], dense={"cost": 1, "columns": 1}),
        anchors=Rows(
            count=lambda case: [columns for _, columns in case.settings["sizes"]],
            dense={"cost": 2},
            counted={"columns": 0},
        ),
        padding=Padding(rows={"cost": math.nan}, dims={"cost": (1, 2)}, outputs={"columns": 1}),
        scale=Scale({"cost": slice(None)}),
        optimality=certified,
        margins=Margins(no_quantities),
        free=("cost",),
        exempt=exempt(
            levels=reasons.NO_LEVELS,
            classes=reasons.NO_CLASSES,
            gradcheck=reasons.ASSIGNER,
            monotony=reasons.NOTHING_GROWS,
        ),
    ),
)
