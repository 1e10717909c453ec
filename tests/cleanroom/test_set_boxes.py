"""The generalised IoU of set prediction against set_prediction.md, A1 and A6, and against autograd of its formula."""

import pytest
import torch
from torch import nan

from cleanroom import set_boxes
from cleanroom.set_boxes import corners_of, generalized_box_iou, paired_box_losses

INF = float("inf")


def formula(boxes1, boxes2):
    """A1 as it stands, differentiated by autograd."""
    low, high = torch.max(boxes1[:, None, :2], boxes2[:, :2]), torch.min(boxes1[:, None, 2:], boxes2[:, 2:])
    hull_low, hull_high = torch.min(boxes1[:, None, :2], boxes2[:, :2]), torch.max(boxes1[:, None, 2:], boxes2[:, 2:])
    shared, hull = (high - low).clamp(min=0).prod(-1), (hull_high - hull_low).clamp(min=0).prod(-1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(-1) for boxes in (boxes1, boxes2)]
    union = areas[0][:, None] + areas[1] - shared
    return shared / union - (hull - union) / hull


def random_boxes(count, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(count, 2, generator=generator, dtype=torch.float64)
    return torch.cat([low, low + 0.01 + torch.rand(count, 2, generator=generator, dtype=torch.float64) / 2], -1).to(
        dtype
    )


def lattice_boxes(count, seed=0, least=1):
    """Corners on whole numbers, so that many touch, coincide or contain each other."""
    generator = torch.Generator().manual_seed(seed)
    low = torch.randint(0, 4, (count, 2), generator=generator).double()
    return torch.cat([low, low + torch.randint(least, 3, (count, 2), generator=generator)], -1)


def gradients(function, boxes1, boxes2):
    boxes1, boxes2 = boxes1.clone().requires_grad_(), boxes2.clone().requires_grad_()
    found = function(boxes1, boxes2)
    weights = torch.linspace(0.5, 1.5, found.numel(), dtype=found.dtype).view(found.shape)
    return found.detach(), *torch.autograd.grad(found, (boxes1, boxes2), weights)


def test_example_of_the_specification():
    boxes1 = torch.tensor([[0, 0, 2, 2], [1, 1, 3, 3], [5, 5, 6, 6.0]])
    boxes2 = torch.tensor([[1, 1, 3, 3], [0, 0, 2, 2.0]])
    found, gradient = gradients(generalized_box_iou, boxes1, boxes2)[:2]
    expected = torch.tensor([[-0.0794, 1], [1, -0.0794], [-0.8, -0.8611]])
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-5)
    boxes1.requires_grad_()
    (gradient,) = torch.autograd.grad(generalized_box_iou(boxes1, boxes2).sum(), boxes1)
    assert gradient.norm().item() == pytest.approx(0.5016735, abs=1e-6)


