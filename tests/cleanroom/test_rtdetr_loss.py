"""RT-DETR's set losses against the worked example and edge cases of set_prediction.md part B, and against autograd."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import one_hot

from cleanroom.losses import _query_class, rtdetr
from cleanroom.losses._pair_boxes import pair_terms
from cleanroom.losses._query_class import ClassForm, class_sums
from cleanroom.losses.denoising import denoising_indices
from cleanroom.losses.rtdetr import DETRLoss, RTDETRDetectionLoss, rtdetr_loss

NAN, INF = math.nan, math.inf
BOTH_PATHS = pytest.mark.parametrize("path", ["sparse", "static"])
FORMS = {
    "varifocal": {"use_fl": True, "use_vfl": True},
    "focal": {"use_fl": True, "use_vfl": False},
    "bce": {"use_fl": False, "use_vfl": False},
}
EACH_FORM = pytest.mark.parametrize("form", FORMS)


def sine(shape, a, b, amplitude, offset):
    """S of the specification."""
    index = torch.arange(math.prod(shape), dtype=torch.float64)
    return (offset + amplitude * torch.sin(a * index + b)).float().view(shape)


def example(layers=1, *, denoising=False, **changes):
    """The input of B9 as arguments of `rtdetr_loss`, varifocal."""
    given = {
        "pred_bboxes": sine((layers, 2, 4, 4), 1.1, 0.5, 0.15, 0.4),
        "pred_scores": sine((layers, 2, 4, 3), 0.9, 0.3, 2, 0),
        "cls": torch.tensor([0, 2, 1]),
        "bboxes": torch.tensor([[0.3, 0.4, 0.2, 0.3], [0.6, 0.5, 0.4, 0.2], [0.5, 0.5, 0.3, 0.3]]),
        "gt_groups": [2, 1],
        "num_classes": 3,
        "use_vfl": True,
    }
    if denoising:
        given |= {
            "dn_bboxes": sine((1, 2, 8, 4), 1.3, 0.1, 0.15, 0.4),
            "dn_scores": sine((1, 2, 8, 3), 0.6, 0.2, 2, 0),
            "dn_pos_idx": torch.tensor([0, 1, 4, 5, 0, 4]),
            "dn_gt_idx": torch.tensor([0, 1, 2]),
            "dn_pos_counts": [4, 2],
            "dn_gt_counts": [2, 1],
            "dn_num_group": 2,
        }
    return given | changes


def truths(cls, boxes, groups):
    return {
        "cls": torch.tensor(cls, dtype=torch.int64),
        "bboxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        "gt_groups": groups,
    }


def leaves(given, *names):
    """The arguments with fresh leaves for `names`, and these leaves."""
    fresh = {name: given[name].detach().clone().requires_grad_() for name in names}
    return given | fresh, list(fresh.values())


def norms(value, *inputs):
    found = torch.autograd.grad(value, inputs, retain_graph=True, allow_unused=True)
    return [0.0 if gradient is None else float(gradient.norm()) for gradient in found]


def batch_of(given):
    return {name: given[name] for name in ("cls", "bboxes", "gt_groups")}


def random_batch(layers, sizes, queries, classes=5, *, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)

    def boxes(*shape):
        centres = torch.rand(*shape, 2, generator=generator, dtype=torch.float64) * 0.8 + 0.1
        return torch.cat([centres, torch.rand(*shape, 2, generator=generator, dtype=torch.float64) * 0.4 + 0.02], -1)

    scores = 2 * torch.randn(layers, len(sizes), queries, classes, generator=generator, dtype=torch.float64) - 1
    return {
        "pred_bboxes": boxes(layers, len(sizes), queries).to(dtype),
        "pred_scores": scores.to(dtype),
        "cls": torch.randint(0, classes, (sum(sizes),), generator=generator),
        "bboxes": boxes(sum(sizes)).to(dtype),
        "gt_groups": list(sizes),
        "num_classes": classes,
    }


# ---------------------------------------------------------------------------------------------- worked example B9

CLASS_TERMS = {"varifocal": (1.2989279, 0.2432629), "focal": (2.8127673, 0.6807751), "bce": (5.6680536, 0.6957010)}


@BOTH_PATHS
@EACH_FORM
def test_worked_example(form, path):
    given, (boxes, scores) = leaves(example(**FORMS[form], path=path), "pred_bboxes", "pred_scores")
    found = rtdetr_loss(**given)
    value, gradient = CLASS_TERMS[form]
    expected = [value, 2.3110454, 1.6626315, 0, 0, 0]
    assert found.terms.tolist() == pytest.approx(expected, rel=1e-6, abs=1e-12)
    assert found.total.item() == pytest.approx(sum(expected), rel=1e-6)
    assert found.queries.tolist() == [0, 3, 3]
    assert found.targets.tolist() == [1, 0, 2]
    of_class, of_bbox, of_giou = (norms(found.terms[i], boxes, scores) for i in range(3))
    assert of_class == pytest.approx([0, gradient], rel=1e-6)
    assert of_bbox == pytest.approx([5.7735030, 0], rel=1e-6)
    assert of_giou == pytest.approx([3.1652578, 0], rel=1e-6)


@BOTH_PATHS
def test_worked_example_of_three_layers(path):
    given, inputs = leaves(example(3, path=path), "pred_bboxes", "pred_scores")
    found = rtdetr_loss(**given)
    expected = [1.234918, 1.295418, 1.371488, 2.610989, 4.439822, 3.304632]
    assert found.terms.tolist() == pytest.approx(expected, abs=1e-6)
    assert found.total.item() == pytest.approx(14.257267, abs=2e-6)
    assert norms(found.total, *inputs) == pytest.approx([15.849562, 0.419225], abs=1e-6)
    assert found.queries.tolist() == [0, 3, 3, 0, 3, 3, 1, 2, 1]  # the last layer first
    assert found.targets.tolist() == [1, 0, 2, 1, 0, 2, 1, 0, 2]


@BOTH_PATHS
@pytest.mark.parametrize(
    ("index", "auxiliary", "queries"),
    [
        (0, [2.391892, 6.020159, 3.817466], [0, 3, 3]),
        (1, [2.595410, 5.477429, 3.844842], [1, 2, 1]),
        (-1, [2.595410, 5.477429, 3.844842], [1, 2, 1]),
    ],
)
def test_worked_example_of_a_shared_matching(path, index, auxiliary, queries):
    found = rtdetr_loss(**example(3, path=path, use_uni_match=True, uni_match_ind=index))
    assert found.terms.tolist() == pytest.approx([1.234918, 1.295418, 1.371488, *auxiliary], abs=1e-6)
    assert found.queries.tolist() == [0, 3, 3, *queries]


def test_without_auxiliary_layers_the_last_one_alone_is_matched():
    found = rtdetr_loss(**example(3, aux_loss=False, use_uni_match=True, uni_match_ind=7))
    assert found.terms.tolist() == pytest.approx([1.234918, 1.295418, 1.371488], abs=1e-6)
    assert len(found.queries) == 3


@BOTH_PATHS
def test_worked_example_of_denoising(path):
    given, (boxes, scores) = leaves(example(denoising=True, path=path), "dn_bboxes", "dn_scores")
    found = rtdetr_loss(**given)
    assert found.terms[6:].tolist() == pytest.approx([1.338871, 2.610837, 1.796269, 0, 0, 0], abs=1e-6)
    assert norms(found.terms[6], boxes, scores) == pytest.approx([0, 0.181537], abs=1e-6)
    assert norms(found.terms[7], boxes, scores) == pytest.approx([4.082483, 0], abs=1e-6)
    assert norms(found.terms[8], boxes, scores) == pytest.approx([2.606948, 0], abs=1e-6)
    assert found.queries.tolist() == [0, 3, 3]


def test_varifocal_parameters_before_8_3_117():
    found = rtdetr_loss(**example(vfl_gamma=2.0, vfl_alpha=0.75))
    assert found.terms[0].item() == pytest.approx(2.83244, abs=1e-5)  # run on 8.1.47
    by_class = DETRLoss(3, use_vfl=True, vfl_gamma=2.0, vfl_alpha=0.75)
    given = example()
    entries = by_class(given["pred_bboxes"], given["pred_scores"], batch_of(given))
    assert entries["loss_class"].item() == found.terms[0].item()


# ------------------------------------------------------------------------------------------------ edge cases B7


@BOTH_PATHS
@pytest.mark.parametrize(("form", "value"), [("varifocal", 11.876269), ("focal", 11.876269), ("bce", 6.055377)])
def test_no_ground_truth(path, form, value):
    changed = truths([], [], [0, 0])
    given, (boxes, scores) = leaves(example(**FORMS[form], **changed, path=path), "pred_bboxes", "pred_scores")
    found = rtdetr_loss(**given)
    assert found.terms.tolist() == pytest.approx([value, 0, 0, 0, 0, 0], rel=1e-6)
    assert found.queries.shape == found.targets.shape == (0,)
    gradients = torch.autograd.grad(found.total, [boxes, scores])
    assert not gradients[0].any()
    assert gradients[1].any()


@BOTH_PATHS
def test_an_image_without_ground_truths(path):
    boxes = example()["bboxes"].tolist()
    second = rtdetr_loss(**example(**truths([0, 2], boxes[:2], [2, 0]), path=path))
    assert second.terms[0].item() == pytest.approx(1.893020, abs=1e-6)
    assert (second.queries.tolist(), second.targets.tolist()) == ([0, 3], [1, 0])
    first = rtdetr_loss(**example(**truths([0, 2], boxes[:2], [0, 2]), path=path))
    assert sorted(first.targets.tolist()) == [0, 1]


@BOTH_PATHS
def test_fewer_groups_than_images_leave_the_last_ones_empty(path):
    changed = truths([0, 2], example()["bboxes"].tolist()[:2], [2])
    assert rtdetr_loss(**example(**changed, path=path)).terms[0].item() == pytest.approx(1.893020, abs=1e-6)


@BOTH_PATHS
def test_more_ground_truths_than_queries_count_pairs(path):
    crowd = [(0.1 + 0.13 * i, 0.8 - 0.1 * i, 0.1 + 0.05 * i, 0.3 - 0.04 * i) for i in range(6)]
    given = example(**truths([0, 1, 2, 0, 1, 2, 1], [*crowd, (0.5, 0.5, 0.3, 0.3)], [6, 1]), path=path)
    found = rtdetr_loss(**given)
    assert len(found.queries) == 5
    image = torch.tensor([0] * 4 + [1])
    distance = (given["pred_bboxes"][0, image, found.queries] - given["bboxes"][found.targets]).abs().sum()
    assert found.terms[1].item() == pytest.approx(5 * distance.item() / 5, rel=1e-6)


def test_identical_ground_truths_get_two_queries():
    box = (0.3, 0.4, 0.2, 0.3)
    found = rtdetr_loss(**example(**truths([0, 0, 1], [box, box, (0.5, 0.5, 0.3, 0.3)], [2, 1])))
    assert found.queries.tolist()[:2] == [2, 3]
    assert found.targets.tolist()[:2] == [1, 0]


def test_all_costs_equal_leave_the_overlap_just_below_1():
    box = (0.3, 0.4, 0.2, 0.3)
    level = {"pred_bboxes": torch.tensor(box).expand(1, 2, 4, 4), "pred_scores": torch.zeros(1, 2, 4, 3)}
    found = rtdetr_loss(**example(**truths([0, 0, 0], [box] * 3, [2, 1]), **level))
    assert found.queries.tolist() == [0, 1, 0]
    assert found.terms[1] == 0
    assert 0 < found.terms[2].item() < 1e-5


def test_boxes_without_area_are_finite():
    point = (0.5, 0.5, 0.0, 0.0)
    points = torch.tensor(point).expand(1, 2, 4, 4).clone().requires_grad_()
    found = rtdetr_loss(**example(**truths([0, 2, 1], [point] * 3, [2, 1]), pred_bboxes=points))
    assert found.terms.isfinite().all()
    (gradient,) = torch.autograd.grad(found.total, points)
    assert gradient.isfinite().all()


def test_nan_logits_keep_the_matching_and_poison_the_class_term_alone():
    given = example()
    given["pred_scores"] = given["pred_scores"].clone()
    given["pred_scores"][:, :, 3] = NAN
    found = rtdetr_loss(**given)
    assert found.terms[:3].isnan().tolist() == [True, False, False]
    assert found.queries.tolist() == [0, 3, 3]


def test_a_nan_box_is_matched_at_cost_0_and_poisons_every_class_of_its_query():
    given = example()
    given["pred_bboxes"] = given["pred_bboxes"].clone()
    given["pred_bboxes"][0, 0, 1, 0] = NAN
    given, (boxes, scores) = leaves(given, "pred_bboxes", "pred_scores")
    found = rtdetr_loss(**given)
    assert 1 in found.queries.tolist()[:2]
    assert found.terms[:3].isnan().all()
    of_boxes, of_scores = torch.autograd.grad(found.total, [boxes, scores])
    assert of_boxes[0, 0, 1].isnan().any()
    assert of_boxes[0, 1].isfinite().all()
    assert of_scores[0].isnan().any(-1).tolist() == [[False, True, False, False], [False] * 4]
    assert of_scores[0, 0, 1].isnan().all()


def test_an_infinite_width_is_matched_at_cost_0():
    given = example()
    given["pred_bboxes"] = given["pred_bboxes"].clone()
    given["pred_bboxes"][0, 0, 1, 2] = INF
    found = rtdetr_loss(**given)
    assert 1 in found.queries.tolist()[:2]
    assert found.terms[1] == INF
    assert found.terms[2].isnan()


@pytest.mark.parametrize(("form", "finite"), [("varifocal", False), ("focal", True), ("bce", True)])
def test_gradient_of_an_infinite_logit_that_answers_rightly(form, finite):
    """Upstream: NaN for varifocal, whose weight multiplies it with 0; NaN for focal, where ours costs nothing."""
    given = example(**FORMS[form])
    given["pred_scores"] = given["pred_scores"].clone()
    given["pred_scores"][0, 1, 3, 1] = INF
    given, inputs = leaves(given, "pred_scores")
    found = rtdetr_loss(**given)
    assert found.queries[2] == 3
    assert found.terms[0].item() == (pytest.approx(2, abs=1) if form == "focal" else INF)
    (gradient,) = torch.autograd.grad(found.total, inputs)
    assert gradient[0, 1, 3, 1].isfinite() == finite
    gradient[0, 1, 3, 1] = 0
    assert gradient.isfinite().all()


def test_a_negative_width_is_accepted():
    given = example()
    given["pred_bboxes"] = given["pred_bboxes"].clone()
    given["pred_bboxes"][0, 0, 0, 2] = -0.2
    assert rtdetr_loss(**given).terms.isfinite().all()


@EACH_FORM
@pytest.mark.parametrize("size", [18.0, 100.0, 1e4])
def test_saturated_logits_are_finite(form, size):
    given = example(**FORMS[form])
    given["pred_scores"] = given["pred_scores"].sign() * size
    given, inputs = leaves(given, "pred_scores")
    found = rtdetr_loss(**given)
    assert found.total.isfinite()
    assert torch.autograd.grad(found.total, inputs)[0].isfinite().all()


def test_a_saturated_negative_of_the_focal_loss():
    """B3: at 1000 the value is 750 and the gradient 0.75."""
    scores = torch.full((1, 1, 1), 1000.0, requires_grad=True)
    nothing = torch.empty(0, dtype=torch.int64)
    found = class_sums(scores, nothing, nothing, torch.empty(0), ClassForm("focal", 1.5, 0.25))
    assert found.item() == 750
    assert torch.autograd.grad(found, scores)[0].item() == 0.75


# ------------------------------------------------------------------------------------------- against autograd


def dense_class_term(form, scores, images, entries, quality):
    """B3 with one-hot rows, summed over each image."""
    classes = scores.shape[2]
    label = torch.zeros_like(scores)
    label[images, entries // classes] = one_hot(entries % classes, classes).to(scores.dtype)
    soft = torch.zeros_like(scores)
    soft[images, entries // classes, entries % classes] = quality.to(scores.dtype)
    target = label if form.kind == "focal" else soft
    entropy = scores.clamp(min=0) - scores * target + torch.log1p(torch.exp(-scores.abs()))
    p = scores.sigmoid()
    weight = torch.ones_like(scores)
    if form.kind == "varifocal":
        weight = form.alpha * p**form.gamma * (1 - label) + soft * label
    if form.kind == "focal":
        weight = (1 - (p * label + (1 - p) * (1 - label))) ** form.gamma
        if form.alpha > 0:
            weight = weight * (form.alpha * label + (1 - form.alpha) * (1 - label))
    return (entropy * weight).sum((1, 2))


def class_inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    scores = (3 * torch.randn(5, 7, 4, generator=generator, dtype=torch.float64)).to(dtype)
    images = torch.tensor([0, 0, 2, 3, 3, 3])
    entries = torch.tensor([1, 26, 13, 0, 7, 10])
    return scores, images, entries, torch.rand(6, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("counts", [None, [2, 0, 1, 3, 0]], ids=["whole", "blocks"])
@pytest.mark.parametrize("gamma", [0.0, 1.0, 1.5, 2.0, 3.0])
@pytest.mark.parametrize(
    ("kind", "alpha"), [("varifocal", 0.25), ("focal", 0.25), ("focal", 0.0), ("focal", -1.0), ("bce", 0.25)]
)
def test_class_term_is_the_dense_one(monkeypatch, kind, alpha, gamma, counts):
    monkeypatch.setattr(_query_class, "_ELEMENTS", 40)  # two blocks and a rest
    form = ClassForm(kind, gamma, alpha)
    scores, *pairs = class_inputs()
    ours, theirs = scores.clone().requires_grad_(), scores.clone().requires_grad_()
    found = class_sums(ours, *pairs, form, scale=0.7, counts=counts)
    expected = 0.7 * dense_class_term(form, theirs, *pairs)
    torch.testing.assert_close(found, expected)
    weights = torch.tensor([1.0, 2.0, 0.5, -1.0, 3.0], dtype=torch.float64)
    for factor in (torch.ones_like(weights), weights):
        (gradient,) = torch.autograd.grad(found, ours, factor, retain_graph=True)
        (dense,) = torch.autograd.grad(expected, theirs, factor, retain_graph=True)
        torch.testing.assert_close(gradient, dense)


def test_class_term_keeps_the_digits_of_quiet_negatives():
    """The sum `z - logsigmoid(z)` loses them in float32."""
    scores = torch.full((1, 1, 3), -12.0)
    nothing = torch.empty(0, dtype=torch.int64)
    found = class_sums(scores, nothing, nothing, torch.empty(0), ClassForm("bce", 0, 0))
    assert found.item() == pytest.approx(3 * math.log1p(math.exp(-12)), rel=1e-6)


def test_class_term_of_half_scores_is_rounded_once():
    scores, *pairs = class_inputs(torch.bfloat16)
    scores = scores.requires_grad_()
    wide = scores.detach().float().requires_grad_()
    form = ClassForm("varifocal", 1.5, 0.25)
    found, expected = (class_sums(some, *pairs, form, scale=1e-3) for some in (scores, wide))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    scale = torch.full_like(found, 65536.0)
    (gradient,) = torch.autograd.grad(found, scores, scale)
    assert torch.equal(gradient, torch.autograd.grad(expected, wide, scale)[0].bfloat16())


def test_class_term_without_gradient_keeps_nothing():
    scores, *pairs = class_inputs()
    found = class_sums(scores, *pairs, ClassForm("focal", 1.5, 0.25))
    assert not found.requires_grad
    with torch.no_grad():
        again = class_sums(scores.requires_grad_(), *pairs, ClassForm("focal", 1.5, 0.25))
    assert torch.equal(found, again)


def autograd_box_terms(boxes, others):
    """B1 by autograd."""
    low, high = boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2
    other_low, other_high = others[:, :2] - others[:, 2:] / 2, others[:, :2] + others[:, 2:] / 2
    shared = (torch.minimum(high, other_high) - torch.maximum(low, other_low)).clamp(min=0).prod(1)
    hull = (torch.maximum(high, other_high) - torch.minimum(low, other_low)).prod(1) + 1e-7
    union = boxes[:, 2:].prod(1) + others[:, 2:].prod(1) - shared + 1e-7
    iou = shared / union
    return (boxes - others).abs().sum(1), 1 - (iou - (hull - union) / hull), iou


BOX_PAIRS = {
    "ordinary": ((0.4, 0.4, 0.3, 0.2), (0.5, 0.45, 0.2, 0.3)),
    "identical": ((0.5, 0.5, 0.25, 0.25), (0.5, 0.5, 0.25, 0.25)),
    "touching": ((0.25, 0.5, 0.5, 0.5), (0.75, 0.5, 0.5, 0.25)),
    "apart": ((0.2, 0.2, 0.1, 0.1), (0.8, 0.7, 0.1, 0.2)),
    "contained": ((0.5, 0.5, 0.125, 0.25), (0.5, 0.5, 0.5, 0.5)),
    "thin": ((0.5, 0.5, 0.9, 1e-4), (0.4, 0.5, 0.8, 2e-4)),
    "point": ((0.5, 0.5, 0.0, 0.0), (0.5, 0.5, 0.5, 0.5)),
    "points": ((0.5, 0.5, 0.0, 0.0), (0.25, 0.5, 0.0, 0.0)),
    "inverted": ((0.5, 0.5, -0.2, 0.3), (0.5, 0.5, 0.4, 0.4)),
}


@pytest.mark.parametrize("pair", BOX_PAIRS.values(), ids=BOX_PAIRS)
def test_box_terms_and_gradients_are_those_of_autograd(pair):
    boxes, others = (torch.tensor([box, box], dtype=torch.float64) for box in pair)
    ours, theirs = boxes.clone().requires_grad_(), boxes.clone().requires_grad_()
    found = pair_terms([ours], [torch.tensor([1, 0])], others)
    expected = autograd_box_terms(theirs, others)
    assert not found.iou.requires_grad
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other)
    for mine, other in ((found.distance, expected[0]), (found.loss, expected[1])):
        (gradient,) = torch.autograd.grad(mine.sum(), ours, retain_graph=True)
        (by_autograd,) = torch.autograd.grad(other.sum(), theirs, retain_graph=True)
        torch.testing.assert_close(gradient, by_autograd, rtol=1e-9, atol=1e-9)


def test_box_gradients_of_small_boxes_keep_their_digits():
    """A box around a point: U = H, so that the slope of the GIoU is 0; float32 corners would leave 1e-2."""
    box = torch.tensor([[0.125, 0.0, 0.001, 0.001]], requires_grad=True)
    found = pair_terms([box], [torch.tensor([0])], torch.tensor([[0.125, 0.0, 0.0, 0.0]]))
    (gradient,) = torch.autograd.grad(found.loss.sum(), box)
    assert gradient[0, 2:].abs().max() < 1e-6


def test_targets_of_box_terms_get_no_gradient():
    found = pair_terms([torch.rand(2, 4)], [torch.tensor([1, 0])], torch.rand(2, 4, requires_grad=True))
    assert not any(term.requires_grad for term in found)


def test_box_terms_of_several_tensors_share_rows():
    first, second = torch.rand(3, 4, requires_grad=True), torch.rand(2, 2, 4, requires_grad=True)
    rows = [torch.tensor([2, 2]), torch.tensor([3])]
    found = pair_terms([first, second], rows, torch.rand(3, 4))
    of_first, of_second = torch.autograd.grad(found.distance.sum(), [first, second])
    assert of_first.abs().sum(1).tolist() == [0, 0, pytest.approx(of_first[2].abs().sum().item())]
    assert of_first[2].abs().sum() > 0
    assert of_second.view(4, 4).abs().sum(1).count_nonzero() == 1


@BOTH_PATHS
@EACH_FORM
def test_gradcheck(form, path):
    given = random_batch(2, (2, 0, 1), 4, seed=5, dtype=torch.float64) | FORMS[form] | {"path": path}
    given |= {
        "dn_bboxes": random_batch(1, (1, 1, 1), 4, seed=6, dtype=torch.float64)["pred_bboxes"],
        "dn_scores": random_batch(1, (1, 1, 1), 4, seed=7, dtype=torch.float64)["pred_scores"],
        "dn_pos_idx": torch.tensor([0, 1, 0]),
        "dn_gt_idx": torch.tensor([0, 1, 2]),
        "dn_pos_counts": [2, 0, 1],
        "dn_gt_counts": [2, 0, 1],
    }
    names = ("pred_bboxes", "pred_scores", "dn_bboxes", "dn_scores")
    given, inputs = leaves(given, *names)

    def terms(**some):
        return rtdetr_loss(**given | some).terms

    def of_scores(main, denoised):
        return terms(pred_scores=main, dn_scores=denoised)

    def of_boxes(main, denoised):
        # The IoU is a constant of the class terms: they move with the boxes, and have no gradient there.
        return terms(pred_bboxes=main, dn_bboxes=denoised)[[1, 2, 4, 5, 7, 8]]

    assert torch.autograd.gradcheck(of_scores, inputs[1::2])
    assert torch.autograd.gradcheck(of_boxes, inputs[::2])


def test_a_graph_serves_twice():
    given, inputs = leaves(example(3), "pred_bboxes", "pred_scores")
    total = rtdetr_loss(**given).total
    first = torch.autograd.grad(total, inputs, retain_graph=True)
    second = torch.autograd.grad(total, inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# ------------------------------------------------------------------------------------------ paths and tracing


@EACH_FORM
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_both_paths_agree(form, dtype):
    given = random_batch(3, (4, 0, 9), 6, seed=2) | FORMS[form]
    given["pred_scores"] = given["pred_scores"].to(dtype)
    given, inputs = leaves(given, "pred_bboxes", "pred_scores")
    sparse, static = (rtdetr_loss(**given, path=path) for path in ("sparse", "static"))
    assert torch.equal(sparse.queries, static.queries)
    assert torch.equal(sparse.targets, static.targets)
    torch.testing.assert_close(sparse.terms, static.terms)
    for mine, other in zip(*(torch.autograd.grad(one.total, inputs) for one in (sparse, static)), strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize(("backend", "form"), [("eager", "focal"), ("eager", "bce"), ("aot_eager", "varifocal")])
def test_compiles_without_a_break_with_the_matcher_inside(backend, form):
    torch._dynamo.reset()
    compiled = torch.compile(rtdetr_loss, fullgraph=True, backend=backend)
    for seed, sizes in enumerate([(2, 1), (4, 3)]):
        given, inputs = leaves(random_batch(3, sizes, 5, seed=seed) | FORMS[form], "pred_bboxes", "pred_scores")
        found, expected = compiled(**given), rtdetr_loss(**given)
        assert torch.equal(found.queries, expected.queries)
        assert torch.equal(found.targets, expected.targets)
        torch.testing.assert_close(found.terms, expected.terms)
        for mine, other in zip(*(torch.autograd.grad(one.total, inputs) for one in (found, expected)), strict=True):
            torch.testing.assert_close(mine, other)


def test_the_second_batch_compiles_for_all_others():
    torch._dynamo.reset()
    graphs = []

    def backend(module, _):
        graphs.append(module)
        return module.forward

    compiled = torch.compile(rtdetr_loss, fullgraph=True, backend=backend)
    for seed, sizes in enumerate([(2, 1), (4, 3), (3, 2), (5, 7), (2, 9)]):
        compiled(**random_batch(2, sizes, 5, seed=seed))
    assert len(graphs) == 2


@pytest.mark.parametrize("denoising", [False, True])
def test_classes_compile(denoising):
    torch._dynamo.reset()
    given = example(3, denoising=True)
    loss = RTDETRDetectionLoss(3, use_vfl=True)
    meta = {"dn_pos_idx": list(given["dn_pos_idx"].split([4, 2])), "dn_num_group": 2}
    meta |= {"dn_gt_idx": list(given["dn_gt_idx"].split([2, 1]))}
    arguments = [(given["pred_bboxes"], given["pred_scores"]), batch_of(given)]
    if denoising:
        arguments += [given["dn_bboxes"], given["dn_scores"], meta]
    found = torch.compile(loss, fullgraph=True, backend="eager")(*arguments)
    expected = loss(*arguments)
    assert list(found) == list(expected)
    torch.testing.assert_close(dict(found), expected)


def test_static_path_traces_without_values():
    given = example(3, denoising=True)
    with FakeTensorMode() as mode:
        fake = {k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in given.items()}
        found = rtdetr_loss(**fake, path="static")
    assert found.terms.shape == (12,)
    assert found.queries.shape == (9,)


def test_denoising_views_of_one_split_are_read_in_place():
    """The model splits its decoder's outputs along the queries."""
    given = example(denoising=True)
    both = {
        name: torch.cat([given[f"dn_{name}"], given[f"pred_{name}"]], dim=2).requires_grad_()
        for name in ("bboxes", "scores")
    }
    parts = {name: value.split([8, 4], dim=2) for name, value in both.items()}
    views = {f"dn_{name}": part[0] for name, part in parts.items()}
    views |= {f"pred_{name}": part[1] for name, part in parts.items()}
    found = rtdetr_loss(**given | views)
    given, inputs = leaves(given, "dn_bboxes", "pred_bboxes", "dn_scores", "pred_scores")
    expected = rtdetr_loss(**given)
    torch.testing.assert_close(found.terms, expected.terms)
    apart = torch.autograd.grad(expected.total, inputs)
    whole = torch.autograd.grad(found.total, [both["bboxes"], both["scores"]])
    torch.testing.assert_close(list(whole), [torch.cat(apart[:2], dim=2), torch.cat(apart[2:], dim=2)])


