"""report.html: its numbers are those of the frames, it needs nothing from outside, and names stay text."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

import reports
from reports import frames, text

MOST_BYTES = 3_000_000


@pytest.fixture(scope="module")
def page(written: Path, parse: Callable):
    return parse((written / "report.html").read_text(encoding="utf-8"))


def test_parity_table_is_the_summary_and_the_worst_error_of_the_frame(written: Path, page) -> None:
    run = frames.read(written)
    rows = page.tables["parity"]
    assert len(rows) == len(run.summary["operations"])
    for row, expected in zip(rows, run.summary["operations"], strict=True):
        for key in ("operation", "oracle", "candidate", "device"):
            assert row[key.capitalize()][0] == text.clean(expected[key])
        for key in ("cases", "match", "tie", "mismatch", "other"):
            assert int(row[key.capitalize()][1]) == expected[key]
        assert float(row["Tie share"][1]) == expected["tie_share"]
        assert row["Tie share"][0] == "1.25% of 5%"
        same = (run.verdicts[["operation", "oracle", "candidate"]] == pd.Series(expected)[:3]).all(axis=1)
        assert float(row["Worst error"][1]) == run.verdicts[same]["error"].max()


def test_speed_and_memory_tables_are_the_frame(written: Path, page) -> None:
    frame = frames.read(written).measurements
    columns = {
        "speed": {
            "Upstream": "oracle_ns",
            "Candidate": "candidate_ns",
            "Speedup": "speedup",
            "Pairs": "pairs",
        },
        "memory": {
            "Upstream peak": "peak_bytes_oracle",
            "Candidate peak": "peak_bytes_candidate",
            "Outputs": "output_bytes",
        },
        "movement": {"Must move": "minimum_bytes"},
    }
    for table, headings in columns.items():
        for row, expected in zip(page.tables[table], frame.to_dict("records"), strict=True):
            assert row["Workload"][0] == expected["workload"]
            for heading, column in headings.items():
                assert float(row[heading][1]) == expected[column], (table, heading)


def test_a_gpu_run_says_what_was_launched_and_how_far_it_is_from_a_copy(run_folder: Path, parse: Callable) -> None:
    def tables():
        return parse(reports.write(run_folder).read_text(encoding="utf-8")).tables

    file = run_folder / "measurements.parquet"
    frame = pd.read_parquet(file)
    assert "launches" not in tables()
    frame["launches_oracle"], frame["launches_candidate"] = 900, 4
    frame["waits_oracle"], frame["waits_candidate"] = 16, 0
    frame["graph_ns"], frame["copy_rate"], frame["graph_note"] = 30_000.0, 4e12, None
    frame["minimum_bytes"] = 40_000_000
    frame.to_parquet(file)
    row = tables()["launches"][0]
    assert [row[name][1] for name in ("Launches of upstream", "Launches", "Waits of upstream", "Waits")] == [
        "900", "4", "16", "0",
    ]  # fmt: skip
    assert float(row["Times the limit"][1]) == pytest.approx(3.0)  # 40 MB at 4 TB/s take 10 us


def test_printed_numbers_and_sentences(page) -> None:
    speed = {(row["Workload"][0], row["Verdict"][0][1:]): row for row in page.tables["speed"]}
    few = speed["crowd-b16", "too-few-pairs"]
    assert few["99% interval"] == ("–", None)
    assert few["In words"][0] == "Only 4 pairs: an estimate, not a finding. 4 of at least 5 pairs fitted in 20 s."
    slower = speed["detr-b16", "slower"]
    assert slower["In words"][0].startswith("Slower: takes at least 1.")
    assert re.fullmatch(r"0\.\d\d×", slower["Speedup"][0])
    memory = page.tables["memory"][0]
    assert (memory["Upstream peak"][0], memory["Candidate peak"][0]) == ("18.9 MB", "3.10 MB")
    assert float(memory["Saving"][1]) == pytest.approx(18.9 / 3.1)
    assert float(memory["Saving beyond outputs"][1]) == pytest.approx((18.9 - 2.9) / (3.1 - 2.9))


def test_sentence_and_facts(page) -> None:
    assert (
        "Parity or a bar fell: 4 failed (2 mismatches) in 1600 cases of 3 operations against 4 oracles."
        " 1.25% of the cases are ties; the candidates run at 0.76× to 68.3× upstream's speed."
    ) in page.text
    assert "1 bar fell: no failing case." in page.text
    assert "Failing cases 3" in page.text
    assert "Bars held 2 of 3" in page.text


def test_a_group_without_a_cap_and_a_row_that_was_not_measured(run_folder: Path, parse: Callable) -> None:
    """Caps may stand in the gate's bars alone; a worker lost while measuring leaves a row of nothing."""
    summary = run_folder / "summary.json"
    content = json.loads(summary.read_text())
    del content["operations"][0]["tie_cap"]
    summary.write_text(json.dumps(content))
    file = run_folder / "measurements.parquet"
    frame = pd.read_parquet(file)
    numbers = ["oracle_ns", "candidate_ns", "speedup", "speedup_low", "speedup_high", "peak_bytes_oracle"]
    numbers += ["peak_bytes_candidate", "output_bytes", "minimum_bytes"]
    frame.loc[0, numbers] = None
    frame.loc[0, ["verdict", "note"]] = ["too-few-pairs", "timeout after 60 s"]
    frame.to_parquet(file)
    page = parse(reports.write(run_folder).read_text(encoding="utf-8"))
    assert page.tables["parity"][0]["Tie share"][0] == "1.25%"
    assert page.tables["speed"][0]["In words"][0] == "Not measured. timeout after 60 s."
    assert page.tables["speed"][0]["Speedup"] == ("–", None)
    assert page.tables["memory"][0]["Upstream peak"] == ("–", None)


