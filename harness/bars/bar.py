"""A bar of the gate, and the file that holds the thresholds with their reasons."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

THRESHOLDS = Path(__file__).parent.parent / "gate.toml"


@dataclass(frozen=True)
class Bar:
    """One bar as it was held against the run."""

    bar: str
    limit: float
    value: float
    ok: bool
    reason: str


@cache
def thresholds() -> Mapping[str, Any]:
    """The tables of `harness/gate.toml`."""
    return tomllib.loads(THRESHOLDS.read_text())


def tied_cases(operation: str) -> Mapping[str, float]:
    """The largest share of cases that may be ties, by dtype; what is not given may not tie at all."""
    return thresholds()["tied_cases"].get(operation, {})
