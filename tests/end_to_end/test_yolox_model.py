"""A whole YOLOX-nano of upstream's classes trains the same with our loss in the place of its head's."""

import pytest

from tests.end_to_end.conftest import ask_worker

NAMES = {"total_loss", "iou_loss", "l1_loss", "conf_loss", "cls_loss", "num_fg"}


@pytest.fixture(scope="module")
def trained():
    """What the worker says of each way of training."""
    return ask_worker("yolox_model_worker.py", "yolox==0.3.0")


@pytest.mark.oracle
@pytest.mark.parametrize("way", ["float32", "static", "autocast"])
def test_same_losses_and_gradients(trained, way):
    found = trained[way]
    half = way == "autocast"
    assert min(found["parameters"]) > 100
    # Upstream subtracts corners in bfloat16, ours from the same boxes in float64.
    assert max(found["worst"]) < (0.5 if half else 2e-4)
    for theirs, ours in zip(found["theirs"], found["ours"], strict=True):
        assert set(theirs) == set(ours) == NAMES
        assert ours == pytest.approx(theirs, rel=1e-2 if half else 1e-5)
    with_l1 = [step["l1_loss"] > 0 for step in found["ours"]]
    assert with_l1 == [False, False, True, True]
    assert len({step["num_fg"] for step in found["ours"]}) > 1  # the assignment changes as it trains
