"""The task-aligned kernels against the static path, and against faults planted in them."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch.fx.experimental.proxy_tensor import make_fx

from cases import tal as tal_cases
from cleanroom.assign._tal_terms import Rules, Scene
from cleanroom.assign.tal import TaskAlignedAssigner, assign, task_aligned_assign
from cleanroom.kernels import tal, tal_targets
from cleanroom.overlap import box_terms
from tests.kernels.conftest import DEVICE, programs_reordered

TRAINER = {"alpha": 0.5, "beta": 6.0, "stride": [8, 16, 32]}
VERSION_8_1 = {"small_box": "off", "edge_round_trip": False, "ciou_alpha": "legacy"}
RULES = Rules(10, 10, 0.5, 6.0, 1e-9, 16.0, 16.0, True, "stable")
# Centres of a 4 x 4 grid of stride 8.
GRID = torch.stack(torch.meshgrid(*[torch.arange(4) * 8.0 + 4] * 2, indexing="xy"), -1).view(16, 2)
NAN = float("nan")
ATOL = 2e-7


def close(expected, found):
    """Decisions equal; scores within what an arc tangent two units off makes of a sixth power.

    The absolute part: overlaps are differences of terms up to 1, whose roundings stay where the difference is small.
    """
    for name, one, other in zip(expected._fields, expected, found, strict=True):
        if one.is_floating_point():
            rtol = max(1e-5, torch.finfo(one.dtype).eps)
            torch.testing.assert_close(
                other, one, rtol=rtol, atol=ATOL, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}"
            )
        else:
            assert torch.equal(one, other), name


def both(arguments, **given):
    """Assert that kernels decide as the static path does, and give what they answer."""
    arguments = [argument.to(DEVICE) for argument in arguments]
    expected = task_aligned_assign(*arguments, **given, path="static")
    found = task_aligned_assign(*arguments, **given, path="triton")
    close(expected, found)
    return found


def scene(seed, dtype=torch.float32, size=64, batch=2, rows=8, classes=4):
    """Random images with ties, identical boxes, tiny boxes, padding anywhere and rows without overlap."""
    draw = torch.Generator().manual_seed(seed)
    rand = partial(torch.rand, generator=draw)
    grids = [torch.meshgrid(*[(torch.arange(size // s) + 0.5) * s] * 2, indexing="xy") for s in (8, 16, 32)]
    points = torch.cat([torch.stack(grid, -1).view(-1, 2) for grid in grids])
    sides = torch.exp(rand(batch, rows, 2) * 5 - 0.5)
    start = (rand(batch, rows, 2) * size - sides / 2).round()
    boxes = torch.cat((start, start + sides), -1)
    boxes[:, 3] = boxes[:, 2]
    aim = torch.randint(0, rows, (batch, len(points), 1), generator=draw)
    predictions = boxes.gather(1, aim.expand(-1, -1, 4)) + (rand(batch, len(points), 4) * 8).round() - 4
    scores = rand(batch, len(points), classes)
    if seed % 3 == 0:
        scores = (scores * 3).round() / 3  # many equal, many zero
    labels = torch.randint(-classes, classes, (batch, rows, 1), generator=draw).float()
    valid = (rand(batch, rows, 1) < 0.8).float()
    return [*(t.to(dtype) for t in (scores, predictions, points)), labels, boxes.to(dtype), valid]


def around(reach):
    """Boxes that reach so far from the points of the grid."""
    return torch.cat((GRID - reach, GRID + reach), 1)


def single(boxes, labels, predictions, scores, valid=None):
    """One image on the grid as the assigner's six arguments."""
    valid = [1.0] * len(boxes) if valid is None else valid
    labels, boxes = torch.tensor(labels, dtype=torch.float32).view(1, -1, 1), torch.tensor(boxes, dtype=torch.float32)
    return [scores[None], predictions[None], GRID, labels, boxes[None], torch.tensor(valid).view(1, -1, 1)]


