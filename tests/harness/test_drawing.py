"""The same seed draws the same cases whatever else is imported: resuming rests on it."""

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import strategies as st

from harness.drawing import Fails, explore

DRAW = """
{imports}
from cases import hungarian, simota, tal
from harness.drawing import explore
for operation in tal, simota, hungarian:
    found = []
    visit = lambda case: found.append(case.digest)
    explore(operation.cases(dtypes=("float32", "bfloat16")), visit, seed=7, examples=60, shrink=False)
    print(" ".join(found))
"""


def digests(imports):
    command = [sys.executable, "-c", DRAW.format(imports=imports)]
    return subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True).stdout


def test_other_imports_do_not_change_what_a_seed_draws():
    few = digests("")
    many = digests("import reports, harness.meter, harness.run, harness.gate, reference, cleanroom.boxes")
    assert few == many
    assert [len(set(line.split())) > 40 for line in few.splitlines()] == [True] * 3


def test_another_seed_draws_others():
    def drawn(seed):
        values = []

        def visit(value):
            values.append(value)

        explore(st.integers(0, 10**9), visit, seed=seed, examples=50, shrink=False)
        return values

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_shrinking_ends_at_the_smallest_failing_value():
    last = []

    def visit(value):
        if value > 1234:
            last[:] = [value]
            raise Fails

    explore(st.integers(0, 10**9), visit, seed=1, examples=200, shrink=True)
    assert last == [1235]


def test_an_error_that_is_not_a_failing_case_comes_through():
    def visit(value):
        raise RuntimeError("the harness itself broke")

    with pytest.raises(RuntimeError, match="broke"):
        explore(st.integers(), visit, seed=1, examples=5, shrink=False)