# ----------------------------------------------------------------------------------- reduction, ignored queries


@BOTH_PATHS
@EACH_FORM
def test_contributions_of_images_sum_to_the_loss(form, path):
    given, inputs = leaves(random_batch(3, (4, 0, 9), 6) | FORMS[form], "pred_bboxes", "pred_scores")
    whole, parts = rtdetr_loss(**given, path=path), rtdetr_loss(**given, path=path, reduction="none")
    assert parts.terms.shape == (6, 3)
    assert parts.total.shape == (3,)
    torch.testing.assert_close(parts.terms.sum(1), whole.terms)
    torch.testing.assert_close(parts.total, parts.terms.sum(0))
    assert not parts.terms[[1, 2, 4, 5], 1].any()
    assert parts.terms[[0, 3], 1].all()
    of_image = torch.autograd.grad(parts.total[2], inputs)
    assert not any(gradient[:, :2].any() for gradient in of_image)
    assert all(gradient[:, 2].any() for gradient in of_image)


@BOTH_PATHS
@EACH_FORM
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_ignored_queries_are_as_if_left_out(form, path, reduction):
    """The other queries alone, with the pairs that they have in the whole matching."""
    given = random_batch(1, (4, 2, 0), 8, seed=4) | FORMS[form] | {"reduction": reduction, "path": path}
    pairs = rtdetr_loss(**given)
    images = torch.tensor([0] * 4 + [1] * 2)
    ignored = torch.zeros(3, 8, dtype=torch.bool)
    ignored[images[0], pairs.queries[0]] = ignored[images[4], pairs.queries[4]] = True
    for image in range(3):  # three a image, so that the rest is a tensor
        for query in range(8):
            if ignored[image].sum() < 3 and query not in pairs.queries[images == image]:
                ignored[image, query] = True
    rows = (~ignored).nonzero()[:, 1].view(3, 5)
    given, (boxes, scores) = leaves(given, "pred_bboxes", "pred_scores")
    found = rtdetr_loss(**given, ignore_mask=ignored)
    assert torch.equal(found.queries, pairs.queries)

    left = []
    for image in range(3):
        own = [(q, t) for q, t, i in zip(*pairs[2:], images, strict=True) if i == image and not ignored[image, q]]
        places = [(rows[image] == query).nonzero().item() for query, _ in own]
        left.append((torch.tensor(places, dtype=torch.int64), torch.tensor([t for _, t in own], dtype=torch.int64)))
    kept = {
        name: value.gather(2, rows[None, :, :, None].expand(1, -1, -1, value.shape[3]))
        for name, value in (("boxes", boxes), ("scores", scores))
    }
    alone = DETRLoss(5, **FORMS[form])(kept["boxes"], kept["scores"], batch_of(given), match_indices=left)
    terms = found.terms if reduction == "sum" else found.terms.sum(1)
    torch.testing.assert_close(terms[:3], torch.stack(list(alone.values())[:3]))
    mine = torch.autograd.grad(found.total.sum(), [boxes, scores])
    other = torch.autograd.grad(sum(alone.values()), [boxes, scores])
    for gradient, expected in zip(mine, other, strict=True):
        torch.testing.assert_close(gradient, expected)
        assert not gradient[0][ignored].any()


