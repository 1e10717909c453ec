"""The pinned releases (`pins.toml`) and the way to write which oracle is meant."""

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

from reference.errors import RequestError

PINS_FILE = Path(__file__).with_name("pins.toml")
SUFFIXES = (".whl", ".tar.gz")
FORMS = "NAME==VERSION, NAME=installed or NAME=FOLDER"


@dataclass(frozen=True)
class Pin:
    """One release: the archive's file name, as the package index has it, and its sha256 in hexadecimal.

    `control` says what is wrong with a release that is pinned for being wrong: a suite that passes it is broken.
    `matrix` marks one that brackets an era: only `harness matrix` uses it, and whoever names it.
    """

    name: str
    version: str
    archive: str
    sha256: str
    control: str = ""
    matrix: bool = False

    def __str__(self) -> str:
        return f"{self.name}=={self.version}"


def read_pins(file: Path | None = None) -> dict[str, Pin]:
    """Return the pins of a file (by default the project's) by "NAME==VERSION", in the file's order.

    Raises RequestError naming the file and the entry that is malformed.
    """
    file = file or PINS_FILE
    try:
        entries = tomllib.loads(file.read_text(encoding="utf-8"))["oracles"]
    except (tomllib.TOMLDecodeError, KeyError) as error:
        raise RequestError(f"{file.name}: no table of [oracles] can be read from it ({error})") from error
    return {key: _pin(key, entry, file) for key, entry in entries.items()}


def _pin(key: str, entry: object, file: Path) -> Pin:
    name, _, version = key.partition("==")
    # They become names of folders.
    if not (re.fullmatch(r"[\w-]+", name) and re.fullmatch(r"[\w.+!-]+", version)):
        raise RequestError(f"{file.name}: {key!r} is not NAME==VERSION")
    if not isinstance(entry, dict) or set(entry) - {"control", "matrix"} != {"archive", "sha256"}:
        raise RequestError(
            f"{file.name}: {key} must have exactly `archive` and `sha256`, and `control` or `matrix` if it is one"
        )
    if entry.get("matrix", True) is not True:
        raise RequestError(f"{file.name}: {key}: `matrix` must be true, or absent")
    if not entry.get("control", "-"):
        raise RequestError(f"{file.name}: {key}: `control` must say what is wrong with the release")
    archive, sha256 = str(entry["archive"]), str(entry["sha256"])
    if not archive.endswith(SUFFIXES) or Path(archive).name != archive:
        raise RequestError(
            f"{file.name}: {key}: archive {archive!r} is not a file name ending in {' or '.join(SUFFIXES)}"
        )
    if not re.fullmatch("[0-9a-f]{64}", sha256):
        raise RequestError(f"{file.name}: {key}: sha256 {sha256!r} is not 64 lower-case hexadecimal digits")
    return Pin(name, version, archive, sha256, str(entry.get("control", "")), bool(entry.get("matrix", False)))


def find_pin(key: str) -> Pin:
    """Return the pin written "NAME==VERSION"; where there is none, RequestError lists the pins."""
    pins = read_pins()
    if key not in pins:
        raise RequestError(f"{key!r} is not pinned; pins: {', '.join(pins)}")
    return pins[key]


@dataclass(frozen=True)
class OracleSpec:
    """Which oracle is meant: a pinned release, a local checkout, or what the environment has installed.

    `version` is the pinned version and `folder` the checkout; with neither, the installed one is meant.
    `str(spec)` gives back what `parse` reads, with the folder made absolute.
    """

    name: str
    version: str = ""
    folder: str = ""

    @classmethod
    def parse(cls, text: str) -> "OracleSpec":
        """Read "ultralytics==8.4.190", "ultralytics=installed" or "yolox=FOLDER"; or RequestError."""
        known = list(dict.fromkeys(pin.name for pin in read_pins().values()))
        name, equals, rest = text.partition("=")
        if name not in known:
            raise RequestError(f"oracle {text!r}: no package {name!r}; known: {', '.join(known)}, written {FORMS}")
        if not equals or not rest.removeprefix("="):
            raise RequestError(f"oracle {text!r} names no version; write {FORMS}; pins: {', '.join(read_pins())}")
        if rest.startswith("="):
            pin = find_pin(text)
            return cls(pin.name, version=pin.version)
        if rest == "installed":
            return cls(name)
        folder = Path(rest).expanduser().resolve()
        if not folder.is_dir():
            raise RequestError(f"oracle {text!r}: {folder} is not a folder (a pin is written {name}==VERSION)")
        return cls(name, folder=str(folder))

    def __str__(self) -> str:
        if self.version:
            return f"{self.name}=={self.version}"
        return f"{self.name}={self.folder or 'installed'}"
