"""Which lines of a folder's files run, recorded by `sys.settrace`."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

Lines = dict[str, list[int]]
"""Line numbers by file, relative to the folder."""


class Reach:
    """Collects lines while `recording()`; what runs at the import of a module is not counted."""

    def __init__(self, folder: Path) -> None:
        self._folder = f"{folder}/"
        self._lines: defaultdict[str, set[int]] = defaultdict(set)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Record what this thread does meanwhile."""
        before = sys.gettrace()
        sys.settrace(self._call)
        try:
            yield
        finally:
            sys.settrace(before)

    def take(self) -> Lines:
        """The lines since the last `take`."""
        found = {file: sorted(lines) for file, lines in self._lines.items()}
        self._lines = defaultdict(set)
        return found

    def _call(self, frame, event, _):
        code = frame.f_code
        if not code.co_filename.startswith(self._folder) or code.co_name == "<module>":
            return None
        seen = self._lines[code.co_filename[len(self._folder) :]]
        seen.add(frame.f_lineno)

        def line(frame, event, _):
            seen.add(frame.f_lineno)
            return line

        return line
