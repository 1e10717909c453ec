"""The comparator of numbers, on an operation whose oracle is a formula: what passes, what falls, and why."""

import pytest
import torch
from torch import Tensor

from cases.case import Case
from harness.execute import Result, execute
from harness.judge import judge
from harness.operation import Input, Operation, Output
from harness.verdict import NON_FINITE, Inquiry

OPERATION = Operation(
    name="squares",
    summary="",
    source="",
    inputs=(Input("x", "(n,)", "floating", ""), Input("y", "(n,)", "floating", "")),
    settings=(),
    outputs=(Output("sum", "()", "floating", ""), Output("each", "(n,)", "floating", "")),
    upstreams={},
    candidates={},
    predictions=("x",),
    workloads=(),
    gradients=("x",),
    moved=("x", "y"),
)


def formula(x: Tensor, y: Tensor) -> dict[str, Tensor]:
    return {"sum": (x * x * y).sum(), "each": x * y}


def case(dtype=torch.float32, x=None) -> Case:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, generator=generator) if x is None else x
    y = torch.rand(len(x), generator=generator) + 0.5
    return Case("squares", {"x": x.to(dtype), "y": y.to(dtype)}, {}, "test", frozenset())


def found(candidate, case, oracle=formula):
    """The finding on a candidate against an oracle, and how often upstream was asked again."""
    asked = []

    def call(function, tensors, *, track=False):
        return execute(lambda given: function(**given), tensors, track=track, gradients=("x",))

    def evaluate(tensors, assignment=None):
        asked.append(assignment)
        return call(oracle, tensors).outputs

    ask = Inquiry(evaluate, None, None, lambda name: {})
    exact = {name: value.double() for name, value in case.tensors.items()}
    theirs, truth, ours = call(oracle, case.tensors), call(oracle, exact), call(candidate, case.tensors, track=True)
    return judge(OPERATION, case, theirs, truth, ours, ask, "none==0")[0], len(asked)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_the_same_formula_in_another_order_matches_with_both_errors_recorded(dtype):
    def other(x, y):
        return {"sum": (x * (x * y)).flip(0).sum(), "each": y * x}

    finding, _ = found(other, case(dtype))
    assert finding.verdict == "match"
    assert 0 <= finding.error <= 1
    assert 0 <= finding.gradient_error <= 1


def scaled_gradient(x: Tensor, factor: float) -> Tensor:
    """x with its gradient scaled."""
    return x * factor + (x * (1 - factor)).detach()


@pytest.mark.parametrize(
    ("fault", "output"),
    [
        (lambda x, y: {**formula(x, y), "sum": (x * x * y).sum() * (1 + 1e-4)}, "sum"),
        (lambda x, y: {**formula(x, y), "each": (x * y).roll(1)}, "each"),
        (lambda x, y: formula(scaled_gradient(x, 1.001), y), "gradient of x"),
        (lambda x, y: {name: value.detach() for name, value in formula(x, y).items()}, "structure"),
        (lambda x, y: {"sum": formula(x, y)["sum"], "each": (x * y).detach()}, "gradient of x"),
    ],
)
def test_a_fault_falls_and_is_named(fault, output):
    finding, _ = found(fault, case())
    assert (finding.verdict, finding.output) == ("mismatch", output)


def test_a_constant_that_should_carry_gradient_is_said_to_have_none():
    finding, _ = found(lambda x, y: {name: value.detach() for name, value in formula(x, y).items()}, case())
    assert "gradient of x is missing" in finding.detail


def test_cancellation_is_judged_by_the_sensitivity_of_the_truth():
    """Nearly all of the sum cancels: one float32 order of it is as good as another, and neither is close in ulps."""
    half = torch.randn(20, generator=torch.Generator().manual_seed(3)) * 1e4
    big = torch.cat((half, -half + torch.linspace(0, 1e-1, 20)))

    def cancels(x, y):
        return {"sum": x[::2].sum() + x[1::2].sum(), "each": x * y}

    def other(x, y):
        return {"sum": sum(x.unbind()), "each": x * y}

    finding, asked = found(other, case(x=big), oracle=cancels)
    assert finding.verdict == "match"
    assert asked > 0


def test_an_oracle_far_from_its_own_float64_run_excuses_nothing():
    """A constant offset in float32 only: equal bits are parity, but nearly the same is not passed on its word."""

    def offset(x, y):
        wrong = 0 if x.dtype == torch.float64 else 1e-2
        return {"sum": (x * x * y).sum() + wrong, "each": x * y}

    def nearly(x, y):
        return {"sum": (x * x * y).sum() + 1.1e-2, "each": x * y}

    assert found(offset, case(), oracle=offset)[0].verdict == "match"
    finding, _ = found(nearly, case(), oracle=offset)
    assert (finding.verdict, finding.output) == ("mismatch", "sum")
    assert found(formula, case(), oracle=offset)[0].verdict == "match"


def test_non_finite_numbers_must_agree_and_are_left_to_the_list_where_only_upstream_has_them():
    given = case(x=torch.tensor([1.0, 0.0, 2.0]))

    def upstream(x, y):
        return {"sum": (x * x * y).sum(), "each": x / x * y}

    def finite(x, y):
        return {"sum": (x * x * y).sum(), "each": torch.where(x == 0, torch.zeros_like(y), x / x * y)}

    assert found(upstream, given, oracle=upstream)[0].verdict == "match"
    finding, _ = found(lambda x, y: {**finite(x.nan_to_num(), y)}, given, oracle=upstream)
    assert (finding.verdict, finding.output) == ("mismatch", NON_FINITE)
    finding, _ = found(upstream, given, oracle=lambda x, y: {**formula(x, y), "each": (x * 0 + 1) * y})
    assert finding.output in {"each", "gradient of x"}


def test_an_element_beside_a_non_finite_one_is_still_judged():
    given = case(x=torch.tensor([1.0, 0.0, 2.0]))

    def upstream(x, y):
        return {"sum": (x * x * y).sum(), "each": x / x * y}

    def wrong_beside(x, y):
        return {"sum": (x * x * y).sum(), "each": torch.where(x == 2, 1.1 * y, x / x * y)}

    finding, _ = found(wrong_beside, given, oracle=upstream)
    assert (finding.verdict, finding.output) == ("mismatch", "each")


def test_without_a_float64_run_the_oracle_must_be_declared_so():
    def narrow(x, y):
        if x.dtype == torch.float64:
            raise RuntimeError("expected Float but found Double")
        return formula(x, y)

    finding, _ = found(formula, case(), oracle=narrow)
    assert (finding.verdict, finding.output) == ("mismatch", "truth")
    assert "expected Float" in finding.detail


def test_gradients_that_do_not_exist_anywhere_count_as_zero():
    given = case()
    tensors = {name: value.clone() for name, value in given.tensors.items()}
    result = execute(lambda t: {"sum": t["y"].sum(), "each": t["y"] * 2}, tensors, track=True, gradients=("x",))
    assert isinstance(result, Result)
    assert "gradient of x" not in result.outputs
    constant = found(
        lambda x, y: {"sum": y.sum(), "each": 2 * y}, given, oracle=lambda x, y: {"sum": y.sum(), "each": y * 2}
    )
    assert constant[0].verdict == "match"
    assert constant[0].gradient_error == 0
