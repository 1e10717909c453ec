"""The Triton kernels through the whole harness, against upstream, under the interpreter where there is no GPU."""

import json

import pytest
import torch

from cleanroom.kernels import runtime
from harness.operations import NAMES, operation

pytestmark = [pytest.mark.oracle, pytest.mark.skipif(not runtime.AVAILABLE, reason=runtime.ABSENT)]

#: Interpreted kernels take a while: pinned cases, which are many, and a few drawn ones, against the newest oracle.
ORACLES = "ultralytics==8.4.190,yolox==0.3.0,transformers==5.23.0,torch_linear_assignment==0.1.0"
KERNELS = [name for name in NAMES if "triton" in operation(name).candidates]


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_hold(harness_run, name):
    run = harness_run(
        "--ops", name, "--backends", "triton", "--oracles", ORACLES, "--examples", "1", "--shrink-seconds", "0",
        "--dtypes", "float32",
        "--workloads", "coco-b1", "--time-limit", "120",
    )  # fmt: skip
    # A share of a few cases says nothing: the caps of ties are for runs of hundreds.
    fallen = [bar for bar in run.summary["gate"] if not bar["ok"] and not bar["bar"].startswith("tied")]
    assert run.summary["failures"] == []
    assert fallen == []
    assert all(row["candidate"] == "triton" for row in run.summary["operations"])
    assert sum(row["match"] for row in run.summary["operations"]) > 4
    if not torch.cuda.is_available():
        assert run.summary["measurements"] == []
        assert json.loads((run.folder / "run.json").read_text())["settings"]["bench"] is False
