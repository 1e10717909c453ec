"""The comparator of `simota`: planted faults are mismatches, valid answers inside the margin are ties.

The oracle is played by `literal`, the specification written out plainly in the dtype of the case, so that
these tests need no upstream package.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cases.case import Case
from harness.execute import Result
from harness.judge import judge
from harness.operations.simota import OPERATION
from harness.operations.simota_compare import illegal
from harness.operations.simota_margins import HEAD, Scene, class_cost, scenes
from harness.verdict import Finding
from tests.asked import asking

CLASSES = 6
FIELDS = tuple(output.name for output in OPERATION.outputs)


@pytest.fixture(autouse=True)
def _one_thread():
    """Tensors here are small: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def draw(
    seed: int,
    *,
    size: int = 128,
    counts: tuple[int, ...] = (9, 4),
    learned: float = 0.6,
    dtype: torch.dtype = torch.float32,
) -> Case:
    """Images of `size` pixels on 3 levels (84 or 336 anchors) whose predictions follow a ground truth."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    batch, rows = len(counts), max(counts) + 1
    cells = [torch.cartesian_prod(torch.arange(size // s), torch.arange(size // s)) for s in (8, 16, 32)]
    stride = torch.cat([torch.full((len(level),), float(s)) for level, s in zip(cells, (8, 16, 32), strict=True)])
    y, x = torch.cat(cells).float().unbind(-1)
    points = torch.stack(((x + 0.5) * stride, (y + 0.5) * stride), -1)
    gt = torch.cat((uniform(batch, rows, 2) * size, size / 20 * torch.exp(2.5 * uniform(batch, rows, 2))), -1)
    classes = torch.randint(0, CLASSES, (batch, rows), generator=generator)
    for b, count in enumerate(counts):
        gt[b, count:], classes[b, count:] = 0, 0
    aim = torch.stack(
        [(points[:, None] - gt[b, : max(count, 1), :2]).abs().amax(-1).argmin(1) for b, count in enumerate(counts)]
    )
    image = torch.arange(batch)[:, None]
    shape = (batch, len(points))
    own = torch.cat(
        (
            points + normal(*shape, 2) * stride[:, None],
            2 * stride[:, None] * torch.exp(normal(*shape, 2) / 2),
        ),
        -1,
    )
    boxes = learned * gt[image, aim] + (1 - learned) * own
    hit = torch.nn.functional.one_hot(classes[image, aim], CLASSES)
    tensors = {
        "gt_boxes": gt,
        "gt_classes": classes.float(),
        "pred_boxes": boxes,
        "cls_logits": normal(*shape, CLASSES) - 4 + 5 * learned * hit,
        "obj_logits": normal(*shape, 1) - 2,
        "strides": stride[None],
        "x_shifts": x[None],
        "y_shifts": y[None],
    }
    tensors = {name: value.to(dtype) for name, value in tensors.items()} | {"num_gt": torch.tensor(counts)}
    return Case("simota", tensors, {"num_classes": CLASSES}, f"drawn:{seed}", frozenset())


def overlap(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Pairwise IoU of centre-form boxes, without epsilon (`spec/yolox_losses.md` section 1)."""
    a, b = tensors["gt_boxes"][:, :, None], tensors["pred_boxes"][:, None]
    low = torch.maximum(a[..., :2] - a[..., 2:] / 2, b[..., :2] - b[..., 2:] / 2)
    high = torch.minimum(a[..., :2] + a[..., 2:] / 2, b[..., :2] + b[..., 2:] / 2)
    shared = (high - low).prod(-1) * (high > low).all(-1)
    return {"iou": shared / (a[..., 2:].prod(-1) + b[..., 2:].prod(-1) - shared)}


