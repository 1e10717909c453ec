"""SimOTA: worked examples and edge cases of specification simota.md, and relations that need no oracle.

The scene of section 5 is built by `worked_scene`. Every behaviour is tested on both paths.
"""

import math

import pytest
import torch

from cleanroom.assign._simota_cost import (
    Rules,
    anchor_grid,
    background_cost,
    corners,
    dynamic_k,
    lowest,
    overlap,
    pair_cost,
    regions,
)
from cleanroom.assign._simota_levels import find_levels, search
from cleanroom.assign.simota import SimOTAAssigner, simota_assign

UNION = {"radius": 2.5, "penalty": 1e5, "region": "union"}
CENTRE = {"radius": 1.5, "penalty": 1e6, "region": "centre"}
PATHS = ("sparse", "static")


def anchors(height, width, strides):
    """Return strides, x_shifts and y_shifts, (1, N) each."""
    cells = [(s, x, y) for s in strides for y in range(height // s) for x in range(width // s)]
    return tuple(torch.tensor(column, dtype=torch.float32)[None] for column in zip(*cells, strict=True))


def case(boxes, classes, pred_boxes, cls_logits, obj_logits, grid):
    """Return the arguments of simota_assign for one image."""
    strides, x_shifts, y_shifts = grid
    return {
        "gt_boxes": torch.tensor(boxes).view(1, -1, 4),
        "gt_classes": torch.tensor(classes, dtype=torch.float32).view(1, -1),
        "num_gt": torch.tensor([len(boxes)]),
        "pred_boxes": pred_boxes,
        "cls_logits": cls_logits,
        "obj_logits": obj_logits,
        "strides": strides,
        "x_shifts": x_shifts,
        "y_shifts": y_shifts,
    }


def worked_scene(boxes=((10.0, 12, 14, 16), (20.0, 22, 18, 12)), classes=(1, 0)):
    """Strides 8 and 16 on 32x32, two classes, raw value 0.5 * sin(0.7 a + 1.3 c)."""
    strides, x, y = anchors(32, 32, (8, 16))
    a, channel = torch.arange(20, dtype=torch.float64)[:, None], torch.arange(7, dtype=torch.float64)
    raw = (0.5 * torch.sin(0.7 * a + 1.3 * channel)).float()
    cell, stride = torch.stack([x[0], y[0]], 1), strides[0, :, None]
    pred = torch.cat([(raw[:, :2] + cell) * stride, raw[:, 2:4].exp() * stride], 1)
    return case(boxes, classes, pred[None], raw[None, :, 5:], raw[None, :, 4:5], (strides, x, y))


def random_scene(seed, counts=(7, 0, 12), size=128, classes=5, dtype=torch.float32):
    """Three images with boxes of all sizes, predictions that overlap them, and padding rows of noise."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    grid = anchors(size, size, (8, 16, 32))
    images, boxes, number = len(counts), max(counts) + 2, grid[0].shape[1]
    centre = (torch.stack([grid[1][0], grid[2][0]], 1) + 0.5) * grid[0][0, :, None]
    gt = torch.cat([normal(images, boxes, 2) * 40 + size / 2, (normal(images, boxes, 2) + 3).exp()], 2)
    source = torch.randint(boxes, (images, number), generator=generator)
    near = gt.gather(1, source[..., None].expand(-1, -1, 4)) * (1 + 0.1 * normal(images, number, 4))
    wild = torch.cat([centre + 4 * normal(images, number, 2), (normal(images, number, 2) + 3).exp()], 2)
    pred = torch.where(torch.rand(images, number, 1, generator=generator) < 0.5, near, wild)
    scene = {
        "gt_boxes": gt,
        "gt_classes": torch.randint(classes, (images, boxes), generator=generator).float(),
        "pred_boxes": pred,
        "cls_logits": 2 * normal(images, number, classes) - 2,
        "obj_logits": 2 * normal(images, number, 1) - 2,
        "strides": grid[0],
        "x_shifts": grid[1],
        "y_shifts": grid[2],
    }
    return {name: value.to(dtype) for name, value in scene.items()} | {"num_gt": torch.tensor(counts)}


def assign(scene, path="sparse", **settings):
    return simota_assign(**scene, num_classes=scene["cls_logits"].shape[2], path=path, **settings)


def pairs(result, image=0):
    """Return {anchor: ground truth} of an image."""
    foreground = result.fg_mask[image].nonzero().squeeze(1).tolist()
    return dict(zip(foreground, result.matched_gt[image, foreground].tolist(), strict=True))


def same(a, b):
    return all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


def pair_costs(scene, settings):
    """Return the costs (G, N) of the first image, from the definitions and by the summation over all classes."""
    gt, pred = scene["gt_boxes"][0][:, None], scene["pred_boxes"][0]
    grid = anchor_grid(scene["strides"], scene["x_shifts"], scene["y_shifts"])
    _, free = regions(gt, grid, Rules(**settings))
    probability = (scene["cls_logits"][0].sigmoid() * scene["obj_logits"][0].sigmoid()).sqrt()
    target = torch.nn.functional.one_hot(scene["gt_classes"][0].long(), probability.shape[1]).float()
    shape = len(gt), *probability.shape
    entropy = torch.nn.functional.binary_cross_entropy(
        probability.expand(shape), target[:, None].expand(shape), reduction="none"
    )
    return entropy.sum(-1) - 3 * (overlap(corners(gt), corners(pred)) + 1e-8).log() + settings["penalty"] * ~free


# --- Worked examples ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("settings", "expected", "iou", "classes"),
    [
        (UNION, {5: 0, 19: 1}, [0.168707, 0.652423], [1, 0]),
        (CENTRE, {6: 0, 19: 1}, [0.260208, 0.652423], [1, 0]),
    ],
    ids=["union", "centre"],
)
def test_worked_example(path, settings, expected, iou, classes):
    result = assign(worked_scene(), path, **settings)
    assert pairs(result) == expected
    foreground = result.fg_mask[0]
    assert result.matched_iou[0, foreground].tolist() == pytest.approx(iou, abs=1e-6)
    assert result.matched_classes[0, foreground].tolist() == classes
    assert result.num_fg.tolist() == [2]
    assert not result.matched_classes[0, ~foreground].any()
    assert not result.matched_iou[0, ~foreground].any()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (UNION, {(0, 4): 13.006852, (0, 5): 6.785806, (0, 6): 100005.375, (0, 7): 100008.484375}),
        (UNION, {(1, 10): 6.790415, (1, 15): 100003.375, (1, 19): 2.665827}),
        (CENTRE, {(0, 4): 13.006852, (0, 5): 6.785807, (0, 6): 5.378039, (0, 7): 1000008.5}),
        (CENTRE, {(1, 10): 6.790415, (1, 15): 3.374079, (1, 19): 2.665827}),
    ],
)
def test_worked_costs(settings, expected):
    scene = worked_scene()
    grid = anchor_grid(scene["strides"], scene["x_shifts"], scene["y_shifts"])
    gt, anchor = torch.tensor(list(expected)).unbind(1)
    boxes = scene["gt_boxes"][0, gt]
    cls, obj = scene["cls_logits"][0, anchor], scene["obj_logits"][0, anchor]
    label = cls[torch.arange(len(gt)), scene["gt_classes"][0, gt].long()]
    iou = overlap(corners(boxes), corners(scene["pred_boxes"][0, anchor]))
    _, free = regions(boxes, grid.at(anchor), Rules(**settings))
    cost = pair_cost(background_cost(cls, obj), label, obj[:, 0], iou, free, settings["penalty"])
    assert cost.dtype == torch.float32
    assert cost.tolist() == pytest.approx(list(expected.values()), rel=1e-6)


REGION_EDGES = [
    (UNION, (12.0, 12, 16, 16), list(range(20)), [5, 16]),
    (CENTRE, (12.0, 12, 16, 16), [0, 1, 2, 4, 5, 6, 8, 9, 10, 16, 17, 18, 19], None),
    (UNION, (24.0, 24, 2, 2), [5, 6, 7, 9, 10, 11, 13, 14, 15, 16, 17, 18, 19], [19]),
    (CENTRE, (24.0, 24, 2, 2), [10, 11, 14, 15, 16, 17, 18, 19], None),
]


@pytest.mark.parametrize(("settings", "box", "candidates", "free"), REGION_EDGES)
def test_region_edges_are_outside(settings, box, candidates, free):
    shifts = anchors(32, 32, (8, 16))
    grid, rules = anchor_grid(*shifts), Rules(**settings)
    near_mask, free_mask = regions(torch.tensor([box])[:, None], grid, rules)
    assert near_mask[0].nonzero().flatten().tolist() == candidates
    assert free_mask[0].nonzero().flatten().tolist() == (candidates if free is None else free)

    levels = find_levels(grid, *shifts[1:])
    mask, _, anchor = search(torch.tensor([box]), torch.tensor([0]), (1, 20), levels, rules)
    assert mask.nonzero().flatten().tolist() == candidates
    assert anchor.tolist() == (candidates if free is None else free)


@pytest.mark.parametrize("settings", [UNION, CENTRE], ids=["union", "centre"])
def test_bisection_equals_the_definition(settings):
    """Boxes on cell edges and centres, outside, inverted and not a number, two images."""
    shifts = anchors(64, 96, (8, 16, 32))
    grid, rules = anchor_grid(*shifts), Rules(**settings)
    generator = torch.Generator().manual_seed(0)
    boxes = torch.randint(-8, 60, (300, 4), generator=generator) * 2.0
    boxes[::7, 2:] *= -1
    boxes[5, 0] = boxes[9, 3] = math.nan
    boxes[11, 2], boxes[12, 0] = math.inf, -math.inf
    image = torch.arange(300) // 200
    near, free = regions(boxes[:, None], grid, rules)
    mask, gt, anchor = search(boxes, image, (2, len(grid.x)), find_levels(grid, *shifts[1:]), rules)
    assert torch.equal(mask.view(2, -1), torch.stack([near[:200].any(0), near[200:].any(0)]))
    assert torch.equal(torch.stack([gt, anchor - image[gt] * len(grid.x)], 1), free.nonzero())


def test_dynamic_k_truncates_the_sum_in_its_dtype():
    iou = torch.tensor([[0.9, 0.8, 0.7, 0.1, 0, 0.05], [0.2, 0.75, 0.6, 0.8, 0.3, 0]])
    assert dynamic_k(iou, torch.float32).tolist() == [2, 2]
    iou = torch.tensor([1.0, 0.5, 0.498046875])
    assert dynamic_k(iou, torch.float32).item() == 1
    assert dynamic_k(iou, torch.bfloat16).item() == 2
    assert dynamic_k(torch.full((30,), 0.99), torch.float32).item() == 9, "of 30 overlaps ten count"
    assert dynamic_k(torch.tensor([0.0, math.nan]), torch.float32).item() == 1


def test_lowest_takes_equal_costs_by_index():
    cost = torch.tensor([[1, 1.5, 2, 9, 9.5, 9.2], [8, 1.4, 2.5, 1.2, 6, 9.9]])
    assert lowest(cost, torch.tensor([2, 2])).nonzero().tolist() == [[0, 0], [0, 1], [1, 1], [1, 3]]
    assert lowest(torch.ones(1, 640), torch.tensor([10])).nonzero()[:, 1].tolist() == list(range(10))
    cost = torch.tensor([[3, 2, 3, 1, 3.0]])
    assert lowest(cost, torch.tensor([4])).nonzero()[:, 1].tolist() == [0, 1, 2, 3]
    cost = torch.tensor([[math.inf, 2, math.inf]])
    assert lowest(cost, torch.tensor([2])).nonzero()[:, 1].tolist() == [1], "infinite costs are never chosen"


def conflict_scene(overlaps, boxes=None):
    """One level of 10x10 cells of stride 8 and identical boxes; predictions overlap them as told per anchor."""
    grid = anchors(80, 80, (8,))
    box = (40.0, 40, 40, 40)
    pred = torch.zeros(1, 100, 4)
    pred[..., :2] = 400.0
    pred[..., 2:] = 1.0
    for anchor, iou in overlaps.items():
        pred[0, anchor] = torch.tensor([40, 40, 40, 40 * iou])
    return case(boxes or [box, box], [0, 1], pred, torch.zeros(1, 100, 2), torch.zeros(1, 100, 1), grid)


FREE = 44  # its centre (36, 36) lies in the box and in the centre square of conflict_scene


@pytest.mark.parametrize("path", PATHS)
def test_conflict_goes_to_the_lowest_cost_then_the_first(path):
    scene = conflict_scene({FREE: 0.9})
    assert pairs(assign(scene, path)) == {FREE: 0}, "an exact tie goes to the lowest row"
    scene["cls_logits"][0, FREE] = torch.tensor([-1.0, 1])
    assert pairs(assign(scene, path)) == {FREE: 1}


@pytest.mark.parametrize("path", PATHS)
def test_exact_tie_of_many_goes_to_the_first(path):
    """More rows than the static path takes at once."""
    scene = conflict_scene({FREE: 0.9}, [(40.0, 40, 40, 40)] * 40)
    scene["gt_classes"] = torch.zeros(1, 40)
    assert pairs(assign(scene, path)) == {FREE: 0}


@pytest.mark.parametrize("path", PATHS)
def test_default_radius_is_two_and_a_half_strides(path):
    """The anchor with the only good prediction lies 19.5 pixels away from the box's centre: 2.4375 strides."""
    anchor = 47
    scene = conflict_scene({anchor: 0.9}, [(40.5, 40.0, 60.0, 60.0)])
    scene["gt_classes"] = torch.zeros(1, 1)
    assert pairs(assign(scene, path)) == {anchor: 0}
    assert anchor not in pairs(assign(scene, path, radius=2.4))


@pytest.mark.parametrize("path", PATHS)
def test_contested_anchor_goes_to_a_third_ground_truth(path):
    """Rows 0 and 1 select FREE; row 2 is cheapest there, but selected its own anchor."""
    own = FREE + 1
    scene = conflict_scene({FREE: 0.5, own: 0.9}, [(40.0, 40, 40, 40)] * 3)
    scene["gt_classes"] = torch.tensor([[0.0, 0, 1]])
    scene["cls_logits"][0, FREE] = torch.tensor([0.0, 1])
    scene["cls_logits"][0, own] = torch.tensor([-9.0, 9])
    cost = pair_costs(scene, UNION)
    assert cost[:, FREE].argmin() == 2
    assert cost.argmin(1).tolist() == [FREE, FREE, own]
    assert pairs(assign(scene, path)) == {FREE: 2, own: 2}


@pytest.mark.parametrize("path", PATHS)
def test_dynamic_k_counts_overlaps_of_penalised_pairs(path):
    """Three perfect predictions in far corners: k is 3 although none of them is free."""
    scene = conflict_scene({0: 1.0, 9: 1.0, 90: 1.0}, [(40.0, 40, 40, 40), (40.0, 40, 200, 200)])
    assert sorted(pairs(assign(scene, path)).values()).count(0) == 3


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("settings", [UNION, CENTRE, UNION | {"penalty": 3.0}], ids=["union", "centre", "cheap"])
@pytest.mark.parametrize("seed", range(4))
def test_equals_the_definition(path, settings, seed):
    """A slow transcription of sections 4.2 to 4.5; a penalty of 3 lets penalised pairs compete with free ones."""
    scene = random_scene(seed)
    result = assign(scene, path, **settings)
    for image, count in enumerate(scene["num_gt"].tolist()):
        one = {name: value[image : image + 1] for name, value in scene.items() if name.startswith(("gt", "num"))}
        one = {name: value[:, :count] if name != "num_gt" else value for name, value in one.items()}
        one |= {name: scene[name][image : image + 1] for name in ("pred_boxes", "cls_logits", "obj_logits")}
        assert pairs(result, image) == by_definition({**scene, **one}, settings)


def by_definition(scene, settings):
    gt, pred = scene["gt_boxes"][0][:, None], scene["pred_boxes"][0]
    if len(gt) == 0:
        return {}
    near, _ = regions(gt, anchor_grid(scene["strides"], scene["x_shifts"], scene["y_shifts"]), Rules(**settings))
    candidates = near.any(0).nonzero().squeeze(1)
    cost = pair_costs(scene, settings)[:, candidates].tolist()
    ious = overlap(corners(gt), corners(pred))[:, candidates]
    claims = {}
    for row, iou in enumerate(ious):
        k = max(1, int(iou.sort(descending=True).values[:10].sum()))
        for column in sorted(range(len(candidates)), key=lambda c: (cost[row][c], c))[:k]:
            claims.setdefault(column, []).append(row)
    every = range(len(gt))
    owners = {c: rows[0] if len(rows) == 1 else min(every, key=lambda r: cost[r][c]) for c, rows in claims.items()}
    return {int(candidates[column]): owners[column] for column in sorted(owners)}


# --- Edge cases (section 4.9) ------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
def test_no_ground_truth_and_no_candidate_are_background(path):
    empty = random_scene(0, counts=(0, 0))
    far = worked_scene([(-900.0, -900, 8, 8)], [0])
    nothing = {**far, "gt_boxes": torch.zeros(1, 0, 4), "gt_classes": torch.zeros(1, 0), "num_gt": torch.tensor([0])}
    for scene in (empty, far, nothing):
        result = assign(scene, path)
        assert result.num_fg.sum() == 0
        assert (result.matched_gt == -1).all()
        assert not result.fg_mask.any()
        assert not result.matched_classes.any()
        assert not result.matched_iou.any()


@pytest.mark.parametrize("path", PATHS)
def test_ground_truth_outside_takes_one_penalised_candidate(path):
    scene = worked_scene([(10.0, 12, 14, 16), (300.0, 300, 10, 10)], [1, 0])
    result = assign(scene, path)
    taken = [anchor for anchor, gt in pairs(result).items() if gt == 1]
    assert len(taken) == 1
    assert result.matched_iou[0, taken[0]] == 0
    cost = pair_costs(scene, UNION)[1]
    assert cost[taken[0]] == cost.min(), "the first of the cheapest, ties being frequent under the penalty"


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("settings", [UNION, CENTRE], ids=["union", "centre"])
def test_more_ground_truths_than_anchors(path, settings):
    generator = torch.Generator().manual_seed(1)
    boxes = torch.rand(300, 4, generator=generator) * 20 + 4
    result = assign(worked_scene(boxes.tolist(), [g % 2 for g in range(300)]), path, **settings)
    assert 1 <= result.num_fg.item() == len(pairs(result)) <= 20


@pytest.mark.parametrize("path", PATHS)
def test_identical_ground_truths(path):
    box = (10.0, 12, 14, 16)
    assert set(pairs(assign(worked_scene([box, box], [1, 1]), path)).values()) == {0}
    first, second = (pair_costs(worked_scene([box], [label]), UNION)[0, 5] for label in (0, 1))
    assert pairs(assign(worked_scene([box, box], [0, 1]), path)) == {5: int(second < first)}


@pytest.mark.parametrize("path", PATHS)
def test_zero_area(path):
    scene = worked_scene([(12.0, 12, 0, 0)], [1])
    scene["pred_boxes"][0, 5] = torch.tensor([12.0, 12, 0, 0])
    result = assign(scene, path)
    assert result.num_fg.item() == 1, "0/0 counts as no overlap, so k is 1"
    assert result.matched_iou.isfinite().all()
    assert not result.matched_iou.any()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("where", ["pred_boxes", "cls_logits", "obj_logits"])
def test_nan_prediction_is_never_chosen(path, where):
    scene = worked_scene()
    scene[where][0, 5] = math.nan
    result = assign(scene, path)
    assert pairs(result).get(5) is None
    assert sorted(pairs(result).values()) == [0, 1]
    assert result.matched_iou.isfinite().all()
    scene[where][:] = math.nan
    assert not assign(scene, path).fg_mask.any()


@pytest.mark.parametrize("path", PATHS)
def test_nan_ground_truth_takes_nothing(path):
    scene = worked_scene()
    scene["gt_boxes"][0, 0, 2] = math.nan
    assert pairs(assign(scene, path)) == {19: 1}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_infinite_values_stay_finite(path, value):
    scene = worked_scene()
    scene["cls_logits"][0, ::2], scene["obj_logits"][0, ::3] = value, value
    result = assign(scene, path)
    assert result.num_fg.item() == 2
    scene = worked_scene()
    scene["pred_boxes"][0, 5, 2] = math.inf
    result = assign(scene, path)
    assert result.matched_iou.isfinite().all()
    assert set(pairs(result).values()) == {0, 1}


def test_class_cost_keeps_the_clamps_of_the_reference():
    """Probabilities of exactly 0 and 1 cost 100 an entry, not infinity, and cancel exactly."""
    cls = torch.tensor([[200.0, 200, -200], [-200, -200, -200], [200, -200, -200]])
    obj = torch.full((3, 1), 200.0)
    cost = pair_cost(background_cost(cls, obj), cls[:, 0], obj[:, 0], torch.ones(3), torch.ones(3) > 0, 1e5)
    assert cost.tolist() == [100, 100, 0]


def test_class_cost_does_not_cancel():
    """The pair's own entry is taken out of a sum that it dominates."""
    cls, obj = torch.full((1, 80), -14.0), torch.full((1, 1), 12.0)
    cls[0, 3] = 15.0
    probability = (cls.sigmoid() * obj.sigmoid()).sqrt().double()
    exact = -(probability[0, 3].log() + (-probability[0]).log1p().sum() - (-probability[0, 3]).log1p())
    cost = pair_cost(background_cost(cls, obj), cls[:, 3], obj[:, 0], torch.ones(1), torch.ones(1) > 0, 1e5)
    assert cost.item() == pytest.approx(exact.item(), rel=2e-7)


@pytest.mark.parametrize("path", PATHS)
def test_anchors_in_another_order(path):
    """The static path takes any order; the sparse path says that it cannot, and "auto" falls back."""
    scene = random_scene(3)
    order = torch.randperm(scene["strides"].shape[1], generator=torch.Generator().manual_seed(0))
    moved = {name: value[:, order] if value.shape[1:2] == order.shape else value for name, value in scene.items()}
    expected = assign(scene, path)
    assert same([t[:, order] for t in expected[:4]], assign(moved, "auto")[:4])
    with pytest.raises(ValueError, match="path 'sparse'"):
        assign(moved, "sparse")


# --- Relations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_dtypes(dtype):
    scene = {k: v if k == "num_gt" else v.to(dtype) for k, v in worked_scene().items()}
    for path in PATHS:
        result = assign(scene, path)
        assert pairs(result) == {5: 0, 19: 1}
        assert result.matched_iou.dtype == result.matched_classes.dtype == dtype
        assert result.fg_mask.dtype == torch.bool
        assert result.matched_gt.dtype == result.num_fg.dtype == torch.int64
        eps = torch.finfo(dtype).eps
        assert result.matched_iou[0, [5, 19]].tolist() == pytest.approx([0.168707, 0.652423], rel=8 * eps + 5e-6)


def test_float16_areas_do_not_overflow():
    scene = {k: v if k == "num_gt" else v.half() for k, v in conflict_scene({FREE: 1.0}).items()}
    scene["gt_boxes"][..., 2:] = 600
    scene["pred_boxes"][0, FREE, 2:] = 600
    for path in PATHS:
        assert assign(scene, path).matched_iou[0, FREE] == 1


def test_mixed_dtypes_and_integer_labels():
    scene = worked_scene()
    expected = assign(scene)
    scene["gt_boxes"], scene["gt_classes"] = scene["gt_boxes"].long(), scene["gt_classes"].to(torch.int32)
    scene["num_gt"], scene["pred_boxes"] = scene["num_gt"].to(torch.int32), scene["pred_boxes"].double()
    for path in PATHS:
        result = assign(scene, path)
        assert torch.equal(result.matched_gt, expected.matched_gt)
        assert result.matched_iou.dtype == torch.float64
        assert result.matched_classes.dtype == torch.int32


def test_fractional_class_is_truncated_for_the_cost_only():
    scene = worked_scene(classes=(1.0, 0.9))
    for path in PATHS:
        result = assign(scene, path)
        assert pairs(result) == {5: 0, 19: 1}
        assert result.matched_classes[0, 19] == torch.tensor(0.9)


@pytest.mark.parametrize("settings", [UNION, CENTRE], ids=["union", "centre"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("seed", range(5))
def test_paths_agree_and_repeat_bitwise(settings, dtype, seed):
    scene = random_scene(seed, counts=(7, 0, 40), dtype=dtype)
    sparse = assign(scene, "sparse", **settings)
    assert same(sparse, assign(scene, "static", **settings))
    assert same(sparse, assign(scene, "sparse", **settings))
    assert same(sparse, assign(scene, "auto", **settings))


@pytest.mark.parametrize("path", PATHS)
def test_many_classes_leave_the_penalty_undecided(path):
    """With 1000 classes a free pair may cost more than a penalised one: saturated logits show it."""
    scene = random_scene(1, counts=(3,), classes=1000, size=64)
    scene["cls_logits"] = torch.full_like(scene["cls_logits"], -40)
    free_anchor = pairs(assign(scene, path))
    scene["cls_logits"][0, list(free_anchor)] = 40.0
    scene["obj_logits"][0, list(free_anchor)] = 40.0
    assert pairs(assign(scene, path)) == by_definition(
        {**scene, **{name: scene[name][:, :3] for name in ("gt_boxes", "gt_classes")}}, UNION
    )


@pytest.mark.parametrize("path", PATHS)
def test_padding_and_batching_change_nothing(path):
    scene = random_scene(2)
    whole = assign(scene, path)
    scene["gt_boxes"][:, 12:], scene["gt_classes"][:, 12:] = math.nan, -7
    assert same(whole, assign(scene, path))
    for image in range(3):
        one = {k: v[image : image + 1] if len(v) == 3 else v for k, v in scene.items()}
        assert same([t[image : image + 1] for t in whole], assign(one, path))


@pytest.mark.parametrize("path", PATHS)
def test_permuting_ground_truths_permutes_owners(path):
    scene = random_scene(4, counts=(12,))
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    whole = assign(scene, path)
    for name in ("gt_boxes", "gt_classes"):
        scene[name] = scene[name][:, order]
    moved = assign(scene, path)
    assert pairs(whole) == {anchor: int(order[gt]) for anchor, gt in pairs(moved).items()}
    assert torch.equal(whole.matched_iou, moved.matched_iou)


@pytest.mark.parametrize("path", PATHS)
def test_inputs_unchanged_and_no_gradient(path):
    scene = random_scene(5)
    before = {name: value.clone() for name, value in scene.items()}
    for name in ("pred_boxes", "cls_logits", "obj_logits"):
        scene[name].requires_grad_()
    result = assign(scene, path)
    assert not any(tensor.requires_grad for tensor in result)
    assert all(torch.equal(scene[name], value) for name, value in before.items())
    inputs = {value.untyped_storage().data_ptr() for value in scene.values()}
    assert not any(tensor.untyped_storage().data_ptr() in inputs for tensor in result)


def test_compiles_without_graph_breaks():
    scene = random_scene(6, counts=(3, 1), size=64)
    compiled = torch.compile(simota_assign, fullgraph=True, backend="aot_eager")
    assert same(assign(scene, "static"), compiled(**scene, num_classes=5))


# --- The drop-in class and bad arguments -------------------------------------------------------------------------


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("settings", [UNION, CENTRE], ids=["union", "centre"])
def test_class_equals_function(path, settings):
    scene = random_scene(7)
    result = assign(scene, path, **settings)
    assigner = SimOTAAssigner(5, path=path, **settings)
    number = scene["strides"].shape[1]
    for image, count in enumerate(scene["num_gt"].tolist()):
        classes, mask, iou, gt, foreground = assigner(
            image, count, number, scene["gt_boxes"][image, :count], scene["gt_classes"][image, :count],
            scene["pred_boxes"][image], scene["strides"], scene["x_shifts"], scene["y_shifts"],
            scene["cls_logits"], scene["pred_boxes"], scene["obj_logits"], None, None, "cpu",
        )  # fmt: skip
        assert isinstance(foreground, int)
        assert foreground == result.num_fg[image]
        assert torch.equal(mask, result.fg_mask[image])
        assert torch.equal(gt, result.matched_gt[image, mask])
        assert torch.equal(iou, result.matched_iou[image, mask])
        assert torch.equal(classes, result.matched_classes[image, mask])


@pytest.mark.parametrize(
    ("name", "change", "error"),
    [
        ("gt_boxes", lambda t: t[..., :3], ValueError),
        ("gt_boxes", lambda t: t[0], ValueError),
        ("gt_classes", lambda t: t[:, 1:], ValueError),
        ("gt_classes", lambda t: t + 2, IndexError),
        ("gt_classes", lambda t: t - 2, IndexError),
        ("num_gt", lambda t: t + 1, ValueError),
        ("num_gt", lambda t: -t, ValueError),
        ("num_gt", lambda t: t.float(), TypeError),
        ("pred_boxes", lambda t: t[..., :3], ValueError),
        ("pred_boxes", lambda t: t[:, :0], ValueError),
        ("pred_boxes", lambda t: t.long(), TypeError),
        ("cls_logits", lambda t: t.long(), TypeError),
        ("cls_logits", lambda t: t[..., :1], ValueError),
        ("obj_logits", lambda t: t[..., 0], ValueError),
        ("strides", lambda t: t[0], ValueError),
        ("x_shifts", lambda t: t[:, 1:], ValueError),
        ("y_shifts", lambda t: t.mT, ValueError),
    ],
)
def test_bad_argument_is_named(name, change, error):
    scene = worked_scene()
    scene[name] = change(scene[name])
    for path in PATHS:
        with pytest.raises(error, match=name):
            simota_assign(**scene, num_classes=2, path=path)


def test_bad_setting_is_named():
    for setting in ("region", "path"):
        with pytest.raises(ValueError, match=setting):
            SimOTAAssigner(2, **{setting: "other"})
