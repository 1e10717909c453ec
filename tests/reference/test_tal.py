"""The adapter of the task-aligned assigner, against the worked examples of task_aligned.md, section 8."""

import sys
from types import SimpleNamespace

import pytest
import torch

from reference.ultralytics.tal import ARGUMENTS, OUTPUTS, bind, translate

BOTH = ["ultralytics==8.4.190", "ultralytics==8.1.47"]
CURRENT, OLD = BOTH


def settings(**changes):
    defaults = {"topk": 3, "topk2": None, "num_classes": 2, "alpha": 0.5, "beta": 6.0, "eps": 1e-9}
    return defaults | {"stride": [8, 16, 32]} | changes


def grid():
    index = torch.arange(16)
    return torch.stack([index % 4 * 8 + 4.0, index // 4 * 8 + 4.0], dim=1)


def scene(rows, labels, half_side=6.0, score=0.25, dtype=torch.float32):
    """One image on the 4 x 4 grid; predictions are centre +- half_side."""
    points = grid()
    tensors = {
        "pd_scores": torch.full((1, 16, 2), score),
        "pd_bboxes": torch.cat([points - half_side, points + half_side], dim=1)[None],
        "anc_points": points,
        "gt_labels": torch.tensor(labels).reshape(1, -1, 1),
        "gt_bboxes": torch.tensor(rows).reshape(1, -1, 4),
        "mask_gt": torch.tensor(rows).reshape(1, -1, 4).sum(2, keepdim=True) > 0,
    }
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def worked_example(dtype=torch.float32):
    rows = [[2.0, 2.0, 18.0, 18.0], [10.0, 10.0, 30.0, 26.0], [0.0, 0.0, 0.0, 0.0]]
    tensors = scene(rows, [0.0, 1.0, 0.0], dtype=dtype)
    tensors["pd_bboxes"][0, 5] = torch.tensor([3.0, 3.0, 18.0, 18.0])
    tensors["pd_bboxes"][0, 10] = torch.tensor([11.0, 10.0, 30.0, 25.0])
    for anchor, label, score in [(5, 0, 0.81), (10, 1, 0.64), (6, 1, 0.36), (11, 1, 0.30)]:
        tensors["pd_scores"][0, anchor, label] = score
    return tensors


THREE = {1: 2.915862e-4, 4: 2.915862e-4, 5: 0.8779297, 6: 1.358923e-4, 10: 0.8898628, 11: 4.050531e-5}
SIX = THREE | {0: 1.095993e-6, 7: 4.053295e-8, 9: 3.697611e-5}
ROW_OF = dict.fromkeys([0, 1, 4, 5], 0) | dict.fromkeys([6, 7, 9, 10, 11], 1)


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("spec", "topk", "topk2", "expected"),
    [(spec, topk, None, scores) for spec in BOTH for topk, scores in [(3, THREE), (6, SIX), (10, SIX)]]
    + [(CURRENT, 3, 1, {5: 0.8779297, 10: 0.8898628})],
)
def test_worked_example(oracle, spec, topk, topk2, expected):
    tensors = worked_example()
    answer = oracle(spec).bind("tal", tensors, settings(topk=topk, topk2=topk2))
    outputs = answer["outputs"]
    positives = sorted(expected)
    assert outputs["fg_mask"][0].nonzero().flatten().tolist() == positives
    rows = [ROW_OF[anchor] for anchor in positives]
    assert outputs["target_gt_idx"][0, positives].tolist() == rows
    assert outputs["target_labels"][0, positives].tolist() == rows
    scores = outputs["target_scores"][0, positives, rows]
    torch.testing.assert_close(scores, torch.tensor([expected[anchor] for anchor in positives]))
    assert outputs["target_scores"].count_nonzero() == len(positives)
    background = [anchor for anchor in range(16) if anchor not in expected]
    assert (outputs["target_bboxes"][0, background] == tensors["gt_bboxes"][0, 0]).all()


@pytest.mark.oracle
@pytest.mark.parametrize("spec", BOTH)
def test_outputs_are_the_raw_result_and_inputs_stay(oracle, spec):
    tensors = worked_example()
    answer = oracle(spec).bind("tal", tensors, settings())
    assert tuple(answer["outputs"]) == OUTPUTS
    for output, raw in zip(answer["outputs"].values(), answer["raw"], strict=True):
        assert output.dtype == raw.dtype
        assert torch.equal(output, raw)
    assert all(torch.equal(tensor, answer["tensors"][name]) for name, tensor in tensors.items())


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("spec", "stride", "box", "candidates"),
    [
        (CURRENT, [8, 16, 32], [13.0, 13.0, 15.0, 15.0], [5, 6, 9, 10]),
        (CURRENT, [8, 16, 32], [13.0, 13.0, 29.0, 14.0], [6, 7, 10, 11]),
        (CURRENT, [8], [15.0, 15.0, 17.0, 17.0], []),
        (CURRENT, [8, 64], [15.0, 15.0, 17.0, 17.0], list(range(16))),
        (OLD, [8, 16, 32], [13.0, 13.0, 15.0, 15.0], []),
    ],
)
def test_stride_reaches_the_releases_that_know_it(oracle, spec, stride, box, candidates):
    tensors = scene([box], [0.0])
    # With k = A every candidate is positive, whatever its metric.
    outputs = oracle(spec).bind("tal", tensors, settings(topk=16, stride=stride))["outputs"]
    assert outputs["fg_mask"][0].nonzero().flatten().tolist() == candidates