def literal(
    case: Case,
    *,
    radius: float = 2.5,
    penalty: float = 1e5,
    count: Callable[[Tensor], Tensor] = torch.trunc,
    conflict: str = "cost",
    select: Callable[[Tensor, int], Tensor] = lambda cost, k: cost.argsort(stable=True)[:k],
) -> dict[str, Tensor]:
    """`spec/simota.md` section 4 written out; every keyword is a place to plant a fault."""
    t = case.tensors
    stride = t["strides"][0]
    points = torch.stack([t[f"{axis}_shifts"][0] * stride + 0.5 * stride for axis in "xy"], -1)
    iou_all = overlap(t)["iou"]
    batch, anchors = t["pred_boxes"].shape[:2]
    owner = torch.full((batch, anchors), -1)
    for b, rows in enumerate(t["num_gt"].tolist()):
        if rows == 0:
            continue
        gt, iou = t["gt_boxes"][b, :rows], iou_all[b, :rows]
        away = (points[None] - gt[:, None, :2]).abs()
        in_box = (0.5 * gt[:, None, 2:] - away > 0).all(-1)
        in_centre = ((radius * stride)[None, :, None] - away > 0).all(-1)
        candidate = (in_box | in_centre).any(0)
        p = (t["cls_logits"][b].float().sigmoid() * t["obj_logits"][b].float().sigmoid()).sqrt()
        target = torch.nn.functional.one_hot(t["gt_classes"][b, :rows].long(), case.settings["num_classes"])
        entropy = torch.nn.functional.binary_cross_entropy(
            p[None].expand(rows, -1, -1), target[:, None].float().expand(-1, anchors, -1), reduction="none"
        )
        cost = entropy.sum(-1) + 3 * -(iou + 1e-8).log() + penalty * ~(in_box & in_centre)
        among = candidate.nonzero()[:, 0]
        chosen = torch.zeros(rows, anchors, dtype=torch.bool)
        top = iou[:, among].topk(min(10, len(among)), -1).values.sum(-1)
        for g in range(rows):
            k = max(1, int(count(top[g])))
            chosen[g, among[select(cost[g, among], k)]] = True
        best = {"cost": cost.argmin(0), "overlap": iou.argmax(0)}[conflict]
        taken = chosen.sum(0)
        owner[b] = torch.where(taken > 1, best, torch.where(taken == 1, chosen.long().argmax(0), -1))
    return consistent(case, owner)


def consistent(case: Case, owner: Tensor) -> dict[str, Tensor]:
    """The outputs that follow from the owners (B, N), -1 for background."""
    t, foreground = case.tensors, owner >= 0
    image = torch.arange(len(owner))[:, None]
    row, anchor = owner.clamp(min=0), torch.arange(owner.shape[1])[None]
    iou, classes = overlap(t)["iou"][image, row, anchor], t["gt_classes"][image, row]
    return {
        "fg_mask": foreground,
        "matched_gt": owner,
        "matched_classes": torch.where(foreground, classes, torch.zeros_like(classes)),
        "matched_iou": torch.where(foreground, iou, torch.zeros_like(iou)),
        "num_fg": foreground.sum(1),
    }


def verdict(case: Case, oracle: dict[str, Tensor], candidate: dict[str, Tensor], **era) -> Finding:
    truth = Result(error=None, outputs=oracle)
    return judge(OPERATION, case, truth, truth, Result(candidate), asking(overlap, era), "yolox==0.3.0")[0]


def judged_scenes(case: Case) -> list[Scene]:
    """The intervals that the comparator sees."""
    seen = []
    outputs = literal(case)
    spy = replace(OPERATION, compare=lambda evidence: seen.extend(scenes(evidence, [0]).values()) or Finding("match"))
    judge(spy, case, Result(outputs), Result(outputs), Result(outputs), asking(overlap), "yolox==0.3.0")
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("seed", range(6))
def test_the_candidate_holds(seed, dtype):
    case = draw(seed, size=(64, 128)[seed % 2], learned=(0.1, 0.6, 0.95)[seed % 3], dtype=dtype)
    outputs = OPERATION.candidates["torch"](**case.tensors, **case.settings)
    found = verdict(case, literal(case), outputs)
    assert found.verdict in {"match", "tie"}, found.detail
    assert found.decisions == outputs["fg_mask"].numel()
    assert found.error <= 1


def test_the_same_answer_is_a_match_and_records_its_error():
    case = draw(0)
    found = verdict(case, literal(case), literal(case))
    assert (found.verdict, found.tied) == ("match", 0)
    assert 0 < found.error <= 1


