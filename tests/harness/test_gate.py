"""The gate falls for every reason it should, and only then."""

import math

import pytest

from harness.bars.bar import tied_cases
from harness.gate import FELL, HOLDS_ALL, INCOMPLETE, INTERRUPTED, NOTHING_TRIED, summarise
from harness.plan import Plan
from harness.runfolder import RunFolder

VERDICT = {
    "operation": "tal",
    "oracle": "ultralytics==8.4.190",
    "candidate": "torch",
    "device": "cpu",
    "dtype": "float32",
    "verdict": "match",
    "output": "",
    "detail": "",
    "replay": "",
    "decisions": 100,
    "tied_decisions": 0,
}
MEASURED = {
    "operation": "tal",
    "oracle": "ultralytics==8.4.190",
    "candidate": "torch",
    "device": "cpu",
    "workload": "coco-b16",
    "threads": 2,
    "direction": "forward",
    "pairs": 40,
    "note": "",
    "speedup": 6.0,
    "speedup_low": 5.0,
    "speedup_high": 7.0,
    "verdict": "faster",
    "peak_bytes_oracle": 200,
    "peak_bytes_candidate": 60,
    "output_bytes": 50,
}


@pytest.fixture
def gate(tmp_path):
    """`gate(verdicts, measurements)` -> summary of a run that asked for 40 cases."""

    def summary(verdicts=(), measurements=(), **options):
        folder = RunFolder.create(tmp_path / "run", {})
        folder.append("verdicts", [{**VERDICT, **row, "case": str(i), "index": i} for i, row in enumerate(verdicts)])
        folder.append("measurements", [{**MEASURED, **row} for row in measurements])
        folder.write_frames({})
        plan = Plan(
            ("tal",), ("ultralytics==8.4.190",), {"torch": ""}, "cpu", ("float32",), "quick", 40, 0, (), None,
            parity=True, bench=True, workers=1, time_limit=1, memory_limit=None, row_seconds=1, shrink_seconds=1,
            baseline="none",
        )  # fmt: skip
        return summarise(folder, plan, **options)

    return summary


def fallen(summary):
    return [bar["bar"].split()[0] for bar in summary["gate"] if not bar["ok"]]


def test_all_that_holds_passes(gate):
    summary = gate([{}] * 38 + [{"verdict": "tie", "tied_decisions": 1}, {"verdict": "known-divergence"}], [{}])
    assert summary["exit_code"] == HOLDS_ALL
    assert summary["failed"] == 0
    assert fallen(summary) == []


@pytest.mark.parametrize(
    "verdict", ["mismatch", "candidate-error", "oracle-error", "crash", "timeout", "out-of-memory", "a new word"]
)
def test_one_bad_verdict_falls(gate, verdict):
    summary = gate([{}] * 40 + [{"verdict": verdict}])
    assert summary["exit_code"] == FELL
    assert summary["failed"] == 1


def test_too_few_cases_fall(gate):
    assert fallen(gate([{}] * 39)) == ["cases"]


def test_too_many_tied_cases_fall(gate):
    ties = math.floor(100 * tied_cases("tal")["float32"]) + 1
    assert fallen(gate([{"verdict": "tie"}] * ties + [{}] * (100 - ties))) == ["tied"]


def test_too_many_tied_decisions_fall(gate):
    assert fallen(gate([{"verdict": "tie", "tied_decisions": 90}] + [{}] * 39)) == ["tied"]


def test_nothing_tried_is_no_pass(gate):
    assert gate()["exit_code"] == NOTHING_TRIED


def test_an_interrupted_run_says_so_and_how_it_goes_on(gate, tmp_path):
    summary = gate([{}] * 40, interrupted=True)
    assert summary["exit_code"] == INTERRUPTED
    assert summary["sentence"].endswith("continue it with --resume.")
    added = RunFolder.create(tmp_path / "mutants", {})
    added.write_frames({})
    summary = summarise(added, None, interrupted=True)
    assert (summary["exit_code"], summary["sentence"]) == (
        INTERRUPTED,
        "The run was interrupted; continue it with --into.",
    )


def test_a_shard_that_never_started_makes_the_run_incomplete(gate):
    summary = gate([{}] * 40, lost=("simota on yolox==0.3.0: no",))
    assert summary["exit_code"] == INCOMPLETE
    assert "simota on yolox==0.3.0" in summary["sentence"]


@pytest.mark.parametrize(
    ("row", "bars"),
    [
        ({"speedup": 3.0, "speedup_low": 2.0, "speedup_high": 3.9}, ["speed"]),
        ({"speedup": 3.0, "speedup_low": 2.0, "speedup_high": 4.1}, []),
        ({"workload": "coco-b1", "speedup": 0.9, "speedup_low": 0.8, "speedup_high": 0.94}, ["speed"]),
        ({"workload": "coco-b1", "speedup": 1.0, "speedup_low": 0.8, "speedup_high": 1.2}, []),
        ({"peak_bytes_candidate": 101}, ["memory"]),
        ({"peak_bytes_candidate": 99}, []),
        ({"candidate": "mine", "speedup_high": 0.1, "peak_bytes_candidate": 10**9}, []),
        ({"speedup": 0.5, "speedup_low": 0.4, "speedup_high": 0.6, "verdict": "too-few-pairs"}, []),
        ({"speedup": 0.5, "speedup_low": 0.4, "speedup_high": 0.6, "verdict": "disturbed"}, []),
        ({"pairs": 0, "speedup": None, "speedup_high": None, "verdict": "too-few-pairs"}, ["measurement"]),
        ({"pairs": 0, "speedup": None, "speedup_high": None, "candidate": "mine"}, ["measurement"]),
    ],
)
def test_bars_of_speed_and_memory(gate, row, bars):
    assert fallen(gate([{}] * 40, [row])) == bars


def test_failures_are_named_once_a_kind_with_the_shrunk_file_first(gate):
    bad = {"verdict": "mismatch", "output": "target_scores"}
    rows = [{}] * 40 + [{**bad, "replay": "drawn"}, {**bad, "replay": "small", "shrunk": "abc"}]
    [failure] = gate(rows)["failures"]
    assert failure["cases"] == 2
    assert failure["replay"] == "small"
