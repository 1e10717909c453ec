"""Runs of the whole harness, in this process, into temporary folders."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

from harness.__main__ import main


class Run(NamedTuple):
    """A run's exit code, folder and summary."""

    code: int
    folder: Path
    summary: dict

    def operation(self, candidate):
        """The parity line of one candidate."""
        [row] = [row for row in self.summary["operations"] if row["candidate"] == candidate]
        return row

    def failures(self, candidate):
        """The kinds of failure of one candidate."""
        return [row for row in self.summary["failures"] if row["candidate"] == candidate]


@pytest.fixture(scope="session")
def harness_run(tmp_path_factory):
    """`harness_run("--ops", "tal", ...)` -> Run; relations without an oracle only where `--relations` names them."""

    def run(*arguments):
        if "--relations" not in arguments:
            arguments = (*arguments, "--no-relations")
        folder = tmp_path_factory.mktemp("run") / "folder"
        code = main(["run", "--out", str(folder), *arguments])
        return Run(code, folder, json.loads((folder / "summary.json").read_text()))

    return run


def ask_worker(script, oracle):
    """What a script of this folder, which trains a model of upstream's on both sides, says of it."""
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": str(here.parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(here / script), oracle]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    # The last line of stderr only: a traceback would quote upstream's source.
    assert done.returncode == 0, done.stderr.splitlines()[-1:]
    return json.loads(done.stdout.splitlines()[-1])


def plug(*names):
    """`--candidate` options for candidates of `tests/faults.py`."""
    return [option for name in names for option in ("--candidate", f"{name}=tests.faults:{name}")]
