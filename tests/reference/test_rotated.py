"""The adapters of rotated boxes, against the worked examples of boxes.md (11 and 12) and task_aligned.md (9)."""

import pytest
import torch

from cases import probiou, rotated_tal

CURRENT, OLD = "ultralytics==8.4.190", "ultralytics==8.1.47"
BOTH = [CURRENT, OLD]
THREE = {5: 0.8938728, 10: 0.01725305, 12: 0.753307}

pytestmark = pytest.mark.oracle


def pinned(module, name):
    return next(case for found, case in module.pinned_cases() if found == name)


@pytest.mark.parametrize(
    ("spec", "name", "expected"),
    [
        *((spec, "worked-example", [[0.50155610]] * 2) for spec in BOTH),
        *((spec, "worked-example-complete", [[0.50065541]] * 2) for spec in BOTH),
        *((spec, "worked-example-pairwise", [[0.50155610, 0.99953181], [0.99953181, 0.50155610]]) for spec in BOTH),
        (CURRENT, "worked-example-floor-0.01", [[0.50263524]] * 2),
    ],
)
def test_similarity(oracle, spec, name, expected):
    case = pinned(probiou, name)
    found = oracle(spec).bind("probiou", case.tensors, case.settings)["outputs"]["similarity"]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=2e-8)


def test_a_floor_is_refused_where_there_is_none(oracle):
    case = pinned(probiou, "worked-example-floor-0.01")
    with pytest.raises(RuntimeError, match=r"RequestError: probiou: .* no floor, and the case has 0\.01"):
        oracle(OLD).bind("probiou", case.tensors, case.settings)


@pytest.mark.parametrize("spec", BOTH)
def test_thin_boxes_are_nan_upstream(oracle, spec):
    """What the divergences say of it."""
    case = pinned(probiou, "field-u-10108-thin-twins")
    assert oracle(spec).bind("probiou", case.tensors, case.settings)["outputs"]["similarity"].isnan().all()


@pytest.mark.parametrize("spec", BOTH)
def test_assigner(oracle, spec):
    case = pinned(rotated_tal, "worked-example")
    answer = oracle(spec).bind("rotated_tal", case.tensors, case.settings)
    scores = answer["outputs"]["target_scores"][0].amax(-1)
    # The old one enlarges no box, so that the row of 6 x 4 has no candidate.
    expected = THREE if spec == CURRENT else {**THREE, 12: 0}
    assert {anchor: scores[anchor].item() for anchor in THREE} == pytest.approx(expected, rel=1e-6)
    foreground = answer["outputs"]["fg_mask"][0].nonzero()[:, 0].tolist()
    assert foreground == ([5, 6, 8, 9, 10, 12, 13] if spec == CURRENT else [5, 10])
    assert all(torch.equal(value, answer["tensors"][name]) for name, value in case.tensors.items())
    overlap = oracle(spec).quantities("rotated_tal", case.tensors, case.settings)["overlap"]
    assert overlap.shape == (1, 3, 16)
    assert overlap[0, 1, [8, 9, 12]].tolist() == pytest.approx((0.2287759, 0.2134754, 0.753307), abs=1e-7)


def test_topk2_is_refused_where_there_is_none(oracle):
    case = pinned(rotated_tal, "worked-example-topk2-1")
    with pytest.raises(RuntimeError, match=r"RequestError: rotated_tal: .* no topk2, and the case sets it to 1"):
        oracle(OLD).bind("rotated_tal", case.tensors, case.settings)
