"""The class term against the definition of yolo_losses.md, sections 0 and 3, in every layout, masked and weighted."""

import math

import pytest
import torch
from torch.nn import functional

from cases.patterns import pattern
from cleanroom.losses import _blocks
from cleanroom.losses.class_bce import class_bce, dense_class_bce

LABELS = torch.tensor([[0, 1, 2, 0, 1], [2, 2, 0, 1, 0]])
VALUES = torch.tensor([[0.5, 0, 1, 0, 0.25], [0, 0, 0, 0.9, 1.0]])


def scores():
    return pattern((2, 5, 3), 2, 0.9, 0.1)


def dense(labels, values, classes):
    return values.new_zeros(*labels.shape, classes).scatter_(2, labels.unsqueeze(2), values.unsqueeze(2))


def problem(seed, batch=3, anchors=40, classes=5, dtype=torch.float64):
    """Logits, labels (those of the background are no class), values and divisor."""
    draw = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(batch, anchors, classes, dtype=dtype, generator=draw) - 1
    labels = torch.randint(0, classes, (batch, anchors), generator=draw)
    foreground = torch.rand(batch, anchors, generator=draw) < 0.3
    values = torch.rand(batch, anchors, dtype=dtype, generator=draw) * foreground
    return logits, labels, values, values.sum()


def test_against_upstreams_numbers():
    logits = scores().requires_grad_()
    loss = class_bce(logits, LABELS, VALUES, torch.tensor(3.65))
    assert loss.item() == pytest.approx(8.040179, abs=2e-6)
    loss.backward()
    assert logits.grad.norm().item() == pytest.approx(0.879237, abs=1e-6)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_against_the_dense_definition(monkeypatch, transposed, reduction, weighted, masked):
    monkeypatch.setattr(_blocks, "ELEMENTS", 32)  # several blocks an image
    logits, labels, values, total = problem(1)
    logits = logits.mT.contiguous().mT if transposed else logits
    weights = torch.tensor([0.5, 1, 2, 0, 0.3]) if weighted else None
    mask = torch.rand(labels.shape, generator=torch.Generator().manual_seed(2)) < 0.2 if masked else None
    element = functional.binary_cross_entropy_with_logits(
        logits.requires_grad_(), dense(labels, values, 5), reduction="none"
    )
    element = element if weights is None else element * weights
    element = element if mask is None else element * ~mask.unsqueeze(2)
    expected = element.sum((1, 2)) / total
    expected = expected.sum() if reduction == "sum" else expected
    loss = class_bce(logits, labels, values, total, class_weights=weights, ignore_mask=mask, reduction=reduction)
    assert torch.allclose(loss, expected, rtol=1e-12)
    factor = torch.rand(loss.shape, dtype=loss.dtype, generator=torch.Generator().manual_seed(3))
    (gradient,) = torch.autograd.grad((loss * factor).sum(), logits)
    (wanted,) = torch.autograd.grad((expected * factor).sum(), logits)
    assert torch.allclose(gradient, wanted, rtol=1e-10, atol=1e-14)
    assert gradient.stride() == logits.stride()


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_images_add_up(reduction):
    logits, labels, values, total = problem(4)
    each = class_bce(logits, labels, values, total, reduction="none")
    assert each.shape == (3,)
    assert each.sum().item() == pytest.approx(class_bce(logits, labels, values, total).item(), rel=1e-12)
    image = class_bce(logits[1:2], labels[1:2], values[1:2], total, reduction=reduction)
    assert image.sum().item() == pytest.approx(each[1].item(), rel=1e-12)


def test_gradient():
    logits, labels, values, total = problem(5, batch=2, anchors=4, classes=3)
    assert torch.autograd.gradcheck(lambda x: class_bce(x, labels, values, total), logits.requires_grad_())
    assert torch.autograd.gradcheck(
        lambda x: dense_class_bce(x, dense(labels, values, 3), total, reduction="none"), logits
    )


