"""Built-in candidates: who has which, what is tried by default, and that the interpreter takes no timings."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from harness import accelerator
from harness.candidates import by_path, default_candidates, interprets
from harness.operation import DropIn
from harness.operations import NAMES, operation
from harness.plan import Plan, RequestError, check_pairs

PROJECT = Path(__file__).parents[2]
ULTRALYTICS = "ultralytics==8.4.190"
BOTH = {"torch": "", "triton": ""}


def plan(operations, candidates):
    return Plan(
        operations, (ULTRALYTICS,), candidates, "cpu", ("float32",), "quick", 1, 0, (), None,
        parity=True, bench=False, workers=1, time_limit=1, memory_limit=None, row_seconds=1, shrink_seconds=1,
    )  # fmt: skip


def path_of(*_, path, **__):
    return {"path": path}


@pytest.mark.parametrize("drop_in", [False, True])
def test_each_candidate_takes_its_path(drop_in):
    def bind(**given):
        return lambda: path_of(**given), lambda found: found

    found = by_path(DropIn(bind) if drop_in else path_of, on_device="scipy")
    here, there = torch.zeros(1), torch.zeros(1, device="meta")
    assert [found["torch"](x=some)["path"] for some in (here, there)] == ["auto", "scipy"]
    assert [found["triton"](x=some)["path"] for some in (here, there)] == ["triton", "triton"]


def test_a_plan_tries_what_an_operation_has():
    own = plan(("tal", "make_anchors"), BOTH)
    assert own.candidates_of("tal") == ("torch", "triton")
    assert own.candidates_of("make_anchors") == ("torch",)
    kernels = plan(("tal", "make_anchors"), {"triton": ""})
    assert kernels.pairs() == [("tal", ULTRALYTICS)]
    with pytest.raises(RequestError, match="make_anchors has no candidate triton"):
        check_pairs(kernels)
    assert plan(("make_anchors",), {"triton": "mine:kernel"}).candidates_of("make_anchors") == ("triton",)


def test_what_has_kernels():
    assert {name for name in NAMES if "triton" in operation(name).candidates} >= {
        "tal", "simota", "hungarian", "v8_detection_loss", "v10_detection_loss", "yolox_loss", "set_loss",
    }  # fmt: skip


def test_kernels_are_tried_by_default_where_they_are_compiled():
    assert default_candidates("cpu") == ("torch",)
    assert "torch" in default_candidates("cuda")
    assert interprets({"triton": ""}, "cpu")
    assert not interprets({"triton": ""}, "cuda")
    assert not interprets({"triton": "mine:kernel"}, "cpu")


def test_nothing_is_said_of_a_device_on_the_cpu():
    assert accelerator.describe(None, None, "cpu") == dict.fromkeys(accelerator.COLUMNS)


def test_without_triton_the_request_is_refused_and_the_library_works(tmp_path):
    """A folder with a `triton` that is too old hides the installed one."""
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton/__init__.py").write_text('__version__ = "3.3.1"\n')
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{PROJECT}"}
    options = ["--backends", "triton", "--ops", "tal", "--out", "run"]
    command = [sys.executable, "-m", "harness", "run", *options]
    told = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert (told.returncode, told.stderr) == (4, "harness: --backends triton: Triton 3.3.1 is older than 3.4\n")
    script = (
        "import torch; from cleanroom.paths import choose_path; x = torch.zeros(1)\n"
        "print(choose_path('auto', x))\n"
        "try: choose_path('triton', x)\n"
        "except RuntimeError as error: print(error)"
    )
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=True)
    assert told.stdout == "sparse\npath 'triton' cannot run here: Triton 3.3.1 is older than 3.4\n"