FAULTS = {
    "centre radius of 2.4 strides": {"radius": 2.4},
    "k rounded, not truncated": {"count": torch.round},
    "k rounded up": {"count": torch.ceil},
    "no penalty": {"penalty": 0.0},
    "conflict to the largest overlap": {"conflict": "overlap"},
    "second best anchors": {"select": lambda cost, k: cost.argsort(stable=True)[1 : k + 1]},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_a_mismatch_wherever_it_changes_an_answer(fault, dtype):
    changed = 0
    for seed in range(10):
        case = draw(seed, counts=(30, 12), learned=(0.3, 0.7)[seed % 2], dtype=dtype)
        oracle, broken = literal(case), literal(case, **FAULTS[fault])
        if torch.equal(oracle["matched_gt"], broken["matched_gt"]):
            continue
        changed += 1
        found = verdict(case, oracle, broken)
        assert found.verdict == "mismatch", (seed, found.detail)
    # Fewer cannot speak for the fault.
    assert changed >= 3


def test_a_smaller_radius_is_seen_where_only_membership_changes():
    """The best anchor lies in the outer tenth of a centre square."""
    case = draw(3, counts=(1,))
    case.tensors["gt_boxes"][0, 0] = torch.tensor([60.0, 60.0, 9.0, 9.0])
    # The stride-8 cell centred on (44, 60) is 16 px away from the centre, 2.5 strides are 20, 2.4 are 19.2.
    case.tensors["gt_boxes"][0, 0, 0] = 44.0 + 19.6
    anchor = 7 * 16 + 5
    case.tensors["pred_boxes"][0] = torch.tensor([200.0, 200.0, 4.0, 4.0])
    case.tensors["pred_boxes"][0, anchor] = case.tensors["gt_boxes"][0, 0]
    case.tensors["cls_logits"][0], case.tensors["obj_logits"][0] = -2.0, -2.0
    case.tensors["gt_boxes"][0, 0, 2:] = 0.5
    oracle, broken = literal(case), literal(case, radius=2.4)
    assert oracle["matched_gt"][0, anchor] == 0
    found = verdict(case, oracle, broken)
    assert found.verdict == "mismatch"
    assert "ground truth 0" in found.detail
    assert "margin" in found.detail
    assert "noise" in found.detail


def test_an_output_shifted_by_one_is_a_mismatch():
    case = draw(1)
    oracle = literal(case)
    for name in ("fg_mask", "matched_gt", "matched_iou", "matched_classes"):
        shifted = oracle | {name: oracle[name].roll(1, dims=1)}
        assert verdict(case, oracle, shifted).verdict == "mismatch", name
    assert verdict(case, oracle, consistent(case, oracle["matched_gt"].roll(1, dims=1))).verdict == "mismatch"
    counted = oracle | {"num_fg": oracle["num_fg"] + 1}
    assert verdict(case, oracle, counted).output == "invariants"


def test_another_ground_truth_by_one_row_is_a_mismatch():
    case = draw(2)
    oracle = literal(case)
    owner = oracle["matched_gt"].clone()
    moved = torch.where(owner >= 0, (owner + 1) % case.tensors["num_gt"][:, None], owner)
    found = verdict(case, oracle, consistent(case, moved))
    assert found.verdict == "mismatch"
    assert "image 0, anchor" in found.detail


def test_each_single_wrong_decision_is_refused():
    """Dropping, adding or giving away any one anchor by more than the noise is not legal."""
    case = draw(5, size=64, counts=(4,), dtype=torch.float64)
    scene, owner = judged_scenes(case)[0], literal(case)["matched_gt"][0]
    assert illegal(scene, owner) is None
    for anchor in range(len(owner)):
        for other in range(-1, 4):
            if other != int(owner[anchor]):
                changed = owner.clone()
                changed[anchor] = other
                assert illegal(scene, changed) is not None, (anchor, other)


def test_wrong_overlaps_are_a_mismatch_with_place_and_budget():
    case = draw(4)
    oracle = literal(case)
    b, a = (int(i) for i in oracle["fg_mask"].nonzero()[0])
    wrong = oracle["matched_iou"].clone()
    wrong[b, a] *= 1 + 1e-4
    found = verdict(case, oracle, oracle | {"matched_iou": wrong})
    assert (found.verdict, found.output) == ("mismatch", "matched_iou")
    assert f"image {b}, anchor {a}" in found.detail
    assert "budget" in found.detail
    assert found.error > 1


def test_a_nan_overlap_of_the_oracle_is_not_passed_over():
    case = draw(4)
    oracle = literal(case)
    b, a = (int(i) for i in oracle["fg_mask"].nonzero()[0])
    poisoned = oracle["matched_iou"].clone()
    poisoned[b, a] = torch.nan
    theirs = oracle | {"matched_iou": poisoned}
    found, divergence = judge(
        OPERATION, case, Result(theirs), Result(oracle), Result(oracle), asking(overlap), "yolox==0.3.0"
    )
    assert (found.verdict, divergence) == ("known-divergence", "simota-undefined-overlap")
    assert verdict(case, theirs, theirs).verdict == "match"


def duplicated(seed: int) -> Case:
    case = draw(seed, counts=(6,))
    for name in ("gt_boxes", "gt_classes"):
        case.tensors[name][0, 5] = case.tensors[name][0, 0]
    return case


def test_identical_ground_truths_may_be_swapped():
    seen = 0
    for seed in range(8):
        case = duplicated(seed)
        oracle = literal(case)
        owner = oracle["matched_gt"].clone()
        owner[oracle["matched_gt"] == 0] = 5
        seen += int((owner == 5).sum() > 1)
        found = verdict(case, oracle, consistent(case, owner))
        assert found.verdict == "tie", found.detail
        assert "ground truth 0" in found.detail
        assert found.tied == int((owner == 5).sum())
        # Half of them swapped is as valid.
        owner[0, (owner[0] == 5).nonzero()[0]] = 0
        assert verdict(case, oracle, consistent(case, owner)).verdict in {"tie", "match"}
    assert seen


def test_ground_truths_that_are_not_identical_may_not_be_swapped():
    case = duplicated(3)
    case.tensors["gt_classes"][0, 5] = (case.tensors["gt_classes"][0, 0] + 1) % CLASSES
    oracle = literal(case)
    owner = oracle["matched_gt"].clone()
    owner[oracle["matched_gt"] == 0], owner[oracle["matched_gt"] == 5] = 5, 0
    assert verdict(case, oracle, consistent(case, owner)).verdict == "mismatch"


def penalised(gap: float) -> tuple[Case, Tensor, int, int]:
    """One ground truth outside: its anchors all bear the penalty; the two cheapest differ by about `gap`."""
    case = draw(7, counts=(2,))
    t = case.tensors
    t["gt_boxes"][0, 1] = torch.tensor([-3.0, 60.0, 4.0, 4.0])
    t["pred_boxes"][0] = torch.tensor([60.0, 60.0, 20.0, 20.0])
    t["gt_boxes"][0, 0] = torch.tensor([60.0, 60.0, 20.0, 20.0])
    t["cls_logits"][0], t["obj_logits"][0] = -2.0, -2.0
    label = int(t["gt_classes"][0, 1])
    first, second = 8 * 16, 8 * 16 + 1
    for anchor, logit in ((first, gap), (second, 0.0)):
        t["obj_logits"][0, anchor], t["cls_logits"][0, anchor, label] = logit, logit
    return case, literal(case)["matched_gt"], first, second


@pytest.mark.parametrize(("gap", "expected"), [(1e-4, "tie"), (0.5, "mismatch")])
def test_penalised_candidates_tie_within_a_unit_of_the_penalty(gap, expected):
    case, owner, first, second = penalised(gap)
    assert owner[0, first] == 1
    assert owner[0, second] == -1
    other = owner.clone()
    other[0, first], other[0, second] = -1, 1
    found = verdict(case, consistent(case, owner), consistent(case, other))
    assert found.verdict == expected, found.detail
    assert "cost 1000" in found.detail


def test_float64_has_no_penalised_ties():
    case, owner, first, second = penalised(1e-4)
    case = replace(case, tensors={n: v.double() if v.is_floating_point() else v for n, v in case.tensors.items()})
    other = owner.clone()
    other[0, first], other[0, second] = -1, 1
    assert verdict(case, consistent(case, owner), consistent(case, other)).verdict == "mismatch"


def test_k_at_a_whole_sum_may_be_either():
    """Three predictions equal to the ground truth: the sum is 3 and rounds to either side."""
    case = draw(9, counts=(1,))
    t = case.tensors
    t["gt_boxes"][0, 0] = torch.tensor([61.3, 60.7, 30.1, 30.3])
    t["pred_boxes"][0] = torch.tensor([200.0, 200.0, 4.0, 4.0])
    near = [7 * 16 + 7, 7 * 16 + 6, 6 * 16 + 7]
    t["pred_boxes"][0, near] = t["gt_boxes"][0, 0]
    owner = torch.full((1, t["pred_boxes"].shape[1]), -1)
    owner[0, near] = 0
    scene = judged_scenes(case)[0]
    assert (int(scene.k_low[0]), int(scene.k_high[0])) == (2, 3)
    dearest = near[int(scene.cost.middle[0, near].argmax())]
    fewer = owner.clone()
    fewer[0, dearest] = -1
    found = verdict(case, consistent(case, owner), consistent(case, fewer))
    assert found.verdict == "tie"
    assert "overlap sum 3" in found.detail
    fewer[0, near[0] if near[0] != dearest else near[1]] = -1
    assert verdict(case, consistent(case, owner), consistent(case, fewer)).verdict == "mismatch"


def test_an_oracle_outside_its_own_margin_is_reported():
    """Otherwise a wrong model of upstream would excuse any candidate that shares it."""
    case = draw(0)
    found = verdict(case, literal(case, penalty=0.0), literal(case))
    assert found.verdict == "mismatch"
    assert found.detail.startswith("oracle: ")


def test_the_era_of_the_repository_head():
    case = draw(0)
    head = literal(case, radius=1.5)
    assert verdict(case, literal(case), head).verdict == "mismatch"
    outputs = OPERATION.candidates["torch"](**case.tensors, **case.settings, **HEAD)
    assert OPERATION.invariants(case, outputs) is None
    assert OPERATION.upstreams["yolox"].era("0.3.0") == {"radius": 2.5, "penalty": 1e5, "region": "union"}


@pytest.mark.parametrize("level", [0.0, 3.0, 20.0, 60.0, 200.0])
def test_the_class_cost_holds_what_float32_gives(level):
    """Saturated logits included: the product underflows to 0 and the probability rounds to 1."""
    generator = torch.Generator().manual_seed(int(level))
    logits = level * torch.randn(50, CLASSES, generator=generator)
    objectness = level * torch.randn(50, 1, generator=generator)
    classes = torch.arange(CLASSES, dtype=torch.float32)
    p = (logits.sigmoid() * objectness.sigmoid()).sqrt()
    entropy = torch.nn.functional.binary_cross_entropy(
        p[None].expand(CLASSES, -1, -1), torch.eye(CLASSES)[:, None].expand(-1, 50, -1), reduction="none"
    ).sum(-1)
    bounds = class_cost(logits, objectness, classes)
    assert bool(((bounds.low <= entropy) & (entropy <= bounds.high)).all())
    # Nearly every pair is known to float32 quality; where 1 - p is a few units, its logarithm is not.
    narrow = bounds.high - bounds.low <= 1e-4 * bounds.high.clamp(min=1)
    assert narrow.float().mean() > 0.6


def test_images_without_ground_truth_are_background():
    case = draw(0, counts=(3, 0, 2))
    oracle = literal(case)
    assert verdict(case, oracle, oracle).verdict == "match"
    broken = oracle["matched_gt"].clone()
    broken[1, 0] = 0
    assert verdict(case, oracle, consistent(case, broken)).output == "invariants"


def test_a_foreground_anchor_far_from_every_ground_truth_breaks_an_invariant():
    case = draw(6, counts=(1,))
    case.tensors["gt_boxes"][0, 0] = torch.tensor([10.0, 10.0, 8.0, 8.0])
    outputs = literal(case)
    assert OPERATION.invariants(case, outputs) is None
    owner = outputs["matched_gt"].clone()
    owner[0, 255] = 0
    assert "no candidate" in OPERATION.invariants(case, consistent(case, owner))


def test_bytes_that_must_move_are_fewer_than_all():
    case = draw(0)
    outputs = literal(case)
    everything = sum(t.nbytes for t in (*case.tensors.values(), *outputs.values()))
    assert sum(t.nbytes for t in outputs.values()) < OPERATION.minimum_bytes(case, outputs) < everything
