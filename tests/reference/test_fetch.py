"""Fetching, with archives made here: nothing goes over the network."""

import hashlib
import io
import os
import signal
import stat
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from reference import fetch as fetch_module
from reference.__main__ import main
from reference.cache import archive_file, cache_folder, oracle_folder
from reference.errors import FetchError
from reference.fetch import fetch
from reference.pins import Pin, read_pins

PROJECT = Path(__file__).parents[2]
WHEEL = {
    "demo/__init__.py": "__version__ = '1.0'\n",
    "demo/deep/er.py": "",
    "demo-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: demo\nVersion: 1.0\n",
    "demo-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "demo-1.0.dist-info/RECORD": "",
}


def sha256(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()


def make_wheel(file, members=WHEEL):
    with zipfile.ZipFile(file, "w") as wheel:
        for name, content in members.items():
            wheel.writestr(name, content)
    return Pin("demo", "1.0", file.name, sha256(file))


def make_source(file, members):
    with tarfile.open(file, "w:gz") as source:
        for name, content in members.items():
            member = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            member.size = len(content)
            source.addfile(member, io.BytesIO(content.encode()))
    return Pin("demo", "1.0", file.name, sha256(file))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of the test's own, and a pip that finds nothing anywhere."""
    folder = tmp_path / "cache"
    (folder / "archives").mkdir(parents=True)
    monkeypatch.setenv("CLEANROOM_CACHE", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    return folder


@pytest.fixture
def wheel(cache):
    return make_wheel(cache / "archives" / "demo-1.0-py3-none-any.whl")


@pytest.fixture
def pinned(tmp_path, monkeypatch):
    """Make pins the project's, for the command line."""

    def pin(*pins):
        lines = [f'"{p}" = {{ archive = "{p.archive}", sha256 = "{p.sha256}" }}' for p in pins]
        file = tmp_path / "pins.toml"
        file.write_text("\n".join(["[oracles]", *lines]))
        monkeypatch.setattr("reference.pins.PINS_FILE", file)

    return pin


def contents(folder):
    return {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}


def unpacked(cache):
    return list((cache / "oracles").iterdir()) if (cache / "oracles").exists() else []


def test_a_wheel_in_the_cache_is_unpacked(cache, wheel):
    assert fetch(wheel)
    assert contents(oracle_folder(cache, wheel)) == set(WHEEL)
    assert unpacked(cache) == [oracle_folder(cache, wheel)]


def test_a_source_archive_loses_its_top_folder(cache):
    top = tarfile.TarInfo("demo-1.0")
    top.type = tarfile.DIRTYPE
    pin = make_source(cache / "archives" / "demo-1.0.tar.gz", {top: "", "demo-1.0/demo/__init__.py": "x = 1"})
    assert fetch(pin)
    assert contents(oracle_folder(cache, pin)) == {"demo/__init__.py"}


def test_a_second_fetch_does_nothing(cache, wheel, monkeypatch):
    fetch(wheel)
    archive_file(cache, wheel).unlink()
    for name in ("unpack", "_check", "_download", "locked"):
        monkeypatch.setattr(fetch_module, name, None)
    assert not fetch(wheel)


def test_another_hash_of_the_same_version_is_fetched_anew(cache, wheel):
    fetch(wheel)
    other = make_wheel(archive_file(cache, wheel), WHEEL | {"demo/__init__.py": "changed"})
    assert fetch(other)


def test_a_wrong_hash_is_refused(cache, wheel, pinned, capsys):
    wrong = Pin(wheel.name, wheel.version, wheel.archive, "f" * 64)
    pinned(wrong)
    assert main(["fetch"]) == 3
    error = capsys.readouterr().err
    assert wheel.sha256 in error
    assert wrong.sha256 in error
    assert unpacked(cache) == []


def link(name, kind, target):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


def zip_link(name):
    member = zipfile.ZipInfo(name)
    member.external_attr = (stat.S_IFLNK | 0o777) << 16
    return member


@pytest.mark.parametrize("name", ["../escaped", "demo/../../escaped", "/escaped", "demo/.."])
def test_names_that_leave_the_folder_are_refused(cache, name):
    folder = cache / "archives"
    wheel = make_wheel(folder / "demo-1.0-py3-none-any.whl", {"demo/__init__.py": "", name: "x"})
    source = make_source(folder / "demo-1.0.tar.gz", {"demo-1.0/demo/__init__.py": "", f"demo-1.0/{name}": "x"})
    absolute = make_source(folder / "other-1.0.tar.gz", {name: "x"})
    for pin in (wheel, absolute) if name == "/escaped" else (wheel, source):
        with pytest.raises(FetchError, match="would leave the folder"):
            fetch(pin)
    assert unpacked(cache) == []
    assert not list(cache.parent.rglob("escaped"))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_of_a_source_archive_are_refused(cache, kind):
    members = {"demo-1.0/demo/__init__.py": "", link("demo-1.0/demo/link", kind, "/etc/passwd"): ""}
    pin = make_source(cache / "archives" / "demo-1.0.tar.gz", members)
    with pytest.raises(FetchError, match=r"'demo-1\.0/demo/link' is no plain file"):
        fetch(pin)
    assert unpacked(cache) == []


def test_links_of_a_wheel_are_refused(cache):
    file = cache / "archives" / "demo-1.0-py3-none-any.whl"
    pin = make_wheel(file, {"demo/__init__.py": "", zip_link("demo/link"): "/etc/passwd"})
    with pytest.raises(FetchError, match="'demo/link' is a link"):
        fetch(pin)
    assert unpacked(cache) == []


@pytest.mark.parametrize("name", ["demo-1.0-py3-none-any.whl", "demo-1.0.tar.gz"])
def test_what_is_no_archive_is_refused(cache, name):
    file = cache / "archives" / name
    file.write_text("<html>not found</html>")
    with pytest.raises(FetchError, match=f"{name} can't be read as an archive"):
        fetch(Pin("demo", "1.0", name, sha256(file)))
    assert unpacked(cache) == []


def test_an_interrupted_fetch_leaves_nothing(cache, wheel, pinned, monkeypatch):
    def interrupted(archive, target):
        (target / "half").write_text("")
        raise KeyboardInterrupt

    pinned(wheel)
    with monkeypatch.context() as patch:
        patch.setattr(fetch_module, "unpack", interrupted)
        assert main(["fetch"]) == 2
    assert unpacked(cache) == []
    assert main(["fetch"]) == 0


CHILD = """
import sys, time
from pathlib import Path
from reference import fetch
from reference.pins import Pin
def half(archive, target):
    (target / "half").write_text("")
    print("half-way", flush=True)
    time.sleep(60)
if sys.argv[1] == "hang":
    fetch.unpack = half
print(fetch.fetch(Pin(*sys.argv[2:])), flush=True)
"""


def child(pin, mode="fetch"):
    command = [sys.executable, "-c", CHILD, mode, pin.name, pin.version, pin.archive, pin.sha256]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=PROJECT)


def test_a_killed_fetch_is_no_fetch(cache, wheel):
    process = child(wheel, "hang")
    assert process.stdout.readline() == "half-way\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not oracle_folder(cache, wheel).exists()
    assert fetch(wheel)
    assert unpacked(cache) == [oracle_folder(cache, wheel)]  # what the killed one left is swept
    assert contents(oracle_folder(cache, wheel)) == set(WHEEL)


def test_concurrent_fetches_unpack_once(cache, wheel):
    processes = [child(wheel) for _ in range(4)]
    assert sorted(process.communicate()[0] for process in processes) == ["False\n"] * 3 + ["True\n"]
    assert unpacked(cache) == [oracle_folder(cache, wheel)]


def test_a_missing_archive_is_one_clear_line(cache, pinned, capsys):
    pin = Pin("demo", "1.0", "demo-1.0-py3-none-any.whl", "0" * 64)
    pinned(pin)
    assert main(["fetch"]) == 3
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    for part in ("demo==1.0", f"archive {pin.archive} is missing", f"into {cache / 'archives'}", "run again"):
        assert part in error
    assert contents(cache) == {".lock"}


def test_a_missing_archive_does_not_keep_the_others_away(cache, wheel, pinned):
    pinned(Pin("absent", "1.0", "absent-1.0-py3-none-any.whl", "0" * 64), wheel)
    assert main(["fetch"]) == 3
    assert unpacked(cache) == [oracle_folder(cache, wheel)]


def test_pip_downloads_a_wheel(cache, tmp_path, pinned, monkeypatch):
    pin = make_wheel(tmp_path / "demo-1.0-py3-none-any.whl")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    pinned(pin)
    assert main(["fetch", "demo==1.0"]) == 0
    assert archive_file(cache, pin).is_file()
    assert contents(oracle_folder(cache, pin)) == set(WHEEL)


@pytest.mark.parametrize("right", [True, False])
def test_the_setup_of_a_source_archive_runs_only_if_the_hash_is_right(cache, tmp_path, monkeypatch, right):
    marker = tmp_path / "set-up was run"
    setup = f"import setuptools\nopen({str(marker)!r}, 'w').close()\nsetuptools.setup(name='demo', version='1.0')\n"
    members = {"demo-1.0/setup.py": setup, "demo-1.0/PKG-INFO": WHEEL["demo-1.0.dist-info/METADATA"]}
    pin = make_source(tmp_path / "demo-1.0.tar.gz", members)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    if right:
        assert fetch(pin)
    else:
        with pytest.raises(FetchError, match=f"has sha256 {pin.sha256}, but {'f' * 64} is pinned"):
            fetch(Pin(pin.name, pin.version, pin.archive, "f" * 64))
        assert unpacked(cache) == []
    assert marker.exists() == right


@pytest.mark.parametrize("arguments", [["fetch", "demo==2.0"], ["fetch", "--fast"], ["bring"], []])
def test_a_wrong_request_is_exit_code_4(cache, arguments, capsys):
    try:
        code = main(arguments)
    except SystemExit as exit_:
        code = exit_.code
    assert code == 4
    assert capsys.readouterr().err


def test_an_unknown_pin_lists_the_known_ones(cache, capsys):
    assert main(["fetch", "yolox==9"]) == 4
    error = capsys.readouterr().err
    assert "'yolox==9'" in error
    assert all(pin in error for pin in read_pins())


def test_list(cache, wheel, pinned, capsys):
    pinned(wheel, Pin("absent", "1.0", "absent-1.0-py3-none-any.whl", "0" * 64))
    fetch(wheel)
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert str(cache) in lines[0]
    assert lines[1:] == [
        f"demo==1.0  fetched  {wheel.archive}",
        "absent==1.0  missing  absent-1.0-py3-none-any.whl",
    ]


def test_the_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("CLEANROOM_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == tmp_path / ".cache" / "cleanroom"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "cleanroom"
    monkeypatch.setenv("CLEANROOM_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"


def test_listing_does_not_wait_for_torch(cache):
    code = "import sys; from reference.__main__ import main; main(['list']); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PROJECT, capture_output=True)
