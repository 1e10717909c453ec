"""From two results to a verdict: rejections, structure and dtypes, before any comparator looks."""

import pytest
import torch

from cases.case import Case
from harness.execute import Failure, Result
from harness.judge import judge
from harness.operations import operation
from tests.asked import asking

CASE = Case(
    "tal",
    {
        "pd_scores": torch.rand(1, 4, 2),
        "pd_bboxes": torch.rand(1, 4, 4),
        "anc_points": torch.rand(4, 2),
        "gt_labels": torch.zeros(1, 0, 1),
        "gt_bboxes": torch.zeros(1, 0, 4),
        "mask_gt": torch.zeros(1, 0, 1),
    },
    {"topk": 1},
    "test",
    frozenset(),
)
OUTPUTS = {
    "target_labels": torch.full((1, 4), 2),
    "target_bboxes": torch.zeros(1, 4, 4),
    "target_scores": torch.zeros(1, 4, 2),
    "fg_mask": torch.zeros(1, 4, dtype=torch.bool),
    "target_gt_idx": torch.zeros(1, 4, dtype=torch.int64),
}


def verdict(oracle, candidate):
    return judge(operation("tal"), CASE, oracle, oracle, candidate, asking(), "ultralytics==8.4.190")[0]


def rejects(message):
    return Result(error=Failure("ValueError", message))


def gives(**changes):
    return Result({**OUTPUTS, **changes})


def test_equal_outputs_match():
    assert verdict(gives(), gives()).verdict == "match"


def test_both_reject_needs_the_name_of_an_argument():
    assert verdict(rejects("whatever"), rejects("topk is 5, there are 4 anchors")).verdict == "both-reject"
    assert verdict(rejects("whatever"), rejects("bad input")).verdict == "candidate-error"


def test_one_that_rejects_alone_fails():
    assert verdict(rejects("index out of range"), gives()).verdict == "oracle-error"
    assert verdict(gives(), rejects("topk is wrong")).verdict == "candidate-error"


def test_memory_that_ran_out_is_its_own_verdict():
    gone = Result(error=Failure("OutOfMemoryError", "CUDA out of memory."))
    assert verdict(gives(), gone).verdict == "out-of-memory"
    assert verdict(gone, gives()).verdict == "out-of-memory"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"fg_mask": torch.zeros(1, 3, dtype=torch.bool)}, "fg_mask has shape (1, 3)"),
        ({"fg_mask": [False] * 4}, "fg_mask is list"),
        ({"target_gt_idx": torch.zeros(1, 4)}, "target_gt_idx has dtype torch.float32"),
        ({"target_labels": torch.full((1, 4), 1)}, "target_labels differs"),
        ({"target_scores": torch.zeros(1, 4, 2, dtype=torch.float64)}, "target_scores has dtype torch.float64"),
    ],
)
def test_a_wrong_output_is_named(changes, said):
    finding = verdict(gives(), gives(**changes))
    assert finding.verdict == "mismatch"
    assert said in finding.detail


def test_a_missing_output_is_named():
    outputs = {name: value for name, value in OUTPUTS.items() if name != "fg_mask"}
    assert "fg_mask is missing" in verdict(gives(), Result(outputs)).detail


def test_side_effects_fail_even_where_the_outputs_agree():
    finding = verdict(gives(), Result(OUTPUTS, None, ("input gt_bboxes was changed",)))
    assert finding.verdict == "mismatch"
    assert "gt_bboxes" in finding.detail
