"""A run folder as the harness leaves it, with numbers of the right size and names chosen by an enemy."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import reports

SCRIPT = "<script>alert(1)</script>"
HOSTILE = f"mine{SCRIPT}|`x`\x07]]>"
"""A candidate's name: markup, a table's pipe, code marks, a bell and the end of a CDATA section."""

IMAGE = "<img src=x onerror=\"document.title='owned'\">"
DETAIL = f"matched_gt[2, 4810] is 7, upstream's 3 | margin 0.25 ]]> {IMAGE}\nbudget 1.2e-07\x00\x1b[31m & more"

COMMIT = "4f2c9d1e0b7a6853c1d2e3f405162738495a6b7c"
STAMP = {"commit": COMMIT, "torch": "2.13.0+cpu", "threads": 2}

# operation, oracle, candidate, [(workload, upstream ms, candidate ms, then MB: upstream, candidate, outputs,
# must move)]
GROUPS: list[tuple[str, str, str, list[tuple[str, float, float, float, float, float, float]]]] = [
    (
        "tal",
        "ultralytics==8.4.190",
        "torch",
        [
            ("coco-b1", 6.1, 1.9, 18.9, 3.1, 2.9, 5.6),
            ("coco-b16", 212.0, 31.0, 402.0, 51.0, 46.2, 89.9),
            ("crowd-b16", 655.0, 148.0, 1130.0, 55.2, 46.2, 90.1),
            ("dense-b4", 1410.0, 240.0, 2760.0, 16.1, 11.5, 22.8),
        ],
    ),
    (
        "tal",
        "ultralytics==8.1.47",
        "torch",
        [
            ("coco-b1", 5.8, 1.9, 18.7, 3.1, 2.9, 5.6),
            ("coco-b16", 201.0, 31.0, 398.0, 51.0, 46.2, 89.9),
        ],
    ),
    (
        "simota",
        "yolox==0.3.0",
        "torch",
        [
            ("coco-b1", 9.6, 1.1, 41.5, 1.4, 0.2, 3.0),
            ("coco-b16", 188.0, 12.5, 60.2, 5.9, 3.6, 47.7),
            ("crowd-b16", 4230.0, 61.0, 1540.0, 11.0, 3.6, 47.8),
        ],
    ),
    ("hungarian", "transformers==5.23.0", "torch", [("detr-b16", 94.0, 24.0, 63.0, 8.2, 0.03, 1.7)]),
    ("hungarian", "ultralytics==8.4.190", HOSTILE, [("detr-b16", 31.0, 40.1, 18.0, 19.5, 0.03, 1.7)]),
]
CASES = 320


def _verdicts(random: np.random.Generator) -> pd.DataFrame:
    rows = []
    for operation, oracle, candidate, _ in GROUPS:
        for index in range(CASES):
            verdict = "tie" if index % 97 == 5 else "match"
            if index in (40, 41):
                verdict = "known-divergence" if operation == "tal" else "both-reject"
            if candidate == HOSTILE and index in (7, 80, 150):
                verdict = {7: "mismatch", 80: "timeout", 150: "mismatch"}[index]
            failing = verdict in ("mismatch", "timeout")
            digest = f"{random.integers(2**62):016x}"
            rows.append(
                {
                    "operation": operation,
                    "oracle": oracle,
                    "candidate": candidate,
                    "device": "cpu",
                    "dtype": ("float32", "float64", "float16", "bfloat16")[index % 4],
                    "case": digest,
                    "origin": f"scene seed {index}" if index % 3 else f"labels/{IMAGE}]]>.json #12",
                    "verdict": verdict,
                    "detail": DETAIL
                    if failing
                    else "upstream makes every score NaN"
                    if verdict == "known-divergence"
                    else "",
                    "output": "matched_gt" if verdict == "mismatch" else "",
                    "error": float(random.beta(1.2, 6)) if verdict in ("match", "tie") else None,
                    "gradient_error": None,
                    "decisions": 8400,
                    "tied_decisions": 2 if verdict == "tie" else 0,
                    "divergence": "tal-non-finite-prediction" if verdict == "known-divergence" else "",
                    "replay": f"failures/hungarian-{digest}|$(x).safetensors" if verdict == "mismatch" else "",
                    "seconds": float(random.gamma(2.0, 0.01)),
                    "index": index,
                }
            )
    return pd.DataFrame(rows).assign(**STAMP)


def _measured(random: np.random.Generator) -> tuple[pd.DataFrame, pd.DataFrame]:
    samples, measurements = [], []
    for operation, oracle, candidate, workloads in GROUPS:
        for workload, upstream, ours, *sizes in workloads:
            pairs = 4 if upstream > 4000 else 25
            name = {
                "operation": operation,
                "oracle": oracle,
                "candidate": candidate,
                "device": "cpu",
                "workload": workload,
                "direction": "forward",
            }
            times = {
                "oracle": upstream * 1e6 * random.lognormal(0, 0.04, pairs),
                "candidate": ours * 1e6 * random.lognormal(0, 0.04, pairs),
            }
            for provider, values in times.items():
                for pair, value in enumerate(values):
                    samples.append(
                        {
                            **name,
                            "pair": pair,
                            "provider": provider,
                            "nanoseconds": int(value),
                            "first": bool(pair % 2) == (provider == "oracle"),
                        }
                    )
            logs = np.log(times["oracle"] / times["candidate"])
            centre, spread = np.median(logs), 2.6 * logs.std() / np.sqrt(pairs)
            few = pairs < 5
            measurements.append(
                {
                    **name,
                    "pairs": pairs,
                    "oracle_ns": float(np.median(times["oracle"])),
                    "candidate_ns": float(np.median(times["candidate"])),
                    "speedup": float(np.exp(centre)),
                    "speedup_low": None if few else float(np.exp(centre - spread)),
                    "speedup_high": None if few else float(np.exp(centre + spread)),
                    "verdict": "too-few-pairs" if few else "faster" if upstream > ours else "slower",
                    **{
                        key: int(size * 1e6)
                        for key, size in zip(
                            ("peak_bytes_oracle", "peak_bytes_candidate", "output_bytes", "minimum_bytes"),
                            sizes,
                            strict=True,
                        )
                    },
                    "note": f"Wide spread {SCRIPT}"
                    if candidate == HOSTILE
                    else "4 of at least 5 pairs fitted in 20 s"
                    if few
                    else "",
                }
            )
    return pd.DataFrame(samples).assign(**STAMP), pd.DataFrame(measurements).assign(**STAMP)


def _summary(verdicts: pd.DataFrame, measurements: pd.DataFrame) -> dict[str, Any]:
    operations = []
    for operation, oracle, candidate, _ in GROUPS:
        rows = verdicts[
            (verdicts.operation == operation) & (verdicts.oracle == oracle) & (verdicts.candidate == candidate)
        ]
        counts = {word: int((rows.verdict == word).sum()) for word in ("match", "tie", "mismatch")}
        operations.append(
            {
                **{"operation": operation, "oracle": oracle, "candidate": candidate, "device": "cpu"},
                "cases": len(rows),
                **counts,
                "other": len(rows) - sum(counts.values()),
                "tie_share": counts["tie"] / len(rows),
                "tie_cap": 0.05,
            }
        )
    failing = int(verdicts.verdict.isin(["mismatch", "timeout"]).sum())
    gate = [
        {
            "bar": "no failing case",
            "limit": 0,
            "value": failing,
            "ok": not failing,
            "reason": "parity is the product",
        },
        {"bar": "tie share", "limit": 0.05, "value": 0.0125, "ok": True, "reason": "a tie must stay rare"},
        {"bar": "speedup tal coco-b16", "limit": 4.0, "value": 6.84, "ok": True, "reason": "issue 2"},
    ]
    tried = f"{len(verdicts)} cases of 3 operations against 4 oracles"
    wanted = [
        *("operation", "oracle", "candidate", "device", "workload", "direction"),
        "speedup",
        "speedup_low",
    ]
    wanted += ["speedup_high", "peak_bytes_oracle", "peak_bytes_candidate"]
    return {
        "passed": sum(bar["ok"] for bar in gate),
        "failed": sum(not bar["ok"] for bar in gate),
        "exit_code": 1 if failing else 0,
        "sentence": f"Parity or a bar fell: {failing + 1} failed (2 mismatches) in {tried}."
        if failing
        else f"Parity holds: {tried}, no mismatch.",
        "gate": gate,
        "operations": operations,
        "measurements": json.loads(measurements[wanted].to_json(orient="records")),
    }


def _provenance() -> dict[str, Any]:
    pins = [
        ("ultralytics", "8.4.190"),
        ("ultralytics", "8.1.47"),
        ("yolox", "0.3.0"),
        ("transformers", "5.23.0"),
    ]
    command = f"python -m harness run --candidate '{HOSTILE}=plugin:assign'"
    return {
        "format": 1,
        "started": "2025-11-21T03:10:04+00:00",
        "finished": "2025-11-21T03:13:31+00:00",
        "command": command,
        "argv": command.split(),
        "profile": "quick",
        "seed": 0,
        "examples": CASES,
        "device": "cpu",
        "threads": 2,
        "cpu": "Example CPU @ 2.60 GHz",
        "commit": COMMIT,
        "dirty": True,
        "versions": {"python": "3.11.2", "torch": "2.13.0+cpu", "numpy": "2.4.6", "scipy": "1.17.0"},
        "oracles": [
            {"name": name, "version": version, "source": "pypi", "sha256": f"{number:x}" * 64}
            for number, (name, version) in enumerate(pins, 10)
        ]
        + [{"name": "yolox", "version": "local", "source": f"checkouts/{IMAGE}", "sha256": None}],
        "settings": {"time_limit": 30, "labels": f"data/{SCRIPT}", "note": "</details></pre>"},
    }


@functools.cache
def _frames() -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    random = np.random.default_rng(7)
    return _verdicts(random), *_measured(random)


def _write(folder: Path, *, failing: bool = True, bench: bool = True, finished: bool = True, frames: bool = True):
    (folder / "failures").mkdir(parents=True)
    verdicts, samples, measurements = (frame.copy() for frame in _frames())
    if not failing:
        broken = verdicts.verdict.isin(["mismatch", "timeout"])
        verdicts.loc[broken, ["verdict", "detail", "output", "replay"]] = ["match", "", "", ""]
    if frames:
        verdicts.to_parquet(folder / "verdicts.parquet", index=False)
    if frames and bench:
        samples.to_parquet(folder / "samples.parquet", index=False)
        measurements.to_parquet(folder / "measurements.parquet", index=False)
    (folder / "run.json").write_text(json.dumps(_provenance()))
    if finished:
        (folder / "summary.json").write_text(json.dumps(_summary(verdicts, measurements)))
    return folder


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Writes a run folder; keywords take out what a run may lack: failing cases, measurements, the end."""
    return functools.partial(_write, tmp_path / "run")


