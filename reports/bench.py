"""Read pytest-benchmark's JSON into the long frame of a run's samples."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from reports.frames import SAMPLES, ReportError

if TYPE_CHECKING:
    import pandas as pd

NAMED = ("operation", "oracle", "candidate", "workload", "direction", "provider")
"""What a benchmark says about itself in `extra_info`; `device`, `torch` and `threads` are optional."""


STAMP = ("commit", "torch", "threads")
"""Provenance that every row of a run's frames carries too."""


def read(path: Path) -> pd.DataFrame:
    """One row a raw sample, with the columns of samples.parquet and its stamp; times in nanoseconds.

    A file saved without its raw samples gives one row a benchmark, its median. Benchmarks do not interleave,
    so `pair` only counts the rounds and `first` is False throughout. Raises ReportError for a file that is no
    pytest-benchmark JSON or has a benchmark that does not say what it measured.
    """
    import pandas as pd

    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ReportError(path, f"not readable as JSON: {error}") from error
    benchmarks = content.get("benchmarks") if isinstance(content, dict) else None
    if not isinstance(benchmarks, list):
        raise ReportError(path, "has no list of benchmarks, so it is no pytest-benchmark JSON")
    commit = (content.get("commit_info") or {}).get("id") or ""
    rows = [row for benchmark in benchmarks for row in _rows(path, benchmark, commit)]
    return pd.DataFrame(rows, columns=[*SAMPLES, *STAMP])


def _rows(path: Path, benchmark: dict[str, Any], commit: str) -> Iterator[dict[str, Any]]:
    name = benchmark.get("fullname", benchmark.get("name", "?"))
    extra = benchmark.get("extra_info") or {}
    missing = [key for key in NAMED if not isinstance(extra.get(key), str)]
    if missing:
        raise ReportError(path, f"benchmark {name!r}: extra_info has no {', '.join(missing)}")
    stats = benchmark.get("stats") or {}
    seconds = stats.get("data") or [stats.get("median")]
    if not all(isinstance(value, (int, float)) for value in seconds):
        raise ReportError(path, f"benchmark {name!r}: stats has neither data nor a median")
    for pair, value in enumerate(seconds):
        yield {
            **{key: extra[key] for key in NAMED},
            "device": extra.get("device", ""),
            "pair": pair,
            "nanoseconds": value * 1e9,
            "first": False,
            "commit": commit,
            "torch": extra.get("torch", ""),
            "threads": extra.get("threads"),
        }
