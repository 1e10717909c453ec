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
        run = folder.read_json("run.json")
        if run.get("format") != FORMAT:
            raise RunFolderError(f"{path / 'run.json'}: format {run.get('format')!r}, this version reads {FORMAT}")
        folder._hold()
        return folder, run

    @property
    def failures(self) -> Path:
        """Where shrunk failing cases are saved."""
        return self.path / "failures"

    def append(self, journal: str, rows: list[dict[str, Any]]) -> None:
        """Append rows to a journal: all on disk when this returns, or none, and WriteError."""
        content = "".join(json.dumps(row, allow_nan=True) + "\n" for row in rows).encode()
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
        lines = file.read_text().split("\n")
        for number, line in enumerate(lines[:-1], 1):
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
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
            return json.loads(file.read_text())
        except FileNotFoundError as error:
            raise RunFolderError(f"{file}: not found; is this a run folder?") from error
        except (OSError, ValueError) as error:
            raise RunFolderError(f"{file}: {error}") from error

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

    @staticmethod
    def _replace(file: Path, content: bytes) -> None:
        temporary = file.with_name(file.name + ".part")
        try:
            temporary.write_bytes(content)
            os.replace(temporary, file)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise WriteError(f"{file}: {error.strerror}") from error