@pytest.mark.oracle
@pytest.mark.parametrize(("spec", "dtype"), [(CURRENT, torch.bool), (OLD, torch.float32)])
def test_early_result_keeps_its_dtypes(oracle, spec, dtype):
    outputs = oracle(spec).bind("tal", scene([], []), settings())["outputs"]
    assert outputs["fg_mask"].dtype == dtype
    assert outputs["target_labels"].dtype == outputs["target_gt_idx"].dtype == torch.float32
    assert (outputs["target_labels"] == 2).all()


@pytest.mark.oracle
def test_topk2_is_refused_where_there_is_none(oracle):
    with pytest.raises(RuntimeError, match=r"RequestError: tal: .* no topk2, and the case sets it to 1"):
        oracle(OLD).bind("tal", worked_example(), settings(topk2=1))


@pytest.mark.oracle
@pytest.mark.parametrize("spec", BOTH)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_overlaps(oracle, spec, dtype):
    overlap = oracle(spec).quantities("tal", worked_example(dtype), settings())["overlap"]
    assert overlap.shape == (1, 3, 16)
    assert overlap.dtype == dtype
    expected = {
        (0, 0): 0.1004762,
        (0, 1): 0.2548138,
        (0, 5): 0.8779297,
        (1, 5): 0.0165732,
        (1, 10): 0.8898628,
    }
    for (row, anchor), value in expected.items():
        assert overlap[0, row, anchor].item() == pytest.approx(value, rel=1e-6)
    assert overlap[0, 0, 15] == 0  # CIoU of distant boxes is negative


@pytest.mark.oracle
@pytest.mark.parametrize("spec", BOTH)
def test_overlaps_of_pairs_that_are_no_candidates(oracle, spec):
    tensors = scene([[2.0, 2.0, 18.0, 18.0]], [0.0], half_side=16.0)
    # Anchor 2, at (20, 4), lies outside the box, and its prediction overlaps it.
    assert oracle(spec).quantities("tal", tensors, settings())["overlap"][0, 0, 2] > 0.1


@pytest.mark.oracle
def test_overlaps_of_many_pairs_are_those_of_few(oracle):
    generator = torch.Generator().manual_seed(0)
    corners = torch.rand(1, 200, 2, generator=generator) * 600
    tensors = {"gt_bboxes": torch.cat([corners, corners + 40], 2), "pd_bboxes": torch.rand(1, 8400, 4) * 640}
    whole = oracle(CURRENT).quantities("tal", tensors, settings())["overlap"]
    assert whole.shape == (1, 200, 8400)
    few = {"gt_bboxes": tensors["gt_bboxes"][:, 190:], "pd_bboxes": tensors["pd_bboxes"][:, :100]}
    part = oracle(CURRENT).quantities("tal", few, settings())["overlap"]
    torch.testing.assert_close(whole[:, 190:, :100], part)


def test_translate_only_names():
    raw = tuple(torch.tensor([float("nan"), -value, 2.0]) for value in range(5))
    outputs = translate(raw)
    assert all(output is given for output, given in zip(outputs.values(), raw, strict=True))


def test_the_call_gets_the_tensors_of_the_case(monkeypatch):
    class Assigner:
        def __init__(self, topk, num_classes, alpha, beta, eps, stride, topk2):
            self.settings = [topk, num_classes, alpha, beta, eps, stride, topk2]

        def __call__(self, *arguments):
            return self.settings, arguments

    monkeypatch.setitem(sys.modules, "ultralytics.utils.tal", SimpleNamespace(TaskAlignedAssigner=Assigner))
    tensors = worked_example()
    chosen, arguments = bind(tensors, settings(topk=7, topk2=2, stride=[4, 8]))()
    assert chosen == [7, 2, 0.5, 6.0, 1e-9, [4, 8], 2]
    assert all(argument is tensors[name] for argument, name in zip(arguments, ARGUMENTS, strict=True))
