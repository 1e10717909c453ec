"""Unpack an archive of which only the hash is known: plain files inside the target, or an error."""

import stat
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from reference.errors import FetchError


def unpack(archive: Path, target: Path) -> None:
    """Write the files of a wheel, or of a source archive less its top folder, into the folder `target`.

    Raises FetchError, before the member is written, for absolute names, names that leave the target, links
    and devices, and for a file that is no archive.
    """
    members = _wheel if archive.suffix == ".whl" else _source
    try:
        for path, content in members(archive):
            file = target / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(content)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise FetchError(f"{archive.name} can't be read as an archive: {error}") from error


def _wheel(archive: Path) -> Iterator[tuple[PurePosixPath, bytes]]:
    with zipfile.ZipFile(archive) as file:
        for member in file.infolist():
            path = _inside(archive, member.filename)
            if stat.S_ISLNK(member.external_attr >> 16):
                raise FetchError(f"{archive.name}: {member.filename!r} is a link; nothing was unpacked")
            if not member.is_dir():
                yield path, file.read(member)


def _source(archive: Path) -> Iterator[tuple[PurePosixPath, bytes]]:
    with tarfile.open(archive, "r:gz") as file:
        for member in file:
            path = _inside(archive, member.name)
            if not (member.isfile() or member.isdir()):
                raise FetchError(f"{archive.name}: {member.name!r} is no plain file; nothing was unpacked")
            content = file.extractfile(member)  # None for a folder
            if content:
                yield PurePosixPath(*path.parts[1:]), content.read()


def _inside(archive: Path, name: str) -> PurePosixPath:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts:
        raise FetchError(f"{archive.name}: {name!r} would leave the folder; nothing was unpacked")
    return path