@BOTH_PATHS
@EACH_FORM
def test_gains_count_beside_ignored_queries(form, path):
    given = random_batch(1, (2, 1), 4) | FORMS[form] | {"path": path, "ignore_mask": torch.eye(4)[:2].bool()}
    gains = [3.0, 0.5, 4.0]
    plain, weighed = (
        rtdetr_loss(**given, loss_gain=dict(zip(("class", "bbox", "giou"), some, strict=True)))
        for some in ([1.0] * 3, gains)
    )
    torch.testing.assert_close(weighed.terms[:3], plain.terms[:3] * torch.tensor(gains))


@BOTH_PATHS
@EACH_FORM
@pytest.mark.parametrize("left", [1, 2])
def test_a_query_that_is_left_alone_counts_as_one(form, path, left):
    """The image without targets: its class term is that of the queries that are left."""
    given = random_batch(1, (0,), 3) | FORMS[form] | {"path": path}
    ignored = torch.arange(3)[None] >= left
    found = rtdetr_loss(**given, ignore_mask=ignored)
    fewer = {name: given[name][:, :, :left] for name in ("pred_bboxes", "pred_scores")}
    torch.testing.assert_close(found.total, rtdetr_loss(**given | fewer).total)


@BOTH_PATHS
def test_ignored_queries_may_be_broken(path):
    given = random_batch(2, (2, 1), 4)
    ignored = torch.zeros(2, 4, dtype=torch.bool)
    ignored[0, 3] = True
    given["pred_scores"][:, 0, 3] = NAN
    given["pred_bboxes"][:, 0, 3] = INF
    given, inputs = leaves(given | FORMS["varifocal"], "pred_bboxes", "pred_scores")
    found = rtdetr_loss(**given, ignore_mask=ignored, path=path)
    assert found.terms.isfinite().all()
    (of_scores,) = torch.autograd.grad(found.total, inputs[1:])
    assert of_scores.isfinite().all()


