"""Terms of the set criterion against set_prediction.md, A4, A5, A6 and A8."""

import pytest
import torch
from torch import nan
from torch.nn import functional

from cases.set_prediction import example, example_pairs
from cleanroom.losses import set_terms
from cleanroom.losses.set_terms import (
    IGNORED,
    Pairs,
    box_terms,
    cardinality_term,
    class_error,
    class_term,
    class_weights,
    join_pairs,
    target_classes,
)

INF = float("inf")


def given_pairs(total=4):
    pairs, counts = example_pairs()
    indices = list(zip(pairs["queries"].split(counts), pairs["targets"].split(counts), strict=True))
    return join_pairs(indices, [2, 1], total, torch.device("cpu"))


def no_pairs(total=4):
    nothing = torch.empty(0, dtype=torch.int64)
    return Pairs(nothing, nothing, total)


def class_loss(logits, labels, pairs, eos_coef=0.1, **settings):
    classes = target_classes(logits, labels, pairs, settings.get("ignore_mask"))
    return class_term(logits, classes, class_weights(logits.shape[2] - 1, eos_coef), eos_coef=eos_coef, **settings)


# ------------------------------------------------------------------------------------------------------- pairs


def test_pairs_are_placed_in_the_batch():
    pairs = given_pairs()
    assert pairs.rows.tolist() == [2, 3, 6]
    assert pairs.targets.tolist() == [0, 1, 2]
    assert pairs.images.tolist() == [0, 0, 1]


def test_pairs_count_from_the_end_as_indices_of_pytorch_do():
    indices = [(torch.tensor([-1, 0]), torch.tensor([0, -1])), ([1], [-1])]
    pairs = join_pairs(indices, [2, 1], 4, torch.device("cpu"))
    assert pairs.rows.tolist() == [3, 0, 5]
    assert pairs.targets.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("queries", "targets", "name"), [([4], [0], "queries"), ([0], [2], "targets"), ([-5], [0], "q")]
)
def test_pairs_out_of_range_are_named(queries, targets, name):
    """Target 2 of image 0 exists in the batch, in image 1."""
    with pytest.raises(IndexError, match=name):
        join_pairs([(queries, targets), ([0], [0])], [2, 1], 4, torch.device("cpu"))


def test_pairs_of_another_number_of_images():
    with pytest.raises(ValueError, match="indices are of 1 images"):
        join_pairs([([0], [0])], [1, 1], 4, torch.device("cpu"))


# -------------------------------------------------------------------------------------------------- class loss


def test_class_loss_of_the_worked_example():
    tensors, _ = example()
    logits = tensors["logits"].requires_grad_()
    loss = class_loss(logits, tensors["labels"], given_pairs())
    assert loss.item() == pytest.approx(1.5455137, abs=1e-6)
    assert torch.autograd.grad(loss, logits)[0].norm().item() == pytest.approx(0.4818837, abs=1e-6)


def test_class_loss_without_pairs_does_not_know_the_weight_of_no_object():
    tensors, _ = example()
    for eos_coef in (0.1, 0.7):
        loss = class_loss(tensors["logits"], tensors["labels"], no_pairs(), eos_coef)
        assert loss.item() == pytest.approx(2.032586, abs=1e-6)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_class_loss_without_any_weight_is_zero(reduction):
    """A4: 0/0 upstream."""
    logits = example()[0]["logits"].requires_grad_()
    loss = class_loss(logits, torch.empty(0, dtype=torch.int64), no_pairs(), 0.0, reduction=reduction).sum()
    assert loss.item() == 0
    assert torch.autograd.grad(loss, logits)[0].abs().max() == 0


def test_class_loss_is_that_of_the_formula():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 7, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    classes = torch.randint(0, 5, (3, 7), generator=generator)
    weights = torch.tensor([1, 1, 1, 1, 0.1]).double()
    expected = (weights[classes] * -logits.log_softmax(-1).gather(-1, classes[..., None])[..., 0]).sum()
    expected = expected / weights[classes].sum()
    loss = class_term(logits, classes, weights.float(), eos_coef=0.1)
    torch.testing.assert_close(loss, expected, rtol=1e-8, atol=0)
    assert torch.autograd.gradcheck(lambda some: class_term(some, classes, weights.float(), eos_coef=0.1), logits)


