"""Reading a run folder: what may be missing, and what is refused by name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

import reports
from reports import frames, tables


def test_reads_everything(run_folder: Path) -> None:
    run = frames.read(run_folder)
    assert run.provenance["profile"] == "quick"
    assert run.summary["exit_code"] == 1
    assert len(run.verdicts) == 1600
    assert set(run.failing["verdict"]) == {"mismatch", "timeout"}
    assert len(run.samples) == 2 * run.measurements["pairs"].sum()


def test_an_unfinished_run_is_read(make_run: Callable[..., Path]) -> None:
    run = frames.read(make_run(finished=False, frames=False))
    assert (run.verdicts, run.samples, run.measurements, run.summary, run.failing) == (None,) * 5


def test_a_frame_of_nothing_has_its_columns(run_folder: Path) -> None:
    """A run with --no-bench writes frames without a row, which then know only the stamped columns."""
    pd.DataFrame(columns=["commit", "torch", "threads"]).to_parquet(run_folder / "measurements.parquet")
    assert list(frames.read(run_folder).measurements.columns) == list(frames.MEASUREMENTS)


def test_columns_of_nulls_keep_their_type(run_folder: Path) -> None:
    file = run_folder / "verdicts.parquet"
    pd.read_parquet(file).assign(error=None, replay=None).to_parquet(file)
    verdicts = frames.read(run_folder).verdicts
    assert verdicts["error"].isna().all()
    assert verdicts["error"].dtype == float
    assert (verdicts["replay"] == "").all()


def _drop_column(file: Path) -> None:
    pd.read_parquet(file).drop(columns="verdict").to_parquet(file)


def _letters_for_numbers(file: Path) -> None:
    pd.read_parquet(file).assign(error="small").to_parquet(file)


def _edit(**changes: object) -> Callable[[Path], None]:
    return lambda file: file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize(
    ("name", "spoil", "reason"),
    [
        ("run.json", Path.unlink, "no run folder"),
        ("run.json", lambda file: file.write_text("{"), "not readable as JSON"),
        ("run.json", lambda file: file.write_bytes(b"\xff\xfe"), "not readable as JSON"),
        ("run.json", lambda file: file.write_text("[]"), "JSON list where an object belongs"),
        ("run.json", _edit(format=2), "format 2 is unknown"),
        ("verdicts.parquet", lambda file: file.write_bytes(b"PAR1 torn"), "not readable as Parquet"),
        ("samples.parquet", lambda file: file.write_bytes(b""), "not readable as Parquet"),
        (
            "measurements.parquet",
            lambda file: file.write_bytes(file.read_bytes()[:-9]),
            "not readable as Parquet",
        ),
        ("verdicts.parquet", _drop_column, "has no column verdict"),
        ("verdicts.parquet", _letters_for_numbers, "column error holds something that is no number"),
        ("summary.json", lambda file: file.write_text("null"), "JSON NoneType"),
        ("summary.json", _edit(exit_code="1"), "'exit_code' is missing or no int"),
        ("summary.json", _edit(gate=[{"bar": "ties"}]), r"gate[0] has no limit, value, ok, reason"),
        ("summary.json", _edit(operations=["tal"]), r"operations[0] has no operation"),
    ],
)
def test_a_bad_file_is_refused_by_name(
    run_folder: Path, name: str, spoil: Callable[[Path], object], reason: str
) -> None:
    spoil(run_folder / name)
    with pytest.raises(reports.ReportError, match=re.escape(reason)) as raised:
        reports.write(run_folder)
    assert raised.value.file == run_folder / name
    assert name in str(raised.value)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(reports.ReportError, match="no such folder"):
        reports.write(tmp_path / "absent")


def test_gradients_have_a_row_of_their_own_in_the_parity_table(run_folder: Path) -> None:
    run = frames.read(run_folder)
    own = run.verdicts["operation"] == "tal"
    run.verdicts.loc[own, "gradient_error"] = 0.25
    fallen = run.verdicts[own].index[0]
    run.verdicts.loc[fallen, ["verdict", "output", "gradient_error"]] = ["mismatch", "gradient of boxes", 7.0]
    rows = [row for row in tables.parity(run).rows if row["quantity"].text == tables.GRADIENT]
    assert {row["operation"].text for row in rows} == {"tal"}
    first = rows[0]
    assert first["cases"].value == (own & (run.verdicts["oracle"] == first["oracle"].text)).sum()
    assert sum(row["mismatch"].value for row in rows) == 1
    assert max(row["worst"].value for row in rows) == 7.0
    assert {row["tie"].value for row in rows} == {None}
