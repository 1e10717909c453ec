"""A release that is known to be wrong falls, for the reason it is known for; no run uses it unless told to."""

import pandas as pd
import pytest
import torch

from cases.pinned import pinned
from harness import oracles
from harness.plan import parse_oracles
from reference import read_pins

CONTROL = "ultralytics==8.0.100"
QUICK = ("--ops", "bbox_loss", "--no-bench", "--examples", "30", "--workers", "1", "--shrink-seconds", "0")


def test_the_control_is_pinned_and_left_out_by_default():
    assert read_pins()[CONTROL].control == "N by N broadcast in the box loss"
    assert CONTROL not in oracles.pins()
    assert CONTROL not in parse_oracles(None, [])
    assert "ultralytics==8.1.47" in parse_oracles(None, [])
    assert parse_oracles(CONTROL, []) == (CONTROL,)


@pytest.mark.oracle
def test_the_control_falls_by_its_broadcast(harness_run):
    run = harness_run("--oracles", CONTROL, "--dtypes", "float32", *QUICK)
    assert run.code == 1
    verdicts = pd.read_parquet(run.folder / "verdicts.parquet").set_index("origin")
    # Not by an adapter that cannot drive it: nothing errs, what differs are sums over anchors.
    assert set(verdicts.verdict) <= {"match", "mismatch", "both-reject", "known-divergence"}
    fallen = verdicts[verdicts.verdict == "mismatch"]
    assert len(fallen) >= 20
    assert (fallen.output == "loss_iou").mean() > 0.5
    assert fallen.loc["pinned:bbox_loss-worked-example", "output"] == "loss_iou"
    assert fallen.loc["pinned:bbox_loss-every-anchor-foreground", "output"] == "loss_iou"
    # One foreground anchor leaves nothing to broadcast.
    alone = [case.origin for case in pinned("bbox_loss") if int(case.tensors["fg_mask"].sum()) <= 1]
    assert "pinned:bbox_loss-one-foreground-anchor" in alone
    assert set(verdicts.loc[alone, "verdict"]) == {"match"}


@pytest.mark.oracle
def test_a_release_that_is_right_passes_the_same_run(harness_run):
    run = harness_run("--oracles", "ultralytics==8.1.47", "--dtypes", "float32", *QUICK)
    assert run.code == 0
    assert torch.tensor([row["match"] for row in run.summary["operations"]]).sum() > 20
