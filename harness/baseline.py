"""The stored baseline: what a candidate's time and memory were, measured against the same upstream.

A ratio of two ratios: upstream is timed in the same pairs, then and now, so that a machine that became slower changes
neither, except where caches and vector units differ: rows are compared only where device, its name and threads are
those of the baseline.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harness.bars.bar import Bar, thresholds
from harness.candidates import BUILT_IN
from harness.runfolder import RunFolder
from harness.statistics import DECIDABLE

if TYPE_CHECKING:
    import pandas as pd

FILE = Path(__file__).with_name("baseline.json")
STORED, NONE = "stored", "none"
"""What `--baseline` says for the project's own file, and for no comparison."""
FORMAT = 1
WHERE = ("operation", "oracle", "candidate", "workload", "direction", "device", "device_name", "threads")


class BaselineError(ValueError):
    """A baseline that cannot be read, with the file and the reason: exit code 4."""


@dataclass(frozen=True)
class Row:
    """One measurement: speedup over upstream with its interval, and the candidate's peak beyond its inputs."""

    operation: str
    oracle: str
    candidate: str
    workload: str
    direction: str
    device: str
    device_name: str
    threads: int
    speedup: float
    speedup_low: float
    speedup_high: float
    peak_bytes: int

    @property
    def where(self) -> tuple[Any, ...]:
        """What identifies it."""
        return tuple(getattr(self, name) for name in WHERE)


def read(file: Path = FILE) -> dict[tuple[Any, ...], Row]:
    """The rows of a baseline by what identifies them; BaselineError names the file and the row that is wrong."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BaselineError(f"{file}: {error}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT or not isinstance(content.get("rows"), list):
        raise BaselineError(f"{file}: no baseline of format {FORMAT}")
    rows: dict[tuple[Any, ...], Row] = {}
    for number, given in enumerate(content["rows"]):
        row = _row(file, number, given)
        if row.where in rows:
            raise BaselineError(f"{file}: rows[{number}]: a second row of {' '.join(map(str, row.where))}")
        rows[row.where] = row
    return rows


def chosen(name: str) -> dict[tuple[Any, ...], Row]:
    """The rows that `--baseline` names: "stored", "none" or a file."""
    if name == NONE or (name == STORED and not FILE.exists()):
        return {}
    return read(FILE if name == STORED else Path(name))


def _row(file: Path, number: int, given: Any) -> Row:
    types = {field.name: {"str": str, "int": int, "float": (int, float)}[field.type] for field in fields(Row)}
    if not isinstance(given, dict) or set(given) != set(types):
        raise BaselineError(f"{file}: rows[{number}] must have exactly {', '.join(types)}")
    for name, type_ in types.items():
        if not isinstance(given[name], type_) or isinstance(given[name], bool):
            raise BaselineError(f"{file}: rows[{number}]: {name} is {given[name]!r}")
    if not 0 < given["speedup_low"] <= given["speedup"] <= given["speedup_high"]:
        raise BaselineError(f"{file}: rows[{number}]: speedup is not inside its interval above 0")
    return Row(**given)


def store(folder: RunFolder, file: Path = FILE) -> str:
    """Write the judged rows of a finished run over those of the file; says how many, and what is left of the old.

    Raises BaselineError where the run measured nothing that can be judged.
    """
    run = folder.read_json("run.json")
    new = {row.where: row for row in _judged(folder.frame("measurements"), run["device_name"])}
    if not new:
        raise BaselineError(f"{folder.path}: no measurement of a built-in candidate that can be judged")
    old = read(file) if file.exists() else {}
    rows = [asdict(row) for _, row in sorted({**old, **new}.items())]
    made = {"commit": run["commit"], "started": run["started"], "torch": run["versions"].get("torch")}
    lines = ",\n".join(json.dumps(row) for row in rows)
    file.write_text(f'{{"format": {FORMAT}, "made": {json.dumps(made)}, "rows": [\n{lines}\n]}}\n', encoding="utf-8")
    return f"{file}: {len(new)} rows of this run, {len(old.keys() - new.keys())} kept of before\n"


def _judged(measurements: pd.DataFrame, device_name: str) -> list[Row]:
    return [
        Row(
            **{name: row[name] for name in WHERE if name in row and name != "threads"},
            device_name=device_name,
            threads=int(row["threads"]),
            **{name: round(row[name], 4) for name in ("speedup", "speedup_low", "speedup_high")},
            peak_bytes=int(row["peak_bytes_candidate"]),
        )
        for row in measurements.to_dict("records")
        if row["candidate"] in BUILT_IN and row["verdict"] in DECIDABLE
    ]


def bars(measurements: pd.DataFrame, stored: Mapping[tuple[Any, ...], Row], device_name: str) -> list[Bar]:
    """A bar on speed and one on memory for every row that the baseline has: an ambiguous timing never falls."""
    noise, found = thresholds()["baseline"], []
    for row in _judged(measurements, device_name):
        before = stored.get(row.where)
        if before is None:
            continue
        where = f"{row.operation} {row.workload} {row.direction}, {row.candidate} against {row.oracle}"
        least, most = 1 - noise["speed_noise"], before.peak_bytes * (1 + noise["memory_noise"]) + noise["memory_bytes"]
        found.append(
            Bar(
                f"speed since the baseline of {where}",
                least,
                row.speedup / before.speedup,
                row.speedup_high >= least * before.speedup_low,
                f"{before.speedup:.2f} times upstream's speed in the baseline, {row.speedup:.2f} now",
            )
        )
        found.append(
            Bar(
                f"memory since the baseline of {where}",
                most,
                row.peak_bytes,
                row.peak_bytes <= most,
                "a peak that grew by more than it repeats to",
            )
        )
    return found


def said(measurements: pd.DataFrame, stored: Mapping[tuple[Any, ...], Row], device_name: str) -> str:
    """Why rows were not compared, in a sentence; "" where all were or there was nothing to compare."""
    judged = _judged(measurements, device_name)
    without = [row for row in judged if row.where not in stored]
    if not without:
        return ""
    threads = "/".join(map(str, sorted({row.threads for row in judged})))
    return (
        f"{len(without)} of {len(judged)} timings have no row in the stored baseline "
        f"(device {judged[0].device}, {device_name}, {threads} threads) and were not compared with it."
    )
