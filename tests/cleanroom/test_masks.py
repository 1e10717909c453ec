"""Mask losses of set prediction against set_prediction.md, A7, and against autograd of the formulas."""

import pytest
import torch
from torch import nan
from torch.nn import functional

from cases.set_prediction import example_masks, example_pairs, wave
from cleanroom.losses import masks as module
from cleanroom.losses.masks import _in_one, dice_loss, mask_terms, sigmoid_focal_loss
from cleanroom.losses.set_terms import Pairs, join_pairs

INF = float("inf")


def focal_formula(z, m, num_boxes, alpha=0.25, gamma=2.0):
    p = z.sigmoid()
    p_t = p * m + (1 - p) * (1 - m)
    loss = functional.binary_cross_entropy_with_logits(z, m, reduction="none") * (1 - p_t) ** gamma
    if alpha >= 0:
        loss = loss * (alpha * m + (1 - alpha) * (1 - m))
    return loss.mean(1).sum() / num_boxes


def dice_formula(z, m, num_boxes):
    p = z.sigmoid()
    return (1 - (2 * (p * m).sum(1) + 1) / (p.sum(1) + m.sum(1) + 1)).sum() / num_boxes


def given_pairs(total=4):
    pairs, counts = example_pairs()
    indices = list(zip(pairs["queries"].split(counts), pairs["targets"].split(counts), strict=True))
    return join_pairs(indices, [2, 1], total, torch.device("cpu"))


def given_masks():
    """The mask logits of A13, and each image's masks in their own size."""
    tensors, sizes = example_masks()
    parts = tensors["masks"].split([2, 1])
    return tensors["pred_masks"], [some[:, :height, :width] for some, (height, width) in zip(parts, sizes, strict=True)]


def terms_and_gradients(logits, *given, **settings):
    logits = logits.clone().requires_grad_()
    losses = mask_terms(logits, *given, **settings)
    return [(loss.detach(), *torch.autograd.grad(loss, logits, retain_graph=True)) for loss in losses]


def random_masks(generator, count, height, width):
    return torch.rand(count, height, width, generator=generator) > 0.5


# --------------------------------------------------------------------------------------------------- functions


def test_functions_of_the_worked_example():
    inputs = wave((3, 5), 0.7, 0.2, 2, 0).requires_grad_()
    targets = (wave((3, 5), 0.5, 0.1, 1, 0) > 0).float()
    for loss, value, norm in (
        (sigmoid_focal_loss(inputs, targets, 2), 0.4106206, 0.1415974),
        (dice_loss(inputs, targets, 2), 0.6590565, 0.0632384),
    ):
        assert loss.item() == pytest.approx(value, abs=1e-6)
        assert torch.autograd.grad(loss, inputs)[0].norm().item() == pytest.approx(norm, abs=1e-6)
    assert sigmoid_focal_loss(inputs, targets, 2, alpha=-1, gamma=1).item() == pytest.approx(0.9986320, abs=1e-6)


@pytest.mark.parametrize("pixels", [1, 2])
def test_masks_of_few_pixels(pixels):
    z = torch.tensor([[1.0, -2], [0.5, 3], [-1, 0]])[:, :pixels]
    m = (z > 0.7).float()
    assert sigmoid_focal_loss(z, m, 2).item() == pytest.approx(focal_formula(z, m, 2).item(), rel=1e-6)
    assert dice_loss(z, m, 2).item() == pytest.approx(dice_formula(z, m, 2).item(), rel=1e-6)


def test_without_alpha_where_both_losses_are_made_in_one():
    inputs = wave((3, 5), 0.7, 0.2, 2, 0)
    focal, _ = _in_one(inputs, (wave((3, 5), 0.5, 0.1, 1, 0) > 0).float(), alpha=-1, gamma=1)
    assert focal.sum().item() / 2 == pytest.approx(0.9986320, abs=1e-6)


def test_masks_without_pixels_cost_nothing():
    none = torch.zeros(2, 0)
    assert sigmoid_focal_loss(none, none, 2).item() == dice_loss(none, none, 2).item() == 0


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_functions_are_the_formulas(soft, dtype):
    generator = torch.Generator().manual_seed(0)
    inputs = (torch.randn(7, 50, generator=generator, dtype=torch.float64) * 4).to(dtype).requires_grad_()
    targets = torch.rand(7, 50, generator=generator).to(dtype)
    targets = targets if soft else targets.round()
    cases = [(sigmoid_focal_loss, focal_formula, s) for s in ((), (-1, 1.0), (0.4, 1.5), (0.25, 0.0))]
    for function, formula, settings in [*cases, (dice_loss, dice_formula, ())]:
        found, expected = function(inputs, targets, 3, *settings), formula(inputs, targets, 3, *settings)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(*(torch.autograd.grad(loss, inputs)[0] for loss in (found, expected)))


