"""Set losses of DETR and YOLOS: the worked example of set_prediction.md A13, masks by hand, edges, compilation."""

import numpy as np
import pytest
import torch

from cleanroom.assign.hungarian import HungarianMatcher
from cleanroom.losses import set_criterion
from cleanroom.losses.masks import dice_loss, sigmoid_focal_loss
from cleanroom.losses.set_criterion import ImageLoss, SetCriterion
from cleanroom.losses.set_prediction import set_loss, term_names
from cleanroom.set_boxes import generalized_box_iou


def wave(shape, a, b, amplitude, offset):
    """The specification's inputs: offset + amplitude sin(a i + b), float32."""
    index = np.arange(np.prod(shape), dtype=np.float64)
    return torch.from_numpy(offset + amplitude * np.sin(a * index + b)).float().reshape(shape)


LABELS = torch.tensor([0, 2, 1])
BOXES = torch.tensor([[0.3, 0.4, 0.2, 0.3], [0.6, 0.5, 0.4, 0.2], [0.5, 0.5, 0.3, 0.3]])
SIZES = [2, 1]


def logits():
    return wave((2, 4, 4), 0.9, 0.3, 2, 0).requires_grad_()


def predicted():
    return wave((2, 4, 4), 1.1, 0.5, 0.15, 0.4).requires_grad_()


def targets(names=("class_labels", "boxes")):
    return [
        dict(zip(names, (labels, boxes), strict=True))
        for labels, boxes in zip(LABELS.split(SIZES), BOXES.split(SIZES), strict=True)
    ]


def norm(loss, leaf):
    return torch.autograd.grad(loss, leaf, retain_graph=True)[0].norm().item()


def test_worked_example_of_the_criterion():
    z, p = logits(), predicted()
    criterion = ImageLoss(HungarianMatcher(1, 5, 2), 3, 0.1, ["labels", "boxes", "cardinality"])
    found = criterion({"logits": z, "pred_boxes": p}, targets())
    assert list(found) == ["loss_ce", "loss_bbox", "loss_giou", "cardinality_error"]
    assert [float(value) for value in found.values()] == pytest.approx([1.5455137, 0.2469046, 0.6592982, 1.5], rel=1e-5)
    assert norm(found["loss_ce"], z) == pytest.approx(0.4818837, rel=1e-4)
    assert norm(found["loss_bbox"], p) == pytest.approx(1.1547006, rel=1e-4)
    assert norm(found["loss_giou"], p) == pytest.approx(2.6300815, rel=1e-4)


@pytest.mark.parametrize("path", ["sparse", "static"])
def test_worked_example_of_the_total(path):
    z, p = logits(), predicted()
    found = set_loss(z, p, LABELS, BOXES, SIZES, path=path)
    assert found.total.item() == pytest.approx(4.0986333, rel=1e-5)
    assert norm(found.total, z) == pytest.approx(0.4818837, rel=1e-4)
    assert norm(found.total, p) == pytest.approx(10.0685085, rel=1e-4)
    assert found.queries.tolist() == [2, 3, 2]
    assert found.targets.tolist() == [0, 1, 0]


@pytest.mark.parametrize(("layers", "total"), [(3, 12.084637), (2, 7.986003)])
def test_auxiliary_layers_are_matched_anew_and_weighted_as_far_as_decoder_layers_say(layers, total):
    z, p = logits(), predicted()
    found = set_loss(
        z, p, LABELS, BOXES, SIZES,
        aux_logits=torch.stack((z / 2, z.flip(1))), aux_boxes=torch.stack((p, p.flip(1))), decoder_layers=layers,
    )  # fmt: skip
    assert found.total.item() == pytest.approx(total, rel=1e-5)


def test_detrs_own_names():
    criterion = SetCriterion(3, HungarianMatcher(1, 5, 2), {}, 0.1, ["labels", "boxes", "cardinality"])
    outputs = {"pred_logits": logits(), "pred_boxes": predicted()}
    found = criterion(outputs, targets(("labels", "boxes")))
    assert float(found["class_error"]) == pytest.approx(66.666672, rel=1e-6)
    assert float(found["loss_ce"]) == pytest.approx(1.5455137, rel=1e-5)


def test_images_alone_sum_up_to_the_whole():
    z, p = logits(), predicted()
    whole, alone = (set_loss(z, p, LABELS, BOXES, SIZES, reduction=way).total for way in ("sum", "none"))
    assert alone.shape == (2,)
    assert alone.sum().item() == pytest.approx(whole.item(), rel=1e-6)


def test_every_pair_ignored():
    found = set_loss(logits(), predicted(), LABELS, BOXES, SIZES, ignore_mask=torch.ones(2, 4, dtype=torch.bool))
    assert found.total.item() == 0


def test_ignored_queries_take_no_part():
    """By hand: neither their class nor their pair counts, nor its target in the normaliser; the matching stays."""
    z, p = logits(), predicted()
    mask = torch.zeros(2, 4, dtype=torch.bool)
    mask[0, 0] = mask[0, 2] = True
    found = set_loss(z, p, LABELS, BOXES, SIZES, ignore_mask=mask)
    usual = set_loss(z, p, LABELS, BOXES, SIZES)
    assert torch.equal(found.queries, usual.queries)
    classes = torch.tensor([[3, 3, 0, 2], [3, 3, 1, 3]])
    weight = torch.where(classes == 3, 0.1, 1.0) * ~mask
    cost = -z.log_softmax(-1).gather(2, classes[..., None])[..., 0]
    image, query, truth = torch.tensor([0, 1]), torch.tensor([3, 2]), torch.tensor([1, 2])
    pred, wanted = p[image, query], BOXES[truth]

    def corners(boxes):
        return torch.cat((boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2), 1)

    giou = generalized_box_iou(corners(pred), corners(wanted)).diagonal()
    expected = (weight * cost).sum() / weight.sum() + 5 * (pred - wanted).abs().sum() / 2 + 2 * (1 - giou).sum() / 2
    assert found.total.item() == pytest.approx(expected.item(), rel=1e-5)


