"""The box loss against example ExB and the edge cases of yolo_losses.md, section 2.4, on both paths."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cases.bbox_loss import example
from cleanroom.box_iou import bbox_iou
from cleanroom.losses.bbox import BboxLoss, bbox_loss, distance_l1

PATHS = ("sparse", "static")
LEAVES = ("pred_dist", "pred_bboxes")


@pytest.fixture(params=PATHS)
def path(request):
    return request.param


def evaluated(tensors, settings, **others):
    """Losses and gradients, by name."""
    given = {name: tensor.clone() for name, tensor in tensors.items()}
    leaves = [given[name].requires_grad_() for name in LEAVES]
    losses = bbox_loss(**given, **settings, **others)
    gradients = torch.autograd.grad(sum(losses), leaves, allow_unused=True)
    return losses, gradients


@pytest.mark.parametrize(
    ("bins", "every", "losses", "norms"),
    [
        (16, False, (0.5557734, 3.044912), (0.228141, 0.231773)),
        (1, False, (0.5557734, 0.09264529), (0.0296506, 0.231773)),
        (16, True, (0.4948190, 3.021187), None),
    ],
)
def test_worked_example(path, bins, every, losses, norms):
    found, gradients = evaluated(*example(bins, every), path=path)
    assert [loss.item() for loss in found] == pytest.approx(losses, rel=1e-6)
    assert [loss.shape for loss in found] == [(), ()]
    if norms:
        assert [gradient.norm().item() for gradient in gradients] == pytest.approx(norms, rel=3e-6)


def test_the_class_drops_in():
    tensors, settings = example()
    stride, size = tensors.pop("stride"), torch.tensor(settings["imgsz"])
    found = BboxLoss(16)(*tensors.values(), size, stride)
    assert type(found) is not list
    assert [loss.item() for loss in found] == pytest.approx([0.5557734, 3.044912], rel=1e-6)
    tensors, settings = example(1)
    stride = tensors.pop("stride")
    assert BboxLoss(1)(**tensors, imgsz=size, stride=stride)[1].item() == pytest.approx(0.09264529, rel=1e-6)


def test_against_the_definition(path):
    """Every row on its own, by the public overlap and the L1 distance of the specification."""
    tensors, settings = example(1)
    weight = tensors["target_scores"].sum(-1)[0]
    first, second = tensors["pred_bboxes"][0], tensors["target_bboxes"][0]
    points, foreground = tensors["anchor_points"], tensors["fg_mask"][0]
    overlap = bbox_iou(first, second, xywh=False, CIoU=True).squeeze(-1)
    target = torch.cat((points - second[:, :2], second[:, 2:] - points), 1)
    distance = ((tensors["pred_dist"][0] - target).abs() * 8 / torch.tensor([96.0, 64, 96, 64])).mean(1)
    expected = [(weight * term)[foreground].sum() / tensors["target_scores_sum"] for term in (1 - overlap, distance)]
    found = bbox_loss(**tensors, **settings, path=path)
    assert [loss.item() for loss in found] == pytest.approx([loss.item() for loss in expected], rel=1e-6)


@pytest.mark.parametrize("bins", [16, 1])
def test_no_foreground(path, bins):
    tensors, settings = example(bins)
    tensors["fg_mask"] = torch.zeros_like(tensors["fg_mask"])
    losses, gradients = evaluated(tensors, settings, path=path)
    assert [loss.item() for loss in losses] == [0, 0]
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients)


@pytest.mark.parametrize("bins", [16, 1])
def test_no_image(path, bins):
    tensors, settings = example(bins)
    kept = ("anchor_points", "stride", "target_scores_sum")
    tensors = {name: tensor if name in kept else tensor[:0] for name, tensor in tensors.items()}
    losses, gradients = evaluated(tensors, settings, path=path)
    assert [loss.item() for loss in losses] == [0, 0]
    assert [gradient.shape[0] for gradient in gradients] == [0, 0]


@pytest.mark.parametrize("bins", [16, 1])
def test_what_is_in_the_background_does_not_matter(path, bins):
    tensors, settings = example(bins)
    losses, gradients = evaluated(tensors, settings, path=path)
    spoiled = {name: tensor.clone() for name, tensor in tensors.items()}
    for name in ("pred_dist", "pred_bboxes", "target_bboxes", "target_scores"):
        spoiled[name][~tensors["fg_mask"]] = math.nan
    again, others = evaluated(spoiled, settings, path=path)
    assert [loss.item() for loss in again] == [loss.item() for loss in losses]
    assert all(torch.equal(one, other) for one, other in zip(gradients, others, strict=True))


def test_a_nan_box_spoils_one_term_and_its_own_gradient(path):
    tensors, settings = example()
    tensors["pred_bboxes"][0, 0, 0] = math.nan
    losses, (by_dist, by_boxes) = evaluated(tensors, settings, path=path)
    assert math.isnan(losses[0].item())
    assert losses[1].item() == pytest.approx(3.044912, rel=1e-6)
    assert by_dist.isfinite().all()
    assert by_boxes.isnan().nonzero()[:, 1].unique().tolist() == [0]


def test_releases_before_8_4_have_no_distance_of_one_bin(path):
    tensors, settings = example(1)
    losses, gradients = evaluated(tensors, settings, reg1_distance="zero", path=path)
    assert losses[0].item() == pytest.approx(0.5557734, rel=1e-6)
    assert (losses[1].item(), losses[1].dtype, losses[1].requires_grad) == (0, torch.float32, False)
    assert gradients[0] is None
    assert gradients[1].norm().item() == pytest.approx(0.231773, rel=3e-6)


def test_the_former_alpha_differs_in_last_digits_only():
    tensors, settings = example()
    stable, legacy = (bbox_loss(**tensors, **settings, ciou_alpha=alpha).loss_iou for alpha in ("stable", "legacy"))
    assert stable.item() == pytest.approx(legacy.item(), rel=1e-6)


@pytest.mark.parametrize("bins", [4, 1])
def test_gradient(path, bins):
    tensors, settings = example(bins)
    given = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}

    def by_distance(pred_dist):
        return bbox_loss(**given | {"pred_dist": pred_dist}, **settings, path=path).loss_dfl

    assert torch.autograd.gradcheck(by_distance, given["pred_dist"].requires_grad_())
    # Of the boxes autograd of the definition: CIoU holds its alpha constant, which differences do not.
    boxes = given["pred_bboxes"].requires_grad_()
    weight, foreground = given["target_scores"].sum(-1), given["fg_mask"]
    overlap = bbox_iou(boxes, given["target_bboxes"], xywh=False, CIoU=True).squeeze(-1)
    expected = ((1 - overlap) * weight)[foreground].sum() / given["target_scores_sum"]
    found = bbox_loss(**given, **settings, path=path).loss_iou
    torch.testing.assert_close(*(torch.autograd.grad(loss, boxes)[0] for loss in (found, expected)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bins", [16, 1])
def test_dtypes(path, dtype, bins):
    tensors, settings = example(bins)
    predicted = {name: tensor.to(dtype) if name in LEAVES else tensor for name, tensor in tensors.items()}
    losses, gradients = evaluated(predicted, settings, path=path)
    wide = torch.promote_types(dtype, torch.float32)
    assert [loss.dtype for loss in losses] == [wide, wide]
    assert [gradient.dtype for gradient in gradients] == [dtype, dtype]
    assert losses[0].item() == pytest.approx(0.5557734, rel=1e-2)
    every = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    assert [loss.dtype for loss in bbox_loss(**every, **settings, path=path)] == [dtype, dtype]


def test_nothing_is_changed_and_targets_get_no_gradient(path):
    tensors, settings = example()
    given = {
        name: tensor.clone().requires_grad_() if tensor.is_floating_point() else tensor.clone()
        for name, tensor in tensors.items()
    }
    sum(bbox_loss(**given, **settings, path=path)).backward()
    assert all(torch.equal(given[name], tensor) for name, tensor in tensors.items())
    assert given["target_bboxes"].grad is None
    assert given["target_scores"].grad is None


def test_distances_of_one_bin_are_shares_of_the_image():
    predicted, target = torch.tensor([[1.0, 2, 3, 4]]), torch.tensor([[0.0, 0, 0, -1]])
    found = distance_l1(predicted, target, torch.tensor([[8.0]]), (64, 96))
    assert found.item() == pytest.approx((8 / 96 + 16 / 64 + 24 / 96 + 40 / 64) / 4)


@pytest.mark.parametrize(
    ("changes", "settings", "error", "message"),
    [
        ({"pred_dist": torch.zeros(1, 10, 63)}, {}, ValueError, "pred_dist"),
        ({"pred_dist": torch.zeros(1, 10, 64, dtype=torch.int64)}, {}, TypeError, "pred_dist"),
        ({"pred_bboxes": torch.zeros(1, 9, 4)}, {}, ValueError, "pred_bboxes"),
        ({"target_bboxes": torch.zeros(1, 9, 4)}, {}, ValueError, "target_bboxes"),
        ({"target_bboxes": torch.full((1, 10, 4), math.nan)}, {}, ValueError, "target_bboxes"),
        ({"target_scores": torch.zeros(1, 9, 3)}, {}, ValueError, "target_scores"),
        ({"anchor_points": torch.zeros(9, 2)}, {}, ValueError, "anchor_points"),
        ({"fg_mask": torch.zeros(10, dtype=torch.bool)}, {}, ValueError, "fg_mask"),
        ({}, {"reg1_distance": "l2"}, ValueError, "reg1_distance"),
        ({}, {"ciou_alpha": "old"}, ValueError, "ciou_alpha"),
        ({}, {"path": "dense"}, ValueError, "path"),
        ({"pred_dist": torch.zeros(1, 10, 4)}, {"reg_max": 1, "imgsz": None}, ValueError, "imgsz"),
        ({"pred_dist": torch.zeros(1, 10, 4), "stride": None}, {"reg_max": 1}, ValueError, "stride"),
    ],
)
def test_errors_name_the_argument(changes, settings, error, message):
    tensors, usual = example()
    with pytest.raises(error, match=message):
        bbox_loss(**tensors | changes, **usual | settings)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("bins", [16, 1])
def test_compiled(backend, bins):
    tensors, settings = example(bins)
    loss = torch.compile(lambda **given: bbox_loss(**given, **settings), fullgraph=True, backend=backend)
    leaves = [tensors[name].requires_grad_() for name in LEAVES]
    found, expected = loss(**tensors), bbox_loss(**tensors, **settings)
    assert [one.item() for one in found] == pytest.approx([one.item() for one in expected], rel=1e-6)
    gradients = [torch.autograd.grad(sum(losses), leaves) for losses in (found, expected)]
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-8)


def test_the_static_path_reads_no_value():
    tensors, settings = example()
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fake = {name: mode.from_tensor(tensor) for name, tensor in tensors.items()}
        found = bbox_loss(**fake, **settings, path="static")
    assert [loss.shape for loss in found] == [(), ()]
