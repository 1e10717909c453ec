"""Every kernel compiles for GPUs that are not here, and keeps its variables in registers."""

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]
MODULES = sorted(
    file.stem
    for file in Path(__file__).parent.glob("test_*.py")
    if "\ndef launches(" in file.read_text(encoding="utf-8")
)
#: Bytes of local memory that a program may take: two words of the scan that looks for candidates, and nothing else.
STACK = {"_propose": 8}


@cache
def compiled(module):
    """(kernel, backend, bytes of stack) of every binary."""
    told = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compiling", module],
        cwd=PROJECT,
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.returncode == 0, told.stderr
    return re.findall(r"^(\w+) (cuda|hip)-\w+:(?: \d+ registers, (\d+) bytes of stack)?", told.stdout, re.MULTILINE)


@pytest.mark.parametrize("module", MODULES)
def test_compiles_and_spills_nothing(module):
    found = compiled(module)
    assert {backend for _, backend, _ in found} == {"cuda", "hip"}
    assert [kernel for kernel, backend, stack in found if backend == "cuda" and int(stack) > STACK.get(kernel, 0)] == []


def test_no_kernel_is_left_out():
    sources = [file.read_text(encoding="utf-8") for file in (PROJECT / "cleanroom/kernels").glob("*.py")]
    launched = {name for source in sources for name in re.findall(r"runtime\.launch\(\s*(\w+)", source)}
    assert len(launched) > 10
    assert launched == {kernel for module in MODULES for kernel, _, _ in compiled(module)}
