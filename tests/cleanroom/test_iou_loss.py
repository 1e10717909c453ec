"""IoU loss of YOLOX: specification yolox_losses.md, section 2."""

import pytest
import torch

from cases.iou_loss import EDGES, WORKED
from cleanroom.losses.yolox_iou import IOUloss, iou_loss

LOSSES = {"iou": [0.64, 0, 1, 0.99609375], "giou": [0.4625, 0, 1.7688889, 0.9375]}
SLOPES = {
    "iou": [(-0.096, 0.096, 0.024, -0.048), (0,) * 4, (0,) * 4, (0, 0, -0.00390625, -0.00390625)],
    "giou": [
        (-0.09171875, 0.09171875, 0.037578125, -0.065390625),
        (0,) * 4,
        (0.0154074, 0.0154074, -0.0100741, -0.0100741),
        (0, 0, -0.03125, -0.03125),
    ],
}
NORMS = {"iou": (0.1460908, 0.1459928), "giou": (0.1585673, 0.1543656)}
ZERO = (0, 0, 0, 0)
#: Loss and gradient by the prediction of every edge, float32.
EXPECTED = {
    "zero-area-same-place": {"iou": (1, ZERO), "giou": (1, ZERO)},
    "zero-area-apart": {"iou": (1, ZERO), "giou": (2, ZERO)},
    "zero-area-inside": {"iou": (1, ZERO), "giou": (1, ZERO)},
    "touching": {"iou": (1, ZERO), "giou": (1, (-0.125, 0, -0.0625, 0))},
    "negative-width": {"iou": (1, ZERO), "giou": (1.25, (0, 0, -0.125, 0.125))},
}


def tensors(pair, dtype=torch.float32):
    return [torch.tensor(side, dtype=dtype).reshape(-1, 4).requires_grad_() for side in pair]


@pytest.mark.parametrize("kind", ["iou", "giou"])
def test_worked_example(kind):
    pred, target = tensors(WORKED)
    loss = iou_loss(pred, target, loss_type=kind)
    assert loss.tolist() == pytest.approx(LOSSES[kind], rel=1e-6)
    of_pred, of_target = torch.autograd.grad(loss.sum(), (pred, target))
    for found, expected in zip(of_pred.tolist(), SLOPES[kind], strict=True):
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-9)
    assert (of_pred.norm().item(), of_target.norm().item()) == pytest.approx(NORMS[kind], rel=1e-6)