@EACH_FORM
def test_every_query_ignored(form):
    found = rtdetr_loss(**example() | FORMS[form], ignore_mask=torch.ones(2, 4, dtype=torch.bool))
    assert found.terms.tolist() == [0] * 6


# ------------------------------------------------------------------------------------------------- the classes


def test_detr_loss_names_and_zeros():
    given = example()
    entries = DETRLoss(3, use_vfl=True)(given["pred_bboxes"], given["pred_scores"].requires_grad_(), batch_of(given))
    names = ["loss_class", "loss_bbox", "loss_giou"]
    assert list(entries) == [*names, *(f"{name}_aux" for name in names)]
    assert all(entry.shape == () for entry in entries.values())
    assert entries["loss_class"].requires_grad
    assert not entries["loss_class_aux"].requires_grad
    assert entries["loss_class_aux"] == 0
    alone = DETRLoss(3, aux_loss=False)(given["pred_bboxes"], given["pred_scores"], batch_of(given), postfix="_x")
    assert list(alone) == [f"{name}_x" for name in names]


@EACH_FORM
def test_detr_loss_is_the_function(form):
    given = random_batch(3, (3, 0, 2), 5)
    chosen = FORMS[form] | {"gamma": 2.0, "alpha": 0.75, "use_uni_match": True, "uni_match_ind": 1}
    gain = {"class": 3.0, "bbox": 0.5, "giou": 4.0}
    entries = DETRLoss(5, gain, **chosen)(given["pred_bboxes"], given["pred_scores"], batch_of(given))
    found = rtdetr_loss(**given, **chosen, loss_gain=gain)
    assert torch.equal(torch.stack(list(entries.values())), found.terms)