@pytest.mark.parametrize("sizes", [(13, 7), (7, 13), (40, 40), (1, 1), (0, 3), (3, 0), (0, 0)])
def test_values_and_gradients_are_those_of_the_formula(sizes):
    pair = random_boxes(sizes[0]), random_boxes(sizes[1], seed=1)
    for found, expected in zip(gradients(generalized_box_iou, *pair), gradients(formula, *pair), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("least", [1, 0])
def test_ties_split_by_halves_and_touching_boxes_pull(least):
    """Of boxes on a grid nearly every corner ties; with `least` 0 half of the first ones have no area."""
    pair = lattice_boxes(60, least=least), lattice_boxes(40, seed=1)
    for found, expected in zip(gradients(generalized_box_iou, *pair), gradients(formula, *pair), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_float32_values_have_the_bits_of_the_formula():
    pair = random_boxes(50, dtype=torch.float32), random_boxes(30, seed=1, dtype=torch.float32)
    assert torch.equal(generalized_box_iou(*pair), formula(*pair))


def test_gradcheck():
    pair = random_boxes(5).requires_grad_(), random_boxes(4, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(generalized_box_iou, pair)


def test_chunks_do_not_change_anything(monkeypatch):
    pair = random_boxes(13), random_boxes(9, seed=1)
    whole = gradients(generalized_box_iou, *pair)
    monkeypatch.setattr(set_boxes, "_CHUNK_PAIRS", 20)
    for found, expected in zip(gradients(generalized_box_iou, *pair), whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)


def test_two_boxes_without_area_are_finite():
    """A1: NaN upstream at any distance."""
    point, far, line = [0.0, 0, 0, 0], [1.0, 1, 1, 1], [0.0, 0, 2, 0]
    boxes = torch.tensor([point, far, line, [0, 0, 2, 2]])
    found, gradient, _ = gradients(generalized_box_iou, boxes, boxes)
    expected = torch.tensor([[0, -1, 0, 0], [-1, 0, -1, 0], [0, -1, 0, 0], [0, 0, 0, 1.0]])
    assert torch.equal(found, expected)
    assert gradient.isfinite().all()


def test_a_box_without_area_inside_another_has_no_gradient():
    inner, outer = torch.tensor([[0.5, 0.5, 0.5, 0.5]]), torch.tensor([[0, 0, 1.0, 1.0]])
    found, by_inner, by_outer = gradients(generalized_box_iou, inner, outer)
    assert found.item() == 0
    assert by_inner.abs().max() == by_outer.abs().max() == 0


def test_what_is_not_finite_stays_where_it_is():
    """Upstream's derivative of a corner that bounds nothing is 0, whatever the pair's overlap is."""
    wide, square = torch.tensor([[0, 0, INF, 1.0]]), torch.tensor([[0.2, 0.2, 0.5, 0.5], [0.1, 0.1, 0.4, 0.4]])
    boxes = torch.cat([wide, random_boxes(3, dtype=torch.float32)])
    _, by_first, by_second = gradients(generalized_box_iou, boxes, square)
    _, expected_first, expected_second = gradients(formula, boxes, square)
    assert torch.equal(by_first.isfinite(), expected_first.isfinite())
    assert torch.equal(by_second.isfinite(), expected_second.isfinite())
    assert by_first[1:].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_give_float32(dtype):
    pair = random_boxes(5, dtype=dtype), random_boxes(4, seed=1, dtype=dtype)
    found, by_first, by_second = gradients(generalized_box_iou, *pair)
    assert found.dtype == torch.float32
    assert by_first.dtype == by_second.dtype == dtype
    torch.testing.assert_close(found, formula(*(boxes.float() for boxes in pair)))


def test_integer_boxes_are_taken():
    boxes = torch.tensor([[0, 0, 2, 2], [1, 1, 3, 3]])
    assert torch.equal(generalized_box_iou(boxes, boxes), generalized_box_iou(boxes.float(), boxes.float()))


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("box", [[2, 0, 1, 1.0], [0, 2, 1, 1.0], [nan, 0, 1, 1], [0, 0, 1, nan]])
def test_malformed_boxes_name_the_argument(place, box):
    pair = [random_boxes(2, dtype=torch.float32), random_boxes(2, dtype=torch.float32)]
    pair[place][1] = torch.tensor(box)
    with pytest.raises(ValueError, match=f"boxes{place + 1} hold"):
        generalized_box_iou(*pair)


@pytest.mark.parametrize("shape", [(3, 5), (4,), (2, 3, 4)])
def test_shapes_name_the_argument(shape):
    with pytest.raises(ValueError, match=r"boxes2 must have shape \(N, 4\)"):
        generalized_box_iou(random_boxes(2), torch.zeros(shape))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_in_one_graph(backend):
    pair = random_boxes(5), random_boxes(4, seed=1)
    compiled = torch.compile(generalized_box_iou, fullgraph=True, backend=backend)
    for found, expected in zip(gradients(compiled, *pair), gradients(generalized_box_iou, *pair), strict=True):
        torch.testing.assert_close(found, expected)


# -------------------------------------------------------------------------------------------------- matched pairs


def centre_boxes(count, seed=0, dtype=torch.float64):
    corners = random_boxes(count, seed)
    return torch.cat([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], -1).to(dtype)


def test_pairs_are_the_diagonal():
    predicted, target = centre_boxes(9), centre_boxes(9, seed=1)
    distance, overlap = paired_box_losses(predicted, target)
    torch.testing.assert_close(distance, (predicted - target).abs().sum(-1))
    torch.testing.assert_close(overlap, 1 - formula(corners_of(predicted), corners_of(target)).diag())


def test_pairs_gradcheck():
    target = centre_boxes(6, seed=1)
    assert torch.autograd.gradcheck(lambda boxes: paired_box_losses(boxes, target), centre_boxes(6).requires_grad_())


def test_pairs_tie_as_the_formula_does():
    """Identical, touching, contained and far boxes; ties of corners in halves, sides of length 0 clamped from above."""
    predicted = torch.tensor([[1, 1, 2, 2], [1, 1, 2, 2], [1, 1, 2, 2], [1, 1, 1, 1], [1, 1, 2, 2.0]]).double()
    target = torch.tensor([[1, 1, 2, 2], [3, 1, 2, 2], [3, 3, 2, 2], [1, 1, 2, 2], [9, 9, 1, 1.0]]).double()
    both = []
    for function in (
        lambda boxes: paired_box_losses(boxes, target)[1],
        lambda boxes: 1 - formula(corners_of(boxes), corners_of(target)).diag(),
    ):
        boxes = predicted.clone().requires_grad_()
        both.append(torch.autograd.grad(function(boxes).sum(), boxes)[0])
    torch.testing.assert_close(*both, rtol=0, atol=1e-14)


def test_equal_coordinates_have_no_l1_gradient():
    boxes = centre_boxes(1).requires_grad_()
    target = boxes.detach().clone()
    target[0, 0] -= 0.25
    (gradient,) = torch.autograd.grad(paired_box_losses(boxes, target)[0].sum(), boxes)
    assert gradient.tolist() == [[1, 0, 0, 0]]


def test_pairs_without_area_are_finite():
    """A6: one prediction and the target of another pair make upstream's gradient NaN."""
    predicted = torch.tensor([[0.4, 0.4, 0, 0], [0.6, 0.5, 0.4, 0.2]], requires_grad=True)
    target = torch.tensor([[0.3, 0.4, 0.2, 0.3], [0.6, 0.5, 0, 0]])
    losses = paired_box_losses(predicted, target)
    (gradient,) = torch.autograd.grad(sum(losses).sum(), predicted)
    assert gradient.isfinite().all()
    apart = paired_box_losses(
        torch.tensor([[0.1, 0.1, 0, 0], [0.5, 0.5, 0, 0]]), torch.tensor([[0.5, 0.5, 0, 0.0]] * 2)
    )
    assert apart[1].tolist() == [2, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_pairs_dtypes(dtype):
    boxes = centre_boxes(3, dtype=dtype).requires_grad_()
    losses = paired_box_losses(boxes, centre_boxes(3, seed=1, dtype=dtype))
    wide = torch.promote_types(dtype, torch.float32)
    assert [loss.dtype for loss in losses] == [wide, wide]
    assert torch.autograd.grad(sum(losses).sum(), boxes)[0].dtype == dtype


@pytest.mark.parametrize(("name", "place"), [("pred_boxes", 0), ("boxes", 1)])
@pytest.mark.parametrize("change", [(2, -0.1), (3, -0.1), (0, nan), (2, nan)])
def test_malformed_pairs_name_the_argument(name, place, change):
    pair = [centre_boxes(3), centre_boxes(3, seed=1)]
    pair[place][1, change[0]] = change[1]
    with pytest.raises(ValueError, match=f"^{name} hold"):
        paired_box_losses(*pair)
    paired_box_losses(*pair, check=False)


def test_a_negative_side_that_rounds_away_is_taken():
    """cx - w/2 and cx + w/2 are the same number: upstream sees a box without area."""
    boxes = torch.tensor([[0.5, 0.5, -1e-12, 0.2]])
    losses = paired_box_losses(boxes, torch.tensor([[0.5, 0.5, 0.2, 0.2]]))
    assert all(loss.isfinite().all() for loss in losses)


def test_an_infinite_width_is_taken_and_an_infinite_centre_with_it_is_not():
    target = torch.tensor([[0.5, 0.5, 0.2, 0.2]])
    assert paired_box_losses(torch.tensor([[0.5, 0.5, INF, 0.2]]), target)[0].item() == INF
    with pytest.raises(ValueError, match="pred_boxes"):
        paired_box_losses(torch.tensor([[INF, 0.5, INF, 0.2]]), target)
