"""Read a run folder: provenance, frames and summary, checked where they enter."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

FORMAT = 1
HOLDS = frozenset({"match", "tie", "both-reject", "known-divergence"})
"""Verdicts under which parity holds; every other one is a failing case."""

GROUP = ("operation", "oracle", "candidate", "device")
"""What tells one row of the parity table from another."""

VERDICTS = (
    *GROUP,
    *("dtype", "case", "origin", "verdict", "detail", "output", "error", "gradient_error"),
    *("divergence", "replay", "seconds", "index"),
)
SAMPLES = (*GROUP, "workload", "direction", "pair", "provider", "nanoseconds", "first")
MEASUREMENTS = (
    *GROUP,
    *("workload", "direction", "pairs", "oracle_ns", "candidate_ns", "speedup", "speedup_low", "speedup_high"),
    *("verdict", "peak_bytes_oracle", "peak_bytes_candidate", "output_bytes", "minimum_bytes", "note"),
)
"""The columns that a report reads; a frame may have more."""

OPTIONAL = {
    "relations": (
        *("operation", "oracle", "subject", "device", "relation"),
        *("dtype", "case", "origin", "verdict", "detail", "replay"),
    ),
    "mutants": ("id", "kind", "operator", "file", "line", "before", "after", "verdict", "by", "detail", "seconds"),
    "versions": ("operation", "oracle", "candidate", "verdict", "settings", "cases", "ties", "detail", "replay"),
}
"""Frames that only some run folders have, with their columns; a section of the report each (`reports/sections.py`)."""

NUMBERS = frozenset(
    {
        *(
            "error",
            "gradient_error",
            "decisions",
            "tied_decisions",
            "seconds",
            "index",
            "pair",
            "nanoseconds",
            "pairs",
            "threads",
        ),
        *("line", "cases", "ties"),
        *("oracle_ns", "candidate_ns", "speedup", "speedup_low", "speedup_high"),
        *("peak_bytes_oracle", "peak_bytes_candidate", "output_bytes", "minimum_bytes"),
    }
)
"""Columns that hold numbers; a missing one reads as NaN. Every other column but `first` is text."""

SUMMARY = {
    "passed": int,
    "failed": int,
    "exit_code": int,
    "sentence": str,
    "gate": list,
    "operations": list,
    "measurements": list,
}
SUMMARY_ROWS = {
    "gate": ("bar", "limit", "value", "ok", "reason"),
    "operations": (*GROUP, "cases", "match", "tie", "mismatch", "other", "tie_share"),
}


class ReportError(Exception):
    """A file of a run folder that cannot be read: names the file and the reason."""

    def __init__(self, file: Path, reason: str) -> None:
        super().__init__(f"{file}: {reason}")
        self.file = file
        self.reason = reason


@dataclass(frozen=True)
class Run:
    """What a run folder holds; a frame that has not been written (yet) is None."""

    folder: Path
    provenance: dict[str, Any]
    verdicts: pd.DataFrame | None
    samples: pd.DataFrame | None
    measurements: pd.DataFrame | None
    summary: dict[str, Any] | None
    frames: Mapping[str, pd.DataFrame] = field(default_factory=dict)
    """The optional frames (`OPTIONAL`) that the folder has, by name."""

    @property
    def whole(self) -> bool:
        """Whether the folder is of `harness run`; else it holds what its optional frames say, and nothing more."""
        return self.provenance.get("kind", "run") == "run"

    @property
    def failing(self) -> pd.DataFrame | None:
        """Rows of the verdicts under which parity does not hold, in the order of the run."""
        if self.verdicts is None:
            return None
        return self.verdicts[~self.verdicts["verdict"].isin(HOLDS)].sort_values("index", kind="stable")


def read(folder: Path) -> Run:
    """Read a run folder.

    Frames and summary.json may be missing (a run that has not finished, `--no-bench`, `--no-parity`);
    run.json may not. Raises ReportError for a missing run.json, a file that cannot be parsed, a format this
    version does not know, or a frame without one of its columns.
    """
    if not folder.is_dir():
        raise ReportError(folder, "no such folder")
    provenance = _json(folder / "run.json")
    if provenance is None:
        raise ReportError(folder / "run.json", "missing, so this is no run folder")
    if provenance.get("format") != FORMAT:
        reason = f"format {provenance.get('format')!r} is unknown, this version reads format {FORMAT}"
        raise ReportError(folder / "run.json", reason)
    return Run(
        folder=folder,
        provenance=provenance,
        verdicts=_frame(folder / "verdicts.parquet", VERDICTS),
        samples=_frame(folder / "samples.parquet", SAMPLES),
        measurements=_frame(folder / "measurements.parquet", MEASUREMENTS),
        summary=_summary(folder / "summary.json"),
        frames={
            name: frame
            for name, columns in OPTIONAL.items()
            if (frame := _frame(folder / f"{name}.parquet", columns)) is not None
        },
    )


def _json(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ReportError(path, f"not readable as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ReportError(path, f"holds a JSON {type(value).__name__} where an object belongs")
    return value


def _summary(path: Path) -> dict[str, Any] | None:
    summary = _json(path)
    if summary is None:
        return None
    for key, kind in SUMMARY.items():
        if not isinstance(summary.get(key), kind):
            raise ReportError(path, f"{key!r} is missing or no {kind.__name__}")
    for key, fields in SUMMARY_ROWS.items():
        for number, row in enumerate(summary[key]):
            missing = [field for field in fields if not isinstance(row, dict) or field not in row]
            if missing:
                raise ReportError(path, f"{key}[{number}] has no {', '.join(missing)}")
    return summary


def _frame(path: Path, columns: tuple[str, ...]) -> pd.DataFrame | None:
    if not path.exists():
        return None
    import pandas as pd
    import pyarrow

    try:
        frame = pd.read_parquet(path)
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise ReportError(path, f"not readable as Parquet: {error}") from error
    if frame.empty:  # a frame of nothing may have been written without its columns
        return frame.reindex(columns=list(columns))
    missing = [column for column in columns if column not in frame.columns]
    if missing:
        raise ReportError(path, f"has no column {', '.join(missing)}")
    for column in columns:
        try:
            frame[column] = _typed(column, frame[column])
        except (ValueError, TypeError) as error:
            raise ReportError(path, f"column {column} holds something that is no number: {error}") from error
    return frame


def _typed(column: str, values: pd.Series) -> pd.Series:
    """A column that was null throughout comes back without its type; give every column the one it has."""
    import pandas as pd

    if column in NUMBERS:
        return pd.to_numeric(values)
    return values if column == "first" else values.fillna("").astype(str)
