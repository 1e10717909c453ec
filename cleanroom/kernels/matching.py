"""The matching of all decoder layers on the device: costs, exact assignment, pairs, and what is wrong, as one operator.

Launches: two for the table of sizes (one more for every 16 images beyond the first), one for the costs (of layers that
are one stack), two for the assignment, one for the pairs, two memsets, one comparison, and one for each message of a
check. Nothing waits for the device, and no shape depends on values, so that a graph can capture it.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from cleanroom.assign._matching_checks import (
    COMPLAINTS,
    CURRENT_POLICY,
    check_inputs,
    check_settings,
    fake_pairs,
)
from cleanroom.assign.matching_cost import CHECKED, CostTerms
from cleanroom.kernels import runtime
from cleanroom.kernels.assignment import Problems, solve
from cleanroom.kernels.matching_cost import Ragged, layer_costs, ragged

NO_MATCHING = "costs of an image have no valid matching, look into logits and boxes"


def match_on_device(
    logits: Sequence[Tensor],
    pred_boxes: Sequence[Tensor],
    labels: Tensor,
    boxes: Tensor,
    sizes: Sequence[int],
    *,
    terms: CostTerms,
    non_finite: str = "",
    local: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Image, query and target of each pair, (L * sum min(Q, size),) int64 on the device.

    Targets count through the batch, or with `local` within their image. Other arguments and order of the pairs:
    `cleanroom.assign._matching_op.matched_layers`. Costs are float32, sums and duals float64, so a matching is optimal
    as SciPy's is; of several optima the one that is found first is returned.

    Raises:
        ValueError, TypeError: shapes, dtypes and settings, as `hungarian_match`. Values that it rejects are rejected by
            an assertion on the device, with its words: a RuntimeError at a later synchronisation.
    """
    variant, class_cost, bbox_cost, giou_cost, use_fl, alpha, gamma = terms
    weights = float(class_cost), float(bbox_cost), float(giou_cost)
    return _match(
        list(logits),
        list(pred_boxes),
        labels,
        boxes,
        list(sizes),
        variant,
        *weights,
        use_fl,
        float(alpha),
        float(gamma),
        non_finite,
        local,
    )


@runtime.operator(
    "match_on_device(Tensor[] logits, Tensor[] pred_boxes, Tensor labels, Tensor boxes, SymInt[] sizes, str variant,"
    " float class_cost, float bbox_cost, float giou_cost, bool use_fl, float alpha, float gamma, str non_finite,"
    " bool local)"
    " -> (Tensor, Tensor, Tensor)",
    fake_pairs,
)
def _match(
    logits: list[Tensor],
    pred_boxes: list[Tensor],
    labels: Tensor,
    boxes: Tensor,
    sizes: list[int],
    variant: str,
    class_cost: float,
    bbox_cost: float,
    giou_cost: float,
    use_fl: bool,
    alpha: float,
    gamma: float,
    non_finite: str,
    local: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    terms = CostTerms(variant, class_cost, bbox_cost, giou_cost, use_fl, alpha, gamma)
    policy = non_finite or CURRENT_POLICY.get(variant)
    check_settings(terms, policy)
    for own_logits, own_boxes in zip(logits, pred_boxes, strict=True):
        check_inputs(own_logits, own_boxes, labels, boxes, sizes, variant=variant)
    device, queries = labels.device, pred_boxes[0].shape[1]
    # Upstream's RT-DETR matcher looks at no prediction where nothing can be matched; DETR's checks every box.
    if variant == "rtdetr" and not (labels.shape[0] and queries):
        return tuple(runtime.empty((0,), torch.int64, device) for _ in range(3))
    pairs, wrong, status = launch_matching(
        logits, pred_boxes, labels, boxes, sizes, terms=terms, policy=policy, local=local
    )
    right = wrong == 0
    for place, name in enumerate(CHECKED if variant == "detr" else CHECKED[:1]):
        torch._assert_async(right[place], COMPLAINTS[name])
    # Under the other policies every cost is finite.
    if policy == "raise":
        torch._assert_async((status == 0).all(), NO_MATCHING)
    return tuple(pairs)


def launch_matching(
    logits: Sequence[Tensor],
    pred_boxes: Sequence[Tensor],
    labels: Tensor,
    boxes: Tensor,
    sizes: Sequence[int],
    *,
    terms: CostTerms,
    policy: str,
    local: bool = False,
) -> tuple[Sequence[Tensor], Tensor, Tensor]:
    """The launches: images, queries and targets of the pairs; what `layer_costs` found wrong; the status of `solve`."""
    device, batch, queries = labels.device, len(sizes), pred_boxes[0].shape[1]
    problems = ragged(sizes, queries, len(logits), device)
    costs, wrong = layer_costs(logits, pred_boxes, labels, boxes, problems, terms=terms, non_finite=policy)
    count = len(logits) * sum(min(queries, size) for size in sizes)
    pairs = [runtime.empty((count,), torch.int64, device) for _ in range(3)]
    # Queries are rows, as SciPy is given them.
    given = Problems(problems.starts, problems.queries, problems.sizes, queries, max(sizes))
    solution = solve(costs, given, 1, queries)
    if count:
        write_pairs(solution.columns, solution.status, problems, pairs, batch, local=local)
    return pairs, wrong, solution.status


def write_pairs(
    columns: Tensor, status: Tensor, problems: Ragged, pairs: Sequence[Tensor], images: int, *, local: bool
) -> None:
    """Write images, queries and targets of matchings given as the (L * B, Q) target of each query, or -1.

    An unsolved problem gets query i with target i: what indexes by pairs stays within bounds until the error shows.
    """
    count, queries = columns.shape
    block = triton.next_power_of_2(queries)
    tables = problems.sizes, problems.first_targets, problems.first_pairs
    warps = min(max(block // 128, 1), 16)
    settings = {"LOCAL": local, "BLOCK": block, "num_warps": warps}
    runtime.launch(_pairs, (count,), columns, status, *tables, *pairs, images, queries, **settings)


@triton.jit
def _pairs(columns, status, sizes, first_targets, first_pairs, pair_images, pair_queries, pair_targets,
           images, queries, LOCAL: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Pairs of one problem, queries ascending: a pair's place is how many queries before it are matched."""
    problem = tl.program_id(0).to(tl.int64)
    query = tl.arange(0, BLOCK)
    target = tl.load(columns + problem * queries + query, mask=query < queries, other=-1)
    plain = tl.where(query < tl.minimum(tl.load(sizes + problem), queries), query, -1).to(tl.int64)
    target = tl.where(tl.load(status + problem) > 0, plain, target)
    matched = target >= 0
    at = tl.load(first_pairs + problem) + tl.cumsum(matched.to(tl.int32), 0) - 1
    tl.store(pair_images + at, problem % images + query * 0, mask=matched)
    tl.store(pair_queries + at, query.to(tl.int64), mask=matched)
    first = 0 if LOCAL else tl.load(first_targets + problem)
    tl.store(pair_targets + at, first + target, mask=matched)
