import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
WORKER = Path(__file__).with_name("oracle_worker.py")


class OracleProcess:
    """An oracle in a process of its own, as upstream must run; errors come back as RuntimeError."""

    def __init__(self, spec, path=""):
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(PROJECT), path])}
        self.process = subprocess.Popen(
            [sys.executable, str(WORKER), spec],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        self.name, self.version, self.source, self.operations = self._reply()

    def bind(self, operation, tensors, settings, *assignment):
        """Return {"outputs", "raw", "tensors" after the call, "gradients" of the tensors that require any}."""
        return self._ask("bind", operation, tensors, settings, *assignment)

    def elsewhere(self, operation, tensors, settings):
        """Return the outputs of a call on a device that is not the CPU; None of those that do not lie there."""
        return self._ask("elsewhere", operation, tensors, settings)

    def assigner_inputs(self, operation, tensors, settings):
        """Return what a total hands to its assigners, and what they answer."""
        return self._ask("assigner_inputs", operation, tensors, settings)

    def quantities(self, operation, tensors, settings):
        return self._ask("quantities", operation, tensors, settings)

    def era(self, operation):
        """Return the version by which upstream's meaning is known."""
        return self._ask("era", operation, {}, {})

    def close(self):
        self.process.kill()
        self.process.communicate()

    def _ask(self, *request):
        pickle.dump(request, self.process.stdin)
        self.process.stdin.flush()
        return self._reply()

    def _reply(self):
        kind, content = pickle.load(self.process.stdout)
        if kind == "error":
            raise RuntimeError(content)
        return content


@pytest.fixture(scope="session")
def oracle():
    """`oracle("yolox==0.3.0")`: that oracle's process, one a session; the test fails where it is missing."""
    processes = {}

    def start(spec):
        if spec not in processes:
            try:
                processes[spec] = OracleProcess(spec)
            except RuntimeError as error:
                pytest.fail(str(error))
        return processes[spec]

    yield start
    for process in processes.values():
        process.close()


@pytest.fixture
def start_oracle():
    """`start_oracle(spec, path)`: a process of its own for one test, with `path` added to PYTHONPATH."""
    processes = []

    def start(spec, path=""):
        processes.append(OracleProcess(spec, path))
        return processes[-1]

    yield start
    for process in processes:
        process.close()