def one_hot(value, *places):
    """Scores (16, 1): a value at some anchors, else 0."""
    scores = torch.zeros(16, 1)
    scores[list(places)] = value
    return scores


def contest():
    """Rows 0 and 1 propose anchor 5; row 2, which does not, overlaps it most."""
    predictions, scores = around(1), torch.full((16, 2), 0.01)
    predictions[5], predictions[6] = torch.tensor([[5.5, 5.5, 21.5, 21.5], [6.0, 6, 22, 22]])
    scores[5, 0], scores[5, 1], scores[6, 1] = 0.9, 0.3, 0.9
    return single([[8, 8, 24, 24], [4, 4, 20, 20], [6, 6, 22, 22]], [0, 0, 1], predictions, scores)


def on_the_edge():
    """Points that are inside by as much as is still outside, 1e-9, from either side of each axis."""
    arguments = single([[0, 0, 1, 1], [-1, -1, 0, 0]], [0, 0], around(9), HALF)
    tiny, half = 1e-9, 0.5
    places = [(tiny, half), (half, tiny), (-tiny, -half), (-half, -tiny)]
    arguments[2] = torch.tensor(places * 4)
    return arguments


HALF, QUARTER = torch.full((16, 1), 0.5), torch.full((16, 2), 0.25)
ALL = torch.tensor([0.0, 0, 32, 32])
EVERYWHERE = ALL.expand(16, 4)
EDGE_CASES = {
    "ties": (single([[0, 0, 32, 32]], [0], EVERYWHERE, HALF), {"topk": 5}),
    "equal rows": (single([[0, 0, 32, 32]] * 3, [0, 0, 0], EVERYWHERE, HALF), {"topk": 5}),
    "equal rows, other classes": (single([[0, 0, 32, 32]] * 2, [0, 1], EVERYWHERE, QUARTER), {"topk": 16}),
    "contest": (contest(), {"topk": 1, **TRAINER}),
    "all padding": (single([[0, 0, 32, 32]] * 2, [0, 0], EVERYWHERE, HALF, [0.0, 0.0]), {"topk": 5}),
    "padding is NaN": (single([[NAN] * 4, [0, 0, 32, 32]], [NAN, 0], EVERYWHERE, HALF, [0.0, 1.0]), {"topk": 5}),
    "NaN rows": (single([[0, NAN, 32, 32], [0, 0, float("inf"), 32]], [0, 0], EVERYWHERE, HALF), {"topk": 5}),
    "thin": (single([[13, 13, 29, 14], [15, 0, 15, 32], [20, 20, 10, 10]], [0] * 3, around(9), HALF), {"topk": 3}),
    "inverted along one axis": (
        single([[20, 10, 10, 20]] * 2, [0, 0], torch.tensor([20.0, 10, 10, 20]).expand(16, 4), HALF),
        {"topk": 16, "beta": 1.0},
    ),
    "thin, exact": (single([[13, 13, 29, 14]], [0], around(9), HALF), {"topk": 3, **VERSION_8_1}),
    "outside": (single([[-50, -50, -49, -49]], [0], around(9), HALF), {"topk": 3}),
    "k above the candidates": (single([[0, 0, 16, 16], [8, 8, 32, 32]], [0, 0], around(9), HALF), {"topk": 16}),
    "no proposals": (single([[0, 0, 32, 32]], [0], EVERYWHERE, HALF), {"topk": 0}),
    "zeros compete": (single([[0, 0, 32, 12]], [0], around(6), 0 * HALF), {"topk": 2, "stride": [8]}),
    "zeros of others": (single([[16, 16, 32, 32]], [0], around(6), 0 * HALF), {"topk": 2, "stride": [8]}),
    "zeros fill up": (single([[0, 0, 32, 32]], [0], around(16), one_hot(0.5, 1, 9)), {"topk": 5}),
    "zeros take places": (single([[8, 0, 32, 32]], [0], around(16), one_hot(0.5, 9)), {"topk": 3}),
    "zeros fill up later": (single([[8, 0, 32, 32]], [0], around(16), one_hot(0.5, 1, 9)), {"topk": 16, "topk2": 4}),
    "no overlap": (
        single([[0, 0, 16, 16], [16, 16, 32, 32], [16, 16, 32, 32]], [1, 1, 0], around(1) + 500, QUARTER),
        {"topk": 16},
    ),
    "NaN box": (single([[0, 0, 32, 32]], [0], torch.cat((around(9)[:8], around(NAN)[8:])), HALF), {"topk": 9}),
    "NaN box, no power": (single([[0, 0, 32, 32]], [0], around(NAN), HALF), {"topk": 9, "beta": 0.0}),
    "infinite box": (single([[0, 0, 32, 32]], [0], around(float("inf")), HALF), {"topk": 9}),
    "NaN scores": (single([[0, 0, 32, 32]], [0], EVERYWHERE, NAN * HALF), {"topk": 9}),
    "infinite scores": (single([[0, 0, 32, 32]], [0], EVERYWHERE, one_hot(float("inf"), 3, 4)), {"topk": 9}),
    "negative scores": (single([[0, 0, 32, 32]], [0], EVERYWHERE, one_hot(-0.5, 3, 4)), {"topk": 9}),
    "negative zero": (single([[0, 0, 32, 32]], [0], EVERYWHERE, one_hot(-0.0, 0, 4)), {"topk": 3}),
    "no eps": (single([[0, 0, 32, 32]], [0], around(9), one_hot(0.5, 2)), {"topk": 3, "eps": 0.0}),
    "bad label of padding": (single([[0, 0, 32, 32]] * 2, [0, 7], EVERYWHERE, HALF, [1.0, 0.0]), {"topk": 3}),
    "on the edge": (on_the_edge(), {"topk": 16, **VERSION_8_1}),
    "former alpha": (single([[2, 1, 30, 9]], [0], around(9), HALF), {"topk": 16, "beta": 1.0, **VERSION_8_1}),
    "bad label outside": (single([[0, 0, 32, 32], [-99, 0, -9, 9]], [0, 7], EVERYWHERE, HALF), {"topk": 3}),
}


