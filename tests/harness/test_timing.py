"""A measurement becomes a line: its verdict, what disturbed it, and who took the worker down."""

import pytest

from harness import timing
from harness.bars.bar import thresholds
from harness.disturbance import Reading, other_cores
from harness.plan import Plan
from harness.pool import WorkerFailed, WorkerLost
from harness.runfolder import RunFolder

PLAN = Plan(
    ("tal",), ("ultralytics==8.4.190",), {"torch": ""}, "cpu", ("float32",), "quick", 1, 0, ("coco-b1",), None,
    parity=False, bench=True, workers=1, time_limit=1, memory_limit=None, row_seconds=1, shrink_seconds=1,
)  # fmt: skip
ROW = timing.Row("tal", "ultralytics==8.4.190", "torch", "coco-b1", "forward")


class Stub:
    """A worker that answers with numbers, or is lost."""

    def __init__(self, other_cores=0.0, lost=None, first=2000):
        self.other_cores, self.lost, self.first = other_cores, lost, first

    def request(self, *_, **__):
        if self.lost:
            raise self.lost
        return {
            "samples": [{"pair": 0, "provider": "oracle", "nanoseconds": 20, "first": True}],
            "oracle": [self.first, *(2000 + i for i in range(1, 20))],
            "candidate": [1000 + i for i in range(20)],
            "note": "",
            "other_cores": self.other_cores,
            "peak_bytes_oracle": 2,
            "peak_bytes_candidate": 1,
            "output_bytes": 1,
            "minimum_bytes": 1,
            "dishonest": "",
        }


@pytest.fixture
def line(tmp_path):
    def take(worker):
        folder = RunFolder.create(tmp_path / "run", {})
        timing.take(PLAN, ROW, folder, worker, threads=2)
        [row] = folder.rows("measurements")
        assert timing.missing(PLAN, folder) == []
        return row

    return take


def test_a_quiet_machine_gives_a_finding(line):
    row = line(Stub())
    assert row["verdict"] == "faster"
    assert row["speedup"] == pytest.approx(2, rel=0.02)
    assert row["note"] == ""


@pytest.mark.parametrize("first", [0, -5])
def test_a_clock_that_stands_still_or_is_set_back_is_a_line_without_a_finding(line, first):
    row = line(Stub(first=first))
    assert (row["verdict"], row["pairs"]) == ("too-few-pairs", 0)
    assert row["note"] == "a call took no time or less: the clock stood still or was set back"


def test_a_busy_machine_gives_none_and_says_so(line):
    row = line(Stub(other_cores=thresholds()["timing"]["other_cores"] + 0.5))
    assert row["verdict"] == "disturbed"
    assert "other processes used 0.8 cores" in row["note"]


@pytest.mark.parametrize(
    ("lost", "reason"),
    [(WorkerLost("crash", "timing", "killed by SIGSEGV"), "SIGSEGV"), (WorkerFailed("ValueError: planted"), "planted")],
)
def test_a_lost_worker_or_a_raising_candidate_is_a_line_with_the_reason(line, lost, reason):
    row = line(Stub(lost=lost))
    assert row["pairs"] == 0
    assert row["speedup"] is None
    assert reason in row["note"]


def test_others_are_what_is_busy_beyond_this_process():
    assert other_cores(Reading(0, 100, 10), Reading(10, 125, 25)) == pytest.approx(1.0)
    assert other_cores(Reading(0, 100, 10), Reading(10, 114, 25)) == 0
