"""ultralytics 8.0.100 broadcasts its box loss N by N; a suite that passes it is broken."""

import pytest

from harness import oracles

CONTROL = "ultralytics==8.0.100"


@pytest.mark.oracle
def test_the_negative_control_is_flagged_for_what_is_wrong_with_it(harness_run):
    run = harness_run(
        "--oracles", CONTROL, "--ops", "bbox_loss", "--no-bench", "--examples", "30", "--shrink-seconds", "0",
        "--dtypes", "float32", "--workers", "1",
    )  # fmt: skip
    assert run.code == 1
    failures = run.failures("torch")
    # The values are wrong, not the way it is called; and one foreground anchor, or none, broadcasts to itself.
    assert {row["verdict"] for row in failures} == {"mismatch"}
    assert {row["output"] for row in failures} <= {"loss_iou", "loss_dfl"}
    assert "loss_iou" in {row["output"] for row in failures}
    assert run.operation("torch")["match"] > 0


def test_a_default_run_does_not_ask_the_control():
    assert CONTROL not in oracles.pins()
