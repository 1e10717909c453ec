"""`harness bundle`: the project, the oracles and missing wheels in one archive, for a host without network.

Unpacked there, `start.sh` runs the harness with whatever options it is given; nothing is installed into the host.
"""

from __future__ import annotations

import io
import json
import re
import shlex
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from collections.abc import Callable, Iterable, Iterator
from email.parser import Parser
from pathlib import Path

from harness.plan import RequestError

PROJECT = Path(__file__).parent.parent
FOLDER = "cleanroom-bundle"
MOST_BYTES = 60_000_000
EXTRAS = ("harness", "oracles", "report")
"""The extras of the project that a run needs."""
ALWAYS_THERE = ("torch", "torchvision", "triton")
"""What a GPU host brings itself: a wheel for its driver, not one from here."""
PLATFORMS = (
    *(f"manylinux_2_{minor}_x86_64" for minor in (39, 35, 34, 31, 28, 27, 24, 17)),
    "manylinux2014_x86_64",
    "manylinux1_x86_64",
)

START = """#!/bin/sh
# Runs the harness from this folder: sh start.sh [OPTIONS OF harness run]
set -eu
cd "$(dirname "$0")"
here=$PWD
python=${PYTHON:-python3}
if [ -d wheels ] && [ ! -d site ]; then
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --target site.partial wheels/*.whl
    mv site.partial site
fi
export PYTHONPATH="$here/project:$here/site${PYTHONPATH:+:$PYTHONPATH}" CLEANROOM_CACHE="$here/cache"
cd project
"$python" -m reference fetch {pins}
exec "$python" -m harness run "$@"
"""

Download = Callable[[str, str, Path], Path]
"""(requirement, Python version, folder) -> the wheel that was downloaded there."""


def bundle(
    out: Path, python: str, have: Iterable[str], oracles: Iterable[str], download: Download | None = None
) -> str:
    """Write the archive, and return its size and the command that starts a run from it.

    Args:
        out: the archive to write, `.tar.gz`.
        python: the host's Python version, "3.12".
        have: names of the packages that the host has, besides PyTorch and Triton.
        oracles: pins to pack, as "NAME==VERSION".
        download: how a wheel is had; pip, by default.

    Raises:
        RequestError: `python` is no version, a wheel cannot be had, or the archive would pass 60 MB.
    """
    from reference.cache import archive_file, cache_folder
    from reference.fetch import fetch
    from reference.pins import find_pin

    if not re.fullmatch(r"3\.\d+", python):
        raise RequestError(f"--python {python!r}: expected a version such as 3.12")
    pins = [find_pin(pin) for pin in oracles]
    with tempfile.TemporaryDirectory() as scratch:
        wheels = missing_wheels(python, {normal(name) for name in (*have, *ALWAYS_THERE)}, Path(scratch), download)
        entries = {f"wheels/{wheel.name}": wheel.read_bytes() for wheel in wheels}
        for pin in pins:
            fetch(pin)
            entries[f"cache/archives/{pin.archive}"] = archive_file(cache_folder(), pin).read_bytes()
        for name in project_files():
            entries[f"project/{name}"] = (PROJECT / name).read_bytes()
    entries["project/.commit"] = json.dumps(commit()).encode()
    entries["start.sh"] = START.replace("{pins}", shlex.join(map(str, pins))).encode()
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, content in entries.items():
            info = tarfile.TarInfo(f"{FOLDER}/{name}")
            info.size, info.mode = len(content), 0o755 if name.endswith(".sh") else 0o644
            archive.addfile(info, io.BytesIO(content))
    size = packed.tell()
    if size > MOST_BYTES:
        largest = sorted(entries, key=lambda name: -len(entries[name]))[:5]
        shown = ", ".join(f"{Path(name).name} {len(entries[name]) / 1e6:.0f} MB" for name in largest)
        raise RequestError(
            f"the archive would have {size / 1e6:.0f} MB, more than {MOST_BYTES / 1e6:.0f}; name with --have what the "
            f"host has; the largest are {shown}"
        )
    out.write_bytes(packed.getvalue())
    start = f"tar xf {shlex.quote(out.name)} && sh {FOLDER}/start.sh --device cuda --profile full"
    return f"{out}: {size / 1e6:.1f} MB, {len(wheels)} wheels for Python {python}\n{start}\n"


def missing_wheels(python: str, have: set[str], folder: Path, download: Download | None = None) -> list[Path]:
    """Wheels of what a run needs and the host lacks, with all that they need in turn."""
    from packaging.requirements import Requirement

    environment = {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}
    pinned = dict(_pins())
    wanted, wheels = [Requirement(text) for text in run_requirements()], []
    while wanted:
        need = wanted.pop()
        name = normal(need.name)
        if name in have or (need.marker and not need.marker.evaluate(environment)):
            continue
        have.add(name)
        text = f"{name}=={pinned[name]}" if name in pinned else f"{need.name}{need.specifier}"
        wheels.append((download or pip_download)(text, python, folder))
        wanted += [Requirement(line) for line in requires(wheels[-1])]
    return sorted(wheels)


def run_requirements() -> list[str]:
    """Direct dependencies of a run, as `pyproject.toml` has them."""
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    needed = [*project["dependencies"], *(text for extra in EXTRAS for text in project["optional-dependencies"][extra])]
    own = [text for text in needed if text.startswith(project["name"])]
    inner = [extra for text in own for extra in re.findall(r"[\w-]+", text.partition("[")[2])]
    needed += [text for extra in inner for text in project["optional-dependencies"][extra]]
    return [text for text in needed if text not in own]


def _pins() -> Iterator[tuple[str, str]]:
    for line in (PROJECT / "constraints.txt").read_text().splitlines():
        name, separator, version = line.partition("==")
        if separator:
            yield normal(name), version.strip()


def normal(name: str) -> str:
    """A package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def requires(wheel: Path) -> list[str]:
    """What a wheel says it needs."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return Parser().parsestr(archive.read(name).decode(), headersonly=True).get_all("Requires-Dist") or []


def pip_download(requirement: str, python: str, folder: Path) -> Path:
    """One wheel for Linux on x86-64, of the newest platform tag that the index has."""
    before = set(folder.iterdir())
    platforms = [part for platform in PLATFORMS for part in ("--platform", platform)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary", ":all:", "--implementation", "cp", "--python-version", python, *platforms]
    told = subprocess.run([*command, "--dest", str(folder), requirement], capture_output=True, text=True, check=False)
    found = set(folder.iterdir()) - before
    if told.returncode or not found:
        reason = told.stderr.strip().rpartition("\n")[2] or f"exit code {told.returncode}"
        raise RequestError(f"no wheel of {requirement} for Python {python}: {reason}")
    return found.pop()


def project_files() -> list[str]:
    """Files of the project as they lie here, without those that git ignores."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    told = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False)
    if told.returncode:
        raise RequestError("bundle: needs a git checkout of the project")
    return sorted(name for name in told.stdout.split("\0") if name and (PROJECT / name).is_file())


def commit() -> tuple[str, bool]:
    """The commit of the project and whether the tree differs from it; in a bundle, those of where it was made."""
    try:
        head, status = (
            subprocess.run(["git", *what], cwd=PROJECT, capture_output=True, text=True, check=True).stdout.strip()
            for what in (("rev-parse", "HEAD"), ("status", "--porcelain"))
        )
    except (OSError, subprocess.CalledProcessError):
        kept = PROJECT / ".commit"
        return tuple(json.loads(kept.read_text())) if kept.is_file() else ("unknown", False)
    return head, bool(status)
