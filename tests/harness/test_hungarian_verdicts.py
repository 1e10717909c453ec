"""The comparator of `hungarian`: planted faults are mismatches, valid answers inside the noise are ties.

The oracle is played by `literal`, the specification written out plainly and solved by SciPy, so that these
tests need no upstream package.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from cases.case import Case
from harness.execute import Result
from harness.judge import judge
from harness.operations.hungarian import OPERATION
from harness.operations.hungarian_compare import by_image
from harness.verdict import Finding
from tests.asked import asking

CLASSES = 6
VARIANTS = ("detr", "rtdetr")


def draw(
    seed: int,
    variant: str = "detr",
    *,
    queries: int = 60,
    sizes: tuple[int, ...] = (9, 0, 14),
    dtype: torch.dtype = torch.float32,
    **settings: object,
) -> Case:
    """A batch in which a third of the queries follow a ground truth of their image."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    total, columns = sum(sizes), CLASSES + (variant == "detr")
    boxes = torch.cat((0.1 + 0.8 * uniform(total, 2), 0.03 + 0.4 * uniform(total, 2)), -1)
    labels = torch.randint(0, CLASSES, (total,), generator=generator)
    predicted = torch.cat(
        (0.1 + 0.8 * uniform(len(sizes), queries, 2), 0.03 + 0.5 * uniform(len(sizes), queries, 2)), -1
    )
    logits = torch.randn(len(sizes), queries, columns, generator=generator) - 2
    first = 0
    for b, size in enumerate(sizes):
        for query in range(0, queries if size else 0, 3):
            aim = first + int(torch.randint(0, size, (), generator=generator))
            predicted[b, query] = boxes[aim] * (0.8 + 0.4 * uniform(4))
            logits[b, query, labels[aim]] += 3
        first += size
    focal = {"use_fl": True, "alpha": 0.25, "gamma": 2.0} if variant == "rtdetr" else {}
    weights = {"class_cost": 1.0, "bbox_cost": 5.0, "giou_cost": 2.0}
    return Case(
        "hungarian",
        {"logits": logits.to(dtype), "pred_boxes": predicted.to(dtype), "labels": labels, "boxes": boxes.to(dtype)},
        {"variant": variant, "sizes": list(sizes), **weights, **focal, **settings},
        f"drawn:{seed}",
        frozenset(),
    )


def cost(case: Case, b: int) -> Tensor:
    """The (Q, G) cost of image b in the dtype of the case (`spec/set_prediction.md` A1, A2, B1, B2)."""
    settings, t = case.settings, case.tensors
    first, size = sum(settings["sizes"][:b]), settings["sizes"][b]
    detr, eps = settings["variant"] == "detr", 0.0 if settings["variant"] == "detr" else 1e-7
    truth, labels = t["boxes"][first : first + size], t["labels"][first : first + size]
    logits, predicted = t["logits"][b], t["pred_boxes"][b]
    if not detr:
        logits, predicted = logits.float(), predicted.float()

    def corners(boxes: Tensor) -> tuple[Tensor, Tensor]:
        return boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2

    (low, high), (low_t, high_t) = corners(predicted[:, None]), corners(truth[None])
    shared = (torch.minimum(high, high_t) - torch.maximum(low, low_t)).clamp(min=0).prod(-1)
    hull = (torch.maximum(high, high_t) - torch.minimum(low, low_t)).prod(-1) + eps
    union = predicted[:, None, 2:].prod(-1) + truth[None, :, 2:].prod(-1) - shared + eps
    giou = shared / union - (hull - union) / hull
    distance = (predicted[:, None] - truth[None]).abs().sum(-1)
    if detr:
        of_class, overlap = -logits.softmax(-1)[:, labels], -giou
    else:
        p, alpha, gamma = logits.sigmoid()[:, labels], settings["alpha"], settings["gamma"]
        of_class = alpha * (1 - p) ** gamma * -(p + 1e-8).log() - (1 - alpha) * p**gamma * -(1 - p + 1e-8).log()
        overlap = 1 - giou
    total = settings["bbox_cost"] * distance + settings["class_cost"] * of_class + settings["giou_cost"] * overlap
    stand_in = torch.finfo(total.dtype).max if detr else 0.0
    return total.nan_to_num(nan=stand_in, posinf=stand_in, neginf=stand_in)


def outputs(case: Case, images: list[list[tuple[int, int]]]) -> dict[str, Tensor]:
    """The outputs that say these (query, local target) pairs."""
    queries, targets, first = [], [], 0
    for pairs, size in zip(images, case.settings["sizes"], strict=True):
        for query, target in sorted(pairs):
            queries.append(query)
            targets.append(target + (first if case.settings["variant"] == "rtdetr" else 0))
        first += size
    return {"queries": torch.tensor(queries).long(), "targets": torch.tensor(targets).long()}


def literal(case: Case) -> dict[str, Tensor]:
    found = []
    for b, size in enumerate(case.settings["sizes"]):
        pairs = linear_sum_assignment(cost(case, b).double().numpy()) if size else ((), ())
        found.append([(int(query), int(target)) for query, target in zip(*pairs, strict=True)])
    return outputs(case, found)


