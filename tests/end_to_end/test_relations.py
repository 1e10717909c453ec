"""Relations without an oracle in a whole run: journaled, barred, reported and replayed."""

import pandas as pd
import pytest

from harness.__main__ import main

RUN = (
    "--ops", "dfl_loss", "--oracles", "ultralytics==8.4.190", "--examples", "12", "--dtypes", "float32", "--no-bench",
    "--workers", "1", "--backends", "torch", "--candidate", "counts=tests.relation_faults:counts_its_calls",
)  # fmt: skip


@pytest.fixture(scope="session")
def run(harness_run):
    """A run with a candidate that answers otherwise each time."""
    return harness_run(*RUN, "--shrink-seconds", "0", "--relations", "repeat,anchors")


@pytest.mark.oracle
def test_a_broken_relation_fails_the_run_and_nobody_else(run):
    assert run.code == 1
    frame = pd.read_parquet(run.folder / "relations.parquet")
    assert set(frame["subject"]) == {"upstream", "torch", "counts"}
    assert set(frame["relation"]) == {"repeat", "anchors"}
    broken = frame[frame["verdict"] == "broken"]
    assert set(broken["subject"]) == {"counts"}
    assert "repeat" in set(broken["relation"])
    fallen = [bar["bar"] for bar in run.summary["gate"] if not bar["ok"]]
    assert "repeat of dfl_loss, counts" in fallen
    assert not any("torch" in bar for bar in fallen)


@pytest.mark.oracle
def test_the_report_has_it(run):
    assert "repeat of dfl_loss, counts" in (run.folder / "report.html").read_text()
    assert "| dfl\\_loss | counts | repeat |" in (run.folder / "summary.md").read_text()


@pytest.mark.oracle
def test_its_smallest_case_is_replayed(run, capsys):
    frame = pd.read_parquet(run.folder / "relations.parquet")
    saved = set(frame[frame["verdict"] == "broken"]["replay"]) - {""}
    assert saved
    for file in saved:
        assert main(["replay", str(run.folder / file), *RUN[2:4], *RUN[-4:]]) == 1
        said = capsys.readouterr().out
        assert "relations of counts" in said
        assert "repeat" in said


@pytest.mark.oracle
def test_relations_can_be_left_out_and_a_wrong_name_is_refused(harness_run, capsys):
    left = harness_run(*RUN, "--no-relations")
    assert not (left.folder / "relations.parquet").exists()
    assert main(["run", "--relations", "symmetry"]) == 4
    assert "--relations symmetry: there are images, " in capsys.readouterr().err
