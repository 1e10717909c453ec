"""The commands from end to end: exit codes, the files of a run, resuming, replaying, plugging in."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from harness.__main__ import main
from tests.end_to_end.conftest import plug

ROOT = Path(__file__).parents[2]
SMALL = ("--ops", "hungarian", "--oracles", "transformers==5.23.0", "--workers", "1", "--examples", "40")
LABELS = ROOT.parent / "shared" / "data" / "coco_val2014_sample" / "instances.json"


def interruptible():
    """A suite that was started in the background has interrupts ignored, and so have its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def harness(*arguments, **options):
    options = {"preexec_fn": interruptible, "cwd": ROOT, "text": True, **options}
    return subprocess.Popen([sys.executable, "-m", "harness", *arguments], **options)


@pytest.fixture(scope="session")
def small(harness_run):
    return harness_run(*SMALL, "--workloads", "coco-b1")


@pytest.mark.oracle
def test_a_run_writes_everything_it_promises(small):
    assert small.code == 0
    for name in ("run.json", "summary.json", "summary.md", "junit.xml", "report.html"):
        assert (small.folder / name).stat().st_size > 0
    [operation] = small.summary["operations"]
    counts = [operation[name] for name in ("match", "tie", "mismatch", "other")]
    assert operation["cases"] == sum(counts) >= 40
    assert operation["mismatch"] == 0
    [measurement] = small.summary["measurements"]
    assert measurement["workload"] == "coco-b1"
    assert measurement["direction"] == "forward"
    assert measurement["speedup_low"] <= measurement["speedup"] <= measurement["speedup_high"]
    assert measurement["peak_bytes_oracle"] > 0


@pytest.mark.oracle
def test_frames_hold_one_row_a_verdict_with_provenance(small):
    import pandas as pd

    verdicts = pd.read_parquet(small.folder / "verdicts.parquet")
    samples = pd.read_parquet(small.folder / "samples.parquet")
    assert len(verdicts) == small.summary["operations"][0]["cases"]
    assert set(verdicts["commit"]) == {json.loads((small.folder / "run.json").read_text())["commit"]}
    assert set(samples["provider"]) == {"oracle", "candidate"}
    assert (samples["nanoseconds"] > 0).all()