def test_functions_gradcheck():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(3, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = (torch.rand(3, 5, generator=generator) > 0.5).double()
    assert torch.autograd.gradcheck(lambda z: sigmoid_focal_loss(z, targets, 2, 0.3, 1.5), inputs)
    assert torch.autograd.gradcheck(lambda z: dice_loss(z, targets, 2), inputs)


def test_blocks_do_not_change_the_functions(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(9, 20, generator=generator, dtype=torch.float64, requires_grad=True)
    targets = (torch.rand(9, 20, generator=generator) > 0.5).double()
    found = []
    for pixels in (1 << 16, 30):
        monkeypatch.setattr(module, "_PIXELS", pixels)
        losses = sigmoid_focal_loss(inputs, targets, 2), dice_loss(inputs, targets, 2)
        found.append([*losses, *torch.autograd.grad(sum(losses), inputs)])
    for some, others in zip(*found, strict=True):
        torch.testing.assert_close(some, others)


def test_functions_average_over_the_second_dimension_alone():
    inputs = torch.linspace(-2, 2, 24).view(2, 3, 4)
    targets = (inputs.cos() > 0).float()
    expected = focal_formula(inputs, targets, 1.0)
    torch.testing.assert_close(sigmoid_focal_loss(inputs, targets, 1.0), expected)


def test_targets_promote_the_result():
    inputs, targets = torch.zeros(2, 3).half(), torch.ones(2, 3)
    assert sigmoid_focal_loss(inputs, targets, 1).dtype == torch.float32
    assert sigmoid_focal_loss(inputs, targets.half(), 1).dtype == torch.float16
    assert dice_loss(inputs, targets.bool(), 1).dtype == torch.float16


def test_functions_name_what_does_not_fit():
    with pytest.raises(ValueError, match=r"inputs \(2, 3\) and targets \(3, 2\)"):
        sigmoid_focal_loss(torch.zeros(2, 3), torch.zeros(3, 2), 1)
    with pytest.raises(ValueError, match="inputs"):
        dice_loss(torch.zeros(2), torch.zeros(2), 1)


# ------------------------------------------------------------------------------------------------ matched masks


@pytest.mark.parametrize("sparse", [True, False])
def test_masks_of_the_worked_example(sparse):
    logits, masks = given_masks()
    found = terms_and_gradients(logits, masks, given_pairs(), 3, sparse=sparse)
    for (loss, gradient), value, norm in zip(found, (0.1842167, 0.4825710), (0.0307302, 0.0183094), strict=True):
        assert loss.item() == pytest.approx(value, abs=1e-6)
        assert gradient.norm().item() == pytest.approx(norm, abs=1e-6)
        assert gradient.flatten(0, 1)[[0, 1, 4, 5, 7]].abs().max() == 0


def by_formula(logits, masks, pairs, normaliser):
    """A7 by autograd over padded masks."""
    size = [max(some.shape[side] for some in masks) for side in (1, 2)]
    padded = [functional.pad(some, (0, size[1] - some.shape[2], 0, size[0] - some.shape[1])) for some in masks]
    targets = torch.cat(padded).to(logits.dtype)[pairs.targets].flatten(1)
    logits = logits.clone().requires_grad_()
    matched = logits.flatten(0, 1)[pairs.rows]
    large = functional.interpolate(matched[:, None], size=size, mode="bilinear", align_corners=False).flatten(1)
    losses = focal_formula(large, targets, normaliser), dice_formula(large, targets, normaliser)
    return [(loss.detach(), *torch.autograd.grad(loss, logits, retain_graph=True)) for loss in losses]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [torch.bool, torch.uint8, torch.float32, "soft"])
@pytest.mark.parametrize("small", [(3, 5), (1, 1), (7, 9), (12, 4)])
@pytest.mark.parametrize("sparse", [True, False])
def test_matched_masks_are_the_formula(dtype, kind, small, sparse):
    """Logits of fewer, as many and more pixels than the masks, and 0; every way of computing: signs, numbers."""
    generator = torch.Generator().manual_seed(1)
    logits = (torch.randn(2, 4, *small, generator=generator, dtype=torch.float64) * 3).to(dtype)
    logits[1] = 0
    masks = [random_masks(generator, 2, 6, 9), random_masks(generator, 1, 7, 8)]
    if kind == "soft":
        masks = [some * torch.rand(some.shape, generator=generator) for some in masks]
    else:
        masks = [some.to(kind) for some in masks]
    found = terms_and_gradients(logits, masks, given_pairs(), 3, sparse=sparse)
    expected = by_formula(logits, masks, given_pairs(), 3)
    for (loss, gradient), (value, slope) in zip(found, expected, strict=True):
        torch.testing.assert_close(loss, value)
        torch.testing.assert_close(gradient, slope, rtol=1e-5 if dtype == torch.float32 else 1e-9, atol=1e-8)


@pytest.mark.parametrize("settings", [{"_PIXELS": 20}, {"_DENSE_SIDE": 0}, {"_DENSE_SIDE": 0, "_DENSE_SIDE_BACK": 0}])
def test_blocks_and_ways_to_resize_do_not_change_the_losses(monkeypatch, settings):
    logits, masks = given_masks()
    whole = terms_and_gradients(logits, masks, given_pairs(), 3)
    for name, value in settings.items():
        monkeypatch.setattr(module, name, value)
    for some, others in zip(terms_and_gradients(logits, masks, given_pairs(), 3), whole, strict=True):
        for ours, theirs in zip(some, others, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_memory_between_the_passes_is_small():
    """Kept are two tensors of the small size, not a dozen of the large one."""
    logits = torch.randn(1, 6, 4, 4).requires_grad_()
    pairs = Pairs(torch.arange(6), torch.arange(6), 6)
    kept = []

    def keep(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        mask_terms(logits, [torch.ones(6, 64, 64, dtype=torch.bool)], pairs, 6)
    assert max(kept) <= 2 * 6 * 4 * 4


def test_no_pairs_give_zero_with_zero_gradient():
    nothing = torch.empty(0, dtype=torch.int64)
    logits, masks = given_masks()
    for loss, gradient in terms_and_gradients(logits, [some[:0] for some in masks], Pairs(nothing, nothing, 4), 1):
        assert loss.item() == 0
        assert gradient.abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_matched_masks_keep_the_dtype_of_the_logits(dtype):
    logits, masks = given_masks()
    for loss, gradient in terms_and_gradients(logits.to(dtype), masks, given_pairs(), 3):
        assert loss.dtype == gradient.dtype == dtype


def test_autocast_does_not_reach_the_products_of_resizing():
    logits, masks = given_masks()
    plain = terms_and_gradients(logits, masks, given_pairs(), 3)
    with torch.autocast("cpu", torch.bfloat16):
        cast = terms_and_gradients(logits, masks, given_pairs(), 3)
    for some, others in zip(plain, cast, strict=True):
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(some, others, strict=True))


@pytest.mark.parametrize("value", [nan, INF, -INF])
def test_what_is_not_finite_stays_with_its_pair(value):
    """An infinite logit that is wrong costs infinity; the gradient of other pixels and pairs is not touched."""
    logits, masks = given_masks()
    poisoned = logits.clone()
    poisoned[0, 2, 0, 0] = value
    found = terms_and_gradients(poisoned, masks, given_pairs(), 3)
    clean = terms_and_gradients(logits, masks, given_pairs(), 3)
    expected = by_formula(poisoned, masks, given_pairs(), 3)
    for (loss, gradient), (_, other), (_, slope) in zip(found, clean, expected, strict=True):
        assert not loss.isfinite() or value in (INF, -INF)
        torch.testing.assert_close(gradient[0, 3], other[0, 3])
        torch.testing.assert_close(gradient[1], other[1])
        assert bool(gradient[slope.isfinite()].isfinite().all())


def test_masks_by_image():
    logits, masks = given_masks()
    whole = mask_terms(logits, masks, given_pairs(), 3)
    for loss, share in zip(whole, mask_terms(logits, masks, given_pairs(), 3, reduction="none"), strict=True):
        assert share.shape == (2,)
        torch.testing.assert_close(share.sum(), loss)


@pytest.mark.parametrize("sparse", [True, False])
def test_masked_queries_take_no_part_in_the_mask_losses(sparse):
    logits, masks = given_masks()
    mask = torch.zeros(2, 4, dtype=torch.bool)
    mask[0, 2] = True
    poisoned = logits.clone()
    poisoned[0, 2] = nan
    found = terms_and_gradients(poisoned, masks, given_pairs(), 2, ignore_mask=mask, sparse=sparse)
    rest = Pairs(torch.tensor([3, 6]), torch.tensor([1, 2]), 4)
    for (loss, gradient), (value, slope) in zip(found, terms_and_gradients(logits, masks, rest, 2), strict=True):
        torch.testing.assert_close(loss, value)
        torch.testing.assert_close(gradient, slope)


def test_shapes_name_the_argument():
    logits, masks = given_masks()
    with pytest.raises(ValueError, match="pred_masks must have shape"):
        mask_terms(logits[0], masks, given_pairs(), 1)
    with pytest.raises(ValueError, match="masks must be tensors"):
        mask_terms(logits, [masks[0][0]], given_pairs(), 1)
    with pytest.raises(ValueError, match="masks must be tensors"):
        mask_terms(logits, [], given_pairs(), 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_rest_of_a_sure_probability_keeps_its_digits(dtype):
    """In float64 a difference from 1 is enough, and is what upstream rounds."""
    z = torch.tensor([20.0], dtype=dtype)
    p = torch.sigmoid(z)
    expected = 1 - p if dtype == torch.float64 else torch.tensor([2.0611537e-9])
    torch.testing.assert_close(module._rest(z, p), expected, rtol=1e-6, atol=0)
