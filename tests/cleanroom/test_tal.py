"""The task-aligned assigner against the worked examples of its specification, and its two paths against each other."""

from functools import partial

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from cleanroom.assign.tal import TaskAlignedAssigner, check_eras, task_aligned_assign
from cleanroom.overlap import box_terms, complete_iou
from cleanroom.paths import choose_path

PATHS = ("sparse", "static")
OUTPUTS = ("target_labels", "target_bboxes", "target_scores", "fg_mask", "target_gt_idx")
TRAINER = {"alpha": 0.5, "beta": 6.0, "stride": [8, 16, 32]}
VERSION_8_1 = {"small_box": "off", "edge_round_trip": False, "ciou_alpha": "legacy"}
VERSION_8_0 = VERSION_8_1 | {"pair_domain": "all"}
# Centres of a 4 x 4 grid of stride 8; anchor k = 4 * row + column.
GRID = torch.stack(torch.meshgrid(*[torch.arange(4) * 8.0 + 4] * 2, indexing="xy"), -1).view(16, 2)


@pytest.fixture(params=PATHS)
def path(request):
    return request.param


def around(points, reach):
    """Boxes that reach so far from their points."""
    return torch.cat((points - reach, points + reach), 1)


def single(boxes, labels, predictions, scores, valid=None, points=GRID):
    """One image as the assigner's six arguments."""
    valid = [1.0] * len(boxes) if valid is None else valid
    return (
        scores[None],
        predictions[None],
        points,
        torch.tensor(labels, dtype=torch.float32).view(1, -1, 1),
        torch.as_tensor(boxes, dtype=torch.float32)[None],
        torch.tensor(valid).view(1, -1, 1),
    )


def worked_example():
    predictions, scores = around(GRID, 6), torch.full((16, 2), 0.25)
    predictions[5] = torch.tensor([3.0, 3, 18, 18])
    predictions[10] = torch.tensor([11.0, 10, 30, 25])
    scores[5, 0], scores[10, 1], scores[6, 1], scores[11, 1] = 0.81, 0.64, 0.36, 0.30
    boxes = [[2, 2, 18, 18], [10, 10, 30, 26], [0, 0, 0, 0]]
    return single(boxes, [0, 1, 0], predictions, scores, [1.0, 1.0, 0.0])


def candidates(box, points=GRID, valid=1.0, **settings):
    """Anchors that are foreground when every candidate is proposed: K = A, all overlaps and scores positive."""
    count = len(points)
    arguments = single([box], [0], around(points, 100), torch.full((count, 1), 0.5), [valid], points)
    result = task_aligned_assign(*arguments, topk=count, **settings)
    return result.foreground[0].nonzero()[:, 0].tolist()


