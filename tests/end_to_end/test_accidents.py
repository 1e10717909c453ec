"""What happens to a run from outside: each ends in a verdict or a clear error, and what was judged stands."""

import itertools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest

from cases.case import Case, CaseError
from harness import pool
from harness.__main__ import main
from harness.runfolder import RunFolder
from tests import faults
from tests.end_to_end.conftest import plug

PROJECT = Path(__file__).parents[2]
QUICK = ("--oracles", "transformers==5.23.0", "--workers", "1", "--no-bench", "--no-relations")
SMALL = ("--ops", "generalized_box_iou", *QUICK)
TWO = ("--ops", "generalized_box_iou,cardinality_error", *QUICK)
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
def test_a_worker_killed_from_outside_costs_its_case_alone(harness_run, tmp_path, monkeypatch, two_runs):
    """And of that case the verdict of whom it was at work on."""
    place = tmp_path / "pid"
    monkeypatch.setenv(faults.PLACE, str(place))

    def kill():
        while not (place.exists() and place.read_text()):
            time.sleep(0.01)
        os.kill(int(place.read_text()), signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    run = harness_run(*TWO, *FEW, "--backends", "torch", *plug("waits_to_be_killed"))
    killer.join(1)
    [killed] = run.failures("waits_to_be_killed")
    assert (killed["verdict"], killed["cases"]) == ("crash", 1)
    assert "killed by SIGKILL" in killed["detail"]
    assert verdicts(run, "torch") == verdicts(two_runs, "torch")
    assert len(verdicts(run, "waits_to_be_killed")) == len(verdicts(run, "torch"))


@pytest.mark.oracle
def test_a_terminated_run_leaves_a_report_and_no_worker(tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "harness", "run", *SMALL, "--examples", "400", "--out", str(folder)]
    process = subprocess.Popen(command, cwd=PROJECT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    journal = folder / "journal" / "verdicts.jsonl"
    while process.poll() is None and not (journal.exists() and journal.read_text().count("\n") > 5):
        time.sleep(0.01)
    workers = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    assert process.wait() == 2
    assert "interrupted" in json.loads((folder / "summary.json").read_text())["sentence"]
    assert (folder / "report.html").exists()
    assert workers
    assert psutil.wait_procs(workers, timeout=10)[1] == []


@pytest.mark.oracle
def test_a_clock_that_jumps_ahead_costs_a_case_at_most(harness_run, monkeypatch, two_runs):
    """The host's, by which a worker's time is up: it jumps by an hour once."""
    readings = itertools.count()

    class Clock:
        @staticmethod
        def monotonic():
            return time.monotonic() + (3600 if next(readings) > 40 else 0)

    monkeypatch.setattr(pool, "time", Clock)
    run = harness_run(*TWO, *FEW)
    assert next(readings) > 41
    left, right = verdicts(run, "torch"), verdicts(two_runs, "torch")
    assert left.keys() == right.keys()
    other = {left[key] for key in left if left[key] != right[key]}
    assert other <= {"timeout"}
    assert sum(left[key] != right[key] for key in left) <= 1


@pytest.mark.oracle
@pytest.mark.parametrize("place", ["verdicts.parquet", "report.html"])
def test_a_disk_that_is_full_when_results_are_written_leaves_no_half_file(tmp_path, two_runs, place):
    """Room for what is written before, and for all but the last byte of a file."""
    folder = shutil.copytree(two_runs.folder, tmp_path / "run")
    journal = (folder / "journal" / "verdicts.jsonl").read_bytes()
    sizes = {file.name: file.stat().st_size for file in folder.iterdir() if file.is_file()}
    largest = sizes[place] - 1
    assert max(len(journal), *(size for name, size in sizes.items() if name not in (place, "report.html"))) < largest
    for file in folder.glob("*.*"):
        if file.name != "run.json":
            file.unlink()

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))

    ended = run_alone("--resume", str(folder), preexec_fn=fill)
    assert ended.returncode == 3, ended.stderr
    assert "File too large; what was judged and measured before stands" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert not (folder / place).exists()
    assert [file.name for file in folder.iterdir() if file.suffix in (".part", ".partial")] == []
    assert (folder / "journal" / "verdicts.jsonl").read_bytes() == journal
    assert main(["run", "--resume", str(folder)]) == 0
    assert (folder / "report.html").exists()


