"""The operator that matches all layers: equal to the matcher layer by layer, traceable, and rarely compiled."""

import pytest
import torch
from torch._subclasses import FakeTensorMode

from cleanroom.assign import _matching_checks
from cleanroom.assign._matching_checks import choose_solver
from cleanroom.assign._matching_op import matched_layers
from cleanroom.assign.hungarian import hungarian_match, match_layers
from cleanroom.assign.matching_cost import CostTerms

TERMS = {"detr": CostTerms("detr", 1, 5, 2), "rtdetr": CostTerms("rtdetr", 2, 5, 2)}
BOTH = pytest.mark.parametrize("variant", TERMS)


def batch(variant, sizes=(3, 0, 6), queries=5, layers=3):
    generator = torch.Generator().manual_seed(0)
    columns = 4 + (variant == "detr")
    logits = [torch.randn(len(sizes), queries, columns, generator=generator) for _ in range(layers)]
    boxes = [torch.rand(len(sizes), queries, 4, generator=generator) for _ in range(layers)]
    labels = torch.randint(0, 4, (sum(sizes),), generator=generator)
    return logits, boxes, labels, torch.rand(sum(sizes), 4, generator=generator), list(sizes)


@BOTH
def test_layers_are_matched_as_one_by_one(variant):
    logits, boxes, labels, truths, sizes = batch(variant)
    found = matched_layers(logits, boxes, labels, truths, sizes, terms=TERMS[variant])
    firsts = torch.tensor([0, 3, 3])
    for layer, (own_logits, own_boxes) in enumerate(zip(logits, boxes, strict=True)):
        settings = TERMS[variant]._asdict()
        alone = hungarian_match(own_logits, own_boxes, labels, truths, sizes, **settings)
        images, queries, targets = (part.view(3, -1)[layer] for part in found)
        assert torch.equal(queries, alone.queries)
        assert images.tolist() == [0, 0, 0, 2, 2, 2, 2, 2]
        offset = firsts[images] if variant == "rtdetr" else 0
        assert torch.equal(targets - firsts[images], alone.targets - offset)


@BOTH
def test_only_one_transfer_brings_all_costs_to_the_host(variant, monkeypatch):
    moved = []
    cpu = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: moved.append(tensor.shape) or cpu(tensor))
    match_layers(*batch(variant), terms=TERMS[variant])
    assert len(moved) == 1


@BOTH
def test_operator_is_well_formed(variant):
    logits, boxes, labels, truths, sizes = batch(variant)
    for tensor in (*logits, *boxes):
        tensor.requires_grad_()
    given = logits, boxes, labels, truths, sizes, *TERMS[variant], ""
    torch.library.opcheck(torch.ops.cleanroom.match_layers.default, given)


@BOTH
@pytest.mark.parametrize("sizes", [(0, 0), (2, 0)])
def test_empty_images(variant, sizes):
    found = matched_layers(*batch(variant, sizes, layers=2), terms=TERMS[variant])
    assert all(part.shape == (2 * sum(sizes),) and part.dtype == torch.int64 for part in found)


def test_no_layer_is_named():
    _, _, labels, truths, sizes = batch("detr")
    with pytest.raises(ValueError, match="logits holds no layer"):
        matched_layers([], [], labels, truths, sizes, terms=TERMS["detr"])


def test_errors_of_the_matcher_come_through():
    logits, boxes, labels, truths, sizes = batch("detr")
    boxes[1][0, 0, 2] = -1
    with pytest.raises(ValueError, match="pred_boxes hold an inverted box"):
        matched_layers(logits, boxes, labels, truths, sizes, terms=TERMS["detr"])


@BOTH
def test_fake_tensors_have_the_length_that_the_host_knows(variant):
    logits, boxes, labels, truths, sizes = batch(variant)
    with FakeTensorMode() as mode:
        fake = [[mode.from_tensor(tensor) for tensor in layers] for layers in (logits, boxes)]
        found = matched_layers(*fake, mode.from_tensor(labels), mode.from_tensor(truths), sizes, terms=TERMS[variant])
    assert all(part.shape == (3 * 8,) and part.dtype == torch.int64 for part in found)


def test_batches_of_other_sizes_are_not_compiled_again_and_again():
    compiled = []

    def backend(module, _):
        compiled.append(module)
        return module

    def total(logits, boxes, labels, truths, sizes):
        found = matched_layers(logits, boxes, labels, truths, sizes, terms=TERMS["detr"])
        return (found.queries + found.targets).sum()

    torch._dynamo.reset()
    function = torch.compile(total, fullgraph=True, backend=backend)
    for sizes in ((3, 2), (2, 4), (5, 1), (6, 0), (1, 7), (8, 9), (2, 2), (3, 3)):
        given = batch("detr", sizes)
        expected = total(*given)
        assert function(*given) == expected
    # Once with the numbers, once with symbols for sizes, once more for a symbol of G.
    assert len(compiled) <= 3


def test_choice_of_the_solver():
    with FakeTensorMode():
        for device, dtype, queries, expected in (
            ("cuda", torch.float16, 4096, "triton"),
            ("cuda", torch.float32, 4097, "scipy"),
            ("cuda", torch.float64, 300, "scipy"),
            ("cpu", torch.float32, 300, "scipy"),
        ):
            assert choose_solver("auto", queries, torch.empty(1, dtype=dtype, device=device)) == expected


def test_a_solver_that_is_asked_for(monkeypatch):
    """Kernels where they can run, after a look at the tensors: `choose_path` says so, or raises."""
    asked = []
    tensor = torch.empty(1)
    for able, expected in (("triton", "triton"), ("static", "scipy")):
        monkeypatch.setattr(_matching_checks, "choose_path", lambda *given, able=able: asked.append(given) or able)
        assert choose_solver("triton", 300, tensor) == expected
        assert choose_solver("scipy", 300, tensor) == "scipy"
    assert asked == [("triton", tensor)] * 2
