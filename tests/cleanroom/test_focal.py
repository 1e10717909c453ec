"""Focal and varifocal loss against the worked examples and tables of yolo_losses.md, sections 2.1 and 2.2."""

import math

import pytest
import torch
from torch.nn import functional

from cases.varifocal_loss import example
from cleanroom.losses import _blocks
from cleanroom.losses.focal import FocalLoss, VarifocalLoss, focal_loss, varifocal_loss


def given():
    """x, q, y of the examples; q is the varifocal loss's."""
    tensors = example()
    return tensors["pred_score"], tensors["gt_score"], tensors["label"]


def differentiated(function, *tensors):
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    loss = function(*leaves)
    return loss, torch.autograd.grad(loss, leaves)


def test_varifocal_worked_example():
    loss, gradients = differentiated(VarifocalLoss(), *given())
    assert loss.item() == pytest.approx(2.626276, abs=1e-6)
    assert [gradient.norm().item() for gradient in gradients] == pytest.approx([0.527255, 1.177635, 0.775847], abs=1e-6)


def test_varifocal_of_former_releases_is_a_plain_sum():
    assert varifocal_loss(*given(), vfl_reduction="sum").item() == pytest.approx(10.50511, abs=1e-5)
    flat = (tensor.flatten() for tensor in given())
    assert varifocal_loss(*flat, vfl_reduction="sum").item() == pytest.approx(10.50511, abs=1e-5)


@pytest.mark.parametrize(
    ("settings", "loss"),
    [
        ({}, 2.216421),
        ({"alpha": 0.0}, 3.823347),
        ({"alpha": -1.0}, 3.823347),
        ({"alpha": []}, 3.823347),
        ({"gamma": 0.0}, 3.409284),
        ({"gamma": 0.5}, 2.891854),
        ({"gamma": 1.0}, 2.512769),
        ({"alpha": [0.1, 0.5, 0.9]}, 1.851976),
        ({"alpha": [0.1, -0.5, 0.9]}, 2.298986),
        ({"alpha": [[0.1], [0.5], [0.9], [0.2]]}, 2.463222),
        ({"alpha": torch.tensor([0.1, 0.5, 0.9])}, 1.851976),
    ],
)
def test_focal_examples(settings, loss):
    x, _, y = given()
    assert FocalLoss(**settings)(x, y).item() == pytest.approx(loss, abs=2e-6)


def test_focal_gradients_of_the_worked_example():
    x, _, y = given()
    _, gradients = differentiated(FocalLoss(), x, y)
    assert [gradient.norm().item() for gradient in gradients] == pytest.approx([0.495804, 1.903262], abs=1e-6)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 1.5, 2.0])
@pytest.mark.parametrize("alpha", [0.25, 0.0, [0.1, -0.2, 0.3, 0.9]])
def test_focal_gradient(monkeypatch, gamma, alpha):
    monkeypatch.setattr(_blocks, "ELEMENTS", 10)  # several blocks, the last one shorter
    draw = torch.Generator().manual_seed(1)
    x, y = (torch.rand(2, 3, 4, dtype=torch.float64, generator=draw) for _ in range(2))
    leaves = [(4 * x - 2).requires_grad_(), y.requires_grad_()]
    assert torch.autograd.gradcheck(FocalLoss(gamma, alpha), leaves)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 3, 1), (3, 1)])
def test_varifocal_gradient(monkeypatch, gamma, shape):
    """Against autograd: in float64 too the cross entropy has float32 precision, which is no place for gradcheck."""
    monkeypatch.setattr(_blocks, "ELEMENTS", 10)
    draw = torch.Generator().manual_seed(2)
    x, q = (torch.randn(2, 3, 4, generator=draw) for _ in range(2))
    y = torch.rand(shape, generator=draw).round()

    def definition(x, q, y):
        weight = 0.75 * x.sigmoid() ** gamma * (1 - y) + q * y
        return (functional.binary_cross_entropy_with_logits(x, q, reduction="none") * weight).mean(1).sum()

    found = differentiated(VarifocalLoss(gamma), x, q.sigmoid(), y)
    expected = differentiated(definition, x, q.sigmoid(), y)
    assert found[0].item() == pytest.approx(expected[0].item(), rel=1e-6)
    for ours, theirs in zip(found[1], expected[1], strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-7)


def test_only_what_is_asked_for_has_a_gradient():
    x, q, y = given()
    q = q.clone().requires_grad_()
    varifocal_loss(x, q, y).backward()
    assert q.grad.norm().item() == pytest.approx(1.177635, abs=1e-6)
    label = y.clone().requires_grad_()
    focal_loss(x, label).backward()
    assert label.grad.norm().item() == pytest.approx(1.903262, abs=1e-6)
    with torch.no_grad():
        assert not focal_loss(x.clone().requires_grad_(), y).requires_grad


def test_integer_labels_and_a_second_backward_pass():
    x, q, y = given()
    x = x.clone().requires_grad_()
    loss = varifocal_loss(x, q, y.long())
    first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert first.norm().item() == pytest.approx(0.527255, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype):
    x, q, y = (tensor.to(dtype) for tensor in given())
    assert varifocal_loss(x, q, y).dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert varifocal_loss(x, q, y).item() == pytest.approx(2.626276, rel=1e-2)
    # Upstream writes into its targets' dtype.
    assert focal_loss(x, y).dtype == dtype
    assert focal_loss(x, y.float()).dtype == torch.float32
    assert focal_loss(x.float(), y).dtype == dtype
    assert focal_loss(x, y).item() == pytest.approx(2.216421, rel=1e-2)
    _, gradients = differentiated(FocalLoss(), x, y)
    assert [gradient.dtype for gradient in gradients] == [dtype, dtype]


