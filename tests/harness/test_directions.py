"""A timed step: forward without a graph, or with the gradients of every leaf."""

import torch

from harness.directions import Step
from harness.execute import weights


def test_a_step_without_leaves_gives_the_raw_result_and_no_graph():
    parameter = torch.ones(3, requires_grad=True)
    step = Step(lambda: parameter * 2, lambda raw: {"out": raw}, [], track=False)
    assert not step().requires_grad
    assert torch.equal(step.outputs()["out"], torch.full((3,), 2.0))


def test_a_step_with_leaves_gives_their_gradients_under_the_weights_of_the_parity_check():
    leaf = torch.arange(3.0, requires_grad=True)
    step = Step(lambda: leaf**2, lambda raw: {"out": raw, "constant": raw.detach()}, [leaf])
    [gradient] = step()
    assert torch.equal(gradient, 2 * leaf.detach() * weights(leaf.detach()))
    assert leaf.grad is None


def test_weights_differ_and_are_exact_in_half_precision():
    value = weights(torch.zeros(11))
    assert len(value.unique()) == 11
    for dtype in (torch.float16, torch.bfloat16):
        assert torch.equal(weights(torch.zeros(11, dtype=dtype)).float(), value)
