"""The stored baseline: a slowdown or a grown peak falls, an ambiguous timing never, and nothing else is compared."""

import json

import pandas as pd
import pytest

from harness import baseline
from harness.__main__ import main
from harness.bars.bar import thresholds
from harness.operations import NAMES
from harness.runfolder import RunFolder

HERE = "AMD EPYC"
NOISE = thresholds()["baseline"]
ROW = {
    "operation": "tal",
    "oracle": "ultralytics==8.4.190",
    "candidate": "torch",
    "workload": "coco-b16",
    "direction": "forward",
    "device": "cpu",
    "threads": 2,
    "speedup": 5.0,
    "speedup_low": 4.8,
    "speedup_high": 5.2,
    "verdict": "faster",
    "peak_bytes_candidate": 1_000_000,
}


def rows(*changes):
    return pd.DataFrame([{**ROW, **change} for change in changes])


def stored(*changes):
    return {row.where: row for row in baseline._judged(rows(*changes), HERE)}


def fallen(now, before=({},)):
    return [bar.bar.split()[0] for bar in baseline.bars(rows(now), stored(*before), HERE) if not bar.ok]


def slower(share, width=0.01):
    middle = ROW["speedup_low"] * share
    return {"speedup": middle, "speedup_low": middle * (1 - width), "speedup_high": middle * (1 + width)}


def test_the_same_again_holds():
    assert [bar.ok for bar in baseline.bars(rows({}), stored({}), HERE)] == [True, True]


def test_a_slowdown_beyond_the_noise_falls_and_one_within_it_does_not():
    assert fallen(slower(1 - NOISE["speed_noise"] - 0.05)) == ["speed"]
    assert fallen(slower(1 - NOISE["speed_noise"] + 0.05)) == []


def test_an_interval_that_reaches_into_the_noise_never_falls():
    """Its median lies beyond, but nothing is sure."""
    assert fallen({**slower(1 - NOISE["speed_noise"] - 0.05, width=0.2), "verdict": "ambiguous"}) == []


@pytest.mark.parametrize("verdict", ["too-few-pairs", "disturbed"])
def test_what_cannot_be_judged_is_not_compared(verdict):
    assert baseline.bars(rows({**slower(0.1), "verdict": verdict}), stored({}), HERE) == []
    assert baseline.said(rows({"verdict": verdict}), {}, HERE) == ""


def test_a_grown_peak_falls():
    most = ROW["peak_bytes_candidate"] * (1 + NOISE["memory_noise"]) + NOISE["memory_bytes"]
    assert fallen({"peak_bytes_candidate": most + 1}) == ["memory"]
    assert fallen({"peak_bytes_candidate": most - 1}) == []


@pytest.mark.parametrize("other", [{"threads": 8}, {"device": "cuda"}, {"workload": "coco-b1"}])
def test_rows_without_a_stored_one_are_said_and_not_compared(other):
    now = rows({**slower(0.1), **other}, {})
    assert [bar.ok for bar in baseline.bars(now, stored({}), HERE)] == [True, True]
    assert baseline.said(now, stored({}), HERE).startswith("1 of 2 timings have no row in the stored baseline")


def test_another_machine_is_said_and_not_compared():
    assert baseline.bars(rows(slower(0.1)), stored({}), "another") == []
    assert "(device cpu, another, 2 threads)" in baseline.said(rows({}), stored({}), "another")


def test_a_candidate_that_is_plugged_in_is_not_compared():
    assert baseline.bars(rows({"candidate": "mine"}), stored({}), HERE) == []


@pytest.fixture
def run(tmp_path):
    """A finished run with the given measurements."""

    def make(*changes):
        told = {"commit": "0" * 40, "started": "2026-01-01", "versions": {"torch": "2.13.0"}, "settings": {}}
        told["device_name"] = HERE
        folder = RunFolder.create(tmp_path / f"run{len(list(tmp_path.iterdir()))}", told)
        folder.append("measurements", [{**ROW, **change} for change in changes])
        folder.write_frames({})
        folder.close()
        return folder.path

    return make


def test_a_run_is_stored_over_the_rows_it_measured(run, tmp_path, capsys):
    file = tmp_path / "baseline.json"
    assert main(["baseline", str(run({}, {"workload": "coco-b1"})), "--file", str(file)]) == 0
    assert main(["baseline", str(run({"speedup": 5.1}, {"verdict": "disturbed"})), "--file", str(file)]) == 0
    assert "1 rows of this run, 1 kept of before" in capsys.readouterr().out
    assert sorted((row.workload, row.speedup) for row in baseline.read(file).values()) == [
        ("coco-b1", 5.0),
        ("coco-b16", 5.1),
    ]


def test_a_run_without_timings_is_refused(run, tmp_path, capsys):
    assert main(["baseline", str(run({"verdict": "disturbed"})), "--file", str(tmp_path / "baseline.json")]) == 4
    assert "no measurement of a built-in candidate that can be judged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda content: content.update(format=2), "no baseline of format 1"),
        (lambda content: content["rows"][0].pop("threads"), "rows[0] must have exactly operation, oracle"),
        (lambda content: content["rows"][0].update(speedup="fast"), "rows[0]: speedup is 'fast'"),
        (lambda content: content["rows"][0].update(speedup_low=9.0), "rows[0]: speedup is not inside its interval"),
        (lambda content: content["rows"].append(content["rows"][0]), "rows[1]: a second row of tal"),
    ],
)
def test_a_wrong_file_is_refused_by_file_and_row(run, tmp_path, capsys, spoil, said):
    file = tmp_path / "baseline.json"
    main(["baseline", str(run({})), "--file", str(file)])
    content = json.loads(file.read_text())
    spoil(content)
    file.write_text(json.dumps(content))
    capsys.readouterr()
    assert main(["run", "--baseline", str(file)]) == 4
    assert capsys.readouterr().err.startswith(f"harness: {file}: {said}")


def test_the_projects_own_baseline_has_a_row_of_every_operation_that_is_timed():
    assert {row.operation for row in baseline.read().values()} == set(NAMES)
