"""The matrix without upstream: bars, era settings, upstream's names against the list, archives of new releases."""

import io
import sys
import tarfile
import zipfile
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

import reference
import reports.versions
from harness.__main__ import main
from harness.bars import versions
from harness.matrix import coverage, eras, names, release, run, table
from harness.matrix.recording import Recording
from harness.operation import gradient_name
from harness.operation import release as number
from harness.operations import NAMES, operation
from reference import pins
from reference.cache import cache_folder

CONTROL = "ultralytics==8.0.100"
NEW = "8.4.999"
WHEEL = f"ultralytics-{NEW}-py3-none-any.whl"
INIT = f'__version__ = "{NEW}"\n'


def row(verdict, operation="bbox_loss", oracle="ultralytics==8.4.190", candidate="torch", **more):
    """A row of the journal."""
    return {
        **{"operation": operation, "oracle": oracle, "candidate": candidate, "verdict": verdict, "settings": ""},
        **{"cases": 20, "ties": 0, "detail": "", "replay": "", **more},
    }


def fallen(*rows):
    """The names of the bars that fall."""
    return [bar.bar for bar in versions.bars(pd.DataFrame(list(rows))) if not bar.ok]


@pytest.mark.parametrize("verdict", ["equal", "settings", "absent"])
def test_a_cell_that_is_understood_holds(verdict):
    assert fallen(row(verdict)) == []


def test_a_cell_that_differs_falls_and_says_how():
    [bar] = [bar for bar in versions.bars(pd.DataFrame([row("differs", detail="loss_iou is off")])) if not bar.ok]
    assert bar.bar == "versions: bbox_loss, torch against ultralytics==8.4.190"
    assert bar.reason == "loss_iou is off"


def test_a_control_must_be_caught_wherever_it_is_known_to_be_wrong():
    caught, passed = row("control", oracle=CONTROL), row("equal", oracle=CONTROL)
    assert fallen(caught) == []
    assert fallen(passed) == [f"versions: control {CONTROL}"]
    assert fallen(row("equal", "dist2bbox", CONTROL)) == []  # known to be wrong elsewhere
    assert fallen(caught, row("equal", "v8_detection_loss", CONTROL)) == [f"versions: control {CONTROL}"]


def test_what_a_control_may_be_wrong_in_is_listed():
    assert versions.controlled(CONTROL, "bbox_loss")
    assert not versions.controlled(CONTROL, "dist2bbox")
    assert not versions.controlled("ultralytics==8.1.47", "bbox_loss")


@pytest.mark.parametrize("verdict", ["unlisted", "stale"])
def test_a_public_name_that_the_list_is_wrong_about_falls(verdict):
    assert fallen(row(verdict, "public names", candidate="ultralytics.utils.loss.New")) == [
        "public name ultralytics.utils.loss.New, ultralytics==8.4.190"
    ]
    assert fallen(row("uncovered", "public names"), row("moved", "tal"), row("unmoved", "tal")) == []


def test_ties_cannot_become_an_excuse():
    assert fallen(row("equal", "dist2bbox", cases=40, ties=40)) == [
        "versions: ties of dist2bbox, torch against ultralytics==8.4.190"
    ]
    assert fallen(row("equal", "dist2bbox", cases=5, ties=5)) == []


def test_the_sentence_counts_cells_and_names_what_moved():
    said = versions.sentence(pd.DataFrame([row("equal"), row("differs", "tal"), row("moved", "tal"), row("uncovered")]))
    assert "2 pairs" in said
    assert "1 equal" in said
    assert "1 differ;" in said
    assert "tal moved" in said


def test_every_known_era_is_among_the_combinations():
    for name in NAMES:
        for package, upstream in operation(name).upstreams.items():
            default, known = eras.newest(name, package), list(eras.combinations(name, package).values())
            for version in eras.releases(package):
                assert upstream.era(version) in [default, *known], (name, version)
            assert default not in known


def test_combinations_mix_eras_and_those_of_a_version_come_first():
    found = eras.combinations("tal", "ultralytics")
    known = [operation("tal").upstreams["ultralytics"].era(version) for version in eras.releases("ultralytics")]
    assert next(iter(found.values())) in known
    mixed = {**eras.newest("tal", "ultralytics"), "edge_round_trip": False}
    assert found["edge_round_trip=False"] == mixed
    assert mixed not in known


