"""What happens to a run from outside: each ends in a verdict or a clear error, and what was judged stands."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from harness.__main__ import main
from harness.runfolder import RunFolder
from tests.end_to_end.conftest import plug

PROJECT = Path(__file__).parents[2]
SMALL = ("--ops", "generalized_box_iou", "--oracles", "transformers==5.23.0", "--workers", "1", "--no-bench")
FEW = ("--examples", "3", "--shrink-seconds", "0", "--dtypes", "float32")


def run_alone(*arguments, **options):
    """A run in a process of its own."""
    command = [sys.executable, "-m", "harness", "run", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=PROJECT, **options)


@pytest.mark.oracle
def test_a_crash_in_native_code_and_memory_that_runs_out_are_verdicts_of_their_candidates(harness_run):
    candidates = ("--backends", "torch", *plug("crashes", "takes_all_memory"))
    run = harness_run(*SMALL, *FEW, "--memory-limit", "6", *candidates)
    assert run.code == 1
    crashes = run.failures("crashes")
    assert {row["verdict"] for row in crashes} == {"crash"}
    assert any("killed by SIGSEGV" in row["detail"] for row in crashes)
    assert {row["verdict"] for row in run.failures("takes_all_memory")} == {"out-of-memory"}
    assert run.failures("torch") == []
    assert len({row["cases"] for row in run.summary["operations"]}) == 1


@pytest.mark.oracle
def test_a_full_disk_ends_the_run_and_loses_nothing(tmp_path):
    """No file may grow past a limit, which is what a full disk looks like to a journal."""
    folder = tmp_path / "run"
    most = 4_000

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

    ended = run_alone(*SMALL, "--examples", "60", "--out", str(folder), preexec_fn=fill)
    assert ended.returncode == 3, ended.stderr
    assert "File too large; what was judged and measured before stands" in ended.stderr
    assert "Traceback" not in ended.stderr
    rows = list(RunFolder(folder).rows("verdicts"))
    assert rows
    # There is room again.
    assert main(["run", "--resume", str(folder)]) == 0
    assert list(RunFolder(folder).rows("verdicts"))[: len(rows)] == rows


def test_two_runs_do_not_share_a_folder(tmp_path):
    folder = RunFolder.create(tmp_path / "run", {"settings": {}})
    second = "from harness.__main__ import main; import sys; sys.exit(main(['run', '--resume', sys.argv[1]]))"
    command = [sys.executable, "-c", second, str(tmp_path / "run")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, cwd=PROJECT)
    assert ended.returncode == 4
    assert ended.stderr.endswith("run: another run is writing into this folder\n")
    folder.close()
    RunFolder.resume(tmp_path / "run")[0].close()


@pytest.mark.oracle
def test_nothing_is_written_outside_the_run_folder(tmp_path):
    """With the cache, which `reference fetch` fills, made unwritable but for its settings."""
    here, home = tmp_path / "here", tmp_path / "home"
    here.mkdir()
    home.mkdir()
    from reference.cache import cache_folder

    environment = os.environ | {
        "HOME": str(home), "CLEANROOM_CACHE": str(cache_folder()),
        "TMPDIR": str(tmp_path / "tmp"), "PYTHONPATH": str(PROJECT),
    }  # fmt: skip
    (tmp_path / "tmp").mkdir()
    command = [sys.executable, "-m", "harness", "run", *SMALL, *FEW, "--out", "own"]
    ended = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert [path.name for path in here.iterdir()] == ["own"]
    assert list(home.rglob("*")) == []
    assert [path for path in (tmp_path / "tmp").rglob("*") if path.is_file()] == []


@pytest.mark.oracle
def test_a_clock_that_jumps_back_changes_no_result(harness_run, monkeypatch):
    from harness import run as module

    times = iter(["2030-01-01T00:00:00+00:00", "2001-01-01T00:00:00+00:00"])
    monkeypatch.setattr(module, "_now", lambda: next(times))
    run = harness_run(*SMALL, *FEW)
    assert run.code == 0
    told = json.loads((run.folder / "run.json").read_text())
    assert told["started"] > told["finished"]
    assert (run.folder / "report.html").exists()


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("run.json", b"{"),
        ("run.json", b'{"format": 1, "settings": {"operations": "tal"}}'),
        ("journal/verdicts.jsonl", b'{"operation": \n{}\n'),
    ],
)
def test_a_damaged_run_folder_is_named(tmp_path, small_run, file, content, capsys):
    folder = shutil.copytree(small_run.folder, tmp_path / "copy")
    (folder / file).write_bytes(content)
    assert main(["run", "--resume", str(folder)]) == 4
    assert Path(file).name in capsys.readouterr().err


@pytest.fixture(scope="module")
def small_run(harness_run):
    return harness_run(*SMALL, *FEW)
