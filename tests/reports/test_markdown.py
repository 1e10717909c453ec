"""summary.md: tables stay tables whatever the names."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path

from reports import frames, markdown


def _written(folder: Path) -> str:
    return markdown.render(frames.read(folder))


def _tables(source: str) -> list[list[list[str]]]:
    """Tables as rows of cells, split as GitHub does: at every pipe without a backslash."""
    blocks = re.findall(r"(?:^\|.*\n?)+", source, flags=re.MULTILINE)
    return [[re.split(r"(?<!\\)\|", line)[1:-1] for line in block.splitlines()] for block in blocks]


def test_every_row_has_the_cells_of_its_heading(run_folder: Path) -> None:
    parity, measured, bars = _tables(_written(run_folder))
    assert (len(parity), len(measured), len(bars)) == (2 + 5, 2 + 11, 2 + 1)
    for table in (parity, measured, bars):
        assert {len(row) for row in table} == {len(table[0])}


def test_numbers(run_folder: Path) -> None:
    parity, measured, _ = _tables(_written(run_folder))
    assert [cell.strip() for cell in parity[-1][4:11]] == ["value", "320", "311", "4", "2", "3", "1.25% of 5%"]
    assert [cell.strip() for cell in measured[-1][-3:]] == ["slower", "18.0 MB", "19.5 MB"]


def test_names_stay_text(run_folder: Path) -> None:
    prose = re.sub(r"(?s)^(`{3,})sh\n.*?^\1$", "", _written(run_folder), flags=re.MULTILINE)
    assert "mine&lt;script&gt;alert(1)&lt;/script&gt;\\|\\`x\\`\\]\\]&gt;" in prose
    assert not re.search(r"<|(?<!\\)`|\x07", prose)


def test_commands_can_be_pasted(run_folder: Path, hostile_name: str) -> None:
    (code,) = re.findall(r"(?s)^```sh\n(.*?)^```$", _written(run_folder), flags=re.MULTILINE)
    commands = [shlex.split(line) for line in code.splitlines()]
    assert [command[:4] for command in commands] == [["python", "-m", "harness", "replay"]] * 2
    assert all(re.search(r"/hungarian-\w{16}\|\$\(x\)\.safetensors$", command[4]) for command in commands)
    assert [command[5:] for command in commands] == [["--backends", hostile_name]] * 2


def test_code_cannot_leave_its_fence() -> None:
    fenced = markdown._fenced("run ```` here")
    assert fenced.startswith("`````sh\n")


def test_without_failures_nothing_is_listed(make_run: Callable[..., Path]) -> None:
    source = _written(make_run(failing=False))
    assert source.startswith(
        "## Cleanroom: Passed\n\nParity holds: 1600 cases of 3 operations against 4 oracles, no mismatch"
    )
    assert "Failing" not in source
    assert "Bars that fell" not in source


def test_an_unfinished_run_says_so(make_run: Callable[..., Path]) -> None:
    source = _written(make_run(finished=False, frames=False))
    assert "The run is not finished" in source
    assert not _tables(source)
