"""No kernel reads or writes beyond a tensor, masked or not: the pages around are closed, and an access there crashes.

A GPU would not notice: its allocator hands out parts of large blocks. Where tests run in several processes, a crash is
a failure of its test alone.
"""

from dataclasses import replace
from functools import partial
from importlib import import_module

import pytest
import torch

from cases.pinned import pinned
from cleanroom.kernels import runtime
from harness.drawing import explore
from harness.operation import AUTOCAST
from harness.operations import NAMES, operation
from harness.worker import as_outputs
from tests.kernels.guarded import guarded

#: All that have kernels of their own: v10's total is v8's, twice.
KERNELS = [name for name in NAMES if "triton" in operation(name).candidates and name != "v10_detection_loss"]
#: Of so many drawn cases those of at most so many numbers: what lies at the end of a block is there in each.
EXAMPLES, NUMBERS = 16, 1500

ALLOCATORS = {"empty": runtime.empty, "zeros": runtime.zeros}

pytestmark = pytest.mark.skipif(not runtime.INTERPRETED, reason="only the interpreter's loads and stores can crash")


def odd_head():
    """A head of five bins a side, which no block has, whose second list has a place for each of eleven anchors."""
    [case] = [case for case in pinned("v8_detection_loss") if case.origin.endswith("-every-anchor-foreground")]
    tensors = case.tensors | {"boxes": case.tensors["boxes"][:, :20]}
    return replace(case, tensors=tensors, settings=case.settings | {"reg_max": 5, "topk": 3, "topk2": 11})


def small_cases(name):
    """Drawn cases of an operation, and what is never drawn."""
    found = {"odd": odd_head()} if name == "v8_detection_loss" else {}

    def keep(case):
        if sum(value.numel() for value in case.tensors.values()) <= NUMBERS:
            found.setdefault(case.digest, case)

    strategy = import_module(f"cases.{name}").cases(dtypes=("float32",))
    explore(strategy, keep, seed=0, examples=EXAMPLES, shrink=False)
    return list(found.values())


def closing(allocate, close):
    """An allocator whose tensors are closed."""
    return lambda *given, **more: close(allocate(*given, **more))


@pytest.mark.parametrize("name", KERNELS)
def test_nothing_beyond_a_tensor_is_touched(name, monkeypatch):
    declared, answered = operation(name), 0
    for number, case in enumerate(small_cases(name)):
        close = partial(guarded, before=number % 3 == 2)
        for allocate, plain in ALLOCATORS.items():
            monkeypatch.setattr(runtime, allocate, closing(plain, close))
        tensors = {key: close(value) for key, value in case.tensors.items()}
        for key in declared.carries_gradient(tensors):
            tensors[key].requires_grad_()
        settings = {key: value for key, value in case.settings.items() if key != AUTOCAST}
        call = partial(declared.candidates["triton"], **tensors, **settings)
        try:
            declared.candidates["torch"](**tensors, **settings)
        except (ValueError, IndexError) as error:  # a drawn request that is wrong
            with pytest.raises(type(error)):
                call()
            continue
        outputs = as_outputs(call()).values()
        losses = [value.sum() for value in outputs if isinstance(value, torch.Tensor) and value.requires_grad]
        if losses:
            sum(losses).backward()
        answered += 1
    assert answered > 5