def verdict(case: Case, oracle: dict[str, Tensor], candidate: dict[str, Tensor]) -> Finding:
    truth = Result(oracle)
    return judge(OPERATION, case, truth, truth, Result(candidate), asking(), "transformers==5.23.0")[0]


def rearranged(case: Case, oracle: dict[str, Tensor], image: int, change: dict[int, int]) -> dict[str, Tensor]:
    """The oracle's answer with some queries of an image given other targets; -1 leaves a query out."""
    images = [dict(pairs) for pairs in by_image(case, oracle)]
    images[image] |= change
    return outputs(case, [[pair for pair in pairs.items() if pair[1] >= 0] for pairs in images])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("seed", range(3))
def test_the_candidate_holds(seed, variant, dtype):
    case = draw(seed, variant, dtype=dtype, queries=(60, 12, 8)[seed])
    ours = OPERATION.candidates["torch"](**case.tensors, **case.settings)
    found = verdict(case, literal(case), ours)
    assert found.verdict in {"match", "tie"}, found.detail
    assert found.decisions == len(ours["queries"])


def test_a_former_era_reaches_the_candidate():
    era = OPERATION.upstreams["transformers"].era("4.57.6")
    assert OPERATION.upstreams["transformers"].era("5.23.0") == OPERATION.upstreams["ultralytics"].era("8.1.47") == {}
    case = draw(0)
    ours = OPERATION.candidates["torch"](**case.tensors, **case.settings, **era)
    assert verdict(case, literal(case), ours).verdict == "match"
    case.tensors["logits"][0, 0] = torch.nan
    with pytest.raises(ValueError, match="logits"):
        OPERATION.candidates["torch"](**case.tensors, **case.settings, **era)


def test_no_ground_truth_is_a_match():
    for variant in VARIANTS:
        case = draw(0, variant, sizes=(0, 0))
        ours = OPERATION.candidates["torch"](**case.tensors, **case.settings)
        assert verdict(case, literal(case), ours) == Finding("match", error=0.0)


