"""Who chooses between data-dependent shapes, static ones and kernels, and by what; nothing here runs on a device."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cleanroom.kernels import runtime
from cleanroom.paths import choose_path, data_dependent, take_sparse_path

HERE = torch.zeros(2)
ELSEWHERE = torch.zeros(2, device="meta")


def on_cuda(dtype=torch.float32):
    with FakeTensorMode():
        return torch.zeros(2, dtype=dtype, device="cuda")


def fake():
    with FakeTensorMode():
        return torch.zeros(2)


@pytest.fixture
def triton(monkeypatch):
    """`triton(available, interpreted)`: whether kernels can run, and where."""

    def given(available, interpreted):
        monkeypatch.setattr(runtime, "AVAILABLE", available)
        monkeypatch.setattr(runtime, "INTERPRETED", interpreted)
        monkeypatch.setattr(runtime, "ABSENT", "" if available else "Triton is not installed")

    return given


def test_shapes_depend_on_values_on_the_cpu_alone(monkeypatch):
    assert data_dependent(HERE, HERE)
    assert not data_dependent(HERE, ELSEWHERE)
    assert not data_dependent(ELSEWHERE, HERE)
    assert not data_dependent(HERE, fake())
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert not data_dependent(HERE)


@pytest.mark.parametrize(("tensor", "auto"), [(HERE, True), (ELSEWHERE, False)])
def test_what_has_no_kernel(tensor, auto):
    assert take_sparse_path("auto", tensor) is auto
    assert take_sparse_path("sparse", tensor) is True
    assert take_sparse_path("static", tensor) is False
    with pytest.raises(ValueError, match=r"path must be one of .* got 'triton'"):
        take_sparse_path("triton", tensor)


@pytest.mark.parametrize(
    ("path", "tensors", "available", "interpreted", "expected"),
    [
        ("auto", [HERE], True, False, "sparse"),
        ("auto", [HERE], True, True, "sparse"),
        ("auto", [ELSEWHERE], True, True, "static"),
        ("auto", [HERE, ELSEWHERE], True, False, "static"),
        ("auto", [on_cuda()], True, False, "triton"),
        ("auto", [on_cuda()], False, False, "static"),
        ("auto", [on_cuda(), on_cuda(torch.float64)], True, False, "static"),
        ("auto", [on_cuda(), fake()], True, False, "static"),
        ("triton", [on_cuda()], True, False, "triton"),
        ("triton", [HERE], True, True, "triton"),
        ("triton", [HERE.double()], True, True, "static"),
        ("sparse", [on_cuda()], True, False, "sparse"),
        ("static", [HERE], True, True, "static"),
    ],
)
def test_what_has_a_kernel(triton, path, tensors, available, interpreted, expected):
    triton(available, interpreted)
    assert choose_path(path, *tensors) == expected
    without = "static" if expected == "triton" else expected
    assert choose_path(path, *tensors, has_kernel=False) == without


def test_kernels_that_cannot_run_are_refused_with_the_reason(triton):
    triton(True, False)
    with pytest.raises(RuntimeError, match="path 'triton' cannot run here: tensors are on cpu"):
        choose_path("triton", HERE)
    triton(False, False)
    for tensor in (HERE, HERE.double()):
        with pytest.raises(RuntimeError, match="path 'triton' cannot run here: Triton is not installed"):
            choose_path("triton", tensor)


def test_an_unknown_path_is_named():
    with pytest.raises(ValueError, match=r"path must be one of .* got 'fast'"):
        choose_path("fast", HERE)