@pytest.mark.parametrize("kind", ["iou", "giou"])
@pytest.mark.parametrize("edge", EXPECTED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_edges(edge, kind, dtype):
    # Upstream's float16 is NaN for pairs without area; ours computes it in float32.
    pred, target = tensors(EDGES[edge], dtype)
    loss = iou_loss(pred, target, loss_type=kind)
    assert loss.dtype == dtype
    value, slope = EXPECTED[edge][kind]
    assert loss.item() == value
    assert torch.autograd.grad(loss.sum(), pred)[0][0].tolist() == list(slope)


@pytest.mark.parametrize("kind", ["iou", "giou"])
def test_large_boxes_of_float16(kind):
    box = torch.full((1, 4), 300.0, dtype=torch.float16)
    assert iou_loss(box, box, loss_type=kind).item() == 0


def test_non_finite_boxes():
    for kind in ("iou", "giou"):
        assert iou_loss(*tensors(EDGES["nan"]), loss_type=kind).isnan()
    assert iou_loss(*tensors(EDGES["infinite-width"])).item() == 1
    pred, target = tensors(EDGES["infinite-width"])
    loss = iou_loss(pred, target, loss_type="giou")
    assert loss.isnan()
    assert torch.autograd.grad(loss.sum(), target)[0].isfinite().all()


@pytest.mark.parametrize("kind", ["iou", "giou"])
def test_gradcheck(kind):
    generator = torch.Generator().manual_seed(4)
    given = [(torch.rand(12, 4, generator=generator, dtype=torch.float64) + 0.3).requires_grad_() for _ in "ab"]
    assert torch.autograd.gradcheck(lambda p, t: iou_loss(p, t, loss_type=kind), given)


def test_boxes_inside_each_other_keep_their_digits():
    """In float32 what cancels would leave noise: corners far from the origin, slopes that are next to nothing."""
    generator = torch.Generator().manual_seed(5)
    outer = torch.rand(50, 4, generator=generator) * torch.tensor([600, 600, 60, 60]) + 20
    inner = outer + torch.rand(50, 4, generator=generator) * torch.tensor([1, 1, 0, 0]) - torch.tensor([0, 0, 9, 9])
    slopes = []
    for dtype in (torch.float32, torch.float64):
        given = [box.to(dtype).requires_grad_() for box in (inner, outer)]
        slopes.append(torch.autograd.grad(iou_loss(*given, loss_type="giou", reduction="sum"), given))
    for found, truth in zip(*slopes, strict=True):
        torch.testing.assert_close(found.double(), truth, rtol=1e-6, atol=1e-14)


def test_the_gap_is_clamped_below_the_smallest_area():
    """A hull of the very area where the clamp begins: its slope is that of the quotient."""
    centres = 0.125, 0.875
    given = [torch.tensor([[x, 0, 0.25, 1e-16]], dtype=torch.float64).requires_grad_() for x in centres]
    (found,) = torch.autograd.grad(iou_loss(*given, loss_type="giou", reduction="sum"), given[:1])
    corners = [torch.cat((box[0, :2] - box[0, 2:] / 2, box[0, :2] + box[0, 2:] / 2)) for box in given]
    hull = (corners[1][2] - corners[0][0]) * (corners[0][3] - corners[0][1])
    union = sum(box[0, 2:].prod() for box in given)
    assert hull.item() == 1e-16
    loss = 1 + (hull - union) / hull.clamp(min=1e-16)
    torch.testing.assert_close(found[0, [0, 2]], torch.autograd.grad(loss, given[0])[0][0, [0, 2]])


def test_reductions():
    pred, target = tensors(WORKED)
    for word, expected in (("sum", sum(LOSSES["iou"])), ("mean", sum(LOSSES["iou"]) / 4)):
        assert IOUloss(word)(pred, target).item() == pytest.approx(expected, rel=1e-6)
    assert IOUloss("whatever")(pred, target).shape == (4,)
    none = torch.zeros(0, 4)
    assert iou_loss(none, none).shape == (0,)
    assert iou_loss(none, none, reduction="sum").item() == 0
    assert iou_loss(none, none, reduction="mean").isnan()


def test_shapes():
    pred, target = tensors(WORKED)
    flat = iou_loss(pred, target)
    assert torch.equal(iou_loss(pred.view(2, 2, 4), target.view(2, 2, 4)), flat)
    assert iou_loss(pred.view(1, 4, 4), target[:1].view(1, 1, 4)).shape == (4,)  # one box against all
    assert torch.equal(iou_loss(pred[0], target[0]), flat[:1])
    with pytest.raises(ValueError, match="pred"):
        iou_loss(torch.tensor(1.0), target)
    for wrong in (target[:3], target.view(2, 2, 4)):
        with pytest.raises(ValueError, match="target"):
            iou_loss(pred, wrong)
    with pytest.raises(ValueError, match="target"):
        iou_loss(pred.view(2, 2, 4), target[:2].view(2, 1, 4)[:, :0])
    with pytest.raises(ValueError, match="pred"):
        iou_loss(torch.zeros(3, 3), torch.zeros(3, 3))


def test_unknown_type():
    for make in (lambda: IOUloss(loss_type="diou"), lambda: iou_loss(*tensors(WORKED), loss_type="diou")):
        with pytest.raises(ValueError, match="loss_type"):
            make()


def test_result_dtypes():
    pred, target = (torch.tensor(side, dtype=torch.bfloat16) for side in WORKED)
    assert iou_loss(pred, target).dtype == torch.bfloat16
    assert iou_loss(pred, target.float()).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert iou_loss(pred, target).dtype == torch.float32


def test_nothing_is_kept_without_gradient():
    pred, target = tensors(WORKED)
    with torch.no_grad():
        assert not iou_loss(pred, target).requires_grad
    only_target = iou_loss(pred.detach(), target).sum()
    assert torch.autograd.grad(only_target, target)[0].norm().item() == pytest.approx(NORMS["iou"][1], rel=1e-6)


def test_compiles():
    pred, target = tensors(WORKED)
    compiled = torch.compile(iou_loss, fullgraph=True, backend="eager")
    for kind in ("iou", "giou"):
        loss = compiled(pred, target, loss_type=kind)
        assert torch.equal(loss, iou_loss(pred, target, loss_type=kind))
        assert torch.autograd.grad(loss.sum(), pred)[0].norm().item() == pytest.approx(NORMS[kind][0], rel=1e-6)
