"""A bar of the gate, and the file that holds the thresholds with their reasons."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
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


def thresholds() -> dict[str, Any]:
    """The tables of `harness/gate.toml`."""
    return tomllib.loads(THRESHOLDS.read_text())