def test_every_tensor_has_a_say_in_where_the_pairs_are_found(monkeypatch):
    """A float64 one among them cannot go through kernels."""
    asked = []
    monkeypatch.setattr(rtdetr, "choose_matched_path", lambda *given: asked.append(given) or "sparse")
    given = random_batch(3, (3, 0, 2), 5)
    rtdetr_loss(**given)
    DETRLoss(5)(given["pred_bboxes"], given["pred_scores"], batch_of(given))
    for path, queries, *tensors in asked:
        assert (path, queries) == ("auto", given["pred_bboxes"].shape[2])
        wanted = [given[name] for name in ("pred_bboxes", "pred_scores", "cls", "bboxes")]
        assert all(one is other for one, other in zip(tensors, wanted, strict=True))
    assert len(asked) == 2


def test_given_pairs_serve_every_layer():
    given = example(4)
    pairs = [(torch.tensor([0, 1]), torch.tensor([0, 1])), (torch.tensor([2]), torch.tensor([2]))]
    entries = DETRLoss(3)(given["pred_bboxes"], given["pred_scores"], batch_of(given), match_indices=pairs)
    expected = [2.715603, 2.831014, 1.777334, 10.282151, 8.235048, 5.651705]  # run on 8.4.190
    assert [entry.item() for entry in entries.values()] == pytest.approx(expected, abs=2e-6)