def test_the_newest_release_is_by_number_and_no_control():
    found = eras.releases("ultralytics")
    assert found == sorted(found, key=number, reverse=True)
    assert "8.0.100" not in found


def test_a_setting_that_an_era_leaves_out_is_said():
    assert eras.difference({}, {"rule": "new"}) == "rule left out"
    assert eras.difference({"rule": "old"}, {"rule": "new"}) == "rule=old"


# Upstream's names against the list.


@pytest.fixture
def package(tmp_path, monkeypatch):
    """`package(files)` makes a package `upstreamlike` importable."""

    def make(files):
        for name, content in files.items():
            file = tmp_path / "upstreamlike" / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(content)
        monkeypatch.syspath_prepend(str(tmp_path))

    yield make
    for name in [name for name in sys.modules if name.partition(".")[0] == "upstreamlike"]:
        del sys.modules[name]


def test_names_are_listed_where_they_live(package):
    package(
        {
            "__init__.py": "",
            "loss.py": "from math import sqrt\nfrom upstreamlike.other import Helper\nLIMIT = 1\n"
            "class Loss: pass\nclass _Hidden: pass\ndef overlap(): pass\n",
            "other.py": "class Helper: pass\n",
        }
    )
    found = names.public_names({"upstreamlike.loss": {}, "upstreamlike.gone": {}, "upstreamlike.no.such": {}})
    assert found == {"names": ["upstreamlike.loss.Loss", "upstreamlike.loss.overlap"], "unread": {}}


def test_a_former_folder_gives_the_present_names_and_a_package_all_of_its_modules(package):
    package(
        {
            "__init__.py": "",
            "old/__init__.py": "",
            "old/loss.py": "class Loss: pass\n",
            "losses/__init__.py": "",
            "losses/first.py": "def one(): pass\n",
            "losses/_hidden.py": "def two(): pass\n",
        }
    )
    places = {"upstreamlike.loss": {"formerly": ["upstreamlike.old.loss"]}, "upstreamlike.losses": {}}
    assert names.public_names(places)["names"] == ["upstreamlike.loss.Loss", "upstreamlike.losses.first.one"]


def test_methods_stand_for_a_class_and_a_module_that_cannot_be_imported_is_told(package):
    package(
        {
            "__init__.py": "",
            "head.py": "class Head:\n    size = 1\n    def get_losses(self): pass\n    def _own(self): pass\n",
            "broken.py": "import surely_not_installed\n",
            "failing.py": "raise ValueError('a secret')\n",
        }
    )
    places = {"upstreamlike.head": {"class": "Head"}, "upstreamlike.broken": {}, "upstreamlike.failing": {}}
    found = names.public_names(places)
    assert found["names"] == ["upstreamlike.head.get_losses"]
    assert found["unread"] == {
        "upstreamlike.broken": "no module surely_not_installed",
        "upstreamlike.failing": "ValueError",
    }


LIST = """
[modules]
"yolox.loss" = {}
[names."yolox.loss"]
IOUloss = { operation = "iou_loss" }
Gone = { absent = "not ours" }
"""


def test_drift_is_seen_in_both_directions(tmp_path):
    file = tmp_path / "coverage.toml"
    file.write_text(LIST)
    known = coverage.coverage(file)
    found = {"names": ["yolox.loss.IOUloss", "yolox.loss.Added"], "unread": {"yolox.loss.more": "no module x"}}
    assert known.unlisted(found) == ["yolox.loss.Added", "yolox.loss.more (cannot be imported: no module x)"]
    assert known.stale([found], ["yolox"]) == ["yolox.loss.Gone"]
    assert known.stale([found], ["transformers"]) == []


