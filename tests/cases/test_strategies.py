"""The strategies reach what they promise: by the tags of a few hundred draws, and again from the tensors."""

from collections import Counter

import pytest
import torch
from hypothesis import Phase, find, settings

from cases import boxes, hungarian, predictions, simota, tal
from cases.case import DTYPES, Case

OPERATIONS = [
    ("tal", {}),
    ("simota", {}),
    ("hungarian", {"variant": "detr"}),
    ("hungarian", {"variant": "rtdetr"}),
]
each_operation = pytest.mark.parametrize(("operation", "options"), OPERATIONS, ids=["tal", "simota", "detr", "rtdetr"])


PREDICTED = {"tal": "pd_scores", "simota": "cls_logits", "hungarian": "logits"}
ROWS = {"tal": "gt_bboxes", "simota": "gt_boxes"}


def image_sizes(case: Case) -> list[int]:
    """Ground truths of every image, from the tensors."""
    if case.operation == "tal":
        return (case.tensors["mask_gt"][..., 0] > 0).sum(dim=1).tolist()
    return case.tensors["num_gt"].tolist() if case.operation == "simota" else case.settings["sizes"]


def counts(cases: list[Case]) -> Counter[str]:
    return Counter(tag for case in cases for tag in case.tags)


@each_operation
def test_every_kind_is_reached_often(draw, operation, options):
    cases = draw(operation, **options)
    seen = counts(cases)
    kinds = [kind for kind in boxes.KINDS if options != {"variant": "detr"} or kind != "inverted"]
    assert {kind: seen[kind] for kind in kinds if seen[kind] < 40} == {}
    assert {k: seen[f"prediction-{k}"] for k in predictions.KINDS if seen[f"prediction-{k}"] < 4} == {}
    assert {dtype: seen[dtype] for dtype in DTYPES if seen[dtype] < 40} == {}
    common = {"tie": 40, "empty-image": 20, "no-ground-truth": 4, "non-finite": 4, "invalid": 4, "medium": 20}
    assert {tag: seen[tag] for tag, least in common.items() if seen[tag] < least} == {}


@each_operation
def test_most_cases_are_valid_finite_small_and_new(draw, operation, options):
    cases = draw(operation, **options)
    seen = counts(cases)
    assert seen["invalid"] < len(cases) / 8
    assert seen["non-finite"] < len(cases) / 6
    assert seen["no-ground-truth"] < len(cases) / 6
    assert seen["small"] > len(cases) * 0.7
    assert len({case.digest for case in cases}) > len(cases) * 0.9
    for case in cases:
        if "small" in case.tags and "invalid" not in case.tags:
            anchors, classes = case.tensors[PREDICTED[operation]].shape[1:]
            assert anchors <= 100
            assert classes <= 8 + ("variant-detr" in case.tags)
            # Two rows of padding beside the ground truths.
            assert max(image_sizes(case), default=0) <= 8
            assert case.tensors.get(ROWS.get(operation), torch.zeros(1, 0)).shape[1] <= 10


def test_tal_reaches_what_only_it_has(draw):
    cases = draw("tal")
    seen = counts(cases)
    wanted = ["topk2", "mixed-dtype", "conflict", "k-exceeds-candidates", "no-candidate-row"]
    wanted += [f"labels-{kind}" for kind in ("fractional", "fraction-below-zero", "negative")]
    wanted += [f"padding-{kind}" for kind in ("end", "start", "anywhere", "zeros", "boxes", "nan", "labels")]
    assert {tag: seen[tag] for tag in wanted if seen[tag] < 15} == {}
    settings_seen = [case.settings for case in cases]
    assert {1, 3, 10, 13} <= {s["topk"] for s in settings_seen}
    assert {(1.0, 6.0), (0.5, 6.0)} <= {(s["alpha"], s["beta"]) for s in settings_seen}
    assert any(case.tensors["pd_scores"].shape[0] == 0 for case in cases)
    older = draw("tal", topk2=False, padding_labels=False, empty_batch=False)
    assert all(tal.allows(case, topk2=False, padding_labels=False, empty_batch=False) for case in older)
    assert not all(tal.allows(case, topk2=False, padding_labels=False, empty_batch=False) for case in cases)
    assert all(case.settings["topk2"] is None for case in older)
    assert all(case.tensors["pd_scores"].shape[0] for case in older)
    assert all((case.tensors["gt_labels"] < 1000).all() for case in older)


