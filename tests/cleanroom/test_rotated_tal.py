"""The assigner of rotated boxes against the worked example of its specification, and its two paths against each other.

What it shares with that of other boxes is tested there.
"""

import math
from functools import partial

import pytest
import torch

from cleanroom.assign._tal_rotated import enlarged, rotated_regions
from cleanroom.assign._tal_terms import Rules
from cleanroom.assign.rotated_tal import RotatedTaskAlignedAssigner, rotated_task_aligned_assign

GRID = torch.stack(torch.meshgrid(*[torch.arange(4) * 8.0 + 4] * 2, indexing="xy"), -1).view(16, 2)
TRAINER = {"alpha": 0.5, "beta": 6.0, "stride": [8, 16, 32]}
RULES = Rules(10, 10, 0.5, 6.0, 1e-9, 0.0, 0.0, False, "stable")


@pytest.fixture(params=("sparse", "static"))
def path(request):
    return request.param


def single(boxes, labels, predictions, scores, valid=None):
    """One image as the assigner's six arguments."""
    valid = [1.0] * len(boxes) if valid is None else valid
    return (
        scores[None],
        predictions[None],
        GRID,
        torch.tensor(labels, dtype=torch.float32).view(1, -1, 1),
        torch.tensor(boxes, dtype=torch.float32)[None],
        torch.tensor(valid).view(1, -1, 1),
    )


def squares(side=12.0):
    return torch.cat((GRID, torch.full((16, 2), side), torch.zeros(16, 1)), 1)


def worked_example():
    predictions, scores = squares(), torch.full((16, 2), 0.25)
    predictions[5] = torch.tensor([15.0, 16, 22, 10, 0.4])
    predictions[12] = torch.tensor([8.0, 25, 7, 4, 0.9])
    scores[5, 0], scores[12, 1] = 0.81, 0.64
    rows = [[16, 16, 24, 10, 0.5], [8, 24, 6, 4, 1.0], [0, 0, 0, 0, 0]]
    return single(rows, [0, 1, 0], predictions, scores, [1.0, 1.0, 0.0])


def candidates(box, path, **settings):
    """Anchors that are foreground when every candidate is proposed: K = A, all overlaps positive."""
    arguments = single([box], [0], squares(40.0), torch.full((16, 1), 0.5))
    result = rotated_task_aligned_assign(*arguments, topk=16, beta=0.0, path=path, **settings)
    return result.foreground[0].nonzero()[:, 0].tolist()