def test_without_ground_truths_only_the_class_term_is_left():
    z, p = logits(), predicted()
    found = set_loss(z, p, LABELS[:0], BOXES[:0], [0, 0])
    assert found.total.item() == pytest.approx(2.032586, rel=1e-5)
    assert norm(found.total, p) == 0


def test_mask_functions_worked_examples():
    z = wave((3, 5), 0.7, 0.2, 2, 0).requires_grad_()
    m = (wave((3, 5), 0.5, 0.1, 1, 0) > 0).float()
    focal, dice = sigmoid_focal_loss(z, m, 2), dice_loss(z, m, 2)
    assert [focal.item(), dice.item()] == pytest.approx([0.4106206, 0.6590565], rel=1e-5)
    assert [norm(focal, z), norm(dice, z)] == pytest.approx([0.1415974, 0.0632384], rel=1e-4)
    assert sigmoid_focal_loss(z, m, 2, alpha=-1, gamma=1).item() == pytest.approx(0.9986320, rel=1e-5)


def test_generalized_box_iou_worked_example_and_bad_boxes():
    a = torch.tensor([[0.0, 0, 2, 2], [1, 1, 3, 3], [5, 5, 6, 6]], requires_grad=True)
    b = torch.tensor([[1.0, 1, 3, 3], [0, 0, 2, 2]])
    found = generalized_box_iou(a, b)
    expected = [-0.0794, 1, 1, -0.0794, -0.8, -0.8611]
    assert found.flatten().tolist() == pytest.approx(expected, abs=5e-5)
    assert norm(found.sum(), a) == pytest.approx(0.5016735, rel=1e-5)
    with pytest.raises(ValueError, match="boxes2"):
        generalized_box_iou(a, b.flip(1))


def test_no_gradient_anomaly_where_zero_area_boxes_of_different_pairs_meet():
    """Upstream's pairwise matrix gives a finite loss with a NaN gradient there (A6)."""
    p = predicted().detach()
    p[0, 2, 2:] = 0
    boxes = BOXES.clone()
    boxes[1, 2:] = 0
    p.requires_grad_()
    found = set_loss(logits(), p, LABELS, boxes, SIZES)
    assert found.total.isfinite()
    assert torch.autograd.grad(found.total, p)[0].isfinite().all()


def test_bad_input_is_named():
    z, p = logits(), predicted()
    with pytest.raises(ValueError, match="sizes"):
        set_loss(z, p, LABELS, BOXES, [2, 2])
    with pytest.raises(ValueError, match="boxes"):
        set_loss(z, p - 1, LABELS, BOXES * -1, SIZES)


def test_inputs_are_unchanged_and_the_total_compiles_with_the_matching_inside():
    z, p = logits(), predicted()
    before = [value.detach().clone() for value in (z, p, LABELS, BOXES)]
    plain = set_loss(z, p, LABELS, BOXES, SIZES)
    compiled = torch.compile(lambda z, p: set_loss(z, p, LABELS, BOXES, SIZES).total, fullgraph=True, backend="eager")
    total = compiled(z, p)
    assert total.item() == pytest.approx(plain.total.item(), rel=1e-6)
    assert norm(total, p) == pytest.approx(10.0685085, rel=1e-4)
    assert all(torch.equal(a, b) for a, b in zip(before, (z, p, LABELS, BOXES), strict=True))


def test_the_normaliser_of_several_processes(monkeypatch):
    """Targets a process, and at least 1."""
    distributed = set_criterion.distributed
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 4)
    monkeypatch.setattr(distributed, "all_reduce", lambda total: total.mul_(2))
    normaliser = ImageLoss._normaliser
    assert [normaliser(count, torch.device("cpu")).item() for count in (0, 1, 3)] == [1, 1, 1.5]


@pytest.mark.parametrize("path", ["sparse", "static"])
def test_one_target_is_divided_by_one(path):
    p = predicted()
    found = set_loss(logits()[:1], p[:1], LABELS[:1], BOXES[:1], [1], path=path)
    torch.testing.assert_close(found.terms[1], (p[0, found.queries[0]] - BOXES[0]).abs().sum())


def test_names_of_the_terms():
    own = ("loss_ce", "loss_bbox", "loss_giou", "cardinality_error")
    assert term_names() == own
    assert term_names(masks=True) == (*own, "loss_mask", "loss_dice")
    assert term_names(2) == (*own, *(f"{name}_{layer}" for layer in range(2) for name in own))


def test_another_matcher_is_asked():
    class Fixed(torch.nn.Module):
        def forward(self, outputs, targets):
            return [(torch.tensor([0, 3]), torch.tensor([1, 0])), (torch.tensor([2]), torch.tensor([0]))]

    outputs = {"logits": logits(), "pred_boxes": predicted()}
    found = ImageLoss(Fixed(), 3, 0.1, ["labels", "boxes"])(outputs, targets())
    matched = outputs["pred_boxes"][[0, 0, 1], [0, 3, 2]]
    expected = (matched - BOXES[[1, 0, 2]]).abs().sum() / 3
    torch.testing.assert_close(found["loss_bbox"], expected)
