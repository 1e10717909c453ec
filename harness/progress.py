"""Progress: a bar where standard error is a terminal, plain lines now and then where it is not."""

from __future__ import annotations

import sys
import threading
import time

EVERY = 15.0
"""Seconds between plain lines."""


class Progress:
    """Counts steps of the current phase; safe to call from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._bar = None
        self._task = None
        self._phase, self._total, self._count, self._said = "", 0, 0, 0.0

    def start(self, phase: str, total: int) -> None:
        """Begin a phase of about `total` steps."""
        self.stop()
        self._phase, self._total, self._count, self._said = phase, total, 0, time.monotonic()
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.fields[phase]}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.description}"),
                console=Console(stderr=True),
                transient=True,
            )
            self._bar.start()
            self._task = self._bar.add_task("", total=total, phase=phase)

    def step(self, label: str) -> None:
        """One step done, on what `label` says."""
        with self._lock:
            self._count += 1
            if self._bar is not None:
                self._bar.update(self._task, advance=1, description=label)
            elif time.monotonic() - self._said > EVERY:
                self._said = time.monotonic()
                sys.stderr.write(f"{self._phase}: {self._count} of about {self._total}, {label}\n")
                sys.stderr.flush()

    def stop(self) -> None:
        """End the phase and take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