def test_detection_loss_without_and_with_denoising():
    given = example(3, denoising=True)
    loss = RTDETRDetectionLoss(3, use_vfl=True)
    predictions = given["pred_bboxes"], given["pred_scores"]
    plain = loss(predictions, batch_of(given))
    assert list(plain)[6:] == [f"{name}_dn" for name in list(plain)[:6]]
    assert [entry.item() for entry in plain.values()][6:] == [0] * 6

    meta = {"dn_pos_idx": given["dn_pos_idx"].split([4, 2]), "dn_num_group": 2, "dn_num_split": [8, 4]}
    every = meta | {"dn_gt_idx": given["dn_gt_idx"].split([2, 1])}
    found = rtdetr_loss(**given).terms
    for one in (meta, every):  # before 8.4.125 the ground truths were not listed: all, in order
        entries = loss(predictions, batch_of(given), given["dn_bboxes"], given["dn_scores"], one)
        assert list(entries) == list(plain)
        torch.testing.assert_close(torch.stack(list(entries.values())), found, rtol=0, atol=0)
    assert not entries["loss_class_aux_dn"].requires_grad


def test_denoising_takes_a_subset_and_negative_places():
    given = example(denoising=True)
    given |= {"dn_pos_idx": torch.tensor([0, -4, 0, 4]), "dn_gt_idx": torch.tensor([1, 2]), "dn_pos_counts": [2, 2]}
    found = rtdetr_loss(**given | {"dn_gt_counts": [1, 1]})
    assert found.terms[6:9].tolist() == pytest.approx([1.956482, 2.678257, 1.706179], abs=1e-6)  # run on 8.4.190