# Against the torch path


def small(case):
    """A program takes milliseconds under the interpreter."""
    images, rows = case.tensors["gt_bboxes"].shape[:2]
    return images * rows <= 24


@settings(max_examples=4, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(tal_cases.cases(dtypes=("float32", "float16", "bfloat16")).filter(small))
def test_drawn_cases(case):
    given = {name: value for name, value in case.settings.items() if name != "num_classes"}
    if "invalid" not in case.tags:
        both(case.tensors.values(), **given)
        return
    errors = []
    for path in ("static", "triton"):
        with pytest.raises((ValueError, TypeError, RuntimeError)) as found:
            task_aligned_assign(*case.tensors.values(), **given, path=path)
        errors.append((found.type, str(found.value)))
    assert errors[0] == errors[1]


@pytest.mark.parametrize(
    ("dtype", "given"),
    [
        (torch.float32, {"topk": 10, **TRAINER}),
        (torch.float16, {"topk": 10, **TRAINER}),
        (torch.bfloat16, {"topk": 10, **TRAINER}),
        (torch.float32, {"topk": 1, "topk2": 3}),
        (torch.float32, {"topk": 7, "topk2": 1, **TRAINER}),
        (torch.bfloat16, {"topk": 84, "topk2": 5}),
        (torch.float32, {"topk": 4, "alpha": 0.0, "beta": 0.0}),
        (torch.float16, {"topk": 4, "alpha": 0.7, "beta": 16.0}),
        (torch.float32, {"topk": 10, **TRAINER, **VERSION_8_1}),
        (torch.bfloat16, {"topk": 10, **TRAINER, **VERSION_8_1}),
    ],
    ids=str,
)
def test_scenes(dtype, given):
    found = both(scene(len(given), dtype), **given)
    assert found.foreground.any()


@pytest.mark.parametrize("name", EDGE_CASES)
def test_edge_cases(name):
    arguments, given = EDGE_CASES[name]
    both(arguments, **given)


@pytest.mark.parametrize("logits", [torch.float32, torch.float16, torch.bfloat16])
def test_logits(logits):
    scores, predictions, points, labels, boxes, mask = scene(1)
    given = Scene(
        (scores * 12 - 6).to(logits),
        box_terms(predictions),
        points,
        labels[..., 0].long(),
        boxes,
        mask[..., 0] > 0,
        True,
    )
    close(assign(given, RULES, path="static"), assign(given, RULES, path="triton"))


def test_points_need_not_form_a_grid():
    scores, predictions, _, *rest = scene(8)
    points = torch.rand(84, 2, generator=torch.Generator().manual_seed(0)) * 64
    points[40:44], points[50] = points[3], NAN
    assert both([scores, predictions, points, *rest], topk=5).foreground.any()


def test_images_without_ground_truths_and_one_row():
    arguments = scene(2)
    arguments[5][0] = 0
    both(arguments, topk=5)
    both([*arguments[:3], *(argument[:, :1] for argument in arguments[3:])], topk=5)


@pytest.mark.parametrize("topk", [tal.MOST - 1, tal.MOST, tal.MOST + 1])
def test_many_proposals(topk):
    both(scene(3, size=88, batch=1, rows=4), topk=topk)


def test_nothing_to_do():
    for change in (lambda t: t[:0] if t.dim() == 3 else t, lambda t: t[:, :0] if t.shape[1] == 8 else t):
        found = task_aligned_assign(*map(change, scene(0)), topk=5, path="triton")
        assert not found.foreground.any()
    scores = torch.rand(2, 0, 4)
    owner, score = tal.assigned(
        scores, torch.rand(2, 0, 4), torch.rand(0, 2), torch.zeros(2, 3).long(), torch.rand(2, 3, 4),
        torch.ones(2, 3).bool(), RULES,
    )  # fmt: skip
    assert owner.shape == score.shape == (2, 0)


@pytest.mark.parametrize("label", [4.0, -5.0])
def test_bad_label_of_a_row_that_contains_an_anchor(label):
    arguments = scene(4)
    arguments[3][1, 6], arguments[4][1, 6], arguments[5][1, 6] = label, torch.tensor([2.0, 2, 60, 60]), 1
    if DEVICE.type == "cuda":
        pytest.skip("a failed assertion ends the process's use of the device")
    with pytest.raises(RuntimeError, match=r"gt_labels: .* outside \[-4, 4\)"):
        task_aligned_assign(*arguments, topk=3, path="triton")


# Sizes and layouts


@pytest.mark.parametrize(("block", "pairs"), [(16, 16), (64, 64), (84, 128), (128, 4096)])
def test_block_sizes(monkeypatch, block, pairs):
    """84 anchors and 8 rows: several blocks, a whole number of them, and one larger than the data."""
    arguments = scene(5)
    if block == 84:
        block, arguments[:3] = 16, [arguments[0][:, :80], arguments[1][:, :80], arguments[2][:80]]
    monkeypatch.setattr(tal, "BLOCK", block)
    monkeypatch.setattr(tal, "PAIRS", pairs)
    monkeypatch.setattr(tal_targets, "BLOCK", block)
    both(arguments, topk=5)
    both(arguments, topk=20, topk2=2)


def within(tensor):
    """The same values as a slice out of a larger tensor of NaN, or of what is no class."""
    shape = [size + 3 for size in tensor.shape]
    larger = torch.full(shape, NAN if tensor.is_floating_point() else 99, dtype=tensor.dtype)
    view = larger[tuple(slice(1, 1 + size) for size in tensor.shape)]
    return view.copy_(tensor)


@pytest.mark.parametrize("change", [within, lambda t: t.mT.contiguous().mT, lambda t: within(t.mT).mT])
def test_layouts(change):
    both([change(argument) for argument in scene(6)], topk=5)


def test_expanded_scores():
    arguments = scene(7)
    arguments[0] = arguments[0][:1, :, :1].expand(arguments[0].shape)
    both(arguments, topk=5)


# Memory and order


@pytest.mark.parametrize("topk2", [None, 2])
def test_every_output_is_written(poisoned, topk2):
    both(scene(9), topk=5, topk2=topk2)


@pytest.mark.parametrize("topk2", [None, 2])
def test_order_of_programs_and_repeats(reordered, topk2):
    arguments = scene(10)
    expected = both(arguments, topk=5, topk2=topk2)
    assert all(map(torch.equal, expected, task_aligned_assign(*arguments, topk=5, topk2=topk2, path="triton")))


@pytest.mark.parametrize("topk2", [None, 2])
def test_nothing_of_boxes_times_anchors_is_allocated(allocations, topk2):
    task_aligned_assign(*scene(11, rows=12), topk=5, topk2=topk2, path="triton")
    assert allocations
    assert max(map(torch.Size.numel, map(torch.Size, allocations))) <= 2 * 84 * 4


# What PyTorch makes of the operator


def test_compiles_as_one_graph():
    assigner = TaskAlignedAssigner(topk=5, num_classes=4, path="triton")
    compiled = torch.compile(assigner, fullgraph=True, backend="aot_eager")
    arguments = [argument.to(DEVICE) for argument in scene(12)]
    assert all(map(torch.equal, assigner(*arguments), compiled(*arguments)))


def test_is_two_nodes_of_a_graph():
    """Fake tensors have no values: what looked at one would raise."""
    traced = make_fx(partial(task_aligned_assign, topk=5, path="triton"), tracing_mode="fake")(*scene(0))
    called = [node.target for node in traced.graph.nodes if str(node.target).startswith("cleanroom")]
    assert called == [torch.ops.cleanroom.tal_assign.default, torch.ops.cleanroom.tal_targets.default]


def test_inputs_that_need_a_gradient():
    arguments = scene(13)
    for argument in (arguments[0], arguments[1], arguments[4]):
        argument.requires_grad_()
    assert not any(output.requires_grad for output in task_aligned_assign(*arguments, topk=5, path="triton"))
    found = answered(tal, arguments, topk=5)
    found += tal_targets.targets(found[0], arguments[3][..., 0].long().to(DEVICE), arguments[4].to(DEVICE))
    assert not any(output.requires_grad for output in found)


# Planted faults


def answered(module, arguments, topk, topk2=None):
    """What a module's kernels answer with the trainer's settings: owner and score."""
    scores, predictions, points, labels, boxes, mask = (argument.to(DEVICE) for argument in arguments)
    rules = replace(RULES, topk=topk, topk2=topk2 or topk)
    return module.assigned(scores, predictions, points, labels[..., 0].long(), boxes, mask[..., 0] != 0, rules)


def is_right(module, arguments, **counts):
    owner, score = answered(module, arguments, **counts)
    expected = task_aligned_assign(*arguments, **counts, **TRAINER, path="static")
    rows = torch.where(expected.foreground, expected.gt_index, -1)
    return torch.equal(owner.long(), rows) and torch.allclose(score, expected.scores, rtol=1e-5, atol=ATOL)


FAULTS = {
    "mask one short at a block's end": (
        [("place, place < anchors", "place, place < anchors - 1")],
        "ties",
        {"topk": 16},
    ),
    "the last tile is dropped": ([("exists = tile < tiles", "exists = tile < tiles - 1")], "ties", {"topk": 16}),
    "one slot too few": ([("lane < COUNT, keys", "lane < COUNT - 1, keys")], "ties", {"topk": 5}),
    "the highest anchor of equals": (
        [("(anchor ^ _LAST)", "anchor"), ("_LAST).to(tl.int32) ^ _LAST", "_LAST).to(tl.int32)")],
        "ties",
        {"topk": 5},
    ),
    "the highest row of equals": (
        [("_key(overlap, other", "_key(overlap, rows - other"), ("_anchor_of(most)", "rows - _anchor_of(most)")],
        "equal rows",
        {"topk": 5},
    ),
    "zeros do not fill up": ([("lowest == 0", "lowest == 1")], "zeros fill up", {"topk": 5}),
    "zeros take no places": (
        [("keys = tl.where(positive,", "keys = tl.where(zero == 0,")],
        "zeros take places",
        {"topk": 3},
    ),
    "an output not written": ([("0.0), mask=image < images", "0.0), mask=owned")], "ties", {"topk": 5}),
    "counters not set": (
        [("tl.store(claims + flat, tl.zeros([BLOCK], tl.int32), mask=inside)", "pass")],
        "contest",
        {"topk": 1},
    ),
    "a lost claim": (
        [
            ("tl.atomic_add(claims + image * anchors + anchor, 1,", "tl.store(claims + image * anchors + anchor, 1,"),
            ('mask=chosen, sem="relaxed")\n    tl.atomic_min', "mask=chosen)\n    tl.atomic_min"),
        ],
        "contest",
        {"topk": 1},
    ),
    "a lost maximum": (
        [
            (
                'tl.atomic_max(peak, metric.to(tl.int32, bitcast=True), mask=chosen, sem="relaxed")',
                "tl.store(peak, metric.to(tl.int32, bitcast=True), mask=chosen)",
            )
        ],
        "k above the candidates",
        {"topk": 16},
    ),
    "whoever comes last owns": (
        [("winner = tl.where(contested,", "winner = tl.where(chosen & False,")],
        "equal rows",
        {"topk": 5},
    ),
    "conflicts among proposers alone": (
        [("usable = contained &", "usable = contained & (overlap < 0.8) &")],
        "contest",
        {"topk": 1},
    ),
    "the second selection keeps all": (
        [('rules.topk2, "SLOTS": _slots(rules.topk2)', 'rules.topk, "SLOTS": _slots(rules.topk)')],
        "ties",
        {"topk": 5, "topk2": 2},
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_caught(planted, poisoned, name):
    faults, case, counts = FAULTS[name]
    arguments, _ = EDGE_CASES[case]
    assert is_right(tal, arguments, **counts)
    assert not is_right(planted(tal, *faults), arguments, **counts)


def test_a_race_is_caught(planted):
    """Where the last program to write decides, other orders of programs give other answers."""
    racing = planted(tal, ("winner = tl.where(contested,", "winner = tl.where(chosen & False,"))
    arguments, _ = EDGE_CASES["equal rows"]
    for module, same in ((tal, True), (racing, False)):
        owner, _ = answered(module, arguments, topk=5)
        with programs_reordered(lambda natural: natural[::-1]):
            again, _ = answered(module, arguments, topk=5)
        assert torch.equal(owner, again) == same


# The compiler


def launches():
    """Every variant of the kernels; see `compiling`."""
    for dtype, rules, logits in (
        (torch.float32, RULES, True),
        (torch.float16, replace(RULES, topk=tal.MOST, topk2=tal.MOST, alpha=1.0), False),
        (torch.bfloat16, replace(RULES, topk2=1, alpha=0.7, ciou_alpha="legacy"), True),
    ):
        arguments = [torch.empty(*shape, dtype=dtype) for shape in ((2, 84, 5), (2, 84, 4), (84, 2))]
        arguments += [torch.empty(2, 3).long(), torch.empty(2, 3, 4, dtype=dtype), torch.empty(2, 3).bool()]
        owner, *_ = tal.launch_all(*arguments, rules, logits)
        tal_targets.gather_all(owner, *arguments[3:5])