@pytest.fixture
def run_folder(make_run: Callable[..., Path]) -> Path:
    """A finished run with failing cases and hostile names."""
    return make_run()


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with its reports written, for tests that only read: drawing the charts takes seconds."""
    folder = _write(tmp_path_factory.mktemp("written") / "run")
    reports.write(folder)
    return folder


class Page(HTMLParser):
    """A page as a reader finds it: its elements, and its tables as rows of cells by heading."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.tables: dict[str, list[dict[str, tuple[str, str | None]]]] = {}
        self.texts: list[str] = []
        self._heads: list[str] = []
        self._cells: list[list[str | None]] = []
        self._table = self._inside = ""
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.elements.append((tag, named))
        if tag == "table":
            self._table, self._heads = named["id"].removeprefix("table-"), []
            self.tables[self._table] = []
        elif tag == "th" and named.get("scope") == "col":
            self._heads.append("")
            self._inside = "head"
        elif tag == "tr":
            self._cells = []
        elif tag == "td":
            self._cells.append(["", named.get("data-value")])
            self._inside = "cell"
        elif tag == "caption":
            self._inside = ""

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._inside = ""
        elif tag == "tr" and self._cells:
            row = zip(self._heads, map(tuple, self._cells), strict=True)
            self.tables[self._table].append(dict(row))
            self._cells = []

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if self._inside == "head":
            self._heads[-1] += data.strip()
        elif self._inside == "cell":
            self._cells[-1][0] += data.strip()

    def all(self, tag: str) -> list[dict[str, str]]:
        """Attributes of every element of that name."""
        return [attributes for name, attributes in self.elements if name == tag]

    @property
    def text(self) -> str:
        """All text, white space folded."""
        return " ".join(" ".join(self.texts).split())


@pytest.fixture(scope="session")
def parse() -> type[Page]:
    """Turns the source of a page into its elements and tables."""
    return Page


@pytest.fixture
def hostile_name() -> str:
    """The hostile candidate's name without its control character, as every form of the report prints it."""
    return HOSTILE.replace("\x07", "")
