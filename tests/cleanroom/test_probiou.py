"""Similarity of rotated boxes against the numbers of boxes.md, sections 11 and 12, and where upstream has none."""

import math

import numpy as np
import pytest
import torch

from cleanroom.boxes import batch_probiou, probiou
from cleanroom.rotated_overlap import GaussianRule, gaussian_iou, gaussian_terms, ordered_form, stable_form

P, Q = (10, 10, 8, 4, 0.3), (11, 12, 6, 5, 0.7)
nan, inf = math.nan, math.inf
HALVES = (torch.float16, torch.bfloat16)


def boxes(*rows, dtype=torch.float32):
    return torch.tensor(rows, dtype=torch.float64).to(dtype).requires_grad_()


def slopes(one, two, **settings):
    value = probiou(one, two, **settings)
    return value, *torch.autograd.grad(value.sum(), (one, two))


def random_boxes(count, dtype=torch.float64, seed=0):
    draw = torch.Generator().manual_seed(seed)
    place, sides, angle = (torch.rand(count, size, generator=draw, dtype=torch.float64) for size in (2, 2, 1))
    one = torch.cat((place * 20, sides * 10 + 2, angle * 4 - 1), 1)
    other = one + torch.randn(count, 5, generator=draw, dtype=torch.float64) * torch.tensor([1, 1, 0.5, 0.5, 0.2])
    return one.to(dtype), other.to(dtype)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({}, 0.50155610), ({"CIoU": True}, 0.50065541), ({"floor": 0.01}, 0.50263524), ({"floor": 1.0}, 0.58206546)],
)
def test_worked_example(settings, expected):
    value = probiou(boxes(P, Q), boxes(Q, P), **settings)
    assert value.shape == (2, 1)
    assert value[:, 0].tolist() == pytest.approx([expected] * 2, abs=1e-8)


def test_gradient_of_the_worked_example():
    _, first, second = slopes(boxes(P), boxes(Q))
    assert first[0].tolist() == pytest.approx((0.01278471, 0.17694466, -0.00708606, 0.04745035, 0.14727709), abs=1e-7)
    assert second[0].tolist() == pytest.approx((-0.01278471, -0.17694466, 0.03089996, 0.00963224, 0.00409818), abs=1e-7)


def test_pairwise_is_the_paired_form_bit_for_bit():
    one, two = random_boxes(7, torch.float32)
    whole = batch_probiou(one, two)
    assert whole.shape == (7, 7)
    assert torch.equal(whole.diagonal()[:, None], probiou(one, two))
    assert torch.equal(batch_probiou(one.numpy(), two.numpy()), whole)
    assert batch_probiou(np.zeros((0, 5), dtype=np.float32), two).shape == (0, 7)
    worked = batch_probiou(boxes(P, Q), boxes(Q, P))
    assert worked.flatten().tolist() == pytest.approx((0.50155610, 0.99953181, 0.99953181, 0.50155610), abs=1e-8)


# ------------------------------------------------------------------------------------------------------- thin boxes

THIN = {
    "points": ((5, 5, 0, 0, 0.3), (5, 5, 0, 0, 0.3), 0.99955279),
    "point-and-box": ((5, 5, 0, 0, 0), (5, 5, 8, 4, 0.4), 5.92e-5),
    "thin-twins": ((5, 5, 1e-3, 30, 0.5), (5, 5, 1e-3, 30, 0.5), 0.99955279),
    "flat-twins": ((5, 5, 0, 30, 0.7), (5, 5, 0, 30, 0.7), 0.99955279),
    "thin-and-box": ((5, 5, 1e-3, 30, 0.4), (5, 5, 8, 4, 0.1), 0.0074),
}


@pytest.mark.parametrize("name", THIN)
@pytest.mark.parametrize("settings", [{}, {"floor": 0.01}, {"CIoU": True}], ids=["plain", "floor", "complete"])
def test_thin_boxes_are_finite_with_finite_gradients(name, settings):
    """Training diverged on such boxes: ultralytics issues 10108, 24933 and 25007."""
    one, two, expected = THIN[name]
    value, first, second = slopes(boxes(one), boxes(two), **settings)
    assert value.isfinite().all()
    assert first.isfinite().all()
    assert second.isfinite().all()
    if not settings:
        assert value.item() == pytest.approx(expected, abs=3e-5)


