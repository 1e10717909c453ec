"""How much of the machine other processes used while something was timed."""

from __future__ import annotations

import time
from typing import NamedTuple

BUSY = ("user", "nice", "system", "irq", "softirq", "steal")


class Reading(NamedTuple):
    """Seconds on the wall clock, of all cores busy, and of this process."""

    wall: float
    busy: float
    own: float


def read() -> Reading:
    """Read the machine's and this process's processor time."""
    import psutil

    everyone, own = psutil.cpu_times(), psutil.Process().cpu_times()
    busy = sum(getattr(everyone, name, 0.0) for name in BUSY)
    return Reading(time.monotonic(), busy, own.user + own.system)


def other_cores(before: Reading, after: Reading) -> float:
    """Cores that others used between two readings, on average."""
    wall, busy, own = (late - early for early, late in zip(before, after, strict=True))
    return max(0.0, busy - own) / wall if wall > 0 else 0.0