def scene(seed, dtype=torch.float32, batch=3, rows=12, classes=4, size=64):
    """Random images with ties, identical boxes, needles, padding anywhere and angles on edges."""
    draw = torch.Generator().manual_seed(seed)
    rand = partial(torch.rand, generator=draw)
    grids = [
        torch.stack(torch.meshgrid(*[(torch.arange(size // s) + 0.5) * s] * 2, indexing="xy"), -1).view(-1, 2)
        for s in (8, 16, 32)
    ]
    points = torch.cat(grids)
    boxes = torch.cat(
        (
            (rand(batch, rows, 2) * size).round(),
            torch.exp(rand(batch, rows, 2) * 9 - 4),
            (rand(batch, rows, 1) * 8).round() * math.pi / 8,
        ),
        -1,
    )
    boxes[:, 3] = boxes[:, 2]
    owner = torch.randint(0, rows, (batch, len(points)), generator=draw)
    predictions = boxes.gather(1, owner[..., None].expand(-1, -1, 5)) + (rand(batch, len(points), 5) * 2).round() - 1
    scores = rand(batch, len(points), classes)
    labels = torch.randint(-classes, classes, (batch, rows, 1), generator=draw).float()
    valid = (rand(batch, rows, 1) < 0.8).float()
    return *(t.to(dtype) for t in (scores, predictions, points)), labels, boxes.to(dtype), valid


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {},
            {5: 0.8938728, 6: 2.76409e-3, 8: 3.693872e-4, 9: 2.76409e-3, 10: 0.01725305, 12: 0.753307, 13: 3.693872e-4},
        ),
        (
            {"small_box": "first_stride"},
            {5: 0.8938728, 8: 3.693872e-4, 9: 2.438412e-4, 10: 0.01725305, 12: 0.753307, 13: 3.693872e-4},
        ),
        (
            {"small_box": "first_stride", "small_box_scope": "boxes"},
            {5: 0.8938728, 8: 0.5051895, 9: 0.5051895, 10: 0.01725305, 12: 0.09466782, 13: 0.5051895},
        ),
    ],
    ids=["now", "8.4.39", "8.4.8"],
)
def test_worked_example_through_the_eras(path, settings, expected):
    assigner = RotatedTaskAlignedAssigner(topk=4, num_classes=2, **TRAINER, **settings, path=path)
    given = worked_example()
    copies = [value.clone() for value in given]
    labels, boxes, scores, foreground, index = assigner(*given)
    assert foreground[0].nonzero()[:, 0].tolist() == list(expected)
    own = {8, 9, 12, 13} if "small_box" in settings else {8, 12, 13}
    assert index[0].nonzero()[:, 0].tolist() == sorted(own)
    assert labels[0].nonzero()[:, 0].tolist() == sorted(own)
    sides = [16.0, 16.0] if "small_box_scope" in settings else [6.0, 4.0]
    assert boxes[0, 12].tolist() == [8.0, 24.0, *sides, 1.0]
    found = {anchor: scores[0, anchor].amax().item() for anchor in expected}
    assert found == pytest.approx(expected, rel=3e-6)
    # Upstream wrote the enlarged sides into the caller's boxes: ultralytics issue 24260.
    assert all(torch.equal(value, copy) for value, copy in zip(given, copies, strict=True))


@pytest.mark.parametrize(
    ("box", "settings", "expected"),
    [
        ((12, 12, 16, 16, 0), {}, [0, 1, 2, 4, 5, 6, 8, 9, 10]),
        ((12, 12, 17, 17, math.pi), {"small_box": "off"}, [0, 1, 2, 4, 5, 6, 8, 9, 10]),
        ((12, 12, 17, 17, math.pi / 4), {"small_box": "off"}, [1, 4, 5, 6, 9]),
        ((16, 16, 40, 1, math.pi / 4), {"small_box": "off"}, [0, 5, 10, 15]),
        ((16, 16, 40, 1, -math.pi / 4), {"small_box": "off"}, [3, 6, 9, 12]),
        ((16, 16, 1, 1, 0.3), {}, [5, 6, 9, 10]),
        ((16, 16, 1, 1, 0.3), {"small_box": "off"}, []),
        ((16, 16, 9, 9, 0.3), {"small_box": "first_stride"}, []),
        ((16, 16, math.nan, 9, 0.3), {}, []),
    ],
)
def test_candidates(path, box, settings, expected):
    assert candidates(box, path, **settings) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("small_box", ["off", "min_side"])
def test_both_paths_decide_alike(dtype, small_box):
    for seed in range(6):
        given = scene(seed, dtype)
        found = [
            rotated_task_aligned_assign(
                *given, topk=7, topk2=seed % 3 or None, **TRAINER, small_box=small_box, path=path
            )
            for path in ("sparse", "static")
        ]
        for one, other in zip(*found, strict=True):
            assert torch.equal(one, other)
        assert found[0].foreground.any()
        assert found[0].scores.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_bounds_hold_every_point_inside(dtype):
    draw = torch.Generator().manual_seed(3)
    count = 400
    boxes = torch.cat(
        (
            torch.rand(count, 2, generator=draw) * 64,
            torch.exp(torch.rand(count, 2, generator=draw) * 14 - 10),
            (torch.rand(count, 1, generator=draw) - 0.5) * 7,
        ),
        1,
    ).to(dtype)
    boxes[::40, 2] = 0
    regions = rotated_regions(boxes, RULES).map(lambda number: number[:, None])
    x, y = (torch.arange(0, 64, 0.5, dtype=dtype)[:, None].expand(-1, 128).reshape(1, -1) for _ in range(2))
    y = y.view(128, 128).T.reshape(1, -1)
    inside = regions.contains(x, y)
    left, top, right, bottom = regions.bounds()
    between = (x > left) & (x < right) & (y > top) & (y < bottom)
    assert inside.sum() > 1000
    assert not (inside & ~between).any()
    if dtype != torch.float16:  # where corners are rounded to half pixels, the bounds may be the whole image
        assert between.sum() < 40 * inside.sum()


def test_a_side_whose_products_are_zero_has_no_bounds():
    region = rotated_regions(torch.tensor([[0.0, 0, 1e-44, 20, 0]]), RULES)
    assert region.contains(torch.tensor([0.03]), torch.tensor([1.0])).item()
    left, _, right, _ = region.bounds()
    assert left < 0.03 < right


def test_enlarged_boxes_are_new_ones():
    boxes = torch.tensor([[8.0, 24, 6, 20, 1]])
    sides = enlarged(boxes, Rules(1, 1, 1.0, 6.0, 1e-9, 8.0, 16.0, False, "stable"))
    assert sides.tolist() == [[8, 24, 16, 20, 1]]
    assert boxes.tolist() == [[8, 24, 6, 20, 1]]


def test_thin_boxes_do_not_spoil_their_image(path):
    """One NaN overlap made every score of the image NaN: ultralytics issues 10108, 24933 and 25007."""
    predictions, scores = squares(), torch.full((16, 2), 0.25)
    needle = [12.0, 12, 1e-3, 30, 0.5]
    predictions[5] = torch.tensor(needle)
    given = single([needle, [20, 20, 16, 12, 0.2]], [0, 1], predictions, scores)
    result = rotated_task_aligned_assign(*given, topk=4, **TRAINER, path=path)
    assert result.scores.isfinite().all()
    assert result.gt_index[0, 5] == 0
    assert result.scores[0, 5] > 0.99


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_prediction_that_is_not_finite_is_never_chosen(path, value):
    given = worked_example()
    given[1][0, 5, 4] = value
    result = rotated_task_aligned_assign(*given, topk=4, **TRAINER, path=path)
    assert not result.foreground[0, 5]
    assert result.scores.isfinite().all()


def test_no_ground_truth_returns_what_upstream_does(path):
    given = single([], [], squares(), torch.full((16, 2), 0.5))
    given = (*given[:4], torch.zeros(1, 0, 5), given[5])
    labels, boxes, scores, foreground, _ = RotatedTaskAlignedAssigner(num_classes=2, path=path)(*given)
    assert boxes.shape == (1, 16, 5)
    assert (labels == 2).all()
    assert not any(value.any() for value in (foreground, boxes, scores))


@pytest.mark.parametrize(
    ("change", "settings", "message"),
    [
        ({4: torch.zeros(1, 3, 4)}, {}, "gt_bboxes must have shape"),
        ({1: torch.zeros(1, 16, 4)}, {}, "pd_bboxes must have shape"),
        ({}, {"small_box_scope": "all"}, "small_box_scope"),
        ({}, {"small_box": "copy"}, "small_box must be"),
        ({}, {"topk": 17}, "topk must be"),
        ({}, {"path": "triton"}, "path must be"),
    ],
)
def test_bad_arguments_are_named(change, settings, message):
    given = list(worked_example())
    for place, value in change.items():
        given[place] = value
    with pytest.raises(ValueError, match=message):
        rotated_task_aligned_assign(*given, **settings)


def test_compiles_in_one_graph():
    torch._dynamo.reset()
    given = worked_example()
    assign = partial(rotated_task_aligned_assign, topk=4, **TRAINER)
    compiled = torch.compile(assign, fullgraph=True, backend="aot_eager")
    for one, other in zip(compiled(*given), assign(*given), strict=True):
        torch.testing.assert_close(one, other)


def test_nothing_is_recorded(path):
    given = worked_example()
    for tensor in (*given[:2], given[4]):
        tensor.requires_grad_()
    assert not any(value.requires_grad for value in rotated_task_aligned_assign(*given, topk=4, **TRAINER, path=path))


@pytest.mark.parametrize(("seed", "dtype"), [(7, torch.float16), (17, torch.float16), (35, torch.bfloat16)])
def test_boxes_given_in_half_are_weighed_as_exactly_as_others(seed, dtype):
    """The form that has upstream's bits elsewhere loses some here, where upstream's are of other numbers."""
    draw = torch.Generator().manual_seed(seed)
    rand = partial(torch.rand, generator=draw)
    points = torch.stack(torch.meshgrid(*[torch.arange(8) * 8.0 + 4] * 2, indexing="xy"), -1).view(64, 2)

    def given(kind):
        boxes = torch.cat((rand(1, 3, 2) * 64, rand(1, 3, 2) * 40 + 2, rand(1, 3, 1) * 3), -1)
        around = points[None] + torch.randn(1, 64, 2, generator=draw) * 4
        predictions = torch.cat((around, rand(1, 64, 2) * 40 + 2, rand(1, 64, 1) * 3), -1)
        scores, labels = rand(1, 64, 3), torch.randint(3, (1, 3, 1), generator=draw)
        return *(part.to(kind) for part in (scores, predictions, points)), labels, boxes.to(kind), torch.ones(1, 3, 1)

    arguments = [given(kind) for kind in (torch.float16, torch.bfloat16)][dtype == torch.bfloat16]
    found = rotated_task_aligned_assign(*arguments)
    exact = rotated_task_aligned_assign(*(part.double() for part in arguments))
    assert torch.equal(found.gt_index, exact.gt_index)
    assert torch.equal(found.scores, exact.scores.to(dtype))
