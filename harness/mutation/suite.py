"""The project's own tests as what finds mutants: those that reach the line, the cheapest first."""

from __future__ import annotations

import os
import time
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from harness.mutation import overlay
from harness.mutation.reach import Reach
from harness.mutation.sources import PROJECT
from harness.mutation.zygote import stage

LEAST_SECONDS, MOST_TIMES = 10.0, 20
"""Processor time that a test may take on a mutant: so many seconds, and so many times what it takes unmutated."""
COLLECTING = "collecting"


def prepare() -> None:
    """What a zygote imports once."""
    import sys

    import hypothesis  # noqa: F401 - so that children need not import it
    import scipy.optimize  # noqa: F401 - as above
    import torch
    import torch._dynamo
    import triton  # noqa: F401 - as above

    from harness import drawing  # noqa: F401 - as above

    torch.set_num_threads(1)
    # pytest compiles every file of tests that it collects: once, and not into the working tree.
    sys.pycache_prefix = str(Path(os.environ["HYPOTHESIS_STORAGE_DIRECTORY"]).with_name("bytecode"))
    sys.dont_write_bytecode = False


class _Watch:
    """Says which test begins, and keeps how each ended."""

    def __init__(self, connection: Connection, limits: dict[str, float], reach: Reach | None = None) -> None:
        self._connection, self._limits, self._reach = connection, limits, reach
        self.rows: list[dict[str, Any]] = []
        self.failed: tuple[str, str] | None = None
        self._passed = False

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item, nextitem):
        stage(self._connection, item.nodeid, self._limits.get(item.nodeid, 900.0))
        self._passed, started = False, time.process_time()
        if self._reach is None:
            return (yield)
        with self._reach.recording():
            done = yield
        seconds, lines = time.process_time() - started, self._reach.take()
        if self._passed:
            self.rows.append({"test": item.nodeid, "seconds": seconds, "lines": lines})
        return done

    def pytest_runtest_logreport(self, report):
        if report.when == "call" and report.passed:
            self._passed = True
        if report.failed:
            self._fails(report)

    def pytest_collectreport(self, report):
        if report.failed:
            self._fails(report)

    def _fails(self, report) -> None:
        self._passed = False
        crash = getattr(report.longrepr, "reprcrash", None)
        said = crash.message if crash else str(report.longrepr)
        self.failed = self.failed or (report.nodeid, " ".join(said.split())[-200:])


def record(connection: Connection, file: str, subject: str, scratch: str) -> list[dict[str, Any]]:
    """Run a file of tests on the unmutated library: a row a test that passes, with the lines that it reaches."""
    overlay.lay(Path(subject))
    watch = _Watch(connection, {}, Reach(Path(subject)))
    _run([file], watch, scratch, connection)
    return watch.rows


def kill(
    connection: Connection, rows: list[dict[str, Any]], subject: str, module: str, file: str, scratch: str
) -> dict[str, Any] | None:
    """What finds the mutant `module`, whose text is in `file`: {by, detail}, or None where all tests pass."""
    overlay.lay(Path(subject), module, Path(file))
    stage(connection, "import", 60.0)
    try:
        import_module(module)
    except Exception as error:  # whatever the mutant raises
        return {"by": "import", "detail": f"{type(error).__name__}: {error}"[:300]}
    watch = _Watch(connection, {row["test"]: LEAST_SECONDS + MOST_TIMES * row["seconds"] for row in rows})
    _run([row["test"] for row in rows], watch, scratch, connection)
    if watch.failed is None:
        return None
    failed, said = watch.failed
    found = {"by": "test", "detail": f"{failed}: {said}"[:300]}
    # A file that cannot even be collected is found by no test of its own.
    return found | {"test": failed} if any(row["test"] == failed for row in rows) else found


def holds(connection: Connection, test: str, subject: str, scratch: str) -> bool:
    """Whether a test passes on the unmutated library where no other has run before."""
    overlay.lay(Path(subject))
    watch = _Watch(connection, {})
    _run([test], watch, scratch, connection)
    return watch.failed is None


def _run(tests: list[str], watch: _Watch, scratch: str, connection: Connection) -> None:
    stage(connection, COLLECTING, 300.0)
    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:randomly", "--no-header"]
    if watch._reach is not None:
        options.remove("-x")
    place = ["-c", str(PROJECT / "pyproject.toml"), "--rootdir", str(PROJECT), f"--basetemp={scratch}/{os.getpid()}"]
    pytest.main([*options, *place, *tests], plugins=[watch])
