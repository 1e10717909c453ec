"""A whole YOLOX-nano of upstream's classes trains the same with our loss in the place of its head's."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("yolox_model_worker.py")
NAMES = {"total_loss", "iou_loss", "l1_loss", "conf_loss", "cls_loss", "num_fg"}


@pytest.fixture(scope="module")
def trained():
    """What the worker says of each way of training."""
    environment = os.environ | {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(WORKER), "yolox==0.3.0"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    # The last line of stderr only: a traceback would quote upstream's source.
    assert done.returncode == 0, done.stderr.splitlines()[-1:]
    return json.loads(done.stdout.splitlines()[-1])


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