def test_simota_reaches_what_only_it_has(draw):
    seen = counts(draw("simota"))
    wanted = ["conflict", "k-exceeds-candidates", "penalised-only", "padding-zeros", "padding-nan", "padding-labels"]
    assert {tag: seen[tag] for tag in wanted if seen[tag] < 15} == {}
    assert seen["no-candidate"] >= 2


@pytest.mark.parametrize("variant", ["detr", "rtdetr"])
def test_hungarian_reaches_what_only_it_has(draw, variant):
    cases = draw("hungarian", variant=variant)
    assert counts(cases)["more-targets-than-queries"] > 30
    assert len({tuple(c.settings[k] for k in ("class_cost", "bbox_cost", "giou_cost")) for c in cases}) >= 5
    if variant == "detr":
        assert counts(cases)["labels-no-object"] > 20
    else:
        assert {case.settings["use_fl"] for case in cases} == {True, False}


@each_operation
def test_every_flaw_can_be_made_and_leaves_the_case_alone(draw, operation, options):
    flaws = {"tal": tal.FLAWS, "simota": simota.FLAWS}.get(operation) or hungarian.FLAWS[options["variant"]]
    cases = draw(operation, **options)
    assert sum(flaw.name in counts(cases) for flaw in flaws) >= len(flaws) / 2
    sound = [case for case in cases if "invalid" not in case.tags][:40]
    before = [case.digest for case in sound]
    for flaw in flaws:
        made = [flaw.applied(case) for case in sound]
        flawed = [new for new, old in zip(made, sound, strict=True) if new is not old]
        assert len(flawed) >= 10, flaw
        assert all({"invalid", flaw.name} <= case.tags for case in flawed)
        assert not {case.digest for case in flawed} & set(before)
    fresh = [Case(c.operation, c.tensors, c.settings, c.origin, c.tags).digest for c in sound]
    assert fresh == before


# What a kind means, from the corners (n, 4) of an image, the frame's size, its strides and anchor centres.
def sides(b):
    return b[:, 2] - b[:, 0], b[:, 3] - b[:, 1]


def repeated(b):
    return any(torch.equal(b[i], b[j]) for i in range(len(b)) for j in range(i))


def nested(b):
    near = (b[:, None, :2] < b[None, :, :2]).all(-1)
    far = (b[:, None, 2:] > b[None, :, 2:]).all(-1)
    return bool((near & far).any())


def on_centre(b, strides, offset):
    return any(bool((((b / s - offset) % 1) == 0).all(dim=1).any()) for s in strides)


