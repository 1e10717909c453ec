"""What a call does besides returning is found: changed inputs, aliases, gradients, global random state."""

import torch

from harness.execute import Failure, execute
from harness.watch import Watch, disagreement


def run(call):
    tensors = {"boxes": torch.rand(3, 4), "labels": torch.tensor([0, 1, 2])}
    return execute(call, tensors, track=True), tensors


def test_a_clean_call_has_no_side_effects():
    result, tensors = run(lambda t: {"out": t["boxes"].detach() * 2})
    assert result.error is None
    assert result.side_effects == ()
    assert torch.equal(result.outputs["out"], tensors["boxes"] * 2)


def test_a_changed_input_is_named():
    def call(tensors):
        tensors["labels"][0] = 7
        return {"out": torch.zeros(1)}

    assert run(call)[0].side_effects == ("input labels was changed",)


def test_a_change_that_equality_cannot_see_is_seen():
    def call(tensors):
        with torch.no_grad():
            tensors["boxes"].copysign_(-torch.ones(3, 4))
        return {"out": torch.zeros(1)}

    tensors = {"boxes": torch.zeros(3, 4)}
    assert execute(call, tensors, track=True).side_effects == ("input boxes was changed",)


def test_an_output_that_is_an_input_is_named():
    effects = run(lambda t: {"out": t["boxes"].detach()[1:]})[0].side_effects
    assert effects == ("output out shares memory with input boxes",)


def test_a_leaked_gradient_is_named():
    assert run(lambda t: {"out": t["boxes"] * 2})[0].side_effects == ("output out carries gradient",)


def test_a_changed_random_state_is_named():
    assert run(lambda t: {"out": torch.rand(2)})[0].side_effects == ("the global random state of PyTorch was changed",)


def test_an_exception_is_kept_by_type_and_message():
    def call(tensors):
        raise ValueError("boxes has\n  no rows")

    assert run(call)[0].error.text == "ValueError: boxes has no rows"


def test_memory_that_ran_out_is_told_apart():
    assert Failure("RuntimeError", "DefaultCPUAllocator: can't allocate memory").out_of_memory
    assert Failure("OutOfMemoryError", "CUDA out of memory.").out_of_memory
    assert not Failure("RuntimeError", "selected index k out of range").out_of_memory


def test_what_a_call_writes_after_it_returned_is_named():
    result = run(
        lambda t: {"nan": torch.tensor(torch.nan), "one": torch.zeros(3, 1).expand(3, 1).T, "late": torch.zeros(2)}
    )[0]
    held = Watch().hold(result)
    assert held.settled().side_effects == ()
    result.outputs["late"][1] = 1
    assert held.settled().side_effects == ("output late was still written after the call had returned",)


def test_memory_that_is_given_out_twice_is_named():
    buffer, watch = torch.zeros(4), Watch()
    assert watch.hold(run(lambda t: {"first": buffer[:2]})[0]).result.side_effects == ()
    again = watch.hold(run(lambda t: {"second": buffer[2:]})[0]).result
    assert again.side_effects == ("output second lies in the memory of the last call's first",)
    assert watch.hold(run(lambda t: {"third": torch.zeros(4)})[0]).result.side_effects == ()


def test_a_timed_call_must_give_what_the_judged_one_gives():
    judged = {"loss": torch.tensor([1.0, 2]), "index": torch.arange(200)}
    assert disagreement({name: value.clone() for name, value in judged.items()}, judged) == ""
    assert disagreement({**judged, "loss": torch.tensor([1.0, 2.001])}, judged) == ""
    assert "loss differs in 1 of 2" in disagreement({**judged, "loss": torch.tensor([1.0, 2.5])}, judged)
    assert "index differs in 200" in disagreement({**judged, "index": torch.arange(200) + 1}, judged)
    assert "index is missing" in disagreement({"loss": judged["loss"]}, judged)
    assert "shape" in disagreement({**judged, "loss": torch.zeros(3)}, judged)
