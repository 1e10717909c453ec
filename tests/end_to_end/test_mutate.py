"""`harness mutate` on a handful of mutants of one small file: what the gate finds, and what a weak gate does not."""

import json
import re

import pandas as pd
import pytest

from harness.__main__ import main
from harness.mutation import syntactic
from harness.mutation.sources import PROJECT

FILE = "cleanroom/codecs.py"
PLANTED = {
    "decoded sides": "low, high = point + near, point + far",
    "corners": "torch.sub(x, left, )",
    "gradient": "if ctx.bound is None:",
    "checked shape": "elif one != 1:",
}
"""Mutants of the file by what they do: their changed lines, those that parity finds at its first case or two."""


@pytest.fixture(scope="session")
def ids():
    found = {mutant.after: mutant.id for mutant in syntactic.mutants(FILE, (PROJECT / FILE).read_text())}
    return {name: found.get(line) or pytest.fail(f"no mutant {line!r}") for name, line in PLANTED.items()}


@pytest.fixture(scope="session")
def mutate(tmp_path_factory):
    def run(*arguments, into=None):
        folder = into or tmp_path_factory.mktemp("mutate") / "folder"
        where = ("--into", str(folder)) if into else ("--out", str(folder))
        code = main(["mutate", "--files", FILE, "--no-tests", "--examples", "4", *where, *arguments])
        return code, folder, json.loads((folder / "summary.json").read_text())

    return run


def rows(folder):
    return [json.loads(line) for line in (folder / "journal/mutants.jsonl").read_text().splitlines()]


@pytest.mark.oracle
def test_after_its_minutes_no_mutant_is_begun(mutate, ids):
    code, folder, summary = mutate("--ids", next(iter(ids.values())), "--minutes", "0")
    assert (code, summary["sentence"]) == (5, "Nothing was tried.")
    assert not (folder / "journal/mutants.jsonl").exists()


@pytest.mark.oracle
def test_the_gate_finds_mutants_and_a_weak_one_does_not(mutate, ids, capsys):
    before = {file: file.stat().st_mtime_ns for file in (PROJECT / "cleanroom").rglob("*.py")}
    chosen = ",".join(list(ids.values())[:2])
    code, folder, summary = mutate("--ops", "dist2bbox,bbox2dist", "--ids", chosen)
    assert code == 0
    assert {(row["verdict"], row["by"]) for row in rows(folder)} == {("killed", "parity")}
    assert "2 of 2 mutants are found" in summary["sentence"]

    # Cut off in the middle of a line, it goes on with what is missing.
    journal = folder / "journal/mutants.jsonl"
    first, second = journal.read_text().splitlines(keepends=True)
    # A mutant of a text that was changed since is taken back.
    former = json.loads(first) | {"id": "0123456789", "verdict": "survived"}
    journal.write_text(f"{first}{json.dumps(former)}\n{second[:40]}")
    code, folder, summary = mutate("--ops", "dist2bbox,bbox2dist", "--ids", ",".join(ids.values()), into=folder)
    assert code == 0
    assert rows(folder)[0]["id"] == json.loads(first)["id"]
    assert sorted(pd.read_parquet(folder / "mutants.parquet")["id"]) == sorted(ids.values())
    assert "Mutants found, by kind" in (folder / "report.html").read_text()

    # The same mutants before a gate that never reaches them: nothing is found, and that is no green.
    capsys.readouterr()
    code, folder, summary = mutate("--ops", "make_anchors", "--ids", chosen)
    assert code == 1
    assert {row["verdict"] for row in rows(folder)} == {"survived"}
    assert [bar["bar"] for bar in summary["gate"] if not bar["ok"]] == ["mutants found"]
    shown = capsys.readouterr().out
    assert "fell: mutants found: 0" in shown
    assert PLANTED["corners"] in shown
    assert before == {file: file.stat().st_mtime_ns for file in (PROJECT / "cleanroom").rglob("*.py")}


def test_a_mutant_is_shown_as_a_difference(ids, capsys):
    assert main(["mutate", "--files", FILE, "--show", ids["corners"]]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"^-\s+torch.sub\(x, left, out=first\)$", shown, re.MULTILINE)
    assert re.search(r"^\+\s+torch.sub\(x, left, \)$", shown, re.MULTILINE)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--files", "cleanroom/nothing.py"], "--files"),
        (["--show", "0123456789", "--files", FILE], "--show 0123456789"),
        (["--ids", "0123456789", "--files", FILE], "--ids 0123456789"),
        (["--workers", "3"], "--workers 3"),
        (["--ops", "tall"], "--ops"),
        (["--again"], "--again"),
        (["--sample", "-1"], "--sample"),
    ],
)
def test_a_wrong_request_is_one_line_and_code_4(arguments, said, tmp_path, capsys):
    folder = [] if "--show" in arguments else ["--out", str(tmp_path / "folder")]
    try:
        code = main(["mutate", *folder, *arguments])
    except SystemExit as left:
        code = left.code
    assert code == 4
    assert said in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "folder").exists()