def test_the_sentence_of_the_summary_is_taken_as_it_stands(run_folder: Path, parse: Callable) -> None:
    file = run_folder / "summary.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "sentence": "Everything <b>held</b>."}))
    page = parse(reports.write(run_folder).read_text(encoding="utf-8"))
    assert "Everything <b>held</b>. 1.25% of the cases are ties" in page.text


def test_failures_divergences_gate_and_provenance(page, hostile_name: str) -> None:
    commands = re.findall(r"python -m harness replay '[^']*failures/hungarian-\w{16}\|\$\(x\)\.safetensors'", page.text)
    assert len(commands) == 2
    assert page.text.count("matched_gt[2, 4810] is 7") == 3
    (divergence,) = page.tables["divergences"]
    assert (divergence["Divergence"][0], divergence["Cases"][1]) == ("tal-non-finite-prediction", "4")
    assert [row["State"][0] for row in page.tables["gate"]] == ["✕fell", "✓held", "✓held"]
    assert "3 min 27 s" in page.text
    assert "with uncommitted changes" in page.text
    assert [row["Version"][0] for row in page.tables["oracles"]] == [
        "8.4.190",
        "8.1.47",
        "0.3.0",
        "5.23.0",
        "local",
    ]
    assert hostile_name in page.text


def test_hostile_names_make_no_element_and_no_attribute(page) -> None:
    assert len(page.all("script")) == 1
    assert not page.all("img")
    names = {name for _, attributes in page.elements for name in attributes}
    assert not [name for name in names if name.startswith("on")]
    assert "style" not in names  # the policy would refuse it
    assert not re.search(r"[\x00-\x08\x0b-\x1f]", page.text)


def test_nothing_comes_from_outside(written: Path, page) -> None:
    source = (written / "report.html").read_bytes()
    assert len(source) < MOST_BYTES
    assert b"://" not in source
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "object", "embed", "base", "image", "use"), tag
        for name in ("src", "srcset", "action", "data", "poster", "xlink:href"):
            assert name not in attributes
        assert attributes.get("href", "#").startswith("#")


def test_the_policy_admits_this_style_and_this_script_only(written: Path, page) -> None:
    source = (written / "report.html").read_text(encoding="utf-8")
    (policy,) = [tag["content"] for tag in page.all("meta") if tag.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; ")
    assert "unsafe" not in policy
    for kind in ("style", "script"):
        (content,) = re.findall(f"<{kind}>(.*?)</{kind}>", source, flags=re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy


def test_a_large_run_stays_small(run_folder: Path) -> None:
    file = run_folder / "verdicts.parquet"
    frame = pd.read_parquet(file)
    failing = frame[frame.verdict == "mismatch"].assign(detail="<" * 50_000)
    pd.concat([frame, *[failing] * 200], ignore_index=True).to_parquet(file)
    page = reports.write(run_folder)
    assert page.stat().st_size < MOST_BYTES
    assert "The first 100 of 403 failing cases" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("lacks", "said"),
    [
        ({"failing": False}, "No case failed."),
        ({"bench": False}, "Time and memory were not measured (no measurements.parquet)."),
        ({"finished": False}, "The run is not finished: so far 1,600 cases over 4 oracles, 3 failing."),
        ({"finished": False, "frames": False}, "Parity was not checked (no verdicts.parquet)."),
    ],
)
def test_a_run_that_lacks_something_says_so(
    make_run: Callable[..., Path], parse: Callable, lacks: dict[str, bool], said: str
) -> None:
    folder = make_run(**lacks)
    page = parse(reports.write(folder).read_text(encoding="utf-8"))
    assert said in page.text
    word = "Passed" if lacks == {"failing": False} else "Unfinished" if "finished" in lacks else "Failed"
    assert page.text.startswith(f"Cleanroom: {word.lower()}")
    assert not list(folder.glob("*.partial"))


def test_an_unfinished_run_counts_its_frame(make_run: Callable[..., Path], parse: Callable) -> None:
    page = parse(reports.write(make_run(finished=False)).read_text(encoding="utf-8"))
    assert [int(row["Cases"][1]) for row in page.tables["parity"]] == [320] * 5
    assert [int(row["Mismatch"][1]) for row in page.tables["parity"]] == [0, 0, 0, 0, 2]
    assert [int(row["Other"][1]) for row in page.tables["parity"]] == [2, 2, 2, 2, 3]
