"""The workloads for pytest-benchmark. A process holds one oracle, so comparisons belong to `python -m harness run`."""

from functools import partial

import pytest

from harness.operation import AUTOCAST, DropIn
from harness.operations import NAMES, operation
from harness.oracles import package, pins
from harness.parity import options
from harness.worker import as_outputs


def pytest_generate_tests(metafunc):
    if "workload" not in metafunc.fixturenames:
        return
    rows = []
    # As a test, not as a benchmark, one workload an operation shows that it runs.
    wanted = 1 if metafunc.config.getoption("benchmark_disable") else None
    for name in NAMES:
        # The newest pin of each package that has the operation decides what a case may hold.
        newest = {package(pin): pin for pin in reversed(pins()) if package(pin) in operation(name).upstreams}
        rows += [(name, pin, workload) for pin in newest.values() for workload in operation(name).workloads[:wanted]]
    metafunc.parametrize(("name", "oracle", "workload"), rows, ids=["-".join(row) for row in rows])


@pytest.fixture
def bound(name, oracle, workload):
    """(call, read, operation): the built-in candidate on the workload, in the era of the oracle."""
    from cases.workloads import workload_case
    from harness.oracles import version

    declared = operation(name)
    case = workload_case(workload, name, "float32", **options(name, oracle))
    era = declared.upstreams[package(oracle)].era(version(oracle))
    settings = {key: value for key, value in case.settings.items() if key != AUTOCAST}
    candidate, given = declared.candidates["torch"], {**case.tensors, **settings, **era}
    if isinstance(candidate, DropIn):
        call, read = candidate.bind(**given)
        return call, read, declared
    return partial(candidate, **given), as_outputs, declared
