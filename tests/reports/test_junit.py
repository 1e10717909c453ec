"""junit.xml: well-formed whatever the names, and its counts add up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

from reports import frames, junit


def _written(folder: Path) -> ElementTree.Element:
    return ElementTree.fromstring(junit.render(frames.read(folder)))


def test_suites_and_counts(run_folder: Path, hostile_name: str) -> None:
    root = _written(run_folder)
    suites = {suite.get("name"): suite for suite in root}
    assert list(suites)[:2] == ["tal / ultralytics==8.4.190 / torch", "tal / ultralytics==8.1.47 / torch"]
    hostile = suites[f"hungarian / ultralytics==8.4.190 / {hostile_name}"]
    assert (hostile.get("tests"), hostile.get("failures"), hostile.get("errors")) == ("4", "3", "1")
    gate = suites["gate"]
    assert (gate.get("tests"), gate.get("failures")) == ("3", "1")
    assert gate.find("testcase/failure").get("message") == "3 against a limit of 0: parity is the product"
    assert (root.get("tests"), root.get("failures"), root.get("errors")) == ("11", "4", "1")
    for suite in root:
        assert int(suite.get("tests")) == len(suite.findall("testcase"))


def test_a_failing_case_has_its_detail_and_command(run_folder: Path) -> None:
    cases = [
        case for case in _written(run_folder).iter("testcase") if case.find("failure[@type='mismatch']") is not None
    ]
    assert len(cases) == 2
    body = cases[0].find("failure").text
    assert "matched_gt[2, 4810] is 7" in body
    assert "<img src=x" in body
    assert "replay: python -m harness replay '" in body


def test_all_held(make_run: Callable[..., Path]) -> None:
    root = _written(make_run(failing=False))
    assert (root.get("tests"), root.get("failures"), root.get("errors")) == ("8", "0", "0")


def test_an_unfinished_run_is_an_error(make_run: Callable[..., Path]) -> None:
    root = _written(make_run(finished=False, frames=False))
    assert (root.get("tests"), root.get("errors")) == ("1", "1")
    assert "There is no summary.json" in root.find("testsuite/testcase/error").get("message")
