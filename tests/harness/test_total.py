"""Totals are judged under the decisions that were taken: a tiny loss whose assigner picks the largest number."""

from dataclasses import replace

import pytest
import torch

import harness.operations
from cases.case import Case
from harness.execute import execute
from harness.judge import judge
from harness.operation import Input, Operation, Output
from harness.total import Part, comparing
from harness.verdict import Finding, Inquiry


def judge_pick(evidence) -> Finding:
    x, ours = evidence.case.tensors["x"].double(), evidence.candidate["place"]
    if evidence.quantities({"x": x})["x"][ours] < x.max() - 1e-6:
        return Finding("mismatch", f"{int(ours)} is not the largest", "place")
    return Finding("tie", f"{int(ours)} is as large", "place")


PICK = Operation(
    name="pick",
    summary="",
    source="",
    inputs=(Input("x", "(n,)", "floating", ""),),
    settings=(),
    outputs=(Output("place", "()", "int64", "", decision=True),),
    upstreams={},
    candidates={},
    predictions=("x",),
    workloads=(),
    compare=judge_pick,
)
TOTAL = replace(
    PICK,
    name="picked",
    outputs=(Output("loss", "()", "floating", ""), *PICK.outputs),
    gradients=("x",),
    compare=comparing(Part("pick", ("place",), lambda inputs, settings, outputs, index: {"place": outputs["place"]})),
)


def upstream(x, place=None):
    """The loss weighs its element by its place, so that another legal choice gives another number."""
    if place is None:
        place = (x if x.dtype == torch.float64 else x.bfloat16()).argmax()
    return {"loss": x[place] ** 2 * (place + 1), "place": place}


@pytest.fixture
def found(monkeypatch):
    monkeypatch.setattr(harness.operations, "operation", lambda name: {"pick": PICK}[name])

    def find(candidate, values, dtype=torch.float32):
        case = Case("picked", {"x": torch.tensor(values, dtype=dtype)}, {}, "test", frozenset())

        def call(function, tensors, assignment=None, *, track=False):
            forced = {} if assignment is None else {"place": assignment["place"]}
            return execute(lambda given: function(**given, **forced), tensors, track=track, gradients=("x",))

        ask = Inquiry(
            evaluate=lambda tensors, assignment=None: call(upstream, tensors, assignment).outputs,
            quantities=lambda name, tensors, settings: tensors,
            assigner=lambda tensors: (tensors, {}, {"place": tensors["x"].argmax()}),
            era=lambda name: {},
        )
        exact = {"x": case.tensors["x"].double()}
        results = call(upstream, case.tensors), call(upstream, exact), call(candidate, case.tensors, track=True)
        return judge(TOTAL, case, *results, ask, "none==0")[0]

    return find


def last_of_the_largest(x):
    return upstream(x, len(x) - 1 - x.flip(0).argmax())


def test_equal_decisions_and_numbers_match(found):
    finding = found(upstream, [1.0, 3.0, 2.0])
    assert (finding.verdict, finding.decisions, finding.tied) == ("match", 1, 0)


def test_a_legal_other_decision_is_a_tie_though_its_number_differs(found):
    finding = found(last_of_the_largest, [1.0, 3.0, 3.0])
    assert (finding.verdict, finding.tied) == ("tie", 1)
    assert "as large" in finding.detail


def test_a_wrong_number_is_not_hidden_behind_a_legal_decision(found):
    def wrong(x):
        outputs = last_of_the_largest(x)
        return {**outputs, "loss": outputs["loss"] * 1.001}

    finding = found(wrong, [1.0, 3.0, 3.0])
    assert (finding.verdict, finding.output) == ("mismatch", "loss")


def test_a_wrong_gradient_is_not_hidden_either(found):
    def wrong(x):
        outputs = last_of_the_largest(x)
        return {**outputs, "loss": outputs["loss"] + (x.sum() - x.sum().detach())}

    finding = found(wrong, [1.0, 3.0, 3.0])
    assert (finding.verdict, finding.output) == ("mismatch", "gradient of x")


def test_an_illegal_decision_is_said_to_be_one(found):
    finding = found(lambda x: upstream(x, x.argmin()), [1.0, 3.0, 2.0])
    assert (finding.verdict, finding.output) == ("mismatch", "place")
    assert "inside: 0 is not the largest" in finding.detail


def test_the_truth_is_taken_under_the_decisions_at_hand_where_float64_decides_otherwise(found):
    """The oracle decides in bfloat16, where both are 3; without forcing, the truth would be another place's number."""

    def scaled(factor):
        def candidate(x):
            outputs = upstream(x)
            return {**outputs, "loss": outputs["loss"] * factor}

        return candidate

    assert found(scaled(1 + 2e-7), [3.0, 3.001, 1.0]).verdict == "match"
    finding = found(scaled(1 + 1e-4), [3.0, 3.001, 1.0])
    assert (finding.verdict, finding.output) == ("mismatch", "loss")