def test_large_logits_are_the_same_on_their_own_way(monkeypatch):
    """Confident, hopeless and ordinary queries, and one label that takes no part."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 50, 7, generator=generator) * torch.logspace(-1, 2, 50)[:, None]
    classes = logits.argmax(-1)
    classes[:, ::7] = 6
    classes[:, ::5] = torch.randint(0, 7, (2, 10), generator=generator)
    classes[0, 3] = IGNORED
    found = []
    for least in (0, 1 << 30):
        monkeypatch.setattr(set_terms, "_LARGE", least)
        given = logits.clone().requires_grad_()
        loss = class_term(given, classes, class_weights(6, 0.1), eos_coef=0.1)
        found.append((loss.detach(), torch.autograd.grad(loss * 3, given)[0]))
    torch.testing.assert_close(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-5, atol=1e-8)
    assert found[0][1][0, 3].abs().max() == 0


def test_a_confident_query_keeps_the_digits_of_its_gradient(monkeypatch):
    monkeypatch.setattr(set_terms, "_LARGE", 0)
    logits = torch.tensor([[[12.0, 0, 0]]], requires_grad=True)
    loss = class_term(logits, torch.tensor([[0]]), class_weights(2, 0.1), eos_coef=0.1)
    (gradient,) = torch.autograd.grad(loss, logits)
    exact = 1 - logits.detach().double().softmax(-1)[0, 0, 0]
    assert gradient[0, 0, 0].item() == pytest.approx(-exact.item(), rel=1e-6)


def test_labels_of_no_object_weigh_as_such_and_ignored_ones_nothing():
    tensors, _ = example()
    logits = tensors["logits"]
    assert class_loss(logits, torch.tensor([0, 3, 1]), given_pairs()).item() == pytest.approx(1.4990, abs=1e-4)
    ignored = class_loss(logits, torch.tensor([0, IGNORED, 1]), given_pairs())
    assert ignored.item() == pytest.approx(1.5465, abs=1e-4)


@pytest.mark.parametrize("label", [4, -1, 100])
def test_labels_out_of_range_are_named(label):
    with pytest.raises(IndexError, match=r"labels must be in \[0, 3\]"):
        class_loss(example()[0]["logits"], torch.tensor([0, label, 1]), given_pairs())


def test_float_labels_are_named():
    with pytest.raises(TypeError, match="labels must be int64"):
        class_loss(example()[0]["logits"], torch.tensor([0.0, 1, 1]), given_pairs())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_class_loss_keeps_the_dtype_of_the_logits(dtype):
    tensors, _ = example()
    logits = tensors["logits"].to(dtype).requires_grad_()
    loss = class_loss(logits, tensors["labels"], given_pairs())
    assert loss.dtype == dtype
    assert torch.autograd.grad(loss, logits)[0].dtype == dtype
    assert loss.item() == pytest.approx(1.5455137, rel=1e-2)


def test_class_loss_of_halves_is_float32_under_autocast():
    tensors, _ = example()
    with torch.autocast("cpu", torch.bfloat16):
        assert class_loss(tensors["logits"].bfloat16(), tensors["labels"], given_pairs()).dtype == torch.float32


def test_class_loss_by_image_sums_to_the_loss():
    tensors, _ = example()
    whole = class_loss(tensors["logits"], tensors["labels"], given_pairs())
    shares = class_loss(tensors["logits"], tensors["labels"], given_pairs(), reduction="none")
    assert shares.shape == (2,)
    torch.testing.assert_close(shares.sum(), whole)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_masked_queries_take_no_part_in_the_class_loss(reduction):
    tensors, _ = example()
    logits, labels = tensors["logits"].requires_grad_(), tensors["labels"]
    mask = torch.tensor([[True, False, True, False], [False] * 4])
    with torch.no_grad():
        logits[0, 0] = nan
    loss = class_loss(logits, labels, given_pairs(), ignore_mask=mask, reduction=reduction).sum()
    # Left: query 1 of image 0 as background, query 3 with class 2, and all of image 1.
    kept = logits.flatten(0, 1)[[1, 3, 4, 5, 6, 7]]
    expected = functional.cross_entropy(kept, torch.tensor([3, 2, 3, 3, 1, 3]), class_weights(3, 0.1))
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient[mask].abs().max() == 0
    assert gradient[~mask].abs().min() > 0


# ------------------------------------------------------------------------------------------------- cardinality


def counted(logits, sizes, **settings):
    return cardinality_term(logits, torch.tensor(sizes), **settings)


def test_cardinality_of_the_worked_example():
    logits = example()[0]["logits"]
    assert counted(logits, [2, 1]).item() == 1.5
    assert counted(logits, [0, 0]).item() == 3.0
    assert counted(logits.double(), [2, 1]).dtype == torch.float32


@pytest.mark.parametrize(
    ("rows", "objects"),
    [
        ([[0, 0, 0.0]], 1),  # equal logits go to the lower class
        ([[0, 0, 1.0]], 0),
        ([[nan, 0, 1.0]], 1),
        ([[0, 0, nan]], 0),
        ([[nan, 0, nan]], 1),
        ([[INF, 0, INF]], 1),
        ([[-INF, -INF, -INF]], 1),
        ([[0, 1, 1.0], [0, 1, 2.0], [3, 1, 2.0]], 2),
    ],
)
def test_cardinality_counts_what_argmax_answers(rows, objects):
    logits = torch.tensor([rows])
    assert int((logits.argmax(-1) != 2).sum()) == objects
    assert counted(logits, [0]).item() == objects


def test_cardinality_by_image_sums_to_the_mean():
    logits, counts = torch.tensor([[[2.0, 1], [2, 1]], [[1, 2], [1, 2]], [[2, 1], [1, 2]]]), torch.tensor([0, 5, 1])
    found = cardinality_term(logits, counts, reduction="none")
    assert found.tolist() == pytest.approx([2 / 3, 5 / 3, 0])
    assert found.sum().item() == pytest.approx(cardinality_term(logits, counts).item())


def test_cardinality_with_no_class_and_no_query():
    assert counted(torch.zeros(1, 3, 1), [2]).item() == 2
    assert counted(torch.zeros(1, 0, 4), [2]).item() == 2


# -------------------------------------------------------------------------------------------------- box losses


def test_box_losses_of_the_worked_example():
    tensors, _ = example()
    boxes = tensors["pred_boxes"].requires_grad_()
    losses = box_terms(boxes, tensors["boxes"], given_pairs(), 3)
    for loss, value, norm in zip(losses, (0.2469046, 0.6592982), (1.1547006, 2.6300815), strict=True):
        assert loss.item() == pytest.approx(value, abs=1e-6)
        (gradient,) = torch.autograd.grad(loss, boxes, retain_graph=True)
        assert gradient.norm().item() == pytest.approx(norm, abs=1e-5)
        assert gradient.flatten(0, 1)[[0, 1, 4, 5, 7]].abs().max() == 0


def test_box_losses_without_pairs_are_zero_with_zero_gradient():
    boxes = example()[0]["pred_boxes"].requires_grad_()
    losses = box_terms(boxes, torch.empty(0, 4), no_pairs(), 1)
    assert [loss.item() for loss in losses] == [0, 0]
    assert torch.autograd.grad(sum(losses), boxes)[0].abs().max() == 0


def test_a_query_of_two_pairs_gets_both_gradients():
    tensors, _ = example()
    boxes = tensors["pred_boxes"].requires_grad_()
    twice = Pairs(torch.tensor([2, 2]), torch.tensor([0, 1]), 4)
    (gradient,) = torch.autograd.grad(box_terms(boxes, tensors["boxes"], twice, 1).loss_bbox, boxes)
    expected = (boxes.detach()[0, 2] - tensors["boxes"][:2]).sign().sum(0)
    assert torch.equal(gradient[0, 2], expected)


def test_box_losses_by_image():
    tensors, _ = example()
    whole = box_terms(tensors["pred_boxes"], tensors["boxes"], given_pairs(), 3)
    shares = box_terms(tensors["pred_boxes"], tensors["boxes"], given_pairs(), 3, reduction="none")
    for loss, share in zip(whole, shares, strict=True):
        assert share.shape == (2,)
        torch.testing.assert_close(share.sum(), loss)


def test_masked_queries_take_no_part_in_the_box_losses():
    tensors, _ = example()
    boxes = tensors["pred_boxes"].clone()
    mask = torch.zeros(2, 4, dtype=torch.bool)
    mask[0, 2] = True
    boxes[0, 2, 2] = INF
    boxes.requires_grad_()
    losses = box_terms(boxes, tensors["boxes"], given_pairs(), 2, ignore_mask=mask)
    rest = Pairs(torch.tensor([3, 6]), torch.tensor([1, 2]), 4)
    for loss, expected in zip(losses, box_terms(boxes, tensors["boxes"], rest, 2), strict=True):
        torch.testing.assert_close(loss, expected)
    assert torch.autograd.grad(sum(losses), boxes)[0][0, 2].abs().max() == 0


def test_box_losses_dtypes():
    tensors, _ = example()
    half, boxes = tensors["pred_boxes"].half(), tensors["boxes"]
    assert [loss.dtype for loss in box_terms(half, boxes.half(), given_pairs(), 3)] == [torch.float16, torch.float32]
    assert [loss.dtype for loss in box_terms(half, boxes, given_pairs(), 3)] == [torch.float32, torch.float32]
    with torch.autocast("cpu", torch.bfloat16):
        assert box_terms(half, boxes.half(), given_pairs(), 3).loss_bbox.dtype == torch.float32


def test_class_error_of_the_worked_example():
    tensors, _ = example()
    assert class_error(tensors["logits"], tensors["labels"], given_pairs()).item() == pytest.approx(66.666672, abs=1e-4)
    assert class_error(tensors["logits"], tensors["labels"], no_pairs()).item() == 100
    # Of equal logits the first is the largest.
    assert class_error(torch.zeros(2, 4, 3), torch.tensor([0, 0, 1]), given_pairs()).item() == pytest.approx(100 / 3)