def scene(seed, dtype=torch.float32, size=64, batch=3, rows=12, classes=4):
    """Random images with ties, identical boxes, tiny boxes, padding anywhere and rows without overlap."""
    draw = torch.Generator().manual_seed(seed)
    rand = partial(torch.rand, generator=draw)
    points = torch.cat(
        [
            torch.stack(torch.meshgrid(*[(torch.arange(size // s) + 0.5) * s] * 2, indexing="xy"), -1).view(-1, 2)
            for s in (8, 16, 32)
        ]
    )
    sides = torch.exp(rand(batch, rows, 2) * 5 - 0.5)
    start = (rand(batch, rows, 2) * size - sides / 2).round()
    boxes = torch.cat((start, start + sides), -1)
    boxes[:, 3] = boxes[:, 2]
    owner = torch.randint(0, rows, (batch, len(points)), generator=draw)
    predictions = boxes.gather(1, owner[..., None].expand(-1, -1, 4)) + (rand(batch, len(points), 4) * 8).round() - 4
    scores = rand(batch, len(points), classes)
    if seed % 3 == 0:
        scores = (scores * 3).round() / 3  # many equal, many zero
    labels = torch.randint(-classes, classes, (batch, rows, 1), generator=draw).float()
    valid = (rand(batch, rows, 1) < 0.8).float()
    return *(t.to(dtype) for t in (scores, predictions, points)), labels, boxes.to(dtype), valid


# Worked examples of the specification


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ((0, 0, 10, 10), (5, 5, 15, 20), -0.01916454),
        ((0, 0, 0, 0), (1, 1, 2, 2), -0.61249995),
        ((0, 0, 10, 10), (10, 0, 20, 10), -0.2),
        ((0, 0, 10, 10), (2, 2, 4, 4), 0.0),
        ((5, 5, 2, 2), (1, 1, 2, 2), -4.0),
        ((1, 1, 2, 2), (1e6, 1e6, 1e6 + 1, 1e6 + 1), -0.99999803),
        ((0, 0, 1e19, 1e19), (0, 0, 1e19, 1e19), 1.0),
        ((0, 0, 10, float("inf")), (1, 1, 2, 2), float("nan")),
    ],
)
def test_complete_iou(first, second, expected):
    overlap = complete_iou(*(box_terms(torch.tensor(box, dtype=torch.float32)) for box in (first, second)))
    torch.testing.assert_close(overlap, torch.tensor(expected), rtol=0, atol=1e-8, equal_nan=True)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"topk": 3},
            {1: 2.915862e-4, 4: 2.915862e-4, 5: 0.8779297, 6: 1.358923e-4, 10: 0.8898628, 11: 4.050531e-5},
        ),
        ({"topk": 3, "topk2": 1}, {5: 0.8779297, 10: 0.8898628}),
        *(
            (
                {"topk": topk},
                {
                    0: 1.095993e-6,
                    1: 2.915862e-4,
                    4: 2.915862e-4,
                    5: 0.8779297,
                    6: 1.358923e-4,
                    7: 4.053295e-8,
                    9: 3.697611e-5,
                    10: 0.8898628,
                    11: 4.050531e-5,
                },
            )
            for topk in (6, 10)
        ),
    ],
)
def test_worked_example(path, settings, expected):
    labels, boxes, scores, foreground, index = TaskAlignedAssigner(num_classes=2, **settings, **TRAINER, path=path)(
        *worked_example()
    )
    second = [anchor for anchor in expected if anchor in (6, 7, 9, 10, 11)]
    assert foreground[0].nonzero()[:, 0].tolist() == list(expected)
    assert index[0].nonzero()[:, 0].tolist() == second
    assert labels[0].nonzero()[:, 0].tolist() == second
    for anchor in range(16):
        row = [10.0, 10, 30, 26] if anchor in second else [2.0, 2, 18, 18]
        assert boxes[0, anchor].tolist() == row
    dense = torch.zeros(16, 2)
    for anchor, value in expected.items():
        dense[anchor, int(anchor in second)] = value
    torch.testing.assert_close(scores[0], dense, rtol=3e-6, atol=0)


def test_conflict_goes_to_a_row_that_did_not_propose(path):
    predictions, scores = around(GRID, 1), torch.full((16, 2), 0.01)
    predictions[5] = torch.tensor([5.5, 5.5, 21.5, 21.5])
    predictions[6] = torch.tensor([6.0, 6, 22, 22])
    scores[5, 0], scores[5, 1], scores[6, 1] = 0.9, 0.3, 0.9
    arguments = single([[8, 8, 24, 24], [4, 4, 20, 20], [6, 6, 22, 22]], [0, 0, 1], predictions, scores)
    result = task_aligned_assign(*arguments, topk=1, **TRAINER, path=path)
    assert result.foreground[0].nonzero()[:, 0].tolist() == [5, 6]
    assert result.gt_index[0, [5, 6]].tolist() == [2, 2]
    torch.testing.assert_close(result.scores[0, [5, 6]], torch.tensor([0.27396, 1.0]), rtol=2e-5, atol=0)


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ((4, 4, 20, 20), [5]),
        ((4.001, 4, 20, 20), [5, 6]),  # below 16 wide, so enlarged about its centre and past anchor 6
        ((3.999, 3.999, 20.001, 20.001), [0, 1, 2, 4, 5, 6, 8, 9, 10]),
        ((13, 13, 15, 15), [5, 6, 9, 10]),
        ((15, 15, 15, 15), [5, 6, 9, 10]),
        ((20, 20, 10, 10), [5, 6, 9, 10]),
        ((15.9, 15.9, 16.1, 16.1), [5, 6, 9, 10]),
        ((13, 13, 29, 14), [6, 7, 10, 11]),
        ((-50, -50, -49, -49), []),
        ((float("nan"), 0, 20, 20), []),
        ((0, 0, float("inf"), 20), []),
    ],
)
def test_candidates(path, box, expected):
    assert candidates(box, path=path) == expected