def test_drift_gets_rows_and_a_version_without_counterparts_is_absent(monkeypatch):
    found = {"names": ["yolox.models.losses.IOUloss", "yolox.models.losses.Added"], "unread": {}}
    rows = list(run.name_rows({"yolox==0.3.0": found}))
    told = {(line["verdict"], line["candidate"]) for line in rows}
    assert ("unlisted", "yolox.models.losses.Added") in told
    # The only pin of its package was looked at, and has not what the list says of it.
    assert ("stale", "yolox.utils.boxes.bboxes_iou") in told
    assert not any(line["candidate"].startswith("ultralytics") for line in rows)
    assert run.lacks("iou_loss", "yolox", "0.3.0", found) == ""
    assert run.lacks("bboxes_iou", "yolox", "0.3.0", found) == "it has no public bboxes_iou"


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ("{ absent = ' ' }", "must say why"),
        ("{ operation = 'no_such' }", "no_such"),
        ("{ operation = [] }", "no operation"),
        ("{}", "either"),
        ("{ operation = 'tal', absent = 'x' }", "either"),
        ("{ operator = 'tal' }", "either"),
    ],
)
def test_a_malformed_entry_is_named(tmp_path, entry, said):
    file = tmp_path / "coverage.toml"
    file.write_text(f'[modules]\n[names."yolox.loss"]\nIOUloss = {entry}\n')
    with pytest.raises(coverage.CoverageError, match=said) as raised:
        coverage.coverage(file)
    assert "yolox.loss.IOUloss" in str(raised.value)


def test_every_operation_is_the_counterpart_of_something():
    assert [name for name in NAMES if not coverage.coverage().counterparts(name)] == []


def test_a_recorded_answer_gives_its_gradients_whatever_it_is_contracted_with():
    outputs = {"loss": torch.tensor(3.0), "index": torch.tensor([1])}
    recorded = Recording({**outputs, gradient_name("x"): torch.tensor([5.0, -1.0])})
    given = {"x": torch.zeros(2, requires_grad=True), "y": torch.zeros(1, requires_grad=True)}
    answered = recorded(**given)
    assert {name: value.tolist() for name, value in answered.items()} == {"loss": 3.0, "index": [1]}
    for weight in (1.0, 7.0):
        contracted = [weight * answered["loss"]]
        x, y = torch.autograd.grad(contracted, list(given.values()), retain_graph=True, allow_unused=True)
        assert x.tolist() == [5.0, -1.0]
        assert y is None
    assert not Recording(outputs)(**given)["loss"].requires_grad