@pytest.mark.oracle
def test_the_last_line_counts(small, capsys):
    assert main(["gate", str(small.folder)]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"{small.summary['passed']} passed, {small.summary['failed']} failed"


@pytest.mark.oracle
def test_the_gate_falls_when_a_stored_verdict_falls(small, tmp_path):
    import shutil

    import pandas as pd

    folder = shutil.copytree(small.folder, tmp_path / "copy")
    verdicts = pd.read_parquet(folder / "verdicts.parquet")
    verdicts.loc[0, "verdict"] = "mismatch"
    verdicts.to_parquet(folder / "verdicts.parquet")
    assert main(["gate", str(folder)]) == 1


@pytest.mark.oracle
def test_a_killed_run_resumed_says_what_an_unkilled_one_says(small, tmp_path):
    folder = tmp_path / "killed"
    process = harness("run", "--out", str(folder), *SMALL, "--no-bench", stderr=subprocess.DEVNULL)
    journal = folder / "journal" / "verdicts.jsonl"
    while process.poll() is None and not (journal.exists() and journal.read_text().count("\n") > 15):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    judged = journal.read_text().count("\n")
    assert 15 < judged < small.summary["operations"][0]["cases"]
    assert not (folder / "summary.json").exists()
    assert main(["run", "--resume", str(folder)]) == 0
    resumed = json.loads((folder / "summary.json").read_text())
    assert resumed["operations"] == small.summary["operations"]
    # What was judged before the kill was not judged again.
    assert journal.read_text().count("\n") == resumed["operations"][0]["cases"]


@pytest.mark.oracle
def test_an_interrupted_run_is_readable_and_resumable(tmp_path):
    folder = tmp_path / "interrupted"
    # Many cases: on a busy machine a few would all be judged before the signal comes.
    options = (*SMALL, "--examples", "400", "--no-bench")
    process = harness("run", "--out", str(folder), *options, stderr=subprocess.DEVNULL)
    journal = folder / "journal" / "verdicts.jsonl"
    while process.poll() is None and not (journal.exists() and journal.read_text().count("\n") > 5):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    assert process.wait() == 2
    assert "interrupted" in json.loads((folder / "summary.json").read_text())["sentence"]
    assert (folder / "report.html").exists()
    assert main(["run", "--resume", str(folder)]) == 0


@pytest.mark.oracle
def test_a_failing_case_is_shrunk_saved_and_replayed(harness_run, capsys):
    run = harness_run(*SMALL, "--no-bench", "--dtypes", "float32", "--shrink-seconds", "4", *plug("hungarian_no_giou"))
    assert run.code == 1
    from cases.case import Case

    [failure] = [row for row in run.failures("hungarian_no_giou") if row["verdict"] == "mismatch"]
    smallest = Case.load(run.folder / failure["replay"])
    assert smallest.origin.startswith("shrunk:")
    # One image, and no more queries and targets than a wrong choice needs.
    assert smallest.tensors["boxes"].shape[0] <= 4
    replay = str(run.folder / failure["replay"])
    capsys.readouterr()
    plugged = plug("hungarian_no_giou")
    assert main(["replay", replay, "--oracles", "transformers==5.23.0", *plugged]) == 1
    assert "hungarian_no_giou against transformers==5.23.0: mismatch" in capsys.readouterr().out
    assert main(["replay", replay, "--oracles", "transformers==5.23.0"]) == 0
    assert main(["replay", replay, "--oracles", "yolox==0.3.0"]) == 5


@pytest.mark.oracle
@pytest.mark.skipif(not LABELS.exists(), reason="the real label sets lie beside the project, not in it")
@pytest.mark.parametrize(
    ("operation", "oracle"),
    [("tal", "ultralytics==8.4.190"), ("simota", "yolox==0.3.0"), ("hungarian", "transformers==5.23.0")],
)
def test_real_labels_hold(harness_run, operation, oracle):
    run = harness_run(
        "--ops", operation, "--oracles", oracle, "--examples", "0", "--labels", str(LABELS), "--no-bench",
        "--dtypes", "float32",
    )  # fmt: skip
    assert run.code == 0
    assert all(row["mismatch"] == 0 for row in run.summary["operations"])
    assert all(row["cases"] >= 39 for row in run.summary["operations"])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "--ops", "nms"], "nms"),
        (["run", "--oracles", "yolov5==1.0"], "yolov5"),
        (["run", "--oracles", "ultralytics==0.0.1"], "ultralytics==0.0.1"),
        (["run", "--ops", "tal", "--oracles", "yolox==0.3.0"], "tal"),
        (["run", "--candidate", "mine"], "NAME=MODULE:ATTRIBUTE"),
        (["run", "--candidate", "mine=nowhere:f"], "nowhere"),
        (["run", "--candidate", "mine=os:sep"], "not callable"),
        (["run", "--dtypes", "int8"], "int8"),
        (["run", "--workloads", "coco-b17"], "coco-b17"),
        (["run", "--profile", "slow"], "slow"),
        (["run", "--labels", "/nowhere.json"], "/nowhere.json"),
        (["run", "--resume", "/nowhere"], "run.json"),
        (["run", "--examples", "-1"], "--examples"),
        (["replay", "/nowhere.safetensors"], "/nowhere.safetensors"),
        (["gate", "/nowhere"], "run.json"),
        (["report", "/nowhere"], "/nowhere"),
        (["show", "nms"], "nms"),
    ],
)
def test_a_wrong_request_ends_with_4_and_says_what_is_wrong(arguments, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        code = main(arguments)
    except SystemExit as ended:
        code = ended.code
    assert code == 4
    assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.oracle
def test_a_checkout_serves_as_oracle(harness_run):
    from harness.oracles import locate

    folder = locate("yolox==0.3.0").root
    run = harness_run("--ops", "simota", "--oracle", f"yolox={folder}", "--examples", "10", "--no-bench")
    assert run.code == 0
    assert {row["oracle"] for row in run.summary["operations"]} == {f"yolox={folder}"}


@pytest.mark.oracle
def test_nothing_tried_is_not_a_pass(harness_run):
    run = harness_run("--ops", "hungarian", "--no-parity", "--no-bench")
    assert run.code == 5


@pytest.mark.oracle
def test_a_run_does_not_write_into_another_runs_folder(small, capsys):
    assert main(["run", "--out", str(small.folder), *SMALL]) == 4
    assert "already holds a run" in capsys.readouterr().err


def test_list_show_and_doctor_name_what_there_is(capsys):
    assert main(["list"]) == 0
    assert main(["doctor"]) == 0
    for operation in ("tal", "simota", "hungarian"):
        assert main(["show", operation]) == 0
    text = capsys.readouterr().out
    for word in ("coco-b16", "crowd-b16", "dense-b4", "detr-b16", "gt_bboxes", "num_gt", "giou_cost", "torch 2"):
        assert word in text
