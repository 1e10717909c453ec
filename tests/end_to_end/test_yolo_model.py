"""A whole detector of ultralytics trains the same with our criterion in the place of upstream's."""

import pytest

from tests.end_to_end.conftest import ask_worker

CRITERIA = {
    "bins": "v8DetectionLoss",
    "distances": "v8DetectionLoss",
    "end-to-end": "E2ELoss",
    "end-to-end distances": "E2ELoss",
    "bins under autocast": "v8DetectionLoss",
}


@pytest.fixture(scope="module")
def trained():
    """What the worker says of each head."""
    return ask_worker("yolo_model_worker.py", "ultralytics==8.4.190")


@pytest.mark.oracle
@pytest.mark.parametrize("head", CRITERIA)
def test_same_loss_and_gradients(trained, head):
    found = trained[head]
    half = "autocast" in head
    assert found["criterion"] == CRITERIA[head]
    assert found["parameters"] > 100
    assert found["worst"] < (0.15 if half else 1e-4)  # upstream decodes in bfloat16, ours for the assigner alone
    for theirs, ours in zip(found["theirs"][0], found["ours"][0], strict=True):
        assert ours == pytest.approx(theirs, rel=2e-2 if half else 1e-4)
    for theirs, ours in zip(found["theirs"][1], found["ours"][1], strict=True):
        assert list(ours) == list(theirs)
        assert list(ours.values()) == pytest.approx(list(theirs.values()), rel=2e-2 if half else 1e-4)