def test_a_view_into_a_larger_tensor():
    logits, labels, values, total = problem(6)
    around = torch.full((3, 9, 40), 1e9, dtype=logits.dtype)
    around[:, 4:] = logits.mT
    view = around[:, 4:].mT.requires_grad_()
    expected = class_bce(logits, labels, values, total)
    assert torch.allclose(class_bce(view, labels, values, total), expected, rtol=1e-13)
    (gradient,) = torch.autograd.grad(class_bce(view, labels, values, total), view)
    (expected,) = torch.autograd.grad(class_bce(logits.requires_grad_(), labels, values, total), logits)
    assert torch.allclose(gradient, expected, rtol=1e-13)


def test_no_gradient_reaches_targets_and_nothing_is_changed():
    logits, labels, values, total = problem(7)
    given = [tensor.clone() for tensor in (logits, labels, values, total)]
    class_bce(logits.requires_grad_(), labels, values.requires_grad_(), total.requires_grad_()).backward()
    assert values.grad is None
    assert total.grad is not None  # a divisor is a divisor
    for tensor, before in zip((logits, labels, values, total), given, strict=True):
        assert torch.equal(tensor, before)


def test_labels_of_the_background_are_not_read():
    logits, labels, values, total = problem(8)
    wild = torch.where(values > 0, labels, 10**6)
    assert torch.equal(class_bce(logits, wild, values, total), class_bce(logits, labels, values, total))


@pytest.mark.parametrize(
    ("logit", "target", "loss", "slope"),
    [
        (1e4, 0.0, 1e4, 1.0),
        (1e4, 1.0, 0.0, 0.0),
        (-1e4, 1.0, 1e4, -1.0),
        (-1e4, 0.0, 0.0, 0.0),
        (math.inf, 0.0, math.inf, 1.0),
        (math.inf, 0.5, math.inf, 0.5),
        (math.inf, 1.0, math.nan, 0.0),
        (-math.inf, 0.0, 0.0, 0.0),  # upstream: NaN
        (-math.inf, 1.0, math.inf, -1.0),  # upstream: NaN
        (math.nan, 0.0, math.nan, math.nan),
        # What is left of a right answer has digits.
        (17.0, 1.0, math.log1p(math.exp(-17)), -1 / (1 + math.exp(17))),
        (-20.0, 0.0, math.log1p(math.exp(-20)), 1 / (1 + math.exp(20))),
    ],
)
def test_single_elements(logit, target, loss, slope):
    x = torch.full((1, 1, 1), logit).requires_grad_()
    found = class_bce(x, torch.zeros(1, 1, dtype=torch.int64), torch.full((1, 1), target))
    (gradient,) = torch.autograd.grad(found, x)
    assert found.item() == pytest.approx(loss, rel=1e-6, nan_ok=True)
    assert gradient.item() == pytest.approx(slope, rel=1e-6, nan_ok=True)


def test_what_a_softplus_leaves_out_has_digits_in_float64():
    x = torch.full((1, 1, 1), 25.0, dtype=torch.float64)
    found = class_bce(x, torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.float64))
    assert found.item() == 25 + math.log1p(math.exp(-25))


def test_a_nan_stays_where_it_is():
    logits = scores()
    logits[0, 3, 1] = math.nan
    (gradient,) = torch.autograd.grad(class_bce(logits.requires_grad_(), LABELS, VALUES), logits)
    assert gradient.isnan().nonzero().tolist() == [[0, 3, 1]]
    ignore = torch.zeros(2, 5, dtype=torch.bool)
    ignore[0, 3] = True
    loss = class_bce(logits, LABELS, VALUES, ignore_mask=ignore)
    assert loss.isfinite()
    assert torch.autograd.grad(loss, logits)[0].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3), (2, 5, 0), (1, 1, 1)])
