"""The list of known divergences excuses what it names and nothing else."""

import datetime

import pytest
import torch

from cases.case import Case
from harness.divergences import LIST, Dispute, entries, excuse
from harness.execute import Failure, Result
from harness.operations import operation
from harness.verdict import NON_FINITE, Finding

ORACLE = "ultralytics==8.4.190"


def outputs(score=0.0):
    return {
        "target_labels": torch.zeros(1, 2, dtype=torch.int64),
        "target_bboxes": torch.zeros(1, 2, 4),
        "target_scores": torch.full((1, 2, 1), score),
        "fg_mask": torch.zeros(1, 2, dtype=torch.bool),
        "target_gt_idx": torch.zeros(1, 2, dtype=torch.int64),
    }


def dispute(*, score=float("nan"), finding=None, candidate=None, oracle=None):
    tensors = {
        "pd_scores": torch.full((1, 2, 1), score),
        "pd_bboxes": torch.zeros(1, 2, 4),
        "gt_bboxes": torch.zeros(1, 1, 4),
        "gt_labels": torch.zeros(1, 1, 1),
    }
    return Dispute(
        operation("tal"),
        Case("tal", tensors, {}, "test", frozenset()),
        oracle or Result(outputs(float("nan"))),
        candidate or Result(outputs()),
        finding or Finding("mismatch", "", NON_FINITE),
    )


def test_a_nan_prediction_is_excused_with_its_entry():
    assert excuse(dispute(), ORACLE).id == "tal-non-finite-prediction"


def test_a_difference_elsewhere_in_the_batch_is_not():
    assert excuse(dispute(finding=Finding("mismatch", "", "target_scores")), ORACLE) is None


def test_a_candidate_that_is_not_finite_itself_is_not():
    assert excuse(dispute(candidate=Result(outputs(float("nan")))), ORACLE) is None


def test_a_candidate_with_side_effects_is_not():
    assert excuse(dispute(candidate=Result(outputs(), None, ("input gt_bboxes was changed",))), ORACLE) is None


def test_a_candidate_that_breaks_an_invariant_is_not():
    broken = {**outputs(), "target_gt_idx": torch.full((1, 2), 5)}
    assert excuse(dispute(candidate=Result(broken)), ORACLE) is None


def test_another_oracle_is_not():
    assert excuse(dispute(), "yolox==0.3.0") is None


def test_an_expired_entry_excuses_nothing():
    last = max(entry.expires for entry in entries())
    assert excuse(dispute(), ORACLE, today=last + datetime.timedelta(days=1)) is None


def test_a_rejection_is_excused_by_its_message_only():
    old = "ultralytics==8.1.47"
    finding = Finding("mismatch", "", "rejection")
    known = Result(error=Failure("RuntimeError", "cannot reshape tensor of 0 elements into shape [0]"))
    other = Result(error=Failure("RuntimeError", "something new"))
    assert excuse(dispute(score=0.0, oracle=known, finding=finding), old).id == "tal-empty-batch"
    assert excuse(dispute(score=0.0, oracle=other, finding=finding), old) is None


def test_every_entry_has_a_reason_and_a_known_operation():
    for entry in entries():
        assert entry.reason
        assert operation(entry.operation)
    assert len({entry.id for entry in entries()}) == len(entries())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[[divergence]]\nid = "x"', "entry 0"),
        (LIST.read_text().replace('when = "oracle-rejects"', 'when = "always"'), "unknown predicate 'always'"),
    ],
)
def test_a_malformed_list_is_refused_with_the_entry(tmp_path, text, message):
    file = tmp_path / "divergences.toml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        entries(file)
