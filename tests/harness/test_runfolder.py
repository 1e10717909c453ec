"""The run folder keeps what was appended, through kills and broken files."""

import json

import pytest

from harness.runfolder import RunFolder, RunFolderError

ROW = {"operation": "tal", "case": "ab", "speedup": float("nan")}


@pytest.fixture
def folder(tmp_path):
    return RunFolder.create(tmp_path / "run", {"settings": {}})


def test_rows_come_back_in_order(folder):
    folder.append("verdicts", [ROW, {**ROW, "case": "cd"}])
    folder.append("verdicts", [{**ROW, "case": "ef"}])
    assert [row["case"] for row in folder.rows("verdicts")] == ["ab", "cd", "ef"]


def test_a_line_torn_by_a_kill_is_dropped_and_the_next_append_is_whole(folder):
    folder.append("verdicts", [ROW])
    file = folder.path / "journal" / "verdicts.jsonl"
    with file.open("a") as journal:
        journal.write('{"operation": "ta')
    assert len(list(folder.rows("verdicts"))) == 1
    folder.mend()
    folder.append("verdicts", [{**ROW, "case": "cd"}])
    assert [row["case"] for row in folder.rows("verdicts")] == ["ab", "cd"]


def test_a_broken_line_in_the_middle_is_an_error_that_names_it(folder):
    file = folder.path / "journal" / "verdicts.jsonl"
    file.write_text('{"a": 1}\nnot json\n{"a": 2}\n')
    with pytest.raises(RunFolderError, match=r"verdicts\.jsonl: line 2"):
        list(folder.rows("verdicts"))


def test_a_second_run_does_not_write_into_the_first(folder):
    with pytest.raises(RunFolderError, match="already holds a run"):
        RunFolder.create(folder.path, {})


def test_resume_refuses_what_is_no_run(tmp_path):
    with pytest.raises(RunFolderError, match=r"run\.json: not found"):
        RunFolder.resume(tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(RunFolderError, match=r"run\.json"):
        RunFolder.resume(tmp_path)
    (tmp_path / "run.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(RunFolderError, match="format 99"):
        RunFolder.resume(tmp_path)


def test_the_last_row_of_a_case_stands_in_the_frame(folder):
    key = {"operation": "tal", "oracle": "o", "candidate": "c", "device": "cpu", "case": "ab"}
    folder.append("verdicts", [{**key, "replay": "drawn"}, {**key, "case": "cd", "replay": ""}])
    folder.append("verdicts", [{**key, "replay": "shrunk"}])
    folder.write_frames({"commit": "abc"})
    frame = folder.frame("verdicts")
    assert sorted(frame["replay"]) == ["", "shrunk"]
    assert set(frame["commit"]) == {"abc"}


def test_a_missing_or_broken_frame_is_named(folder):
    with pytest.raises(RunFolderError, match=r"verdicts\.parquet: not found"):
        folder.frame("verdicts")
    (folder.path / "verdicts.parquet").write_bytes(b"PAR1half")
    with pytest.raises(RunFolderError, match=r"verdicts\.parquet"):
        folder.frame("verdicts")