def test_candidates_of_invalid_row(path):
    assert candidates((13, 13, 15, 15), valid=0.0, path=path) == []


@pytest.mark.parametrize(
    ("box", "settings", "expected"),
    [
        ((15, 15, 17, 17), {"stride": [8]}, []),
        ((15, 15, 17, 17), {"stride": [4, 8, 16]}, []),
        ((15, 15, 17, 17), {"stride": [8, 64]}, list(range(16))),
        ((13, 13, 23, 23), {"small_box": "first_stride"}, [10]),
        ((13, 13, 23, 23), {}, [5, 6, 9, 10]),
        ((13, 13, 15, 15), {"small_box": "first_stride"}, [5, 6, 9, 10]),
        ((13, 13, 21, 21), {"small_box": "first_stride"}, [10]),
        ((13, 13, 15, 15), {"small_box": "off"}, []),
        ((13, 13, 15, 15), VERSION_8_1, []),
    ],
)
def test_small_box_rules(path, box, settings, expected):
    assert candidates(box, path=path, **settings) == expected


def test_round_trip_moves_an_edge(path):
    points = torch.tensor([[28.0, 10.0], [40.0, 10.0]])
    box = (28, 0, 51.22970962, 20)
    assert candidates(box, points, path=path) == [0, 1]
    assert candidates(box, points, path=path, **VERSION_8_1) == [1]


def test_the_nearest_float_inside_an_edge_is_inside(path):
    assert candidates((3.9999998, 3.9999998, 8, 8), path=path, **VERSION_8_1) == [0]


def test_legacy_alpha_differs_in_last_bits_only():
    corners = torch.rand(2, 1000, 4, generator=torch.Generator().manual_seed(0)) * 50
    corners[..., 2:] += corners[..., :2]
    stable, legacy = (complete_iou(*map(box_terms, corners), alpha) for alpha in ("stable", "legacy"))
    assert not torch.equal(stable, legacy)
    torch.testing.assert_close(stable, legacy, rtol=1e-5, atol=1e-7)


def conflict(valid=None):
    """Rows 0 and 1 contain anchor 5 and propose it; row 2 does not contain it, and overlaps its prediction most."""
    predictions = around(GRID, 1)
    predictions[5] = torch.tensor([8.0, 8, 26, 26])
    boxes = [[4.5, 4.5, 19, 19], [5, 5, 19.5, 19.5], [12.5, 12.5, 30, 30]]
    return single(boxes, [0, 0, 1], predictions, torch.full((16, 2), 0.5), valid)


@pytest.mark.parametrize(
    ("era", "row", "score"), [(VERSION_8_1, 1, 0.27782), (VERSION_8_0, 2, 0.36949)], ids=["8.0.52 on", "8.0.51"]
)
def test_who_may_win_a_conflict(path, era, row, score):
    result = task_aligned_assign(*conflict(), topk=1, **TRAINER, **era, path=path)
    assert result.gt_index[0, 5] == row
    assert result.labels[0, 5] == (row == 2)
    torch.testing.assert_close(result.scores[0, 5], torch.tensor(score), rtol=2e-5, atol=0)


def test_among_all_pairs_padding_wins_too_but_proposes_nothing(path):
    # Row 2 contains 10 and 15, which nobody else does.
    real, padded = (
        task_aligned_assign(*conflict([1.0, 1.0, last]), topk=1, **TRAINER, **VERSION_8_0, path=path)
        for last in (1.0, 0.0)
    )
    assert real.foreground[0].nonzero()[:, 0].tolist() == [5, 10]
    assert padded.foreground[0].nonzero()[:, 0].tolist() == [5]
    assert padded.gt_index[0, 5] == 2
    alone = task_aligned_assign(*conflict([1.0, 0.0, 0.0]), topk=1, **TRAINER, **VERSION_8_0, path=path)
    assert alone.gt_index[0, 5] == 0  # nobody contests it


