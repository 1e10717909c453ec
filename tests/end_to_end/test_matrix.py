"""The matrix against upstream: its table, a planted fault, folders continued and added to, a release that moved."""

import json
import shlex
import zipfile
from typing import NamedTuple

import pandas as pd
import pytest

from harness.__main__ import main
from reference import pins, read_pins
from reference.cache import archive_file, cache_folder, oracle_folder

pytestmark = pytest.mark.oracle

NEWEST, FORMER, CONTROL = "ultralytics==8.4.190", "ultralytics==8.1.47", "ultralytics==8.0.100"
QUICK = ("--examples", "6", "--workers", "1", "--dtypes", "float32")
NEW = "ultralytics==8.4.999"


class Matrix(NamedTuple):
    """A matrix's exit code, folder, frame and summary."""

    code: int
    folder: object
    frame: pd.DataFrame
    summary: dict

    def cell(self, operation, oracle):
        """The row of one cell."""
        own = self.frame[(self.frame.operation == operation) & (self.frame.oracle == oracle)]
        [row] = own.to_dict("records")
        return row


def matrix(folder, *arguments, into=False):
    code = main(["matrix", "--into" if into else "--out", str(folder), *QUICK, *arguments])
    return Matrix(code, folder, pd.read_parquet(folder / "versions.parquet"), summary(folder))


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Two operations against a present release, a former one and the control."""
    versions = ",".join((NEWEST, FORMER, CONTROL))
    folder = tmp_path_factory.mktemp("matrix") / "run"
    return matrix(folder, "--ops", "bbox_loss,probiou", "--oracles", versions)


def test_the_table_says_of_every_cell_what_is_true(table):
    assert table.code == 0
    assert table.cell("bbox_loss", NEWEST)["verdict"] == "equal"
    former = table.cell("bbox_loss", FORMER)
    assert former["verdict"] == "settings"
    assert "reg1_distance=zero" in former["settings"]
    assert "cases differ; the smallest: mismatch in loss_dfl" in former["detail"]
    control = table.cell("bbox_loss", CONTROL)
    assert control["verdict"] == "control"
    assert "mismatch in loss_iou" in control["detail"]
    absent = table.cell("probiou", CONTROL)
    assert (absent["verdict"], absent["cases"]) == ("absent", 0)
    assert absent["detail"] == "it has no public probiou or batch_probiou"
    assert min(table.frame[table.frame.verdict.isin(["equal", "settings", "control"])].cases) >= 10


def test_the_table_is_in_every_report(table):
    for name in ("report.html", "summary.md", "junit.xml"):
        text = (table.folder / name).read_text().replace("\\", "")
        assert "probiou" in text
        assert CONTROL in text
    assert "reg1_distance=zero" in (table.folder / "report.html").read_text()
    assert "RotatedBboxLoss" in (table.folder / "report.html").read_text()
    assert any(bar["bar"] == f"versions: control {CONTROL}" and bar["ok"] for bar in table.summary["gate"])
    assert table.summary["failed"] == 0


def test_a_folder_of_a_matrix_is_judged_again_and_no_run_is_resumed_from_it(table, capsys):
    assert main(["gate", str(table.folder)]) == 0
    assert table.summary["sentence"] in capsys.readouterr().out
    assert main(["run", "--resume", str(table.folder)]) == 4
    assert "harness matrix --into" in capsys.readouterr().err


def test_what_has_no_counterpart_is_listed_and_nothing_is_unlisted(table):
    uncovered = table.frame[table.frame.verdict == "uncovered"].set_index("candidate")
    assert uncovered.loc["ultralytics.utils.loss.v8PoseLoss", "detail"] == "keypoints: pose is no detection"
    assert uncovered.loc["ultralytics.utils.loss.v8PoseLoss", "oracle"] == f"{NEWEST}, {FORMER}"
    assert set(table.frame.verdict) <= {"equal", "settings", "absent", "control", "uncovered"}


def test_a_planted_fault_differs_and_its_smallest_case_replays(tmp_path, capsys, monkeypatch):
    fault = "bbox_loss_unweighted=tests.loss_faults:bbox_loss_unweighted"
    arguments = ("--ops", "bbox_loss", "--oracles", NEWEST, "--candidate", fault, "--shrink-seconds", "2")
    run = matrix(tmp_path / "run", *arguments)
    assert run.code == 1
    cell = run.cell("bbox_loss", NEWEST)
    assert cell["verdict"] == "differs"
    assert "mismatch in loss_iou" in cell["detail"]
    assert "shrunk:from" in cell["detail"]
    assert [bar["bar"] for bar in run.summary["gate"] if not bar["ok"]] == [
        f"versions: bbox_loss, bbox_loss_unweighted against {NEWEST}"
    ]
    assert "differs: bbox_loss, bbox_loss_unweighted" in capsys.readouterr().out
    words = shlex.split(cell["replay"])
    monkeypatch.chdir(run.folder)
    assert main(words[words.index("harness") + 1 :]) == 1
    assert f"bbox_loss_unweighted against {NEWEST}: mismatch" in capsys.readouterr().out


def test_a_matrix_is_added_to_a_finished_run_and_continued_where_it_stopped(harness_run, capsys):
    run = harness_run("--ops", "dist2bbox", "--oracles", FORMER, "--examples", "3", "--no-bench", "--workers", "1")
    assert run.code == 0
    added = matrix(run.folder, "--ops", "dist2bbox,bbox2dist", "--oracles", FORMER, into=True)
    assert added.code == 0
    assert added.cell("dist2bbox", FORMER)["verdict"] == "equal"
    assert added.summary["operations"] == run.summary["operations"]
    assert added.summary["sentence"].startswith(run.summary["sentence"].partition(".")[0])
    page = (run.folder / "report.html").read_text()
    assert 'id="parity"' in page
    assert 'id="versions"' in page

    journal = run.folder / "journal" / "versions.jsonl"
    rows = {row["operation"]: row for row in map(json.loads, journal.read_text().splitlines())}
    # As a kill leaves it: whole lines, and one that was being written.
    kept = {**rows["dist2bbox"], "detail": "judged before"}
    journal.write_text(json.dumps(kept) + "\n" + json.dumps(rows["bbox2dist"])[:40])
    again = matrix(run.folder, into=True)  # what is left of the request is in the folder
    assert again.code == 0
    assert again.cell("dist2bbox", FORMER) == {**added.cell("dist2bbox", FORMER), "detail": "judged before"}
    assert again.cell("bbox2dist", FORMER) == added.cell("bbox2dist", FORMER)
    assert len(again.frame) == len(added.frame)
    capsys.readouterr()


# A release that moved: the newest one with another constant in its overlap, under another number.

MOVED = {
    "ultralytics/__init__.py": ('"8.4.190"', '"8.4.999"'),
    "ultralytics/utils/metrics.py": ("4 / math.pi", "3 / math.pi"),
}


@pytest.fixture
def release(tmp_path, monkeypatch):
    """The archive of the new release; the cache is the pins' and takes nothing of it back."""
    pin, cache = read_pins()[NEWEST], tmp_path / "cache"
    archive = tmp_path / "ultralytics-8.4.999-py3-none-any.whl"
    with zipfile.ZipFile(archive_file(cache_folder(), pin)) as old, zipfile.ZipFile(archive, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name in MOVED:
                before, after = (text.encode() for text in MOVED[name])
                assert before in content  # upstream's, hence never printed
                content = content.replace(before, after)
            new.writestr(name, content)
    (cache / "oracles").mkdir(parents=True)
    folder = oracle_folder(cache_folder(), pin)
    (cache / "oracles" / folder.name).symlink_to(folder)
    monkeypatch.setenv("CLEANROOM_CACHE", str(cache))
    return archive


def test_a_release_that_moved_is_told_with_the_smallest_case(release, tmp_path, capsys, monkeypatch):
    before = pins.PINS_FILE.read_text()
    run = matrix(
        tmp_path / "run",
        "--ops",
        "bbox_loss,dfl_loss",
        "--add",
        NEW,
        "--archive",
        str(release),
        "--shrink-seconds",
        "2",
    )
    out = capsys.readouterr().out
    assert run.code == 1  # no known settings give it
    moved = run.frame[run.frame.verdict == "moved"]
    assert set(moved.operation) == {"bbox_loss"}
    assert "values" in set(moved.settings)
    assert (moved.oracle == NEW).all()
    [values] = moved[moved.settings == "values"].to_dict("records")
    assert "loss_iou" in values["detail"]
    assert "shrunk:from" in values["detail"]
    dfl = run.frame[(run.frame.operation == "dfl_loss")].set_index("verdict")
    assert set(dfl.index) == {"unmoved", "equal"}
    candidate = run.frame[(run.frame.operation == "bbox_loss") & (run.frame.candidate == "torch")]
    assert list(candidate.verdict) == ["differs"]
    assert "moved: bbox_loss, values" in out
    assert "unmoved: dfl_loss" in out
    sha256 = json.loads((run.folder / "run.json").read_text())["added"]["sha256"]
    assert f'"{NEW}" = {{ archive = "{release.name}", sha256 = "{sha256}" }}' in out
    # The saved case tells it again; the archive lies in the cache by now.
    words = shlex.split(values["replay"])
    monkeypatch.chdir(run.folder)
    assert main(words[words.index("harness") + 1 :]) == 1
    told = capsys.readouterr().out
    assert f"{NEW} and {NEWEST}: mismatch values" in told
    assert "equal with no known settings" in told
    assert pins.PINS_FILE.read_text() == before  # without --write nothing is pinned
