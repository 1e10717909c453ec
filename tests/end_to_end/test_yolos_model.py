"""A tiny YOLOS of transformers trains the same with our loss in the place of its own."""

import pytest

from tests.end_to_end.conftest import ask_worker

NAMES = {"loss", "loss_ce", "loss_bbox", "loss_giou", "cardinality_error"}


@pytest.fixture(scope="module")
def trained():
    """What the worker says of both sides."""
    return ask_worker("yolos_model_worker.py", "transformers==5.23.0")


@pytest.mark.oracle
def test_same_losses_and_gradients(trained):
    assert min(trained["parameters"]) > 30
    assert max(trained["worst"]) < 2e-4
    for theirs, ours in zip(trained["theirs"], trained["ours"], strict=True):
        assert set(theirs) == set(ours) == NAMES
        assert ours == pytest.approx(theirs, rel=1e-5)
    losses = [step["loss"] for step in trained["ours"]]
    assert losses[-1] < losses[0]  # it trains
