"""`pytest tests/bench --benchmark-enable --benchmark-json FILE`; `reports.bench` reads the file."""

import pytest
import torch


@pytest.mark.oracle
def test_workload(benchmark, name, oracle, workload, bound):
    call, read, declared = bound
    benchmark.extra_info.update(
        operation=name, oracle=oracle, candidate="torch", workload=workload, direction="forward", provider="candidate"
    )
    with torch.no_grad():
        outputs = read(benchmark(call))
    assert [output.name for output in declared.outputs if output.name not in outputs] == []