def test_among_all_pairs_equals_go_to_the_lowest_row(path):
    far, near = [24, 24, 31, 31], [0, 0, 16, 16]
    arguments = single([far, near, near], [1, 0, 0], around(GRID, 0), torch.full((16, 2), 0.5))
    result = task_aligned_assign(*arguments, topk=16, **TRAINER, **VERSION_8_0, path=path)
    assert result.foreground[0, :2].all()
    assert (result.gt_index[0, :2] == 0).all()  # all overlaps are 0
    assert (result.scores == 0).all()


@pytest.mark.parametrize("seed", range(3))
def test_paths_agree_among_all_pairs(seed):
    arguments = list(scene(seed, rows=40))
    arguments[1] = arguments[1] + 8  # predictions lie between boxes
    sparse, static = (task_aligned_assign(*arguments, topk=5, **TRAINER, **VERSION_8_0, path=path) for path in PATHS)
    assert all(torch.equal(ours, other) for ours, other in zip(sparse, static, strict=True))
    candidates_only = task_aligned_assign(*arguments, topk=5, **TRAINER, **VERSION_8_1)
    assert not torch.equal(sparse.gt_index, candidates_only.gt_index)


def test_kernels_leave_former_eras_to_the_static_path(monkeypatch):
    monkeypatch.setattr("cleanroom.kernels.runtime.runs_on", lambda *tensors: True)
    assert [choose_path("triton", GRID, has_kernel=known) for known in (True, False)] == ["triton", "static"]
    eras = [check_eras(None, "off", False, "legacy", domain) for domain in ("candidates", "all")]
    assert [found.has_kernel for found in eras] == [True, False]


# Ties


@pytest.mark.parametrize("topk", [1, 2, 4])
def test_equal_metrics_take_the_lowest_anchors(path, topk):
    predictions = torch.tensor([0.0, 0, 32, 32]).expand(16, 4)
    arguments = single([[0, 0, 32, 32]], [0], predictions, torch.full((16, 1), 0.5))
    result = task_aligned_assign(*arguments, topk=topk, path=path)
    assert result.foreground[0].nonzero()[:, 0].tolist() == list(range(topk))


def test_equal_metrics_do_not_depend_on_the_order_of_the_points(path):
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0))
    predictions = torch.tensor([0.0, 0, 32, 32]).expand(16, 4)
    arguments = single([[0, 0, 32, 32]], [0], predictions, torch.full((16, 1), 0.5), points=GRID[order])
    result = task_aligned_assign(*arguments, topk=3, path=path)
    assert result.foreground[0].nonzero()[:, 0].tolist() == [0, 1, 2]


@pytest.mark.parametrize(("box", "expected"), [((0, 0, 10, 10), [0]), ((16, 16, 32, 32), []), ((0, 0, 32, 12), [0, 1])])
def test_zero_metrics_compete_with_all_anchors(path, box, expected):
    arguments = single([box], [0], around(GRID, 6), torch.zeros(16, 1))
    result = task_aligned_assign(*arguments, topk=2, stride=[8], path=path)
    assert result.foreground[0].nonzero()[:, 0].tolist() == expected
    assert (result.scores == 0).all()


def test_zeros_fill_up_after_positives(path):
    scores = torch.zeros(16, 1)
    scores[[1, 9]] = 0.5
    arguments = single([[0, 0, 32, 32]], [0], around(GRID, 16), scores)
    # 1 and 9 are positive; of the anchors left 0, 2 and 3 are the lowest.
    result = task_aligned_assign(*arguments, topk=5, path=path)
    assert result.foreground[0].nonzero()[:, 0].tolist() == [0, 1, 2, 3, 9]


def test_second_selection_fills_up_with_zeros_by_the_same_rule(path):
    scores = torch.zeros(16, 1)
    scores[[1, 9]] = 0.5
    arguments = single([[8, 0, 32, 32]], [0], around(GRID, 16), scores)
    # 0 is no candidate but stands before 2 among the zeros.
    result = task_aligned_assign(*arguments, topk=16, topk2=4, path=path)
    assert result.foreground[0].nonzero()[:, 0].tolist() == [1, 2, 9]