def test_sizes_of_0_and_1(shape):
    logits = torch.zeros(shape).requires_grad_()
    labels, values = torch.zeros(shape[:2], dtype=torch.int64), torch.zeros(shape[:2])
    loss = class_bce(logits, labels, values)
    assert loss.item() == pytest.approx(logits.numel() * math.log(2))
    assert torch.autograd.grad(loss, logits)[0].shape == shape


def test_a_value_costs_nothing_where_there_are_no_classes():
    assert class_bce(torch.zeros(1, 2, 0), torch.zeros(1, 2, dtype=torch.int64), torch.full((1, 2), 0.5)).item() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_logits_are_summed_in_float32(dtype):
    logits = torch.full((1, 100, 80), 20.0, dtype=dtype).requires_grad_()
    labels, values = torch.zeros(1, 100, dtype=torch.int64), torch.zeros(1, 100)
    loss = class_bce(logits, labels, values, torch.tensor(1.0))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(160000)  # beyond float16
    assert class_bce(logits, labels, values, torch.tensor(16.0, dtype=dtype)).dtype == dtype
    assert torch.autograd.grad(loss, logits)[0].dtype == dtype


def test_one_in_many_is_not_lost():
    """A float32 sum over ten million logits that goes element by element would stop growing."""
    logits = torch.full((1, 131072, 40), -4.6)
    labels, values = torch.zeros(1, 131072, dtype=torch.int64), torch.zeros(1, 131072)
    expected = logits.numel() * math.log1p(math.exp(logits[0, 0, 0].double().item()))
    assert class_bce(logits, labels, values).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"labels": LABELS + 1}, IndexError, "labels"),
        ({"labels": LABELS - 1}, IndexError, "labels"),
        ({"labels": LABELS.float()}, TypeError, "labels"),
        ({"labels": LABELS[:, :4]}, ValueError, "labels"),
        ({"values": VALUES.long()}, TypeError, "values"),
        ({"values": VALUES[:1]}, ValueError, "values"),
        ({"scores": torch.zeros(2, 5)}, ValueError, "scores"),
        ({"scores": torch.zeros(2, 5, 3, dtype=torch.int64)}, TypeError, "scores"),
        ({"class_weights": torch.ones(4)}, ValueError, "class_weights"),
        ({"ignore_mask": torch.zeros(2, 5)}, TypeError, "ignore_mask"),
        ({"ignore_mask": torch.zeros(2, 4, dtype=torch.bool)}, ValueError, "ignore_mask"),
        ({"reduction": "mean"}, ValueError, "reduction"),
    ],
)
def test_errors_name_the_argument(changes, error, message):
    with pytest.raises(error, match=message):
        class_bce(**{"scores": scores(), "labels": LABELS, "values": VALUES, **changes})


def test_the_dense_form_is_the_compact_one():
    logits = scores().requires_grad_()
    compact, full = class_bce(logits, LABELS, VALUES, 3.65), dense_class_bce(logits, dense(LABELS, VALUES, 3), 3.65)
    assert full.item() == pytest.approx(compact.item(), rel=1e-6)
    gradients = [torch.autograd.grad(loss, logits)[0] for loss in (compact, full)]
    assert torch.allclose(*gradients, rtol=1e-5, atol=1e-8)
    with pytest.raises(ValueError, match="target_scores"):
        dense_class_bce(logits, VALUES)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled(backend, dtype):
    settings = {"class_weights": torch.tensor([0.5, 1, 2]), "ignore_mask": VALUES > 0.95, "reduction": "none"}
    compiled = torch.compile(lambda x: class_bce(x, LABELS, VALUES, **settings), fullgraph=True, backend=backend)
    logits = scores().to(dtype).requires_grad_()
    expected = class_bce(logits, LABELS, VALUES, **settings)
    assert torch.allclose(compiled(logits), expected, rtol=1e-5)
    gradients = [torch.autograd.grad(loss.sum(), logits)[0] for loss in (compiled(logits), expected)]
    assert torch.allclose(*gradients, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5)
