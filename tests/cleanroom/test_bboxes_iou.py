"""Pairwise overlap of YOLOX: specification yolox_losses.md, section 1."""

import pytest
import torch

from cleanroom import yolox_boxes
from cleanroom.yolox_boxes import bboxes_iou

ROWS = torch.tensor([[10.0, 10, 8, 6], [20, 14, 10, 10], [40, 40, 4, 4]])
COLUMNS = torch.tensor([[11.0, 9, 6, 8], [20, 14, 10, 10], [30, 30, 6, 6]])


def boxes(count, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    centre, side = torch.rand(2, count, 2, generator=generator, dtype=dtype)
    return torch.cat([centre * 4, side * 3 + 0.5], 1)


def plain(a, b):
    """The definition for boxes in centre form, for autograd to differentiate."""
    low = torch.maximum((a[:, :2] - a[:, 2:] / 2)[:, None], b[:, :2] - b[:, 2:] / 2)
    high = torch.minimum((a[:, :2] + a[:, 2:] / 2)[:, None], b[:, :2] + b[:, 2:] / 2)
    inner = (high - low).prod(2) * (high > low).all(2)
    return inner / (a[:, 2:].prod(1)[:, None] + b[:, 2:].prod(1) - inner)


def test_worked_example():
    a, b = ROWS.clone().requires_grad_(), COLUMNS.clone().requires_grad_()
    iou = bboxes_iou(a, b, xyxy=False)
    assert iou.tolist() == [[pytest.approx(0.6), 0, 0], [0, 1, 0], [0, 0, 0]]
    of_a, of_b = torch.autograd.grad(iou[:2, :2].sum(), (a, b))
    assert of_a.norm().item() == pytest.approx(0.1216552, rel=1e-6)
    assert of_b.norm().item() == pytest.approx(0.1216552, rel=1e-6)
    assert not of_a[1:].any()  # halves of the edges of the identical pair


def test_corners_of_integers():
    iou = bboxes_iou(torch.tensor([[0, 0, 4, 4]]), torch.tensor([[2, 2, 6, 6]]))
    assert (iou.item(), iou.dtype) == (pytest.approx(0.1428571), torch.float32)


@pytest.mark.parametrize("xyxy", [False, True])
def test_gradient_of_either_side(xyxy):
    a, b = boxes(5, 0).requires_grad_(), boxes(6, 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: bboxes_iou(a, b, xyxy), (a, b))
    if not xyxy:
        weights = torch.arange(1.0, 31, dtype=torch.float64).view(5, 6)
        ours = torch.autograd.grad((bboxes_iou(a, b, xyxy=False) * weights).sum(), (a, b))
        theirs = torch.autograd.grad((plain(a, b) * weights).sum(), (a, b))
        assert all(torch.allclose(x, y, rtol=1e-12, atol=1e-13) for x, y in zip(ours, theirs, strict=True))


def test_blocks_of_rows_add_up(monkeypatch):
    a, b = boxes(50, 2).requires_grad_(), boxes(40, 3).requires_grad_()

    def run():
        iou = bboxes_iou(a, b, xyxy=False)
        return iou, *torch.autograd.grad(iou.square().sum(), (a, b))

    whole = run()
    monkeypatch.setattr(yolox_boxes, "BLOCK", 7)
    assert all(torch.allclose(x, y, rtol=1e-12) for x, y in zip(whole, run(), strict=True))


def test_gradients_of_large_coordinates_keep_their_digits():
    """Edges and areas pull against each other: in float32 their difference loses digits."""
    rows, columns = boxes(20, 0) * 300, boxes(15, 1) * 300
    weights = torch.rand(20, 15, generator=torch.Generator().manual_seed(2))

    def slopes(*given):
        leaves = [part.clone().requires_grad_() for part in given]
        return torch.autograd.grad(bboxes_iou(*leaves, xyxy=False), leaves, weights.to(given[0].dtype))

    given = rows.float(), columns.float()
    for slope, exact in zip(slopes(*given), slopes(*(part.double() for part in given)), strict=True):
        torch.testing.assert_close(slope, exact.float(), rtol=1e-6, atol=0)


def test_no_union_is_no_overlap():
    points = torch.tensor([[5.0, 5, 0, 0], [50, 5, 0, 0], [5, 5, 4, 4]]).requires_grad_()
    iou = bboxes_iou(points, points, xyxy=False)
    assert iou.tolist() == [[0, 0, 0], [0, 0, 0], [0, 0, 1]]
    (grad,) = torch.autograd.grad(iou.sum(), points)
    assert grad.isfinite().all()


def test_half_precision_does_not_overflow():
    box = torch.tensor([[300.0, 300, 600, 600]], dtype=torch.float16)
    assert bboxes_iou(box, box, xyxy=False).item() == 1


def test_what_is_not_finite_spoils_its_own_pairs_only():
    a = torch.tensor([[5.0, 5, torch.inf, 4], [5, torch.nan, 4, 4], [5, 5, 4, 4]]).requires_grad_()
    b = torch.tensor([[5.0, 5, 4, 4]]).requires_grad_()
    iou = bboxes_iou(a, b, xyxy=False)
    assert (iou[0].item(), iou[2].item()) == (0, 1)
    assert iou[1].isnan()
    of_a, of_b = torch.autograd.grad(iou.sum(), (a, b))
    assert of_a[2].isfinite().all()
    assert of_b.isfinite().all()


@pytest.mark.parametrize(
    ("first", "second", "xyxy", "result"),
    [
        (torch.float32, torch.float64, False, torch.float64),
        (torch.bfloat16, torch.bfloat16, True, torch.bfloat16),
        (torch.float16, torch.int64, True, torch.float16),
        (torch.float16, torch.int64, False, torch.float32),
    ],
)
def test_dtypes(first, second, xyxy, result):
    assert bboxes_iou(ROWS.to(first), COLUMNS.to(second), xyxy).dtype == result


def test_empty_and_wrong_shapes():
    assert bboxes_iou(ROWS[:0], COLUMNS).shape == (0, 3)
    assert bboxes_iou(ROWS, COLUMNS[:0]).shape == (3, 0)
    with pytest.raises(IndexError, match="bboxes_b"):
        bboxes_iou(ROWS, torch.zeros(2, 5))


def test_arguments_are_left_alone():
    a, b = ROWS.clone(), COLUMNS.clone()
    bboxes_iou(a, b)
    assert torch.equal(a, ROWS)
    assert torch.equal(b, COLUMNS)