# Corners are sums of drawn numbers.
ROUNDING = 1e-9
MEANING = {
    "ordinary": lambda b, size, strides: bool(((sides(b)[0] > 0) & (sides(b)[1] > 0)).any()),
    "tiny": lambda b, size, strides: bool(
        ((torch.maximum(*sides(b)) < min(strides)) & (torch.minimum(*sides(b)) > 0)).any()
    ),
    "huge": lambda b, size, strides: bool(((sides(b)[0] >= 0.85 * size[0]) & (sides(b)[1] >= 0.85 * size[1])).any()),
    "thin": lambda b, size, strides: bool(
        (
            (torch.minimum(*sides(b)) <= 2 + ROUNDING)
            & (torch.minimum(*sides(b)) > 0)
            & (torch.maximum(*sides(b)) >= min(size) // 2 - ROUNDING)
        ).any()
    ),
    "zero-area": lambda b, size, strides: bool((torch.minimum(*sides(b)) == 0).any()),
    "inverted": lambda b, size, strides: bool((torch.minimum(*sides(b)) < 0).any()),
    "off-image": lambda b, size, strides: bool(((b[:, 2:] <= 0) | (b[:, :2] >= torch.tensor(size))).any(dim=1).any()),
    "identical": lambda b, size, strides: repeated(b),
    "nested": lambda b, size, strides: nested(b),
    "on-anchor-centre": lambda b, size, strides: on_centre(b, strides, 0.5),
    "on-cell-edge": lambda b, size, strides: on_centre(b, strides, 0.0),
}


def images_of(case: Case) -> list[torch.Tensor]:
    """The valid boxes of every image of a `tal` case."""
    return [box[mask[:, 0] > 0] for box, mask in zip(case.tensors["gt_bboxes"], case.tensors["mask_gt"], strict=True)]


def test_tagged_boxes_are_what_the_tag_says(draw):
    assert set(MEANING) == set(boxes.KINDS)
    checked = Counter()
    for case in draw("tal", dtypes=("float64",)):
        strides = case.settings["stride"]
        points = case.tensors["anc_points"]
        # The last anchor is the last cell of the coarsest level.
        size = tuple((points[-1] + max(strides) / 2).tolist())
        for kind in case.tags & set(MEANING):
            # Nesting an inverted or clipped parent keeps the tag; a parent is always an earlier box with area.
            assert any(MEANING[kind](b, size, strides) for b in images_of(case) if len(b)), (kind, case)
            checked[kind] += 1
    assert min(checked[kind] for kind in MEANING) >= 40


def test_padding_lies_and_holds_what_the_tags_say(draw):
    between = 0
    for case in draw("tal", dtypes=("float64",)):
        valid = case.tensors["mask_gt"][..., 0] > 0
        assert ("padding" in case.tags) == (not bool(valid.all()))
        if "padding" not in case.tags:
            continue
        rows, labels = case.tensors["gt_bboxes"][~valid], case.tensors["gt_labels"][~valid]
        later_is_valid = (valid[:, 1:] & ~valid[:, :-1]).any(dim=1)
        earlier_is_valid = (valid[:, :-1] & ~valid[:, 1:]).any(dim=1)
        if "padding-end" in case.tags:
            assert not bool(later_is_valid.any())
        elif "padding-start" in case.tags:
            assert not bool(earlier_is_valid.any())
        else:
            between += bool((later_is_valid & earlier_is_valid).any())
        assert ("padding-nan" in case.tags) == bool(rows.isnan().any())
        if "padding-boxes" in case.tags:
            assert bool((rows[:, 2:] > 0).all())
        if "padding-zeros" in case.tags:
            assert not bool(rows.any() or labels.any())
        if "padding-labels" in case.tags:
            first = ~valid[:, 0]
            assert not bool(case.tensors["gt_labels"][first, 0].any())
            assert not bool(rows.any())
            assert int((labels > 1000).sum()) == int((~valid[:, 1:]).sum())
    assert between >= 10


def test_tagged_predictions_are_what_the_tag_says(draw):
    checked = Counter()
    for case in draw("tal", dtypes=("float64",)):
        scores, predicted = case.tensors["pd_scores"], case.tensors["pd_bboxes"]
        if not scores.numel():
            continue
        nan = int(scores.isnan().sum() + predicted.isnan().sum())
        infinite = int(scores.isinf().sum() + predicted.isinf().sum())
        kind = next(tag for tag in case.tags if tag.startswith("prediction-")).removeprefix("prediction-")
        checked[kind] += 1
        assert (nan, infinite) == {"nan-one-place": (1, 0), "inf-one-place": (0, 1)}.get(kind, (0, 0))
        if kind == "uniform":
            assert bool((scores == 0.5).all())
        elif kind == "saturated":
            assert bool(((scores < 1e-6) | (scores > 1 - 1e-6)).all())
        elif kind == "tied" and scores.shape[1] > 1:
            assert torch.equal(scores[:, 0], scores[:, 1])
            assert torch.equal(predicted[:, 0], predicted[:, 1])
        elif kind == "early":
            assert scores.median() < 0.05
    assert set(checked) == set(predictions.KINDS)


def test_a_late_detector_finds_its_ground_truths(draw):
    wanted = {"prediction-late", "medium"}
    case = next(case for case in draw("tal", dtypes=("float64",)) if wanted <= case.tags)
    image = images_of(case)[0]
    whole = image[(image[:, 2:] > image[:, :2] + 16).all(dim=1) & (image >= 0).all(dim=1)]
    near = torch.maximum(whole[:, None, :2], case.tensors["pd_bboxes"][0, None, :, :2])
    far = torch.minimum(whole[:, None, 2:], case.tensors["pd_bboxes"][0, None, :, 2:])
    overlap = (far - near).clamp(min=0).prod(dim=2)
    union = (whole[:, 2:] - whole[:, :2]).prod(dim=1)[:, None] + (
        case.tensors["pd_bboxes"][0, :, 2:] - case.tensors["pd_bboxes"][0, :, :2]
    ).prod(dim=1)
    best, anchor = (overlap / (union - overlap)).max(dim=1)
    assert len(whole) >= 5
    assert best.median() > 0.7
    assert case.tensors["pd_scores"][0, anchor].amax(dim=1).median() > 0.6


def test_tagged_conflicts_and_few_candidates_are_in_the_tensors(draw):
    """A contested anchor lies in two valid boxes; with K = A and positive metrics both propose it."""
    contested = few = proposed_twice = 0
    for case in draw("tal", dtypes=("float64",)):
        points, strides = case.tensors["anc_points"], case.settings["stride"]
        least = strides[1] if len(strides) > 1 else strides[0]
        conflict = small = False
        for b in images_of(case):
            centre, side = (b[:, :2] + b[:, 2:]) / 2, b[:, 2:] - b[:, :2]
            side = torch.where(side < least, torch.full_like(side, least), side)
            inside = ((points - centre[:, None]).abs() < side[:, None] / 2).all(dim=2)
            conflict |= bool((inside.sum(dim=0) > 1).any())
            small |= bool(((inside.sum(dim=1) > 0) & (inside.sum(dim=1) < case.settings["topk"])).any())
            proposed_twice += bool((inside.sum(dim=0) > 1).any()) and case.settings["topk"] == len(points)
        if "invalid" not in case.tags:
            assert conflict == ("conflict" in case.tags)
            assert small == ("k-exceeds-candidates" in case.tags)
        contested, few = contested + conflict, few + small
    assert min(contested, few, proposed_twice) > 20


@each_operation
def test_tagged_ties_and_empty_images_are_in_the_tensors(draw, operation, options):
    for case in draw(operation, **options):
        if "invalid" in case.tags:
            continue
        sizes = image_sizes(case)
        assert ("empty-image" in case.tags) == (0 in sizes)
        assert ("no-ground-truth" in case.tags) == (sum(sizes) == 0)
        assert ("empty-batch" in case.tags) == (not sizes)


def test_float16_cases_stay_in_range_unless_tagged(draw):
    """CIoU squares the diagonal of the hull of a prediction and a ground truth that contains its anchor."""
    overflow = [case for case in draw("tal", dtypes=("float16",)) if "half-overflow" in case.tags]
    assert 1 <= len(overflow) <= len(draw("tal", dtypes=("float16",))) / 20
    for case in draw("tal", dtypes=("float16",)):
        if not {"half-overflow", "non-finite"} & case.tags and case.tensors["pd_bboxes"].numel():
            predicted = case.tensors["pd_bboxes"].double().flatten(0, 1)
            spans = predicted[:, 2:].amax(dim=0) - predicted[:, :2].amin(dim=0)
            assert float(spans.square().sum()) < 65504


def test_valid_detr_boxes_have_sides(draw):
    for case in draw("hungarian", variant="detr"):
        if "invalid" not in case.tags:
            for name in ("boxes", "pred_boxes"):
                assert bool((case.tensors[name][..., 2:] >= 0).all())


@each_operation
def test_the_same_seed_draws_the_same_cases(draw, operation, options):
    first, second = (draw.__wrapped__(operation, examples=40, **options) for _ in range(2))
    assert [case.digest for case in first] == [case.digest for case in second]


def test_a_planted_property_shrinks_to_a_readable_case():
    quiet = settings(max_examples=1000, phases=(Phase.generate, Phase.shrink))
    case = find(
        tal.cases(), lambda case: {"conflict", "padding"} <= case.tags and case.settings["topk"] > 1, settings=quiet
    )
    assert "small" in case.tags
    tensors = case.tensors
    assert tensors["pd_scores"].shape[0] <= 2
    assert tensors["pd_scores"].shape[1] <= 16
    assert int(tensors["mask_gt"].sum()) == 2
    assert len(case.settings["stride"]) <= 2
    assert case.tags & set(boxes.KINDS) == {"ordinary"}
    assert bool((tensors["gt_bboxes"] == tensors["gt_bboxes"].round()).all())
    assert "gt_bboxes: float32 " in repr(case)
    assert str(tensors["gt_bboxes"].tolist()) in repr(case)