def test_identical_ground_truths(path):
    boxes = [[2, 2, 30, 30], [2, 2, 30, 30]]
    result = task_aligned_assign(*single(boxes, [0, 0], around(GRID, 9), torch.rand(16, 2)), topk=6, path=path)
    assert result.foreground.sum() == 6
    assert (result.gt_index == 0).all()


def test_conflict_without_overlap_stays_with_the_rows_that_contain_the_anchor(path):
    boxes = [[0, 0, 16, 16], [16, 16, 32, 32], [16, 16, 32, 32]]
    arguments = single(boxes, [1, 1, 0], around(GRID + 500, 1), torch.full((16, 2), 0.5))
    result = task_aligned_assign(*arguments, topk=16, path=path)
    assert result.gt_index[0].view(4, 4).tolist() == [[0] * 4, [0] * 4, [0, 0, 1, 1], [0, 0, 1, 1]]
    assert result.foreground[0].nonzero()[:, 0].tolist() == [0, 1, 4, 5, 10, 11, 14, 15]


# Outputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_dtypes_and_shapes(path, dtype):
    outputs = TaskAlignedAssigner(topk=5, num_classes=6, path=path)(*scene(0, dtype))
    assert [tuple(output.shape) for output in outputs] == [(3, 84), (3, 84, 4), (3, 84, 6), (3, 84), (3, 84)]
    assert [output.dtype for output in outputs] == [torch.int64, dtype, dtype, torch.bool, torch.int64]
    assert all(output.isfinite().all() for output in outputs)
    assert (outputs[2] != 0).sum(2).max() == 1


@pytest.mark.parametrize(
    ("scores", "boxes", "truths", "expected"),
    [
        (torch.float16, torch.float32, torch.float32, torch.float32),
        (torch.float64, torch.float32, torch.float32, torch.float64),
        (torch.float32, torch.float64, torch.float32, torch.float64),
        (torch.float32, torch.float32, torch.bfloat16, torch.float32),
    ],
)
def test_mixed_dtypes(path, scores, boxes, truths, expected):
    arguments = list(scene(2))
    arguments[0], arguments[1], arguments[4] = arguments[0].to(scores), arguments[1].to(boxes), arguments[4].to(truths)
    _, target_boxes, target_scores, foreground, _ = TaskAlignedAssigner(topk=5, num_classes=4, path=path)(*arguments)
    assert (target_scores.dtype, target_boxes.dtype) == (expected, truths)
    assert foreground.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_no_ground_truth_returns_what_upstream_does(path, dtype):
    scores, predictions, points = scene(0, dtype)[:3]
    arguments = (
        scores,
        predictions,
        points,
        torch.zeros(3, 0, 1),
        torch.zeros(3, 0, 4, dtype=dtype),
        torch.zeros(3, 0, 1),
    )
    labels, boxes, target_scores, foreground, index = TaskAlignedAssigner(topk=999, num_classes=7, path=path)(
        *arguments
    )
    assert labels.dtype == index.dtype == dtype
    assert (labels == 7).all()
    assert boxes.shape == predictions.shape
    assert target_scores.shape == scores.shape
    assert foreground.dtype == torch.bool
    assert not any(output.any() for output in (boxes, target_scores, foreground, index))
    compact = task_aligned_assign(*arguments, topk=999, path=path)
    assert compact.labels.dtype == compact.gt_index.dtype == torch.int64


def test_no_images(path):
    outputs = TaskAlignedAssigner(topk=5, num_classes=4, path=path)(*(t[:0] if t.dim() == 3 else t for t in scene(0)))
    assert [tuple(output.shape) for output in outputs] == [(0, 84), (0, 84, 4), (0, 84, 4), (0, 84), (0, 84)]


def test_all_rows_padded(path):
    *arguments, _ = worked_example()
    result = task_aligned_assign(*arguments, torch.zeros(1, 3, 1), topk=3, path=path)
    assert not result.foreground.any()
    assert (result.boxes == torch.tensor([2.0, 2, 18, 18])).all()
    assert not result.scores.any()