FAULTS = {
    "no GIoU term": {"giou_cost": 0.0},
    "no L1 term": {"bbox_cost": 0.0},
    "no class term": {"class_cost": 0.0},
    "GIoU weight 2.5 for 2": {"giou_cost": 2.5},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_a_mismatch_wherever_it_changes_an_answer(fault, variant):
    changed = 0
    for seed in range(12):
        # As many ground truths as queries: every choice matters.
        case = draw(seed, variant, sizes=(40, 30), queries=40)
        oracle, broken = literal(case), literal(replace(case, settings=case.settings | FAULTS[fault]))
        if by_image(case, oracle) == by_image(case, broken):
            continue
        changed += 1
        found = verdict(case, oracle, broken)
        assert found.verdict == "mismatch", found.detail
        assert "margin" in found.detail
        assert found.error > 1
    # Fewer cannot speak for the fault.
    assert changed >= 3


def test_local_targets_where_global_ones_belong_are_a_mismatch():
    case = draw(1, "rtdetr")
    oracle = literal(case)
    local = literal(replace(case, settings=case.settings | {"variant": "detr"}))
    assert int(oracle["targets"][-14:].min()) >= 9
    found = verdict(case, oracle, local)
    assert (found.verdict, found.output) == ("mismatch", "invariants")
    assert "image 2" in found.detail


def test_global_targets_where_local_ones_belong_are_a_mismatch():
    case = draw(1)
    oracle = literal(case)
    shifted = oracle | {"targets": oracle["targets"] + torch.tensor([0] * 9 + [9] * 14)}
    assert verdict(case, oracle, shifted).output == "invariants"


@pytest.mark.parametrize("variant", VARIANTS)
def test_an_index_shifted_by_one_is_a_mismatch(variant):
    case = draw(2, variant)
    oracle = literal(case)
    for name in ("queries", "targets"):
        assert verdict(case, oracle, oracle | {name: oracle[name] + 1}).verdict == "mismatch"
        assert verdict(case, oracle, oracle | {name: oracle[name].roll(1)}).verdict == "mismatch"


def test_what_is_no_matching_is_a_mismatch():
    case = draw(3)
    oracle = literal(case)
    order = torch.arange(23)
    order[:2] = torch.tensor([1, 0])
    assert "ascend" in verdict(case, oracle, {n: v[order] for n, v in oracle.items()}).detail
    repeated = oracle["targets"].clone()
    repeated[1] = repeated[0]
    assert "repeat" in verdict(case, oracle, oracle | {"targets": repeated}).detail
    outside = oracle["queries"].clone()
    outside[8] = 60
    assert "leave" in verdict(case, oracle, oracle | {"queries": outside}).detail
    fewer = {name: value[:-1] for name, value in oracle.items()}
    assert verdict(case, oracle, fewer).verdict == "mismatch"
    assert "expected 23 pairs" in OPERATION.invariants(case, fewer)
    assert verdict(case, oracle, {n: v.int() for n, v in oracle.items()}).verdict == "mismatch"


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_swap_of_two_pairs_beyond_the_noise_is_a_mismatch(variant):
    case = draw(4, variant, sizes=(6, 5), queries=20)
    oracle = literal(case)
    pairs = dict(by_image(case, oracle)[1])
    for (first, one), (second, other) in combinations(pairs.items(), 2):
        found = verdict(case, oracle, rearranged(case, oracle, 1, {first: other, second: one}))
        assert found.verdict == "mismatch"
        assert "image 1, 2 pairs differ" in found.detail
        assert found.tied == 2


def test_identical_queries_may_stand_for_each_other():
    case = draw(5)
    oracle = literal(case)
    query, target = min(by_image(case, oracle)[0])
    twin = next(q for q in range(60) if q not in oracle["queries"][:9].tolist())
    for name in ("logits", "pred_boxes"):
        case.tensors[name][0, twin] = case.tensors[name][0, query]
    oracle = literal(case)
    holder = next(q for q, t in by_image(case, oracle)[0] if t == target)
    other = rearranged(case, oracle, 0, {holder: -1, (twin if holder == query else query): target})
    found = verdict(case, oracle, other)
    assert (found.verdict, found.tied) == ("tie", 1)
    assert "margin 0, noise" in found.detail


def test_identical_ground_truths_may_be_swapped_and_others_not():
    case = draw(6)
    for name in ("labels", "boxes"):
        case.tensors[name][1] = case.tensors[name][0]
    oracle = literal(case)
    holder = {target: query for query, target in by_image(case, oracle)[0]}
    twins = rearranged(case, oracle, 0, {holder[0]: 1, holder[1]: 0})
    assert verdict(case, oracle, twins).verdict == "tie"
    others = rearranged(case, oracle, 0, {holder[0]: 2, holder[2]: 0})
    assert verdict(case, oracle, others).verdict == "mismatch"


@pytest.mark.parametrize(("gap", "expected"), [(1e-8, "tie"), (1e-4, "mismatch")])
def test_near_ties_count_up_to_the_rounding_of_the_dtype(gap, expected):
    """Two queries a hair apart, in float64 so that the hair exists; judged as the float32 matcher computes."""
    case = draw(7, "rtdetr", sizes=(4,), queries=12, dtype=torch.float64)
    oracle = literal(case)
    query, target = min(by_image(case, oracle)[0])
    twin = next(q for q in range(12) if q not in oracle["queries"].tolist())
    for name in ("logits", "pred_boxes"):
        case.tensors[name][0, twin] = case.tensors[name][0, query]
    case.tensors["logits"][0, twin, case.tensors["labels"][target]] -= gap
    best = rearranged(case, oracle, 0, {})
    worse = rearranged(case, oracle, 0, {query: -1, twin: target})
    assert verdict(case, best, worse).verdict == expected


def test_an_oracle_that_is_not_optimal_is_reported():
    """Otherwise a wrong cost formula here would excuse any candidate that shares it."""
    case = draw(8)
    broken = literal(replace(case, settings=case.settings | {"giou_cost": 0.0}))
    found = verdict(case, broken, literal(case))
    assert found.verdict == "mismatch"
    assert found.detail.startswith("oracle: ")


def test_an_undefined_cost_is_matched_last_by_detr_and_the_rest_is_free_where_it_is_forced():
    case = draw(9, sizes=(3,), queries=4)
    case.tensors["logits"][0, 1:3] = torch.nan
    oracle = literal(case)
    forced = dict(by_image(case, oracle)[0])
    assert {0, 3} < set(forced)
    undefined = next(iter(set(forced) - {0, 3}))
    swapped = rearranged(case, oracle, 0, {0: forced[3], 3: forced[0]})
    assert verdict(case, oracle, swapped).verdict == "tie"
    rotated = rearranged(case, oracle, 0, {undefined: -1, 3 - undefined: forced[undefined]})
    assert verdict(case, oracle, rotated).verdict == "tie"
    more = rearranged(case, oracle, 0, {0: -1, 3 - undefined: forced[0]})
    assert verdict(case, oracle, more).verdict == "mismatch"


def test_an_undefined_cost_counts_as_0_for_rtdetr():
    case = draw(9, "rtdetr", sizes=(3,), queries=8)
    case.tensors["pred_boxes"][0, 5] = torch.nan
    oracle = literal(case)
    assert 5 in oracle["queries"]
    query, target = next(pair for pair in by_image(case, oracle)[0] if pair[0] == 5)
    free = next(q for q in range(8) if q not in oracle["queries"].tolist())
    assert verdict(case, oracle, rearranged(case, oracle, 0, {query: -1, free: target})).verdict == "mismatch"


def test_bytes_that_must_move_are_fewer_than_all():
    for variant in VARIANTS:
        case = draw(0, variant)
        found = literal(case)
        everything = sum(t.nbytes for t in (*case.tensors.values(), *found.values()))
        assert sum(t.nbytes for t in found.values()) < OPERATION.minimum_bytes(case, found) < everything
