"""JSON that pytest-benchmark itself wrote becomes the frame of samples."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from reports import ReportError, bench, frames

EXTRA = {
    **{"operation": "tal", "oracle": "ultralytics==8.4.190", "candidate": "torch", "workload": "coco-b1"},
    **{"direction": "forward", "device": "cpu", "torch": "2.13.0", "threads": 2},
}
SOURCE = f"""
import pytest

@pytest.mark.parametrize("provider", ["oracle", "candidate"])
def test_call(benchmark, provider):
    benchmark.extra_info.update({EXTRA!r}, provider=provider)
    benchmark.pedantic(sum, args=([1, 2],), rounds=4)
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("bench")
    (folder / "test_bench.py").write_text(SOURCE)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--benchmark-json=saved.json"]
    # Beside other workers of a suite nothing is benchmarked, and this run would take itself for one.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, timeout=120)
    return json.loads((folder / "saved.json").read_text())


def _read(tmp_path: Path, content: object):
    file = tmp_path / "saved.json"
    file.write_text(json.dumps(content))
    return bench.read(file)


def test_a_row_a_raw_sample(tmp_path: Path, saved: dict) -> None:
    frame = _read(tmp_path, saved)
    assert list(frame.columns) == [*frames.SAMPLES, *bench.STAMP]
    raw = [value * 1e9 for benchmark in saved["benchmarks"] for value in benchmark["stats"]["data"]]
    assert frame["nanoseconds"].tolist() == raw
    assert frame["provider"].tolist() == ["oracle"] * 4 + ["candidate"] * 4
    assert frame["pair"].tolist() == [0, 1, 2, 3] * 2
    assert {key: frame[key].unique().tolist() for key in EXTRA} == {key: [value] for key, value in EXTRA.items()}


def test_without_raw_samples_the_median(tmp_path: Path, saved: dict) -> None:
    medians = [benchmark["stats"]["median"] * 1e9 for benchmark in saved["benchmarks"]]
    slim = [{**benchmark, "stats": {**benchmark["stats"], "data": []}} for benchmark in saved["benchmarks"]]
    assert _read(tmp_path, {**saved, "benchmarks": slim})["nanoseconds"].tolist() == medians


def test_no_benchmark_no_row(tmp_path: Path) -> None:
    frame = _read(tmp_path, {"benchmarks": []})
    assert frame.empty
    assert list(frame.columns) == [*frames.SAMPLES, *bench.STAMP]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([], "no pytest-benchmark JSON"),
        ({"benchmarks": None}, "no pytest-benchmark JSON"),
        (
            {"benchmarks": [{"name": "test_a", "extra_info": {"operation": "tal"}}]},
            "'test_a': extra_info has no oracle",
        ),
        (
            {"benchmarks": [{"extra_info": {**EXTRA, "provider": "oracle"}, "stats": {}}]},
            "neither data nor a median",
        ),
    ],
)
def test_a_bad_file_is_refused(tmp_path: Path, content: object, reason: str) -> None:
    with pytest.raises(ReportError, match=reason):
        _read(tmp_path, content)