def test_no_proposals(path):
    assert not task_aligned_assign(*worked_example(), topk=0, path=path).foreground.any()


def test_inputs_are_neither_changed_nor_aliased_nor_tracked(path):
    arguments = [t.clone().requires_grad_(index in (0, 1, 4)) for index, t in enumerate(scene(3))]
    before = [t.detach().clone() for t in arguments]
    outputs = TaskAlignedAssigner(topk=5, num_classes=4, path=path)(*arguments)
    assert not any(output.requires_grad for output in outputs)
    storages = {t.untyped_storage().data_ptr() for t in arguments}
    assert not any(output.untyped_storage().data_ptr() in storages for output in outputs)
    assert all(map(torch.equal, arguments, before))


def test_mask_values_and_dtypes_mean_the_same(path):
    *arguments, mask = scene(4)
    expected = task_aligned_assign(*arguments, mask, topk=5, path=path)
    for other in (mask * 2, -mask, mask * 0.5, mask.bool(), mask.int()):
        assert all(map(torch.equal, expected, task_aligned_assign(*arguments, other, topk=5, path=path)))


@pytest.mark.parametrize("layout", ["channels first", "slice", "expanded"])
def test_layouts_mean_the_same(path, layout):
    scores, predictions, points, labels, boxes, mask = scene(5)
    if layout == "expanded":
        scores = scores[:1, :, :1].expand(scores.shape)
    expected = task_aligned_assign(scores.contiguous(), predictions, points, labels, boxes, mask, topk=5, path=path)
    if layout == "channels first":
        scores, predictions = scores.mT.contiguous().mT, predictions.mT.contiguous().mT
    elif layout == "slice":
        scores, boxes = torch.cat((scores, scores), 2)[..., :4], torch.cat((labels, boxes), 2)[..., 1:]
    result = task_aligned_assign(scores, predictions, points, labels, boxes, mask, topk=5, path=path)
    assert all(map(torch.equal, expected, result))


# Labels and errors


def test_labels_are_truncated_and_negative_ones_count_from_the_end(path):
    *arguments, labels, boxes, mask = worked_example()
    for given, score_of, written in ((1.9, 1, 1), (-0.5, 0, 0), (-1.0, 1, 0), (-2.0, 0, 0)):
        labels = torch.full_like(labels, given)
        result = task_aligned_assign(*arguments, labels, boxes, mask, topk=3, path=path)
        same = task_aligned_assign(*arguments, torch.full_like(labels, score_of), boxes, mask, topk=3, path=path)
        assert torch.equal(result.scores, same.scores)
        assert (result.labels == written).all()


@pytest.mark.parametrize("label", [2.0, -3.0, float("nan")])
def test_bad_label_of_a_row_with_candidates(path, label):
    *arguments, labels, boxes, mask = worked_example()
    labels[0, 1] = label
    with pytest.raises(IndexError if path == "sparse" else RuntimeError, match="gt_labels"):
        task_aligned_assign(*arguments, labels, boxes, mask, topk=3, path=path)
    boxes[0, 1] = torch.tensor([11.0, 11, 13, 13])  # around one anchor
    with pytest.raises(IndexError if path == "sparse" else RuntimeError, match="gt_labels"):
        task_aligned_assign(*arguments, labels, boxes, mask, topk=3, path=path)
    boxes[0, 1] += 500
    assert task_aligned_assign(*arguments, labels, boxes, mask, topk=3, path=path).foreground.any()


def test_bad_labels_of_padding_are_ignored_but_for_row_0(path):
    *arguments, labels, boxes, mask = worked_example()
    assigner = TaskAlignedAssigner(topk=3, num_classes=2, path=path)
    expected = assigner(*arguments, labels, boxes, mask)
    labels[0, 2] = 77
    assert all(map(torch.equal, expected, assigner(*arguments, labels, boxes, mask)))
    labels[0, 0], mask[0, 0] = 77, 0
    with pytest.raises(IndexError if path == "sparse" else RuntimeError):
        assigner(*arguments, labels, boxes, mask)