# ------------------------------------------------------------------------------------- dtypes, inputs, errors


@EACH_FORM
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_of_scores(form, dtype):
    given = example(**FORMS[form])
    given["pred_scores"] = given["pred_scores"].to(dtype)
    given, inputs = leaves(given, "pred_bboxes", "pred_scores")
    found = rtdetr_loss(**given)
    assert found.terms.dtype == torch.promote_types(dtype, torch.float32)
    assert [g.dtype for g in torch.autograd.grad(found.total, inputs)] == [torch.float32, dtype]
    assert found.terms[0].item() == pytest.approx(CLASS_TERMS[form][0], rel=1e-2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_boxes_that_upstream_rejects(dtype):
    given = example()
    given |= {name: given[name].to(dtype) for name in ("pred_bboxes", "bboxes")}
    given, inputs = leaves(given, "pred_bboxes")
    found = rtdetr_loss(**given)
    assert found.terms.dtype == torch.promote_types(dtype, torch.float32)
    assert found.terms[:3].tolist() == pytest.approx([1.2989279, 2.3110454, 1.6626315], rel=2e-2)
    assert torch.autograd.grad(found.total, inputs)[0].dtype == dtype


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(dtype):
    expected = rtdetr_loss(**example(3)).terms
    with torch.autocast("cpu", dtype):
        assert torch.equal(rtdetr_loss(**example(3)).terms, expected)


@BOTH_PATHS
def test_inputs_stay_as_they_are(path):
    given, inputs = leaves(example(3, denoising=True), "pred_bboxes", "pred_scores", "dn_bboxes", "dn_scores")
    before = {name: value.detach().clone() for name, value in given.items() if isinstance(value, torch.Tensor)}
    torch.autograd.grad(rtdetr_loss(**given, path=path).total, inputs)
    assert all(torch.equal(given[name], value) for name, value in before.items())


def test_classes_of_int32_are_accepted():
    given = example()
    found = rtdetr_loss(**given | {"cls": given["cls"].int()})
    assert torch.equal(found.terms, rtdetr_loss(**given).terms)


ERRORS = {
    "pred_bboxes of three axes": (ValueError, "pred_bboxes", {"pred_bboxes": torch.zeros(2, 4, 4)}),
    "pred_bboxes of integers": (TypeError, "pred_bboxes", {"pred_bboxes": torch.zeros(1, 2, 4, 4).long()}),
    "pred_bboxes of other queries": (ValueError, "pred_bboxes", {"pred_bboxes": torch.zeros(1, 2, 5, 4)}),
    "no layer": (ValueError, "pred_bboxes", {n: torch.zeros(0, 2, 4, 4) for n in ("pred_bboxes", "pred_scores")}),
    "no image": (ValueError, "pred_bboxes", {n: torch.zeros(1, 0, 4, 4) for n in ("pred_bboxes", "pred_scores")}),
    "no query": (ValueError, "pred_bboxes", {n: torch.zeros(1, 2, 0, 4) for n in ("pred_bboxes", "pred_scores")}),
    "num_classes": (ValueError, "num_classes", {"num_classes": 4}),
    "cls of floats": (TypeError, "cls", {"cls": torch.zeros(3)}),
    "cls of two axes": (ValueError, "cls", {"cls": torch.zeros(3, 1).long()}),
    "cls beyond the classes": (ValueError, "cls", {"cls": torch.tensor([0, 3, 1])}),
    "cls below 0": (ValueError, "cls", {"cls": torch.tensor([0, -1, 1])}),
    "bboxes of another number": (ValueError, "bboxes", {"bboxes": torch.zeros(2, 4)}),
    "bboxes of integers": (TypeError, "bboxes", {"bboxes": torch.zeros(3, 4).long()}),
    "gt_groups of another sum": (ValueError, "gt_groups", {"gt_groups": [2, 2]}),
    "gt_groups below 0": (ValueError, "gt_groups", {"gt_groups": [4, -1]}),
    "gt_groups of more images": (ValueError, "gt_groups", {"gt_groups": [1, 1, 1]}),
    "loss_gain": (ValueError, "loss_gain has no 'giou'", {"loss_gain": {"class": 1, "bbox": 1}}),
    "uni_match_ind": (IndexError, "uni_match_ind", {"use_uni_match": True}),
    "reduction": (ValueError, "reduction", {"reduction": "mean"}),
    "path": (ValueError, "path", {"path": "fast"}),
    "ignore_mask of numbers": (TypeError, "ignore_mask", {"ignore_mask": torch.zeros(2, 4)}),
    "ignore_mask of another shape": (ValueError, "ignore_mask", {"ignore_mask": torch.zeros(2, 3).bool()}),
    "dn_scores missing": (ValueError, "dn_scores", {"dn_scores": None}),
    "dn_bboxes of other images": (
        ValueError,
        "dn_bboxes",
        {"dn_bboxes": torch.zeros(1, 3, 8, 4), "dn_scores": torch.zeros(1, 3, 8, 3)},
    ),
    "dn_pos_idx of floats": (TypeError, "dn_pos_idx", {"dn_pos_idx": torch.zeros(6)}),
    "dn_pos_idx beyond the queries": (IndexError, "dn_pos_idx", {"dn_pos_idx": torch.tensor([0, 1, 4, 8, 0, 4])}),
    "dn_gt_idx beyond the truths": (IndexError, "dn_gt_idx", {"dn_gt_idx": torch.tensor([0, 1, 3])}),
    "dn_pos_counts of another sum": (ValueError, "dn_pos_counts", {"dn_pos_counts": [4, 1]}),
    "dn_gt_counts of one image": (ValueError, "dn_gt_counts", {"dn_gt_counts": [3]}),
    "dn_num_group": (ValueError, "dn_pos_idx", {"dn_num_group": 1}),
}


@BOTH_PATHS
@pytest.mark.parametrize(("kind", "name", "changes"), ERRORS.values(), ids=ERRORS)
def test_errors_name_the_argument(kind, name, changes, path):
    with pytest.raises(kind, match=name):
        rtdetr_loss(**example(denoising=True, path=path) | changes)


def test_errors_of_the_classes():
    given = example(denoising=True)
    predictions = given["pred_bboxes"], given["pred_scores"]
    with pytest.raises(ValueError, match="dn_bboxes"):
        RTDETRDetectionLoss(3)(predictions, batch_of(given), dn_meta={})
    with pytest.raises(ValueError, match="match_indices"):
        DETRLoss(3)(*predictions, batch_of(given), match_indices=[])
    meta = {"dn_pos_idx": [torch.tensor([0])], "dn_gt_idx": [], "dn_num_group": 1}
    with pytest.raises(ValueError, match="dn_gt_idx"):
        RTDETRDetectionLoss(3)(predictions, batch_of(given), given["dn_bboxes"], given["dn_scores"], meta)


# ------------------------------------------------------------------------------------------ denoising indices


def as_lists(found):
    return [some.tolist() for some in found.dn_pos_idx], [some.tolist() for some in found.dn_gt_idx]


def test_denoising_indices_of_the_example():
    found = denoising_indices([2, 1], 4, 5)
    assert as_lists(found) == ([[0, 1, 4, 5], [0, 4]], [[0, 1], [2]])
    assert (found.dn_num_group, found.dn_num_split) == (2, [8, 4])
    former = denoising_indices([2, 1], 4, 5, layout="halves")
    assert as_lists(former) == ([[0, 1, 2, 3], [0, 2]], [[0, 1], [2]])
    assert (former.dn_num_group, former.dn_num_split) == (2, [8, 4])


def test_denoising_indices_cap_crowded_images():
    generator = torch.Generator().manual_seed(0)
    found = denoising_indices([7, 0, 2], 4, 5, generator=generator)
    positions, chosen = as_lists(found)
    assert positions == [[0, 1, 2, 3, 4], [], [0, 1]]
    assert chosen[0] == sorted(set(chosen[0])) != [0, 1, 2, 3, 4]
    assert max(chosen[0]) < 7
    assert chosen[1:] == [[], [7, 8]]
    assert (found.dn_num_group, found.dn_num_split) == (1, [10, 4])
    every = denoising_indices([7, 0, 2], 4, 5, cap=False)
    assert as_lists(every)[1] == [list(range(7)), [], [7, 8]]
    assert every.dn_num_split == [14, 4]


@pytest.mark.parametrize(("groups", "wanted"), [([0, 0], 5), ([], 5), ([1], 0)])
def test_nothing_to_denoise(groups, wanted):
    assert denoising_indices(groups, 4, wanted) is None


def test_denoising_indices_reject():
    with pytest.raises(ValueError, match="layout"):
        denoising_indices([1], 4, layout="pairs")
    with pytest.raises(ValueError, match="gt_groups"):
        denoising_indices([1, -1], 4)
