"""Every fault from the field is covered by something that there is, and named after it."""

from collections import Counter
from pathlib import Path

import pytest

from cases import field
from cases.pinned import pinned
from harness import relations
from harness.describe import show
from harness.operations import NAMES, operation
from reference import read_pins
from tests.field_faults import CONTROLS, FAULTS

ROOT = Path(__file__).parents[2]

#: The rows of the table of wrong results, by the first place where each was reported; what else was, in `ALSO`.
ROWS = (
    "PaddleDetection#5710",
    "Tencent/YOLO-Master#253",
    "MultimediaTechLab/YOLO#48",
    "DETA#8",
    "U#25912",
    "U#24260",
    "U#10108",
    "U#490",
    "U#4848",
    "U#25990",
    "U#25941",
    "YX#811",
    "RF#431",
    "U#25508",
    "HF#28865",
    "HF#47000",
    "yolov7#306",
    "ultralytics==8.0.100",
    "U#22971",
)
ALSO = {
    "Tencent/YOLO-Master#253": ("MultimediaTechLab/YOLO#103",),
    "DETA#8": ("CLRerNet#78",),
    "U#10108": ("U#24933", "U#25007"),
    "U#4848": ("U#19514",),
    "U#25941": ("U#25209",),
    "YX#811": ("MD#6731", "pixeltable-yolox#16"),
    "RF#431": ("U#4085", "RT-DETR#527"),
    "U#25508": ("optax#1179",),
    "yolov7#306": ("yolov7#2146",),
}
each_row = pytest.mark.parametrize("row", field.rows(), ids=lambda row: row.id)


def test_every_row_is_declared_once_and_nothing_else():
    assert sorted(row.id for row in field.rows()) == sorted(ROWS)
    assert {row.id: row.also for row in field.rows() if row.also} == ALSO


@each_row
def test_what_covers_a_row_exists(row):
    stored = {case.origin.removeprefix("pinned:"): case for case in pinned()}
    assert [name for name in row.cases if name not in stored] == []
    for name in row.cases:
        case = stored[name]
        assert case.operation in row.operations
        assert row.tag in case.tags
        assert name.startswith(tuple(f"{case.operation}-{slug}" for slug in row.slugs))
    for control in row.controls:
        assert control in read_pins() or (ROOT / control).is_file()
    assert set(row.operations) | set(row.targets) <= set(NAMES)
    if row.relations:
        assert set(row.relations) <= set(relations.NAMES)


def test_every_case_with_a_tag_of_the_field_is_declared():
    tagged = {
        (tag, case.origin.removeprefix("pinned:")) for case in pinned() for tag in case.tags if tag.startswith("field:")
    }
    assert tagged == {(row.tag, name) for row in field.rows() for name in row.cases}
    named = {case.origin.removeprefix("pinned:") for case in pinned() if "-field-" in case.origin}
    assert named == {name for _, name in tagged}


def test_every_case_is_shown_to_fail_on_a_fault_of_its_row():
    shown = {(fault.row, f"{fault.operation}-field-{name}") for fault in FAULTS for name in fault.cases}
    assert shown == {(row.id, name) for row in field.rows() for name in row.cases}
    assert {fault.operation for fault in FAULTS} <= set(CONTROLS)


def test_strategies_reach_the_targets(draw):
    wanted = {(name, tag) for row in field.rows() for name, tags in row.targets.items() for tag in tags}
    for drawn in sorted({name for name, _ in wanted}):
        seen = Counter(tag for case in draw(drawn) for tag in case.tags)
        assert {tag: seen[tag] for name, tag in wanted if name == drawn and not seen[tag]} == {}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('id = "X#1"\nfact = "f"', r"row 0 \(X#1\): nothing covers it"),
        ('id = "X#1"\nfact = "f"\ncases = ["a"]\nchecks = []', "unknown key checks"),
        ('fact = "f"\ncases = ["a"]', r"row 0 \(no id\): .*'id'"),
    ],
)
def test_a_malformed_row_is_named(tmp_path, text, reason):
    file = tmp_path / "field.toml"
    file.write_text(f"[[row]]\n{text}\n")
    with pytest.raises(ValueError, match=f"field.toml: .*{reason}"):
        field.rows(file)


def test_an_operation_is_shown_with_its_rows():
    text = show(operation("simota"))
    own = field.rows_of("simota")
    assert {"DETA#8", "U#4848", "YX#811", "yolov7#306"} == {row.id for row in own}
    assert [row.id for row in own if f"{', '.join((row.id, *row.also))}: {row.fact}\n" not in text] == []
