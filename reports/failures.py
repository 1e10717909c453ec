"""Failing cases: what each was, what went wrong, and the command that replays it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reports import text

if TYPE_CHECKING:
    from reports.frames import Run

LONGEST = 4000
"""Characters of a detail that a report keeps; the frame has all of them."""


@dataclass(frozen=True)
class Failure:
    """One failing case, ready to print; `command` is "" where no case was saved."""

    operation: str
    oracle: str
    candidate: str
    device: str
    dtype: str
    case: str
    origin: str
    verdict: str
    output: str
    error: float | None
    detail: str
    command: str


def failures(run: Run) -> list[Failure]:
    """Every failing case of a run, in the order of the run."""
    failing = run.failing
    targets = run.provenance.get("settings", {}).get("candidates", {})
    return [] if failing is None else [_failure(run.folder, row, targets) for row in failing.to_dict("records")]


def _failure(folder: Path, row: Mapping[str, Any], targets: Mapping[str, str]) -> Failure:
    detail = text.clean(row["detail"])
    if len(detail) > LONGEST:
        detail = f"{detail[:LONGEST]}… ({len(detail) - LONGEST:,} characters more in verdicts.parquet)"
    same = ("operation", "oracle", "candidate", "device", "dtype", "case", "origin", "verdict", "output")
    return Failure(
        **{key: text.clean(row[key]) for key in same},
        error=None if text.absent(row["error"]) else float(row["error"]),
        detail=detail,
        command=replay_command(folder, row["replay"], row["candidate"], targets.get(row["candidate"], "")),
    )


def replay_command(folder: Path, replay: str, candidate: str = "torch", target: str = "") -> str:
    """The shell command that replays a saved case, or "" where none was saved.

    `target` is "MODULE:ATTRIBUTE" of a candidate that was plugged in; of the built-in ones `torch` need not be named.
    """
    if not replay:
        return ""
    # From where the command will be typed, most likely; and an artifact then tells nothing of its machine.
    path, here = folder.absolute() / replay, Path.cwd()
    path = path.relative_to(here) if path.is_relative_to(here) else path
    command = ["python", "-m", "harness", "replay", str(path)]
    if target:
        command += ["--candidate", f"{candidate}={target}"]
    elif candidate != "torch":
        command += ["--backends", candidate]
    return shlex.join(map(text.clean, command))
