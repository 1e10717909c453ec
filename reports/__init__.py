"""What comes out of a run: an HTML page, a JUnit file and a Markdown summary, from the run folder only."""

from __future__ import annotations

import os
from pathlib import Path

from reports.frames import ReportError

__all__ = ["ReportError", "write"]


def write(run_folder: Path) -> Path:
    """Write report.html, junit.xml and summary.md into a run folder; returns the path of report.html.

    Works on a run that has not finished: what is missing is said in the report. The verdict is the one in
    summary.json, never computed here. Raises ReportError for a file that cannot be read.
    """
    from reports import frames, html, junit, markdown

    run = frames.read(Path(run_folder))
    _replace(run.folder / "junit.xml", junit.render(run))
    _replace(run.folder / "summary.md", markdown.render(run))
    _replace(run.folder / "report.html", html.render(run))
    return run.folder / "report.html"


def _replace(path: Path, text: str) -> None:
    """Write a whole file or nothing, so that a reader never meets half a report."""
    partial = path.with_name(path.name + ".partial")
    # Bytes: the content security policy hashes the text as it stands, and newlines must not be translated.
    try:
        partial.unlink(missing_ok=True)
        partial.write_bytes(text.encode("utf-8"))
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
