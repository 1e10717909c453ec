"""What the tests of kernels share: poisoned outputs, other orders of programs, recorded sizes, planted faults."""

import importlib.util
import inspect
import sys
from contextlib import contextmanager
from itertools import count

import pytest
import torch

from cleanroom.kernels import runtime

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
_NUMBERS = count()


def pytest_ignore_collect(collection_path, config):
    """Without Triton there is nothing to test but that the library says so, which tests/cleanroom does."""
    return None if runtime.AVAILABLE else True


@pytest.fixture
def poisoned(monkeypatch):
    """Uninitialised memory holds NaN, or the largest integer: an element nobody writes shows."""

    def poison(shape, dtype, device):
        worst = torch.nan if dtype.is_floating_point else True if dtype == torch.bool else torch.iinfo(dtype).max
        return torch.full(tuple(shape), worst, dtype=dtype, device=device)

    monkeypatch.setattr(runtime, "empty", poison)


@pytest.fixture
def allocations(monkeypatch):
    """Shapes of all that kernels' code allocates, in order."""
    found = []

    def recording(allocate):
        def allocate_and_record(shape, dtype, device):
            found.append(tuple(shape))
            return allocate(shape, dtype, device)

        return allocate_and_record

    for name in ("empty", "zeros"):
        monkeypatch.setattr(runtime, name, recording(getattr(runtime, name)))
    return found


@contextmanager
def programs_reordered(permute):
    """Run the programs of each launch in another order: what depends on the order shows. Interpreter only.

    `permute(grid)` gives the coordinates (x, y, z) in the order in which they are to run.
    """
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    real_set, real_dim = builder.set_grid_idx, builder.set_grid_dim
    order = {}

    def set_dim(*grid):
        from itertools import product

        natural = list(product(*map(range, grid)))
        order.clear()
        order.update(zip(natural, permute(natural), strict=True))
        real_dim(*grid)

    builder.set_grid_dim, builder.set_grid_idx = set_dim, lambda *at: real_set(*order[at])
    try:
        yield
    finally:
        del builder.set_grid_dim, builder.set_grid_idx


@pytest.fixture(params=["backwards", "shuffled"])
def reordered(request):
    """Programs run backwards, or shuffled."""
    if not runtime.INTERPRETED:
        pytest.skip("the device itself decides on the order of programs")

    def permute(natural):
        if request.param == "backwards":
            return natural[::-1]
        chosen = torch.randperm(len(natural), generator=torch.Generator().manual_seed(0)).tolist()
        return [natural[place] for place in chosen]

    with programs_reordered(permute):
        yield


@pytest.fixture
def planted(monkeypatch, tmp_path):
    """`planted(module, (old, new), ...)`: the module with parts of its source replaced, not registered with PyTorch."""

    def plant(module, *faults):
        source = inspect.getsource(module)
        for old, new in faults:
            assert source.count(old) >= 1, f"{module.__name__} has no {old!r}: the fault must follow the code"
            source = source.replace(old, new)
        name = f"planted_{next(_NUMBERS)}_{module.__name__.rpartition('.')[2]}"
        file = tmp_path / f"{name}.py"
        file.write_text(source)
        spec = importlib.util.spec_from_file_location(name, file)
        loaded = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, loaded)
        with monkeypatch.context() as patch:
            patch.setattr(runtime, "REGISTERED", False)
            spec.loader.exec_module(loaded)
        return loaded

    return plant
