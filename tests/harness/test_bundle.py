"""The bundle: what it packs, and that a run starts from it with nothing but what it holds."""

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from harness import bundle as module
from harness.bundle import FOLDER, bundle, missing_wheels, normal, requires, run_requirements
from harness.plan import RequestError
from reference.cache import cache_folder

IN_GIT = module.commit()[0] != "unknown" and not (module.PROJECT / ".commit").exists()
needs_git = pytest.mark.skipif(not IN_GIT, reason="what belongs to the project is known in a git checkout alone")

NEEDED = {normal(text.partition(">")[0].partition("[")[0].partition(";")[0]) for text in run_requirements()}


def wheel_of(needs, asked):
    """A download that makes wheels which need what `needs` says, and notes what was asked for."""

    def download(requirement, python, folder):
        asked.append(requirement)
        name = requirement.partition("==")[0].partition(">")[0]
        file = folder / f"{name}-1-py3-none-any.whl"
        lines = "".join(f"Requires-Dist: {need}\n" for need in needs.get(name, ()))
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr(f"{name}-1.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {name}\n{lines}")
        return file

    return download


def test_a_run_needs_what_the_project_declares():
    assert {"torch", "hypothesis", "pandas", "jinja2", "scipy", "loguru"} <= NEEDED
    assert not any(text.startswith("cleanroom") for text in run_requirements())
    assert "pytest" not in NEEDED


def test_wheels_follow_what_wheels_need(tmp_path):
    asked = []
    needs = {
        "jinja2": ["MarkupSafe>=2", "numpy", 'tomli; python_version < "3.11"', 'babel; extra == "i18n"'],
        "markupsafe": ["jinja2"],
    }
    found = missing_wheels("3.12", NEEDED - {"jinja2"}, tmp_path, wheel_of(needs, asked))
    assert [wheel.name for wheel in found] == ["MarkupSafe-1-py3-none-any.whl", "jinja2-1-py3-none-any.whl"]
    assert asked == ["jinja2==3.1.6", "MarkupSafe>=2"]
    assert requires(found[1]) == needs["jinja2"]


@pytest.mark.parametrize("python", ["3", "2.7", "3.12; rm"])
def test_a_version_that_is_none_is_refused(tmp_path, python):
    with pytest.raises(RequestError, match="--python"):
        bundle(tmp_path / "out.tar.gz", python, NEEDED, [])


@needs_git
def test_too_large_an_archive_is_refused_with_what_is_large(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MOST_BYTES", 1000)
    with pytest.raises(RequestError, match="name with --have"):
        bundle(tmp_path / "out.tar.gz", "3.12", NEEDED, [])
    assert not (tmp_path / "out.tar.gz").exists()


@needs_git
@pytest.mark.oracle
def test_a_run_starts_from_what_was_packed_alone(tmp_path):
    """The archive is unpacked elsewhere, with an empty home, a cache of its own and no git around it."""
    if not any((cache_folder() / "archives").glob("yolox-*")):
        pytest.skip("the oracles' archives are not here: python -m reference fetch")
    out = tmp_path / "out.tar.gz"
    said = bundle(out, "3.12", NEEDED, ["yolox==0.3.0"])
    assert said.endswith(f"tar xf out.tar.gz && sh {FOLDER}/start.sh --device cuda --profile full\n")
    with tarfile.open(out) as archive:
        archive.extractall(tmp_path, filter="data")
    environment = {
        "PATH": os.environ["PATH"], "PYTHON": sys.executable, "HOME": str(tmp_path), "PIP_NO_INDEX": "1",
    }  # fmt: skip
    options = ["--ops", "bboxes_iou", "--oracles", "yolox==0.3.0", "--examples", "5", "--no-bench"]
    command = ["sh", str(tmp_path / FOLDER / "start.sh"), *options, "--out", str(tmp_path / "run")]
    told = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, cwd=tmp_path)
    assert told.returncode == 0, told.stderr
    assert "Parity holds" in told.stdout
    provenance = (tmp_path / "run/run.json").read_text()
    assert module.commit()[0] in provenance
    assert str(Path(module.PROJECT)) not in provenance
