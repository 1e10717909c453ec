"""The element losses of ultralytics: worked examples of yolo_losses.md section 2, gradients, bad input."""

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

from cleanroom.losses.bbox import BboxLoss, bbox_loss
from cleanroom.losses.class_bce import class_bce, dense_class_bce
from cleanroom.losses.dfl import DFLoss, distribution_focal_loss
from cleanroom.losses.focal import FocalLoss, VarifocalLoss


def wave(shape, a, b, c):
    """The specification's S(shape; a, b, c)."""
    index = np.arange(np.prod(shape), dtype=np.float64)
    return torch.from_numpy(a * np.sin(b * index + c)).float().reshape(shape)


def norm(loss, *leaves):
    return [gradient.norm().item() for gradient in torch.autograd.grad(loss, leaves)]


X = wave((2, 4, 3), 2, 0.9, 0.1)
Y = (wave((2, 4, 3), 1, 1.3, 0.2) > 0.4).float()
Q = (wave((2, 4, 3), 0.5, 0.6, 0.9) + 0.5) * Y


def test_varifocal_worked_example():
    x, q, y = (value.clone().requires_grad_() for value in (X, Q, Y))
    loss = VarifocalLoss()(x, q, y)
    assert loss.item() == pytest.approx(2.626276, rel=1e-5)
    assert norm(loss, x, q, y) == pytest.approx([0.527255, 1.177635, 0.775847], rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "value"),
    [({}, 2.216421), ({"alpha": 0}, 3.823347), ({"gamma": 0}, 3.409284), ({"alpha": [0.1, 0.5, 0.9]}, 1.851976)],
)
def test_focal_worked_example(settings, value):
    assert FocalLoss(**settings)(X, Y).item() == pytest.approx(value, rel=1e-5)


def test_modulating_factors_are_differentiated():
    x, y = X[:1].double().requires_grad_(), Y[:1].double()
    # The cross entropy inside is computed in float32, as upstream's is: larger steps, and its digits.
    assert gradcheck(lambda x: VarifocalLoss()(x, Q[:1].double(), y), x, eps=1e-2, atol=1e-3)
    assert gradcheck(lambda x: FocalLoss()(x, y), x)


DISTANCES = torch.tensor([[0, 0.25, 1, 4.5], [4.99, 5, 7, -1]])


def test_dfl_worked_example_leaves_the_target_as_it_is():
    x, target = wave((8, 6), 1.5, 0.8, 0.2).requires_grad_(), DISTANCES.clone()
    loss = DFLoss(6)(x, target)
    assert loss.flatten().tolist() == pytest.approx([3.044196, 1.954426], rel=1e-5)
    assert norm(loss.sum(), x) == pytest.approx([0.653850], rel=1e-4)
    assert torch.equal(target, DISTANCES)


def test_dfl_gradcheck_and_bad_input():
    x = wave((2, 4, 6), 1.5, 0.8, 0.2).double().requires_grad_()
    assert gradcheck(lambda x: distribution_focal_loss(x, DISTANCES.double()), x)
    with pytest.raises(ValueError, match="target"):
        distribution_focal_loss(x, DISTANCES.double() * torch.nan)
    with pytest.raises(TypeError, match="target"):
        distribution_focal_loss(x, DISTANCES.long())


