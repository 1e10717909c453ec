"""Bring a pinned archive into the cache, check it, and unpack it: whole, or not at all."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from reference.cache import archive_file, cache_folder, locked, oracle_folder
from reference.errors import FetchError
from reference.pins import Pin
from reference.unpack import unpack

PARTIAL = ".partial-"
PIP_DOWNLOAD = ["-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
PIP_DOWNLOAD += ["--no-deps", "--ignore-requires-python", "--require-hashes"]


def fetch(pin: Pin, cache: Path | None = None) -> bool:
    """Make the pin's folder in the cache exist; returns whether there was anything to do.

    An archive in the cache's `archives` folder is used without network, else pip downloads it there.
    Raises FetchError where the archive can't be had, isn't the pinned one, or may not be unpacked.
    """
    cache = cache or cache_folder()
    folder = oracle_folder(cache, pin)
    if folder.is_dir():
        return False
    with locked(cache):
        if folder.is_dir():  # another process fetched it while this one waited
            return False
        archive = archive_file(cache, pin)
        for parent in (archive.parent, folder.parent):
            parent.mkdir(exist_ok=True)
            for leftover in parent.glob(PARTIAL + "*"):  # of a fetch that was killed: the lock is ours
                shutil.rmtree(leftover)
        if not archive.is_file():
            _download(pin, archive)
        _check(pin, archive)
        partial = folder.with_name(PARTIAL + folder.name)
        partial.mkdir()
        try:
            unpack(archive, partial)
            os.replace(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return True


def _check(pin: Pin, archive: Path) -> None:
    with archive.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != pin.sha256:
        raise _wrong_hash(pin, found, f"remove {archive} and run again")


def _download(pin: Pin, archive: Path) -> None:
    # pip is told the hash, so that it checks a source archive before it runs its set-up to read its metadata.
    kind = ["--only-binary", ":all:"]
    if archive.suffix != ".whl":
        # The set-up of such an archive may import torch, which only this environment has.
        kind = ["--no-binary", pin.name, "--no-build-isolation"]
    with tempfile.TemporaryDirectory(prefix=PARTIAL, dir=archive.parent) as folder:
        wanted = Path(folder, "wanted.txt")
        wanted.write_text(f"{pin} --hash=sha256:{pin.sha256}\n", encoding="utf-8")
        command = [sys.executable, *PIP_DOWNLOAD, *kind, "--dest", folder, "--requirement", str(wanted)]
        pip = subprocess.run(command, capture_output=True, text=True, check=False)
        downloaded = Path(folder, pin.archive)
        if pip.returncode == 0 and downloaded.is_file():
            os.replace(downloaded, archive)
            return
    got = re.search(r"Got\s+([0-9a-f]{64})", pip.stderr)
    if got:
        raise _wrong_hash(pin, got[1], "pip refused it")
    errors = re.findall(r"^ERROR: (.+)$", pip.stderr, re.MULTILINE) or [f"exit code {pip.returncode}"]
    raise FetchError(
        f"{pin}: archive {pin.archive} is missing and pip could not download it ({errors[-1]}); "
        f"bring that file into {archive.parent} and run again"
    )


def _wrong_hash(pin: Pin, found: str, hint: str) -> FetchError:
    return FetchError(f"{pin}: {pin.archive} has sha256 {found}, but {pin.sha256} is pinned; {hint}")