@pytest.mark.parametrize(
    ("settings", "error", "name"),
    [
        ({"topk": 17}, ValueError, "topk"),
        ({"topk": -1}, ValueError, "topk"),
        ({"topk": 2.0}, TypeError, "topk"),
        ({"topk": 3, "topk2": 17}, ValueError, "topk2"),
        ({"stride": []}, IndexError, "stride"),
        ({"small_box": "on"}, ValueError, "small_box"),
        ({"edge_round_trip": False}, ValueError, "edge_round_trip"),
        ({"ciou_alpha": "new"}, ValueError, "ciou_alpha"),
        ({"pair_domain": "inside"}, ValueError, "pair_domain"),
        ({"path": "fast"}, ValueError, "path"),
    ],
)
def test_bad_settings_are_named(settings, error, name):
    with pytest.raises(error, match=f"^{name} "):
        task_aligned_assign(*worked_example(), **{"topk": 3} | settings)


@pytest.mark.parametrize(
    ("position", "change", "error", "name"),
    [
        (0, lambda t: t[0], ValueError, "pd_scores"),
        (1, lambda t: t[:, :3], ValueError, "pd_bboxes"),
        (2, lambda t: t[None], ValueError, "anc_points"),
        (3, lambda t: t[:, :2], ValueError, "gt_labels"),
        (4, lambda t: t[..., :3], ValueError, "gt_bboxes"),
        (5, lambda t: t[..., 0], ValueError, "mask_gt"),
        (0, torch.Tensor.int, TypeError, "pd_scores"),
        (1, torch.Tensor.half, TypeError, "pd_bboxes"),
        (4, torch.Tensor.double, TypeError, "pd_bboxes"),
    ],
)
def test_bad_tensors_are_named(position, change, error, name):
    arguments = list(worked_example())
    arguments[position] = change(arguments[position])
    with pytest.raises(error, match=f"^{name} "):
        task_aligned_assign(*arguments, topk=3)


def test_no_anchors():
    arguments = single([[0, 0, 9, 9]], [0], torch.zeros(0, 4), torch.zeros(0, 2), points=torch.zeros(0, 2))
    with pytest.raises(IndexError, match="anc_points"):
        task_aligned_assign(*arguments, topk=0)


# NaN and infinity: known divergence, upstream's scores of the whole image become NaN


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", ["box", "score", "everywhere"])
def test_non_finite_prediction_is_never_chosen(path, where, value):
    scores, predictions, *rest = worked_example()
    clean = task_aligned_assign(scores, predictions, *rest, topk=3, **TRAINER, path=path)
    spoiled = slice(None) if where == "everywhere" else slice(10, 11)
    if where != "score":
        predictions[0, spoiled, 2] = value
    if where != "box":
        scores[0, spoiled] = value
    result = task_aligned_assign(scores, predictions, *rest, topk=3, **TRAINER, path=path)
    assert result.scores.isfinite().all()
    assert not result.foreground[0, spoiled].any()
    if where != "everywhere":
        # The other ground truth does not notice; this one proposes its next best anchor.
        assert torch.equal(result.scores[0, [1, 4, 5]], clean.scores[0, [1, 4, 5]])
        assert result.gt_index[0].nonzero()[:, 0].tolist() == [6, 9, 11]


def test_nan_box_is_never_chosen_even_where_its_overlap_does_not_count(path):
    scores, predictions, *rest = worked_example()
    predictions[0, 10] = float("nan")
    assert not task_aligned_assign(scores, predictions, *rest, topk=16, beta=0.0, path=path).foreground[0, 10]


def test_negative_score_is_never_chosen(path):
    scores, *rest = worked_example()
    scores[0, 10] *= -1
    result = task_aligned_assign(scores, *rest, topk=16, path=path)
    assert result.foreground[0].nonzero()[:, 0].tolist() == [0, 1, 4, 5, 6, 7, 9, 11]
    assert (result.scores >= 0).all()


def test_non_finite_row_does_not_win_a_conflict(path):
    """Rows 0 and 1 propose anchor 5; row 2 overlaps it most, but its class has no score there."""
    predictions = torch.tensor([[6.0, 6, 22, 22]]).expand(16, 4)
    scores = torch.full((16, 2), 0.5)
    scores[5, 1] = float("nan")
    arguments = single([[8, 8, 24, 24], [4, 4, 20, 20], [6, 6, 22, 22]], [0, 0, 1], predictions, scores)
    result = task_aligned_assign(*arguments, topk=16, path=path)
    assert result.foreground[0, 5]
    assert result.gt_index[0, 5] != 2
    assert result.scores.isfinite().all()