def example_b(bins):
    """ExB of section 2.4."""
    n = torch.arange(10)
    points = torch.stack((n % 5 + 0.5, n // 5 + 0.5), 1)
    pred = torch.cat(
        (points - 1 - 0.5 * wave((10, 2), 1, 0.9, 0.2), points + 1.2 + 0.5 * wave((10, 2), 1, 0.4, 0.7)), 1
    )
    target = torch.cat((points - 1.3, points + 1.1), 1)
    mask = (n % 3 == 0)[None]
    scores = (wave((1, 10, 3), 0.4, 0.5, 0.1) + 0.5) * mask[..., None]
    dist = wave((1, 10, 4 * bins), 1, 0.7, 0.3) + (1.5 if bins == 1 else 0)
    total = scores.sum().clamp(min=1)
    return (
        dist,
        pred[None],
        points,
        target[None],
        scores,
        total,
        mask,
        torch.tensor([64.0, 96]),
        torch.full((10, 1), 8.0),
    )


@pytest.mark.parametrize(
    ("bins", "values", "norms"),
    [
        (16, (0.5557734, 3.044912), (0.228141, 0.231773)),
        (1, (0.5557734, 0.09264529), (0.0296506, 0.231773)),
    ],
)
def test_box_loss_worked_example(bins, values, norms):
    dist, pred, *rest = example_b(bins)
    dist.requires_grad_()
    pred.requires_grad_()
    found = BboxLoss(bins)(dist, pred, *rest)
    assert [value.item() for value in found] == pytest.approx(values, rel=1e-5)
    assert norm(sum(found), dist, pred) == pytest.approx(norms, rel=1e-4)


def test_box_loss_without_foreground_is_zero_with_zero_gradients():
    dist, pred, points, target, scores, total, mask, size, stride = example_b(16)
    dist.requires_grad_()
    pred.requires_grad_()
    found = BboxLoss(16)(dist, pred, points, target, scores, total, torch.zeros_like(mask), size, stride)
    assert [value.item() for value in found] == [0, 0]
    assert norm(sum(found), dist, pred) == [0, 0]


def test_nan_outside_the_foreground_never_enters_the_box_loss():
    dist, pred, points, target, scores, total, mask, size, stride = example_b(16)
    expected = BboxLoss(16)(dist, pred, points, target, scores, total, mask, size, stride)
    spoilt = pred.masked_fill(~mask[..., None], torch.nan)
    found = BboxLoss(16)(dist, spoilt, points, target, scores, total, mask, size, stride)
    assert [value.item() for value in found] == [value.item() for value in expected]


def test_before_8_4_0_one_bin_had_no_distance_term():
    dist, pred, points, target, scores, total, mask, size, stride = example_b(1)
    given = dict(
        zip(("pred_dist", "pred_bboxes", "anchor_points", "target_bboxes"), (dist, pred, points, target), strict=True)
    )
    found = bbox_loss(
        **given, target_scores=scores, target_scores_sum=total, fg_mask=mask, imgsz=size, stride=stride, reg_max=1,
        reg1_distance="zero",
    )  # fmt: skip
    assert found.loss_dfl.item() == 0
    assert found.loss_iou.item() == pytest.approx(0.5557734, rel=1e-5)


LABELS, VALUES = torch.tensor([[0, 2, 1, 0], [1, 1, 0, 2]]), torch.tensor([[0.5, 0, 1, 0], [0, 0.3, 0.9, 0.2]])


def dense():
    return torch.zeros(2, 4, 3).scatter_(2, LABELS[..., None], VALUES[..., None])


@pytest.mark.parametrize("transposed", [False, True])
def test_class_bce_is_that_of_dense_targets(transposed):
    scores = X.mT.contiguous().mT if transposed else X.clone()
    scores.requires_grad_()
    expected = torch.nn.functional.binary_cross_entropy_with_logits(scores, dense(), reduction="sum") / 2.5
    theirs = torch.autograd.grad(expected, scores)[0]
    for found in (class_bce(scores, LABELS, VALUES, 2.5), dense_class_bce(scores, dense(), 2.5)):
        assert found.item() == pytest.approx(expected.item(), rel=1e-6)
        torch.testing.assert_close(torch.autograd.grad(found, scores)[0], theirs, rtol=1e-5, atol=1e-7)


def test_class_bce_masks_weights_and_images_as_by_hand():
    mask = torch.tensor([[True, False, False, False], [False, False, True, False]])
    weights = torch.tensor([0.5, 1.0, 2.0])
    each = torch.nn.functional.binary_cross_entropy_with_logits(X, dense(), reduction="none") * weights
    expected = (each * ~mask[..., None]).sum((1, 2)) / 3
    found = class_bce(X, LABELS, VALUES, 3.0, class_weights=weights, ignore_mask=mask, reduction="none")
    torch.testing.assert_close(found, expected)
    whole = class_bce(X, LABELS, VALUES, 3.0, class_weights=weights, ignore_mask=mask)
    torch.testing.assert_close(whole, expected.sum())


def test_class_bce_of_extreme_logits_and_bad_labels():
    scores = torch.tensor([[[1e4, -1e4, 0.0]]], requires_grad=True)
    loss = class_bce(scores, torch.tensor([[1]]), torch.tensor([[1.0]]))
    assert loss.item() == pytest.approx(2e4 + np.log(2), rel=1e-6)
    assert torch.autograd.grad(loss, scores)[0].flatten().tolist() == [1, -1, 0.5]
    with pytest.raises(IndexError, match="labels"):
        class_bce(scores, torch.tensor([[3]]), torch.tensor([[1.0]]))


def test_terms_compile_without_graph_breaks():
    compiled = torch.compile(
        lambda x, rows: (class_bce(x, LABELS, VALUES), distribution_focal_loss(rows, DISTANCES)),
        fullgraph=True,
        backend="eager",
    )
    rows = wave((2, 4, 6), 1.5, 0.8, 0.2)
    expected = class_bce(X, LABELS, VALUES), distribution_focal_loss(rows, DISTANCES)
    for ours, plain in zip(compiled(X, rows), expected, strict=True):
        torch.testing.assert_close(ours, plain)