def test_a_half_call_does_not_round_alpha_for_good():
    x, _, y = given()
    loss = FocalLoss(alpha=[0.1, 0.5, 0.9])
    before = loss(x, y)
    loss(x.bfloat16(), y.bfloat16())
    assert torch.equal(loss(x, y), before)


@pytest.mark.parametrize("function", [lambda x: varifocal_loss(x, x, x), lambda x: focal_loss(x, x)])
def test_sizes_of_0(function):
    assert math.isnan(function(torch.zeros(2, 0, 3)).item())
    for shape in ((0, 4, 3), (2, 4, 0), (2, 0, 0), (0, 0, 3)):
        leaf = torch.zeros(shape).requires_grad_()
        loss = function(leaf)
        assert loss.item() == 0
        assert torch.autograd.grad(loss, leaf)[0].shape == shape


@pytest.mark.parametrize(
    ("x", "q", "loss"),
    [
        (1e4, 0.0, 7500.0),
        (1e4, 1.0, 0.0),
        (-1e4, 1.0, 1e4),
        (-1e4, 0.0, 0.0),
        (math.inf, 0.0, math.inf),
        (math.inf, 1.0, math.nan),
        (-math.inf, 0.0, math.nan),
        (math.nan, 0.0, math.nan),
    ],
)
def test_varifocal_single_elements(x, q, loss):
    x, q, y = (torch.full((1, 1, 1), value) for value in (x, q, float(q > 0)))
    assert varifocal_loss(x, q, y).item() == pytest.approx(loss, nan_ok=True)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 1.5])
@pytest.mark.parametrize("size", [18.0, 30.0, 200.0, 1e4])
def test_what_is_wholly_right_has_a_finite_slope(gamma, size):
    """Upstream: NaN for gamma below 1, once 1 - p rounds to 0."""
    y = torch.tensor([[0.0, 1.0]])
    _, (by_x, by_y) = differentiated(FocalLoss(gamma), (2 * y - 1) * size, y)
    assert by_x.isfinite().all()
    assert by_y.isfinite().all()
    assert by_x.abs().max() < 1e-7
    negative = torch.full((1, 1), -size)
    _, gradients = differentiated(VarifocalLoss(gamma), negative, torch.zeros(1, 1), torch.zeros(1, 1))
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_small_losses_have_digits():
    x = torch.tensor([[12.0, -12.0]])
    y = torch.tensor([[1.0, 0.0]])
    wrong = 1 / (1 + math.exp(12))
    expected = math.log1p(math.exp(-12)) * wrong**1.5 * (0.25 + 0.75)
    assert focal_loss(x, y).item() == pytest.approx(expected, rel=2e-6)


def test_nan_stays_where_it_is():
    x, q, y = given()
    x[1, 2, 0] = math.nan
    for function in (lambda x: varifocal_loss(x, q, y), lambda x: focal_loss(x, y)):
        _, (gradient,) = differentiated(function, x)
        assert gradient.isnan().nonzero().tolist() == [[1, 2, 0]]


X = torch.zeros(2, 4, 3)


@pytest.mark.parametrize(
    ("function", "arguments", "error", "message"),
    [
        (varifocal_loss, {"pred_score": X[0, 0], "gt_score": X[0, 0], "label": X[0, 0]}, ValueError, "pred_score"),
        (varifocal_loss, {"pred_score": X.long(), "gt_score": X, "label": X}, TypeError, "pred_score"),
        (varifocal_loss, {"pred_score": X, "gt_score": X[:, :3], "label": X}, ValueError, "gt_score"),
        (varifocal_loss, {"pred_score": X, "gt_score": X, "label": X.bool()}, TypeError, "label"),
        (varifocal_loss, {"pred_score": X, "gt_score": X, "label": X[:, :3]}, ValueError, "label"),
        (
            varifocal_loss,
            {"pred_score": X, "gt_score": X, "label": X, "vfl_reduction": "none"},
            ValueError,
            "vfl_reduction",
        ),
        (focal_loss, {"pred": X[0, 0], "label": X[0, 0]}, ValueError, "pred"),
        (focal_loss, {"pred": X, "label": X[:1]}, ValueError, "label"),
        (focal_loss, {"pred": X, "label": X.long()}, TypeError, "label"),
        (focal_loss, {"pred": X, "label": X, "alpha": [0.1, 0.5]}, ValueError, "alpha"),
        (focal_loss, {"pred": X[..., :1], "label": X[..., :1], "alpha": [0.1, 0.5, 0.9]}, ValueError, "alpha"),
    ],
)
def test_errors_name_the_argument(function, arguments, error, message):
    with pytest.raises(error, match=message):
        function(**arguments)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("alpha", [0.25, [0.1, 0.5, 0.9]])
def test_compiled(backend, alpha):
    x, q, y = given()
    for loss, tensors in ((FocalLoss(alpha=alpha), (x, y)), (VarifocalLoss(), (x, q, y))):
        found = differentiated(torch.compile(loss, fullgraph=True, backend=backend), *tensors)
        expected = differentiated(loss, *tensors)
        assert found[0].item() == pytest.approx(expected[0].item(), rel=1e-6)
        for ours, theirs in zip(found[1], expected[1], strict=True):
            assert torch.allclose(ours, theirs, rtol=1e-5)
