"""The distribution focal loss against the worked example and the table of yolo_losses.md, section 2.3."""

import math

import pytest
import torch

from cases.patterns import pattern
from cleanroom.losses.dfl import DFLoss, distribution_focal_loss

TARGET = torch.tensor([[0, 0.25, 1, 4.5], [4.99, 5, 7, -1]])


def logits():
    return pattern((8, 6), 1.5, 0.8, 0.2)


def by_definition(pred_dist, target):
    """-[(1 - f) log softmax_l + f log softmax_(l+1)], averaged over the sides, in float64."""
    bins = pred_dist.shape[-1]
    log_p = pred_dist.double().log_softmax(-1).view(*target.shape, bins)
    t = target.double().clamp(0, bins - 1.01)
    low = t.floor().long()
    one, other = (log_p.gather(-1, index.unsqueeze(-1)).squeeze(-1) for index in (low, low + 1))
    return -((1 - (t - low)) * one + (t - low) * other).mean(-1)


def test_worked_example():
    pred_dist = logits().requires_grad_()
    loss = DFLoss(6)(pred_dist, TARGET)
    assert loss.shape == (2, 1)
    assert loss.flatten().tolist() == pytest.approx([3.044196, 1.954426], abs=1e-6)
    loss.sum().backward()
    assert pred_dist.grad.norm().item() == pytest.approx(0.653850, abs=1e-6)


def test_the_target_is_not_clamped_in_place():
    target = TARGET.clone()
    DFLoss(6)(logits(), target)
    assert torch.equal(target, TARGET)


def test_no_gradient_reaches_the_target():
    target = TARGET.clone().requires_grad_()
    distribution_focal_loss(logits().requires_grad_(), target).sum().backward()
    assert target.grad is None


@pytest.mark.parametrize("bins", [2, 3, 16])
def test_gradient(bins):
    draw = torch.Generator().manual_seed(bins)
    pred_dist = torch.randn(3, 4, bins, dtype=torch.float64, generator=draw).requires_grad_()
    target = torch.rand(3, 4, dtype=torch.float64, generator=draw) * (bins - 1)
    assert torch.autograd.gradcheck(lambda x: distribution_focal_loss(x, target), pred_dist)


def test_every_layout_of_the_rows():
    flat = distribution_focal_loss(logits(), TARGET)
    assert torch.equal(distribution_focal_loss(logits().view(2, 4, 6), TARGET), flat)
    assert distribution_focal_loss(logits(), TARGET.view(8, 1)).shape == (8,)
    assert distribution_focal_loss(logits(), TARGET.flatten()).item() == pytest.approx(flat.mean().item(), rel=1e-6)


def test_nothing():
    pred_dist = logits()[:0].requires_grad_()
    loss = DFLoss(6)(pred_dist, TARGET[:0])
    assert loss.shape == (0, 1)
    loss.sum().backward()
    assert pred_dist.grad.shape == (0, 6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wide", [torch.float32, None])
def test_half(dtype, wide):
    pred_dist, target = logits().to(dtype), TARGET.to(wide or dtype)
    loss = DFLoss(6)(pred_dist.requires_grad_(), target)
    assert loss.dtype == (wide or dtype)
    expected = by_definition(pred_dist.detach(), target)
    # bfloat16 included, whose bound upstream rounds to the last bin.
    assert torch.allclose(loss.double().squeeze(-1), expected, rtol=torch.finfo(loss.dtype).eps)
    loss.sum().backward()
    assert pred_dist.grad.dtype == dtype


@pytest.mark.parametrize("place", [0.9999999, 1e-7, 14.99, 20.0, 3.0])
def test_small_weights_keep_their_digits(place):
    draw = torch.Generator().manual_seed(1)
    pred_dist = torch.randn(4, 16, generator=draw).requires_grad_()
    target = torch.full((1, 4), place)
    (gradient,) = torch.autograd.grad(distribution_focal_loss(pred_dist, target), pred_dist)
    exact = pred_dist.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(by_definition(exact, target), exact)
    assert torch.allclose(gradient.double(), expected, rtol=2e-6, atol=0)


def test_infinite_and_extreme():
    def loss(bin_, value, place=1.0):
        pred_dist = pattern((4, 6), 1, 0.8, 0.2)
        pred_dist[0, bin_] = value
        pred_dist.requires_grad_()
        found = distribution_focal_loss(pred_dist, torch.full((1, 4), place))
        return found.item(), torch.autograd.grad(found, pred_dist)[0].isnan().sum().item()

    assert loss(0, math.inf)[1] == 6
    assert math.isnan(loss(0, math.nan)[0])
    assert loss(0, -math.inf) == (pytest.approx(2.029635, abs=1e-6), 0)  # a bin that is not used
    assert loss(1, -math.inf) == (math.inf, 0)
    assert loss(3, 1e4) == (pytest.approx(2501.515, rel=1e-6), 0)


def test_infinite_targets_are_clamped():
    far = torch.tensor([[math.inf, -math.inf, 7.0, -1.0]])
    near = torch.tensor([[4.99, 0.0, 4.99, 0.0]])
    pred_dist = logits()[:4]
    assert distribution_focal_loss(pred_dist, far).item() == pytest.approx(
        distribution_focal_loss(pred_dist, near).item(), rel=1e-6
    )


@pytest.mark.parametrize(
    ("pred_dist", "target", "error", "message"),
    [
        (torch.zeros(7, 6), torch.zeros(2, 4), ValueError, "pred_dist"),
        (torch.zeros(8, 1), torch.zeros(2, 4), ValueError, "pred_dist"),
        (torch.zeros(8, 6), torch.full((2, 4), math.nan), ValueError, "target"),
        (torch.zeros(8, 6), torch.zeros(2, 4, dtype=torch.int64), TypeError, "target"),
        (torch.zeros(8, 6, dtype=torch.int64), torch.zeros(2, 4), TypeError, "pred_dist"),
        (torch.zeros(8, 6), torch.tensor(1.0), ValueError, "target"),
    ],
)
def test_errors_name_the_argument(pred_dist, target, error, message):
    with pytest.raises(error, match=message):
        distribution_focal_loss(pred_dist, target)


def test_the_class_knows_its_bins():
    with pytest.raises(ValueError, match="pred_dist must have 16 bins"):
        DFLoss()(logits(), TARGET)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled(backend):
    pred_dist = logits().requires_grad_()
    compiled = torch.compile(distribution_focal_loss, fullgraph=True, backend=backend)
    loss = compiled(pred_dist, TARGET)
    assert torch.equal(loss, distribution_focal_loss(pred_dist, TARGET))
    (gradient,) = torch.autograd.grad(loss.sum(), pred_dist)
    assert gradient.norm().item() == pytest.approx(0.653850, abs=1e-6)
    last = torch.full_like(TARGET, pred_dist.shape[-1] - 1)
    assert torch.equal(compiled(pred_dist, last), distribution_focal_loss(pred_dist, last))
