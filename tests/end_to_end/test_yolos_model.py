"""A tiny YOLOS of transformers trains the same with our loss in the place of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("yolos_model_worker.py")
NAMES = {"loss", "loss_ce", "loss_bbox", "loss_giou", "cardinality_error"}


@pytest.fixture(scope="module")
def trained():
    """What the worker says of both sides."""
    environment = os.environ | {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(WORKER), "transformers==5.23.0"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    # The last line of stderr only: a traceback would quote upstream's source.
    assert done.returncode == 0, done.stderr.splitlines()[-1:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.oracle
def test_same_losses_and_gradients(trained):
    assert min(trained["parameters"]) > 30
    assert max(trained["worst"]) < 2e-4
    for theirs, ours in zip(trained["theirs"], trained["ours"], strict=True):
        assert set(theirs) == set(ours) == NAMES
        assert ours == pytest.approx(theirs, rel=1e-5)
    losses = [step["loss"] for step in trained["ours"]]
    assert losses[-1] < losses[0]  # it trains
