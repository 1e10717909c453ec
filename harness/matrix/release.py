"""Fetch a release that is not pinned: by name and version or from a file, checked and unpacked, or nothing left."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import reference
from harness.plan import RequestError
from reference import FetchError, OracleError, OracleSpec, Pin
from reference.cache import archive_file, cache_folder, locked, oracle_folder
from reference.fetch import PIP_DOWNLOAD, fetch
from reference.pins import SUFFIXES

SCRATCH = ".partial-add-"
WITHOUT_HASH = [option for option in PIP_DOWNLOAD if option != "--require-hashes"]
"""Of a release that nobody has pinned no hash is known: it is computed, and printed for the pin."""


def parse(text: str) -> tuple[str, str]:
    """(name, version) of `NAME==VERSION`; RequestError for another form, an unknown package or a pin."""
    pins = reference.read_pins()
    known = list(dict.fromkeys(pin.name for pin in pins.values()))
    found = re.fullmatch(r"([A-Za-z0-9_.-]+)==([0-9][0-9A-Za-z.]*)", text)
    if not found:
        raise RequestError(f"--add {text!r}: expected NAME==VERSION, such as ultralytics==8.4.200")
    if found[1] not in known:
        raise RequestError(f"--add {text!r}: no package {found[1]!r}; known: {', '.join(known)}")
    if text in pins:
        raise RequestError(f"--add {text!r}: it is pinned already; run: python -m harness matrix --oracles {text}")
    return found[1], found[2]


def obtain(name: str, version: str, archive: Path | None = None) -> Pin:
    """The pin of a release that then lies in the cache, unpacked, as other pins do.

    From `archive`, else from the cache's archives, else by pip. FetchError or RequestError where it cannot be had, is
    another release than it says, or may not be unpacked: the cache is then as it was.
    """
    cache = cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=SCRATCH, dir=cache) as folder:
        scratch = Path(folder)
        (scratch / "archives").mkdir()
        file = _copied(archive, scratch, name, version) if archive else _kept(cache, name, version)
        file = file or _downloaded(scratch, name, version)
        if file.parent != scratch / "archives":
            file = Path(shutil.copy(file, scratch / "archives"))
        pin = Pin(name, version, file.name, _hash(file))
        fetch(pin, scratch)
        _check(pin, oracle_folder(scratch, pin))
        _keep(pin, scratch, cache)
    return pin


def spec(pin: Pin) -> str:
    """How a worker is told to load a release that is fetched, pinned or not."""
    return f"{pin.name}={oracle_folder(cache_folder(), pin)}"


def line(pin: Pin) -> str:
    """The release's line of `reference/pins.toml`."""
    return f'"{pin}" = {{ archive = "{pin.archive}", sha256 = "{pin.sha256}" }}'


def write(pin: Pin, file: Path) -> None:
    """Add the release to a file of pins: whole, or not at all."""
    content = file.read_text(encoding="utf-8")
    partial = file.with_name(file.name + ".part")
    partial.write_text(f"{content.rstrip()}\n{line(pin)}\n", encoding="utf-8")
    try:
        reference.read_pins(partial)
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def _copied(archive: Path, scratch: Path, name: str, version: str) -> Path:
    if not archive.is_file():
        raise RequestError(f"--archive {archive}: no such file")
    if not archive.name.startswith((f"{name}-{version}-", f"{name}-{version}.")) or not archive.name.endswith(SUFFIXES):
        raise RequestError(
            f"--archive {archive.name}: not an archive of {name}=={version}, whose name is {name}-{version} and what "
            f"follows, ending in {' or '.join(SUFFIXES)}"
        )
    return Path(shutil.copy(archive, scratch / "archives"))


def _kept(cache: Path, name: str, version: str) -> Path | None:
    files = [
        *(cache / "archives").glob(f"{name}-{version}-*.whl"),
        *(cache / "archives").glob(f"{name}-{version}.tar.gz"),
    ]
    return files[0] if files else None


def _downloaded(scratch: Path, name: str, version: str) -> Path:
    """By pip, in the form in which the package's pins are: a source archive runs its set-up to tell its metadata."""
    wheels = any(pin.archive.endswith(".whl") for pin in reference.read_pins().values() if pin.name == name)
    kind = ["--only-binary", ":all:"] if wheels else ["--no-binary", name, "--no-build-isolation"]
    folder = scratch / "archives"
    command = [sys.executable, *WITHOUT_HASH, *kind, "--dest", str(folder), f"{name}=={version}"]
    pip = subprocess.run(command, capture_output=True, text=True, check=False)
    files = [file for file in folder.iterdir() if file.name.endswith(SUFFIXES)]
    if pip.returncode or len(files) != 1:
        errors = re.findall(r"^ERROR: (.+)$", pip.stderr, re.MULTILINE) or [f"exit code {pip.returncode}"]
        raise FetchError(f"--add {name}=={version}: pip could not download it ({errors[-1]})")
    return files[0]


def _hash(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _check(pin: Pin, folder: Path) -> None:
    try:
        found = reference.locate(OracleSpec(pin.name, folder=str(folder))).version
    except OracleError:
        raise FetchError(f"{pin}: {pin.archive} holds no package {pin.name}") from None
    except (SyntaxError, ValueError, RecursionError, MemoryError, OSError):
        raise FetchError(f"{pin}: the version of {pin.archive} cannot be read") from None
    if found not in {pin.version, "unknown"}:
        raise FetchError(f"{pin}: {pin.archive} says that it is {pin.name}=={found}")


def _keep(pin: Pin, scratch: Path, cache: Path) -> None:
    with locked(cache):
        target, folder = archive_file(cache, pin), oracle_folder(cache, pin)
        for parent in (target.parent, folder.parent):
            parent.mkdir(exist_ok=True)
        if target.is_file() and _hash(target) != pin.sha256:
            raise FetchError(f"{pin}: the cache holds another archive called {pin.archive}; remove one of them")
        if not folder.is_dir():
            os.replace(oracle_folder(scratch, pin), folder)
        os.replace(archive_file(scratch, pin), target)