# Releases that are not pinned.


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache that holds the pins and nothing else, and no network: pip looks into the folder `links` beside it."""
    (tmp_path / "links").mkdir()
    (tmp_path / "cache" / "oracles").mkdir(parents=True)
    for folder in (cache_folder() / "oracles").iterdir():
        (tmp_path / "cache" / "oracles" / folder.name).symlink_to(folder)
    monkeypatch.setenv("CLEANROOM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))
    return tmp_path / "cache"


def wheel(file, members=None, link=False):
    """A wheel of `members`; with `link`, one of them is a symbolic link."""
    members = {"ultralytics/__init__.py": INIT} if members is None else members
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            info = zipfile.ZipInfo(name)
            info.external_attr = (0o120777 if link and name.endswith("link") else 0o100644) << 16
            archive.writestr(info, content)
    return file


def left(cache):
    """What a cache holds beside its lock and the pins."""
    paths = [path for path in cache.rglob("*") if path.name != ".lock" and not path.is_symlink()]
    return sorted(str(path.relative_to(cache)) for path in paths if path != cache / "oracles")


def test_a_release_lies_in_the_cache_as_pins_do(cache, tmp_path):
    pin = release.obtain("ultralytics", NEW, wheel(tmp_path / WHEEL))
    assert reference.locate(reference.OracleSpec.parse(release.spec(pin))).version == NEW
    assert (cache / "archives" / WHEEL).is_file()
    assert left(cache) == sorted(
        ["archives", f"archives/{WHEEL}"]
        + [
            f"oracles/ultralytics-{NEW}-{pin.sha256[:12]}{end}"
            for end in ("", "/ultralytics", "/ultralytics/__init__.py")
        ]
    )
    assert release.obtain("ultralytics", NEW) == pin  # from the cache, with nothing to download from


def test_pip_brings_a_release_by_name_and_version(cache, tmp_path):
    metadata = f"Metadata-Version: 2.1\nName: ultralytics\nVersion: {NEW}\n"
    info = f"ultralytics-{NEW}.dist-info"
    tags = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    members = {
        "ultralytics/__init__.py": INIT,
        f"{info}/METADATA": metadata,
        f"{info}/WHEEL": tags,
        f"{info}/RECORD": "",
    }
    wheel(tmp_path / "links" / WHEEL, members)
    assert release.obtain("ultralytics", NEW).archive == WHEEL


def test_a_line_is_written_where_pins_are_read(tmp_path):
    file = tmp_path / "pins.toml"
    file.write_text(pins.PINS_FILE.read_text())
    pin = reference.Pin("ultralytics", NEW, WHEEL, "a" * 64)
    release.write(pin, file)
    assert reference.read_pins(file) == {**reference.read_pins(), str(pin): pin}
    assert list(tmp_path.iterdir()) == [file]


HOSTILE = {
    "a path that leaves the folder": ({"../../evil.py": "x"}, "would leave the folder"),
    "an absolute path": ({"/evil.py": "x"}, "would leave the folder"),
    "a link": ({"ultralytics/link": "/etc/passwd"}, "is a link"),
    "another package": ({"other/__init__.py": INIT}, "holds no package ultralytics"),
    "another version": (
        {"ultralytics/__init__.py": '__version__ = "8.4.190"\n'},
        "says that it is ultralytics==8.4.190",
    ),
    "no Python": ({"ultralytics/__init__.py": "\x00("}, "cannot be read"),
    "no text": ({"ultralytics/__init__.py": b"\xff\xfe__version__"}, "cannot be read"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_archive_is_one_clear_line_and_leaves_nothing(cache, tmp_path, capsys, kind):
    members, said = HOSTILE[kind]
    file = wheel(tmp_path / WHEEL, members, link=True)
    assert main(["matrix", "--add", f"ultralytics=={NEW}", "--archive", str(file), "--out", str(tmp_path / "out")]) == 4
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert said in error
    assert left(cache) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "links", WHEEL]


def test_a_hostile_source_archive_leaves_nothing_either(cache, tmp_path, capsys):
    file = tmp_path / "yolox-9.9.tar.gz"
    with tarfile.open(file, "w:gz") as archive:
        link = tarfile.TarInfo("yolox-9.9/yolox/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
        outside = tarfile.TarInfo("../../evil.py")
        archive.addfile(outside, io.BytesIO())
    assert main(["matrix", "--add", "yolox==9.9", "--archive", str(file)]) == 4
    assert "is no plain file" in capsys.readouterr().err
    assert left(cache) == []


def test_no_archive_at_all(cache, tmp_path, capsys):
    file = tmp_path / WHEEL
    file.write_bytes(b"PK\x03\x04 half a wheel")
    assert main(["matrix", "--add", f"ultralytics=={NEW}", "--archive", str(file)]) == 4
    assert "can't be read as an archive" in capsys.readouterr().err
    assert left(cache) == []


def test_another_archive_of_that_name_is_not_overwritten(cache, tmp_path, capsys):
    first = release.obtain("ultralytics", NEW, wheel(tmp_path / WHEEL))
    before = left(cache)
    second = wheel(tmp_path / WHEEL, {"ultralytics/__init__.py": INIT + "changed = True\n"})
    assert main(["matrix", "--add", f"ultralytics=={NEW}", "--archive", str(second)]) == 4
    assert "another archive" in capsys.readouterr().err
    assert left(cache) == before
    assert release.obtain("ultralytics", NEW) == first


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--add", "detectron2==1.0"], "no package 'detectron2'; known: ultralytics"),
        (["--add", "ultralytics"], "expected NAME==VERSION"),
        (["--add", "ultralytics==--index-url=x"], "expected NAME==VERSION"),
        (["--add", "ultralytics==8.4.190"], "pinned already"),
        (["--add", "ultralytics==99.99.99"], "No matching distribution"),
        (["--add", "yolox==99.99.99"], "No matching distribution"),
        (["--add", f"ultralytics=={NEW}", "--archive", "no-such-file.whl"], "no such file"),
        (["--add", f"ultralytics=={NEW}", "--archive", __file__], "not an archive of"),
        (["--add", f"ultralytics=={NEW}", "--against", "yolox==0.3.0"], "not a pin of ultralytics"),
        (["--add", f"ultralytics=={NEW}", "--against", "ultralytics==1.2"], "is not pinned"),
        (["--add", f"ultralytics=={NEW}", "--ops", "simota"], "simota has no oracle"),
        (["--add", f"ultralytics=={NEW}", "--oracles", "yolox==0.3.0"], "--against"),
        (["--add", f"ultralytics=={NEW}", "--case", "x", "--out", "y"], "--case writes no run folder"),
        (["--archive", "x.whl"], "--archive goes with --add"),
        (["--write"], "--write goes with --add"),
        (["--ops", "no_such"], "no_such"),
        (["--oracles", "ultralytics==1.2.3"], "not pinned"),
        (["--candidate", "mine=no_such:thing"], "no_such"),
        (["--into", "no-such-folder"], "is this a run folder?"),
        (["--into", "a", "--out", "b"], "give one of them"),
    ],
)
def test_a_wrong_request_is_one_clear_line(cache, tmp_path, monkeypatch, capsys, arguments, said):
    monkeypatch.chdir(tmp_path)
    assert main(["matrix", *arguments]) == 4
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert said in error
    assert left(cache) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "links"]


# What is shown.

SHOWN = [
    row("equal"),
    row("settings", oracle="ultralytics==8.1.47", settings="ciou_alpha=legacy", detail="2 of 20"),
    row("control", oracle=CONTROL, detail="15 of 20", replay="python -m harness replay x"),
    row("equal", "simota", "yolox==0.3.0"),
    row("differs", "tal", detail="scores are off", replay="python -m harness replay y"),
    row("moved", "tal", candidate="ultralytics==8.4.190 (decisions)", settings="decisions", detail="3 of 20"),
    row("uncovered", "public names", candidate="yolox.utils.boxes.postprocess", detail="of inference"),
    row("unlisted", "public names", candidate="yolox.utils.boxes.added", detail="in no list"),
]


def test_the_tables_of_the_report():
    found = {found.name: found for found in reports.versions.tables(pd.DataFrame(SHOWN))}
    matrix = {line["operation"].text: line for line in found["versions-ultralytics"].rows}
    assert matrix["bbox_loss"]["ultralytics==8.1.47"].text == "equal with ciou_alpha=legacy"
    assert matrix["bbox_loss"][CONTROL].text == "control"
    assert (matrix["tal"]["ultralytics==8.4.190"].text, matrix["tal"]["ultralytics==8.4.190"].tone) == (
        "differs",
        "bad",
    )
    assert matrix["tal"]["ultralytics==8.1.47"].text == "–" or not matrix["tal"]["ultralytics==8.1.47"].tone
    assert [line["operation"].text for line in found["versions-yolox"].rows] == ["simota"]
    assert [line["verdict"].text for line in found["versions-behind"].rows] == ["differs", "settings", "control"]
    assert [line["settings"].text for line in found["versions-moved"].rows] == ["decisions"]
    assert [line["verdict"].text for line in found["versions-names"].rows] == ["unlisted", "uncovered"]


def test_the_table_of_the_terminal():
    lines = table.grid(pd.DataFrame(SHOWN)).splitlines()
    assert lines[0].split() == ["ultralytics", "8.4.190", "8.1.47", "8.0.100"]
    assert lines[1].split() == ["bbox_loss", "equal", "equal", "with", "[a]", "control"]
    assert lines[2].split() == ["tal", "differs", "-", "-"]
    assert lines[-1] == "[a]: ciou_alpha=legacy"
    told = table.differing(pd.DataFrame(SHOWN), "runs/x")
    assert "cd runs/x && python -m harness replay y" in told
    assert "yolox.utils.boxes.added" in told
    assert "postprocess: of inference" in table.uncovered(pd.DataFrame(SHOWN))


def test_a_pin_that_the_frame_does_not_know_is_no_control(monkeypatch):
    control = SimpleNamespace(control="wrong")
    monkeypatch.setattr(versions.reference, "read_pins", lambda: {CONTROL: control})
    assert fallen(row("equal")) == []