def test_eps_of_zero_stays_finite(path):
    scores, *rest = worked_example()
    for given in (scores, torch.zeros_like(scores)):
        result = task_aligned_assign(given, *rest, topk=3, eps=0.0, path=path)
        assert result.foreground.any()
        assert result.scores.isfinite().all()


# Paths


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "settings",
    [
        {"topk": 10, **TRAINER},
        {"topk": 13},
        {"topk": 1, "topk2": 3},
        {"topk": 7, "topk2": 1, **TRAINER},
        {"topk": 84, "topk2": 5},
        {"topk": 4, "alpha": 0.0, "beta": 0.0},
        {"topk": 4, "alpha": 0.7, "beta": 2.5},
        {"topk": 10, **TRAINER, **VERSION_8_1},
    ],
    ids=str,
)
def test_paths_agree_bitwise(dtype, settings):
    for seed in range(6):
        arguments = scene(seed, dtype)
        sparse, static = (task_aligned_assign(*arguments, **settings, path=path) for path in PATHS)
        for name, left, right in zip(sparse._fields, sparse, static, strict=True):
            assert torch.equal(left, right), (name, seed)


def test_chunks_do_not_change_the_result(monkeypatch):
    arguments = scene(7, batch=2, rows=40)
    expected = task_aligned_assign(*arguments, topk=5)
    for module, sizes in (
        ("_tal_sparse", {"CHUNK_PAIRS": 30, "CHUNK_TABLE": 60}),
        ("_tal_static", {"CHUNK_PAIRS": 1, "MIN_ROWS": 3}),
    ):
        for name, value in sizes.items():
            monkeypatch.setattr(f"cleanroom.assign.{module}.{name}", value)
    for path in PATHS:
        assert all(map(torch.equal, expected, task_aligned_assign(*arguments, topk=5, path=path)))


def test_points_need_not_form_a_grid():
    scores, predictions, _, *rest = scene(8)
    points = torch.rand(84, 2, generator=torch.Generator().manual_seed(0)) * 64
    points[40:44] = points[3]
    sparse, static = (task_aligned_assign(scores, predictions, points, *rest, topk=5, path=path) for path in PATHS)
    assert sparse.foreground.any()
    assert all(map(torch.equal, sparse, static))


def test_images_are_independent_and_padding_has_no_effect(path):
    scores, predictions, points, labels, boxes, mask = scene(9)
    whole = task_aligned_assign(scores, predictions, points, labels, boxes, mask, topk=5, path=path)
    pad = torch.nn.functional.pad
    for image in range(3):
        part = slice(image, image + 1)
        alone = task_aligned_assign(
            scores[part],
            predictions[part],
            points,
            pad(labels[part], (0, 0, 0, 9), value=99.0),
            pad(boxes[part], (0, 0, 0, 9), value=30.0),
            pad(mask[part], (0, 0, 0, 9)),
            topk=5,
            path=path,
        )
        assert all(torch.equal(one[0], many[image]) for one, many in zip(alone, whole, strict=True))


@pytest.mark.parametrize("topk2", [None, 2])
def test_static_path_has_no_data_dependent_shapes(topk2):
    """Fake tensors have no values: a shape or a branch that depends on one raises."""
    assigner = TaskAlignedAssigner(topk=5, num_classes=4, topk2=topk2, path="static")
    arguments = scene(10)
    traced = make_fx(assigner, tracing_mode="fake")(*arguments)
    assert all(map(torch.equal, assigner(*arguments), traced(*arguments)))


def test_compiles_as_one_graph():
    """Under torch.compile "auto" takes the static path; a graph break would raise."""
    assigner = TaskAlignedAssigner(topk=5, num_classes=4)
    compiled = torch.compile(assigner, fullgraph=True, backend="eager")
    arguments = scene(11)
    assert all(map(torch.equal, assigner(*arguments), compiled(*arguments)))