@pytest.mark.oracle
def test_a_counterexample_that_cannot_be_saved_ends_the_run_as_a_full_disk_does(
    tmp_path, harness_run, monkeypatch, capsys
):
    def full(case, path):
        raise CaseError("cannot be written: No space left on device", path)

    monkeypatch.setattr(Case, "save", full)
    command = ["run", *SMALL, *FEW, "--out", str(tmp_path / "run"), *plug("says_what_no_frame_holds")]
    assert main(command) == 3
    assert "No space left on device; what was judged and measured before stands" in capsys.readouterr().err


@pytest.mark.oracle
def test_names_and_messages_of_an_enemy_are_text(harness_run, tmp_path):
    """A name that is a path and markup, and a message that is no Unicode."""
    name = "../../<b>mine\n</b>"
    target = "tests.faults:says_what_no_frame_holds"
    run = harness_run(*SMALL, *FEW, "--candidate", f"{name}={target}")
    assert run.code == 1
    [told] = run.failures(name)
    assert "<script>" in told["detail"]
    assert "<script>alert" not in (run.folder / "report.html").read_text()
    assert (run.folder / told["replay"]).parent == run.folder / "failures"
    assert [path.name for path in run.folder.parent.iterdir()] == [run.folder.name]


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
        ("run.json", b"[]"),
        ("run.json", b"[" * 100_000),
        ("run.json", b"\xff\xfe"),
        ("run.json", b'{"format": 1, "finished": null}'),
        ("journal/verdicts.jsonl", b'{"operation": \n{}\n'),
        ("journal/verdicts.jsonl", b"{}\n"),
        ("journal/verdicts.jsonl", b"[]\n"),
        ("journal/verdicts.jsonl", b"\xff\xfe\n"),
    ],
)
def test_a_damaged_run_folder_is_named(tmp_path, two_runs, file, content, capsys):
    folder = shutil.copytree(two_runs.folder, tmp_path / "copy")
    (folder / file).write_bytes(content)
    assert main(["run", "--resume", str(folder)]) == 4
    told = capsys.readouterr().err
    assert Path(file).name in told
    assert "Traceback" not in told


@pytest.mark.oracle
@pytest.mark.parametrize("command", ["gate", "report"])
@pytest.mark.parametrize("damage", ["truncated", "other columns"])
def test_a_damaged_frame_is_named(tmp_path, two_runs, command, damage, capsys):
    folder = shutil.copytree(two_runs.folder, tmp_path / "copy")
    frame = folder / "verdicts.parquet"
    if damage == "truncated":
        frame.write_bytes(frame.read_bytes()[:-30])
    else:
        pd.read_parquet(frame).rename(columns={"verdict": "<script>"}).to_parquet(frame)
    assert main([command, str(folder)]) == 4
    assert "verdicts.parquet" in capsys.readouterr().err


@pytest.mark.oracle
@pytest.mark.parametrize("place", ["journal/verdicts.jsonl", "summary.json.part", "failures", "report.html.partial"])
def test_a_link_out_of_a_run_folder_is_not_followed(tmp_path, two_runs, place, capsys):
    folder = shutil.copytree(two_runs.folder, tmp_path / "copy")
    outside = tmp_path / "outside"
    outside.write_text("mine\n") if "." in place else outside.mkdir()
    link = folder / place
    shutil.rmtree(link) if link.is_dir() else link.unlink(missing_ok=True)
    link.symlink_to(outside)
    assert main(["run", "--resume", str(folder)]) == 4
    assert f"{Path(place).name}: is a link" in capsys.readouterr().err
    # The report writes on its own.
    main(["report", str(folder)])
    assert (outside.read_text() == "mine\n") if outside.is_file() else (list(outside.iterdir()) == [])


@pytest.fixture(scope="module")
def two_runs(harness_run):
    """Two operations, one after the other on one worker, with nothing amiss."""
    run = harness_run(*TWO, *FEW)
    assert run.code == 0
    return run


def verdicts(run, candidate):
    """The verdict of every case of a candidate, by operation and case."""
    frame = pd.read_parquet(run.folder / "verdicts.parquet")
    own = frame[frame.candidate == candidate]
    return dict(zip(zip(own.operation, own.case, strict=True), own.verdict, strict=True))