def test_a_thin_pair_leaves_the_others_alone():
    thin = THIN["thin-twins"]
    alone = slopes(boxes(P), boxes(Q))
    among = slopes(boxes(P, thin[0]), boxes(Q, thin[1]))
    assert all(torch.equal(one, other[:1]) for one, other in zip(alone, among, strict=True))


@pytest.mark.parametrize("thickness", [1.0, 1e-2, 1e-4])
def test_both_forms_are_one_number(thickness):
    one, two = random_boxes(200)
    one[:, 2] *= thickness
    two[:, 2] = one[:, 2] * 1.5
    for rule in (GaussianRule(), GaussianRule(complete=True), GaussianRule(floor=0.01)):
        terms = gaussian_terms(one, rule), gaussian_terms(two, rule)
        ordered, stable = ordered_form(*terms, rule), stable_form(*terms, rule)
        torch.testing.assert_close(stable, ordered, rtol=1e-7, atol=1e-6 * thickness**-0.5 * 1e-2)
    terms32 = [gaussian_terms(box.float(), GaussianRule()) for box in (one, two)]
    exact = [gaussian_terms(box.float().double(), GaussianRule()) for box in (one, two)]
    found = stable_form(*terms32, GaussianRule()).double()
    torch.testing.assert_close(found, stable_form(*exact, GaussianRule()), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("height", [3.0, -3.0, 0.0])
def test_the_stable_form_takes_the_aspect_of_any_height(height):
    rule = GaussianRule(complete=True)
    one, two = (
        gaussian_terms(torch.tensor([[5.0, 5, 4, side, 0.2]], dtype=torch.float64), rule) for side in (2, height)
    )
    plain, complete = (stable_form(one, two, which) for which in (GaussianRule(), rule))
    turn = math.atan(4 / 2) - (math.atan(4 / height) if height else math.pi / 2)
    aspect = 4 / math.pi**2 * turn**2
    expected = plain - aspect**2 / (aspect - plain + 1 + 1e-7)
    torch.testing.assert_close(complete, expected)


def test_a_point_has_no_aspect():
    one, two = (gaussian_terms(boxes(box).detach(), GaussianRule(complete=True)) for box in THIN["point-and-box"][:2])
    assert torch.equal(stable_form(one, two, GaussianRule(complete=True)), stable_form(one, two, GaussianRule()))


def test_the_stable_form_stands_in_for_nan_only():
    one, two = random_boxes(50, torch.float32)
    terms = gaussian_terms(one), gaussian_terms(two)
    assert torch.equal(gaussian_iou(*terms), ordered_form(*terms, GaussianRule()))
    thin = gaussian_terms(torch.tensor([THIN["thin-twins"][0]]))
    assert ordered_form(thin, thin, GaussianRule()).isnan()
    assert torch.equal(gaussian_iou(thin, thin), stable_form(thin, thin, GaussianRule()))


# ------------------------------------------------------------------------------------------- gradients and invariances


@pytest.mark.parametrize("form", [ordered_form, stable_form])
def test_gradcheck(form):
    one, two = (box.requires_grad_() for box in random_boxes(6))
    for rule in (GaussianRule(), GaussianRule(floor=0.01)):
        terms = [lambda box, rule=rule: gaussian_terms(box, rule)] * 2
        assert torch.autograd.gradcheck(
            lambda a, b, rule=rule, terms=terms: form(terms[0](a), terms[1](b), rule), (one, two)
        )
    assert torch.autograd.gradcheck(probiou, (one, two))
    assert torch.autograd.gradcheck(batch_probiou, (one, two[:2]))


def test_broadcast_gradients_are_sums_over_the_pairs():
    one, two = random_boxes(5)
    single, many = one[:1].clone().requires_grad_(), two.clone().requires_grad_()
    _, first, second = slopes(single, many)
    each = slopes(one[:1].repeat(5, 1).requires_grad_(), two.clone().requires_grad_())
    torch.testing.assert_close(first, each[1].sum(0, keepdim=True))
    torch.testing.assert_close(second, each[2])


def test_invariances():
    one, two = random_boxes(40)
    value = probiou(one, two)
    turned = torch.cat((one[:, :2], one[:, 2:4].flip(1), one[:, 4:] + math.pi / 2), 1)
    half_turn = one + torch.tensor([0, 0, 0, 0, math.pi], dtype=torch.float64)
    for other in (turned, half_turn, one * torch.tensor([1, 1, -1, 1, 1])):
        torch.testing.assert_close(probiou(other, two), value, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(probiou(two, one), value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("special", [nan, inf])
@pytest.mark.parametrize("column", [2, 3, 4])
def test_what_is_not_finite_is_nan_and_stays_in_its_pair(special, column):
    one = boxes(P, P).detach()
    one[0, column] = special
    value, first, _ = slopes(one.requires_grad_(), boxes(Q, Q))
    assert value[0].isnan()
    assert torch.equal(value[1:], probiou(boxes(P), boxes(Q)))
    assert first[1].isfinite().all()


@pytest.mark.parametrize("dtype", HALVES)
def test_half_is_computed_in_float32(dtype):
    """In float16 upstream calls all squares from 20 on alike."""
    one, two = boxes((50, 50, 20, 20, 0), dtype=dtype), boxes((52, 50, 20, 20, 0), dtype=dtype)
    value, first, _ = slopes(one, two)
    assert value.dtype == first.dtype == dtype
    assert value.item() == pytest.approx(0.87798, rel=4e-3)
    assert probiou(one, two.float()).dtype == torch.float32


@pytest.mark.parametrize(
    ("one", "two", "error", "message"),
    [
        (torch.zeros(2, 4), torch.zeros(2, 5), ValueError, "obb1 must be"),
        (torch.zeros(2, 5), torch.zeros(5), ValueError, "obb2 must be"),
        (torch.zeros(2, 5), torch.zeros(3, 5), ValueError, "obb1 and obb2 do not broadcast"),
        (torch.zeros(2, 5), torch.zeros(2, 5).bool(), TypeError, "obb2 must be real"),
    ],
)
def test_wrong_arguments(one, two, error, message):
    with pytest.raises(error, match=message):
        probiou(one, two)


def test_gradients_may_be_asked_for_twice():
    one, two = boxes(P), boxes(Q)
    value = probiou(one, two)
    first = torch.autograd.grad(value, one, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(value, one)[0])


def test_compiles_in_one_graph():
    torch._dynamo.reset()
    compiled = torch.compile(probiou, fullgraph=True, backend="aot_eager")
    one, two = ([P, Q, *(pair[side] for pair in THIN.values())] for side in (0, 1))
    found = boxes(*one), boxes(*two)
    value = compiled(*found)
    expected = slopes(boxes(*one), boxes(*two))
    torch.testing.assert_close(value, expected[0])
    for slope, wanted in zip(torch.autograd.grad(value.sum(), found), expected[1:], strict=True):
        torch.testing.assert_close(slope, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"CIoU": True}, {"floor": 0.5}, {"eps": 1e-3}])
def test_settings_mean_the_same_without_a_gradient(settings):
    one, two = random_boxes(20)
    found = probiou(one, two, **settings)
    expected = probiou(one.requires_grad_(), two, **settings)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-12, atol=0)
    if settings:
        assert not torch.allclose(found, probiou(one.detach(), two), rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("flat", [(0,), (1,), (0, 1), ()])
def test_what_compilers_see_of_boxes_without_height(monkeypatch, flat, dtype):
    pair = [boxes(P, Q, dtype=dtype), boxes(Q, P, dtype=dtype)]
    for side in flat:
        pair[side].data[0, 3] = 0
    expected = slopes(*pair, CIoU=True)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    found = slopes(*pair, CIoU=True)
    for one, other in zip(found, expected, strict=True):
        assert one.isfinite().all()
        # The determinant of a flat box is rounding, and what follows from it depends on the order.
        torch.testing.assert_close(one[1:], other[1:], rtol=1e-4, atol=1e-6)
