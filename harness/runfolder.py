"""The run folder: an append-only journal while running, Parquet frames at the end.

Rows are appended as JSON lines and flushed as they come, so a killed run loses at most the line it was
writing; `--resume` reads them back and does only what is missing.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from reports.frames import MEASUREMENTS, SAMPLES, VERDICTS
from reports.frames import OPTIONAL as COLUMNS

FORMAT = 1
JOURNALS = ("verdicts", "samples", "measurements")
OPTIONAL = ("relations", "mutants", "versions")
"""Journals of which a folder has a frame only where something was journaled."""
KEYS = {
    "verdicts": ["operation", "oracle", "candidate", "device", "case"],
    "relations": ["operation", "oracle", "subject", "device", "relation", "case"],
    "mutants": ["id"],
    "versions": ["operation", "oracle", "candidate"],
}
"""A row appended again (a verdict with the file of its shrunk case, say) replaces the earlier one of its key."""
RETRACTED = "retracted"
"""The verdict of a row that takes the earlier ones of its key back: no frame has it."""


class RunFolderError(ValueError):
    """A run folder that cannot be used, with the file and the reason."""


class WriteError(RunFolderError):
    """Something that could not be written, a full disk mostly: what was written before stands."""


class RunFolder:
    """One run's folder. `create` starts a new one, `resume` continues one that was cut off.

    Both take the folder's lock: a second run is refused while the first lives, however it ends.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._held: IO[str] | None = None

    def close(self) -> None:
        """Give the folder's lock back."""
        if self._held:
            self._held.close()
            self._held = None

    def _hold(self) -> None:
        self._held = (self.path / ".lock").open("w")
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.close()
            raise RunFolderError(f"{self.path}: another run is writing into this folder") from error

    @classmethod
    def create(cls, path: Path, run: dict[str, Any]) -> RunFolder:
        """Make the folder and write `run.json`; refuses a folder that already holds a run."""
        folder = cls(path)
        folder._own()
        if (path / "run.json").exists():
            raise RunFolderError(f"{path / 'run.json'}: the folder already holds a run; use --resume or another --out")
        (path / "failures").mkdir(parents=True, exist_ok=True)
        (path / "journal").mkdir(exist_ok=True)
        folder._hold()
        folder.write_json("run.json", {"format": FORMAT, **run})
        return folder

    @classmethod
    def resume(cls, path: Path) -> tuple[RunFolder, dict[str, Any]]:
        """Open an existing run and return it with its `run.json`."""
        folder = cls(path)
        folder._own()
        run = folder.read_json("run.json")
        if run.get("format") != FORMAT:
            raise RunFolderError(f"{path / 'run.json'}: format {run.get('format')!r}, this version reads {FORMAT}")
        if not isinstance(run.get("settings"), dict):
            raise RunFolderError(f"{path / 'run.json'}: no settings of a run")
        folder._hold()
        return folder, run

    def _own(self) -> None:
        """Refuse a folder with links in it: what is written through one lands elsewhere."""
        for place in (self.path, self.path / "journal", self.failures):
            for file in (place, *place.iterdir()) if place.is_dir() else ():
                if file.is_symlink() and file != self.path:
                    raise RunFolderError(f"{file}: is a link, and a run writes into its own folder only")

    @property
    def failures(self) -> Path:
        """Where shrunk failing cases are saved."""
        return self.path / "failures"

    def append(self, journal: str, rows: list[dict[str, Any]]) -> None:
        """Append rows to a journal: all on disk when this returns, or none, and WriteError."""
        lines = (json.dumps(row, allow_nan=True, ensure_ascii=False) + "\n" for row in rows)
        # A candidate may say what is no Unicode, half a surrogate pair, which no frame could hold.
        content = "".join(lines).encode(errors="replace")
        path = self.path / "journal" / f"{journal}.jsonl"
        with self._lock, path.open("ab", buffering=0) as file:
            whole = file.tell()
            try:
                written = 0
                while written < len(content):
                    written += file.write(content[written:])
                os.fsync(file.fileno())
            except OSError as error:
                # A torn line must not stand in the middle, should there be room again.
                file.truncate(whole)
                raise WriteError(f"{path}: {error.strerror}") from error

    def rows(self, journal: str) -> Iterator[dict[str, Any]]:
        """Rows of a journal; a last line cut off by a kill is left out, any other broken line is an error."""
        file = self.path / "journal" / f"{journal}.jsonl"
        if not file.exists():
            return
        for number, line in enumerate(file.read_bytes().split(b"\n")[:-1], 1):
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as error:
                raise RunFolderError(f"{file}: line {number}: {error}") from error

    def mend(self) -> None:
        """Drop a torn last line of each journal, so that the next append starts on its own line."""
        for journal in (*JOURNALS, *OPTIONAL):
            file = self.path / "journal" / f"{journal}.jsonl"
            if file.exists():
                content = file.read_bytes()
                whole = content[: content.rfind(b"\n") + 1]
                if whole != content:
                    self._replace(file, whole)

    def read_json(self, name: str) -> dict[str, Any]:
        """A JSON file of the folder; RunFolderError names it where it is absent or broken."""
        file = self.path / name
        try:
            value = json.loads(file.read_bytes())
        except FileNotFoundError as error:
            raise RunFolderError(f"{file}: not found; is this a run folder?") from error
        except (OSError, ValueError, RecursionError) as error:
            raise RunFolderError(f"{file}: {error}") from error
        if not isinstance(value, dict):
            raise RunFolderError(f"{file}: holds a JSON {type(value).__name__} where an object belongs")
        return value

    def write_json(self, name: str, value: dict[str, Any]) -> None:
        """Write a JSON file whole or not at all."""
        self._replace(self.path / name, json.dumps(value, indent=2).encode() + b"\n")

    def write_frames(self, constants: dict[str, Any]) -> None:
        """Turn the journals into the Parquet frames, with provenance columns on every row."""
        import pandas as pd

        for journal in (*JOURNALS, *OPTIONAL):
            frame = pd.DataFrame(list(self.rows(journal))).assign(**constants)
            if journal in KEYS and len(frame):
                frame = frame.drop_duplicates(KEYS[journal], keep="last")
            if "verdict" in frame:
                frame = frame[frame["verdict"] != RETRACTED]
            if journal in OPTIONAL and not len(frame):
                continue
            content = io.BytesIO()
            frame.to_parquet(content, index=False)
            self._replace(self.path / f"{journal}.parquet", content.getvalue())

    def frame(self, name: str):
        """One of the Parquet frames; an optional one that was not written is empty."""
        import pandas as pd

        file = self.path / f"{name}.parquet"
        if name in OPTIONAL and not file.exists():
            return pd.DataFrame()
        try:
            return pd.read_parquet(file)
        except FileNotFoundError as error:
            raise RunFolderError(f"{file}: not found; the run did not finish, continue it with --resume") from error
        except (OSError, ValueError) as error:
            raise RunFolderError(f"{file}: {error}") from error

    def check_journals(self) -> None:
        """Raise RunFolderError for a journal with a row that is not a run's."""
        for journal, keys in KEYS.items():
            for number, row in enumerate(self.rows(journal), 1):
                if missing := [key for key in keys if not isinstance(row, dict) or key not in row]:
                    file = self.path / "journal" / f"{journal}.jsonl"
                    raise RunFolderError(f"{file}: line {number}: no {', '.join(missing)}")

    def check_frames(self) -> None:
        """Raise RunFolderError for a frame that is not readable, or not a run's."""
        columns = {"verdicts": VERDICTS, "samples": SAMPLES, "measurements": MEASUREMENTS, **COLUMNS}
        for name, wanted in columns.items():
            frame = self.frame(name)
            # A frame of no rows has no columns of its own.
            if missing := [column for column in wanted if len(frame) and column not in frame]:
                raise RunFolderError(f"{self.path / name}.parquet: has no column {', '.join(missing)}")

    @staticmethod
    def _replace(file: Path, content: bytes) -> None:
        temporary = file.with_name(file.name + ".part")
        try:
            temporary.write_bytes(content)
            os.replace(temporary, file)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise WriteError(f"{file}: {error.strerror}") from error
