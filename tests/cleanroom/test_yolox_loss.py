"""Total loss of YOLOX's head: worked example and edges of specification yolox_losses.md, section 3.

Every behaviour is tested on both paths, against the spec's numbers or a plain formula that autograd differentiates.
"""

import copy
import math
import pickle

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import binary_cross_entropy_with_logits as bce
from torch.nn.functional import one_hot

from cases.yolox_loss import WAVE_LABELS, example
from cleanroom.assign.simota import simota_assign
from cleanroom.losses.yolox import YOLOXLoss, yolox_decoded_loss, yolox_loss
from cleanroom.losses.yolox_iou import iou_loss
from cleanroom.yolox_boxes import yolox_decode

STRIDES, CLASSES = (8, 16), 2
FIRST, SECOND = WAVE_LABELS
RELEASE = {"radius": 2.5, "penalty": 1e5, "region": "union"}
HEAD = {"radius": 1.5, "penalty": 1e6, "region": "centre"}
PATHS = pytest.mark.parametrize("path", ["sparse", "static"])
VARIANTS = pytest.mark.parametrize("variant", ["release", "head"])
ERAS = {"release": RELEASE, "head": HEAD}
#: Total without L1, box, objectness, class and L1 term, total; and the norms of their gradients by the raw maps.
VALUES = {
    "release": (12.056066, 3.864706, 6.847497, 1.343862, 1.449562, 13.505628),
    "head": (12.112722, 3.766590, 7.007046, 1.339085, 1.134452, 13.247174),
}
NORMS = {
    "release": (6.306102, 6.195989, 1.108574, 0.384329, 1.414214, 7.114189),
    "head": (6.329948, 6.218216, 1.126254, 0.365493, 1.414214, 7.171829),
}
LEVELS = {"release": (1.654284, 6.919179), "head": (1.886823, 6.919179)}


def inputs(labels=WAVE_LABELS, images=1, dtype=torch.float32, rows=4):
    """Labels and raw maps of the worked example, the maps as leaves."""
    given = dict(example(labels, images, rows).tensors)
    rows = given.pop("labels")
    return rows.to(dtype), [raw.to(dtype).requires_grad_() for raw in given.values()]


def run(labels, maps, **settings):
    return yolox_loss(labels, maps, strides=STRIDES, num_classes=CLASSES, **settings)


def norms(loss, maps):
    return [grad.norm().item() for grad in torch.autograd.grad(loss, maps, retain_graph=True)]


def pairs(found, image=0):
    """{anchor: ground truth} of an image."""
    return {anchor: found.matched_gt[image, anchor].item() for anchor in found.fg_mask[image].nonzero()[:, 0].tolist()}


def random_inputs(seed, counts=(5, 0, 3), side=64, classes=3, dtype=torch.float64):
    """Images with boxes, raw maps of three levels that overlap them now and then, and labels with padding."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.zeros(len(counts), max(counts) + 2, 5, dtype=torch.float64)
    for image, count in enumerate(counts):
        labels[image, :count, 0] = torch.randint(classes, (count,), generator=generator)
        labels[image, :count, 1:3] = torch.rand(count, 2, generator=generator) * side
        labels[image, :count, 3:] = torch.rand(count, 2, generator=generator) * side / 2 + 4
    strides = (8, 16, 32)
    maps = [
        torch.randn(len(counts), 5 + classes, side // s, side // s, generator=generator, dtype=torch.float64)
        for s in strides
    ]
    return (
        labels.to(dtype),
        [raw.to(dtype).requires_grad_() for raw in maps],
        {"strides": strides, "num_classes": classes},
    )


def by_hand(labels, maps, found, strides, num_classes, ignore=None):
    """Box, objectness, class and L1 contributions of each image, from decisions and the definition."""
    rows = yolox_decode(maps, strides)
    raw = torch.cat([level[:, :4].flatten(2).mT for level in maps], 1)
    outputs, cells, stride = (
        rows.outputs,
        torch.stack([rows.x_shifts[0], rows.y_shifts[0]], 1),
        rows.strides[0, :, None],
    )
    part = found.fg_mask if ignore is None else found.fg_mask & ~ignore
    positives, terms = max(int(part.sum()), 1), []
    for image, mask in enumerate(part):
        truth = labels[image, found.matched_gt[image, mask]]
        boxes = outputs[image, mask, :4]
        loss = iou_loss(boxes, truth[:, 1:5]) if len(boxes) else boxes.sum(1)
        overlap = (1 - loss).clamp(min=0).sqrt().detach()
        target = one_hot(truth[:, 0].long(), num_classes) * overlap[:, None]
        every = bce(outputs[image, :, 4], mask.to(outputs.dtype), reduction="none")
        every = every if ignore is None else every[~ignore[image]]
        wanted = torch.cat([truth[:, 1:3] / stride[mask] - cells[mask], (truth[:, 3:5] / stride[mask] + 1e-8).log()], 1)
        terms.append(
            torch.stack(
                [
                    5 * loss.sum(),
                    every.sum(),
                    bce(outputs[image, mask, 5:], target, reduction="sum"),
                    (raw[image, mask] - wanted).abs().sum(),
                ]
            )
        )
    return torch.stack(terms, 1) / positives


# --- Worked example ----------------------------------------------------------------------------------------------


@PATHS
@VARIANTS
def test_worked_example(path, variant):
    labels, maps = inputs()
    with_l1 = run(labels, maps, use_l1=True, path=path, **ERAS[variant])
    without = run(labels, maps, path=path, **ERAS[variant])
    values = [without.total_loss, *with_l1[1:5], with_l1.total_loss]
    assert [value.item() for value in values] == pytest.approx(VALUES[variant], abs=1.5e-6)
    for loss, norm in zip(values, NORMS[variant], strict=True):
        assert math.hypot(*norms(loss, maps)) == pytest.approx(norm, abs=1.5e-6)
    assert norms(with_l1.total_loss, maps) == pytest.approx(LEVELS[variant], abs=1.5e-6)
    assert with_l1.num_fg.item() == 1
    assert (without.l1_loss.item(), without.l1_loss.requires_grad) == (0, False)
    assert pairs(with_l1) == ({5: 0, 19: 1} if variant == "release" else {6: 0, 19: 1})


@PATHS
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("masked", [False, True])
def test_against_the_plain_formula(path, reduction, masked):
    for seed in range(4):
        labels, maps, settings = random_inputs(seed)
        ignore = None
        if masked:
            ignore = torch.rand(3, 84, generator=torch.Generator().manual_seed(seed)) < 0.5
        found = yolox_loss(labels, maps, **settings, use_l1=True, path=path, reduction=reduction, ignore_mask=ignore)
        plain = by_hand(labels, maps, found, **settings, ignore=ignore)
        plain = plain if reduction == "none" else plain.sum(1)
        ours = torch.stack(found[1:5])
        assert torch.allclose(ours, plain, rtol=1e-11)
        assert torch.allclose(found.total_loss, plain.sum(0), rtol=1e-11)
        weights = torch.linspace(0.5, 2, ours.numel(), dtype=torch.float64).view(ours.shape)
        slopes = (torch.autograd.grad((terms * weights).sum(), maps, retain_graph=True) for terms in (ours, plain))
        for a, b in zip(*slopes, strict=True):
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


def test_an_ignored_anchor_is_still_assigned():
    labels, maps = inputs()
    ignore = torch.zeros(1, 20, dtype=torch.bool)
    ignore[0, 5] = True
    found = run(labels, maps, ignore_mask=ignore)
    assert pairs(found) == {5: 0, 19: 1}
    assert found.num_fg.item() == 0.5  # one of the two counts
    (first, _) = torch.autograd.grad(found.total_loss, maps)
    assert not first.flatten(2)[0, :, 5].any()


def test_contributions_of_an_image_touch_no_other():
    labels, maps, settings = random_inputs(2)
    found = yolox_loss(labels, maps, **settings, reduction="none")
    for grad in torch.autograd.grad(found.total_loss[0], maps):
        assert grad[0].any()
        assert not grad[1:].any()


@PATHS
def test_gradcheck(path):
    # The class term's soft labels are constants of the gradient, not of finite differences.
    labels, maps, settings = random_inputs(5, counts=(2, 1), side=32)

    def losses(*raw):
        found = yolox_loss(labels, raw, **settings, use_l1=True, path=path)
        return found.iou_loss, found.conf_loss, found.l1_loss

    assert torch.autograd.gradcheck(losses, maps)


# --- Which rows are ground truths --------------------------------------------------------------------------------


@PATHS
@pytest.mark.parametrize(
    ("rows", "same_as"),
    [
        ((FIRST, (0, 0, 0, 0, 0), SECOND), (FIRST, (0, 1e-30, 0, 0, 0))),  # a zero row counts, the last is dropped
        (((0, -30, 12, 10, 6), SECOND), ((0, -30, 12, 10, 6),)),  # a sum of 0 or less drops the last as well
    ],
    ids=["zero row", "negative sum"],
)
def test_the_first_rows_count(path, rows, same_as):
    labels, maps = inputs(rows)
    found = run(labels, maps, path=path)
    counted = sum(sum(row) > 0 for row in rows)
    assert found.matched_gt.max() < counted
    truths, _ = inputs(same_as)
    decoded = yolox_decode(maps, STRIDES)
    outputs = decoded.outputs.detach()
    direct = simota_assign(
        truths[..., 1:5], truths[..., 0], torch.tensor([counted]), outputs[..., :4], outputs[..., 5:],
        outputs[..., 4:5], decoded.strides, decoded.x_shifts, decoded.y_shifts, num_classes=2, path=path,
    )  # fmt: skip
    assert torch.equal(found.matched_gt, direct.matched_gt)


@PATHS
def test_a_row_of_nan_is_not_counted(path):
    nan = (0, math.nan, 12, 8, 8)
    found = run(*inputs((FIRST, nan)), path=path)
    alone = run(*inputs((FIRST,)), path=path)
    assert found.total_loss.item() == pytest.approx(alone.total_loss.item(), rel=1e-6)
    # Among the first rows it is a ground truth that no anchor is near to; its own class must exist.
    first = run(*inputs((nan, FIRST)), path=path)
    assert first.total_loss.isfinite()
    assert not first.fg_mask.any()


@PATHS
def test_further_columns_enter_the_count_only(path):
    labels, maps = inputs()
    plain = run(labels, maps, path=path).total_loss
    found = run(torch.nn.functional.pad(labels, (0, 1), value=0.5), maps, path=path)
    assert found.num_fg.item() == found.fg_mask.sum().item() / 4  # the padding rows count
    assert run(torch.nn.functional.pad(labels, (0, 1)), maps, path=path).total_loss.equal(plain)
    assert not run(torch.nn.functional.pad(labels, (0, 1), value=-90.0), maps, path=path).fg_mask.any()


@PATHS
def test_labels_of_other_kinds(path):
    labels, maps = inputs()
    plain = run(labels, maps, path=path)
    assert all(map(torch.equal, run(labels.long(), maps, path=path), plain))
    labels[0, 1, 0] = 0.9  # truncated
    assert run(labels, maps, path=path).total_loss.equal(plain.total_loss)


# --- Edges (3.8) -------------------------------------------------------------------------------------------------


@PATHS
@pytest.mark.parametrize("rows", [0, 4])
def test_no_ground_truth(path, rows):
    labels, maps = inputs((), rows=rows)
    found = run(labels, maps, use_l1=True, path=path)
    values = [value.item() for value in found[:6]]
    assert values == pytest.approx([13.855240, 0, 13.855240, 0, 0, 1], abs=2e-6)
    for loss in (found.iou_loss, found.cls_loss, found.l1_loss):
        assert norms(loss, maps) == [0, 0]


@PATHS
@pytest.mark.parametrize(("variant", "total"), [("release", 20.508043), ("head", 20.249590)])
def test_an_empty_image_is_all_negatives(path, variant, total):
    found = run(*inputs(images=2), use_l1=True, path=path, **ERAS[variant])
    assert found.total_loss.item() == pytest.approx(total, abs=3e-6)
    assert found.num_fg.item() == 1


@PATHS
def test_ground_truths_that_get_nothing(path):
    assert run(*inputs((FIRST, FIRST)), path=path).num_fg.item() == 0.5
    crowd = [(g % 2, 16 + g / 8, 16 - g / 8, 9 + g % 5, 11 + g % 7) for g in range(30)]
    found = run(*inputs(crowd), path=path)
    assert found.fg_mask.sum() <= 20
    assert found.num_fg.item() == pytest.approx(found.fg_mask.sum().item() / 30)


@PATHS
def test_a_ground_truth_without_area(path):
    labels, maps = inputs(((0, 12, 12, 0, 0),))
    found = run(labels, maps, use_l1=True, path=path)
    assert found.iou_loss.item() == 5
    assert norms(found.iou_loss, maps) == [0, 0]
    [anchor] = pairs(found)
    sides = torch.cat([raw.flatten(2) for raw in maps], 2)[0, 2:4, anchor]
    distance = (sides + 18.420681).abs().sum().item()
    assert found.l1_loss.item() > distance  # and that of the centre
    assert found.l1_loss.item() == pytest.approx(38.4, abs=1.5)


@PATHS
def test_a_ground_truth_outside_is_trained_on_one_anchor(path):
    found = run(*inputs((FIRST, (0, 60, 16, 10, 10))), path=path)
    assert list(pairs(found).values()).count(1) == 1
    assert found.iou_loss.item() > 2.5  # IoU 0 of one in two


@PATHS
def test_no_area_against_no_area_is_finite(path):
    labels, maps = inputs(((0, 12, 12, 0, 0),))
    with torch.no_grad():
        for raw in maps:
            raw[:, :2], raw[:, 2:4] = 0.5, -200.0
    found = run(labels, maps, path=path)
    assert found.fg_mask.any()
    assert all(value.isfinite() for value in found[:6])
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(found.total_loss, maps))


@PATHS
def test_no_candidate_is_all_background(path):
    found = run(*inputs(((0, 900, 900, 2, 2),)), path=path)
    assert not found.fg_mask.any()
    assert found.total_loss.item() == pytest.approx(13.855240, abs=2e-6)
    assert found.num_fg.item() == 1


@PATHS
def test_predictions_that_are_not_finite(path):
    labels, maps = inputs()
    spoilt = [raw.detach().clone() for raw in maps]
    spoilt[0][0, 2, 0, 3] = torch.nan  # a box that is not selected
    assert run(labels, spoilt, path=path).total_loss.item() == pytest.approx(12.056066, abs=2e-6)
    spoilt[0][0, 4, 0, 3] = torch.inf  # a negative that is sure of itself
    found = run(labels, spoilt, path=path)
    assert found.conf_loss == torch.inf
    assert found.cls_loss.isfinite()
    spoilt[0][0, 4, 0, 3] = torch.nan
    found = run(labels, spoilt, path=path)
    assert found.conf_loss.isnan()
    assert found.iou_loss.isfinite()


def test_nan_elsewhere_does_not_reach_the_gradient():
    labels, maps = inputs()
    with torch.no_grad():
        maps[0][0, 5:, 0, 3] = torch.nan  # classes of a background anchor
    for path in ("sparse", "static"):
        assert all(g.isfinite().all() for g in torch.autograd.grad(run(labels, maps, path=path).total_loss, maps))


# --- Dtypes (3.7) ------------------------------------------------------------------------------------------------

HALVES = pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
TERMS = slice(0, 5)


@PATHS
@HALVES
def test_half_dtypes(path, half):
    labels, maps = inputs(dtype=half)
    alone = run(labels, maps, use_l1=True, path=path)
    assert {loss.dtype for loss in alone[TERMS]} == {half}
    mixed = run(labels.float(), maps, use_l1=True, path=path)
    kinds = [loss.dtype for loss in mixed[TERMS]]
    assert kinds == [torch.float32, torch.float32, half, torch.float32, half]
    with torch.autocast("cpu", half):
        cast = run(labels, maps, use_l1=True, path=path)
    assert {loss.dtype for loss in cast[TERMS]} == {torch.float32}
    for found in (alone, mixed, cast):
        assert found.total_loss.item() == pytest.approx(13.5056, rel=2e-3)
        grads = torch.autograd.grad(found.total_loss, maps)
        assert {grad.dtype for grad in grads} == {half}
        assert [grad.float().norm().item() for grad in grads] == pytest.approx(LEVELS["release"], rel=2e-2)


def test_other_dtypes():
    labels, maps = inputs()
    plain = run(labels, maps, use_l1=True)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, run(labels, maps, use_l1=True), plain))
    assert {loss.dtype for loss in plain[TERMS]} == {torch.float32}
    assert run(labels, maps, dtype=torch.float16).conf_loss.dtype == torch.float16
    assert {loss.dtype for loss in run(labels.double(), [raw.double() for raw in maps])[TERMS]} == {torch.float64}


# --- What holds of any result ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_paths_agree(dtype):
    for seed in range(6):
        labels, maps, settings = random_inputs(seed, counts=(6, 0, 2, 9), dtype=dtype)
        sparse, static = (yolox_loss(labels, maps, **settings, use_l1=True, path=p) for p in ("sparse", "static"))
        assert torch.equal(sparse.matched_gt, static.matched_gt)
        for a, b in zip(sparse[:6], static[:6], strict=True):
            assert a.item() == pytest.approx(b.item(), rel=1e-6)
        slopes = (torch.autograd.grad(found.total_loss, maps) for found in (sparse, static))
        assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-8) for a, b in zip(*slopes, strict=True))


def test_padding_and_order_do_not_matter():
    labels, maps, settings = random_inputs(3)
    found = yolox_loss(labels, maps, **settings)
    wide = yolox_loss(torch.nn.functional.pad(labels, (0, 0, 0, 7)), maps, **settings)
    assert all(map(torch.equal, found, wide))
    turned = yolox_loss(labels.flip(0), [raw.flip(0) for raw in maps], **settings)
    assert turned.total_loss.item() == pytest.approx(found.total_loss.item(), rel=1e-12)
    assert torch.equal(turned.fg_mask, found.fg_mask.flip(0))


def test_arguments_are_left_alone():
    labels, maps = inputs()
    before = labels.clone(), [raw.detach().clone() for raw in maps]
    run(labels, maps, use_l1=True).total_loss.backward()
    assert torch.equal(labels, before[0])
    assert all(map(torch.equal, maps, before[1]))


def test_without_gradient_nothing_carries_it():
    labels, maps = inputs()
    with torch.no_grad():
        found = run(labels, maps, use_l1=True)
    assert not any(value.requires_grad for value in found)
    labels.requires_grad_()
    assert torch.autograd.grad(run(labels, maps).total_loss, labels, allow_unused=True) == (None,)
    for use_l1 in (False, True):
        decoded = YOLOXLoss(CLASSES)(*arguments(labels, maps, use_l1))
        assert torch.autograd.grad(decoded[0], labels, allow_unused=True) == (None,)


def test_errors():
    labels, maps = inputs()
    for row in ((2, *FIRST[1:]), (-1, *FIRST[1:])):
        with pytest.raises(IndexError, match="labels"):
            run(*inputs((row,)))
    with pytest.raises(ValueError, match="labels"):
        run(labels[..., :4], maps)
    with pytest.raises(ValueError, match="labels"):
        run(labels.expand(2, -1, -1), maps)
    with pytest.raises(ValueError, match="maps"):
        yolox_loss(labels, maps, strides=STRIDES, num_classes=3)
    with pytest.raises(ValueError, match="maps"):
        run(labels[:0], [raw[:0] for raw in maps])
    for name, wrong in (("reduction", "mean"), ("region", "box"), ("path", "fast")):
        with pytest.raises(ValueError, match=name):
            run(labels, maps, **{name: wrong})
        with pytest.raises(ValueError, match=name):
            YOLOXLoss(2, **{name: wrong})
    with pytest.raises(ValueError, match="ignore_mask"):
        run(labels, maps, ignore_mask=torch.zeros(1, 20))


# --- The drop-in -------------------------------------------------------------------------------------------------


def arguments(labels, maps, use_l1):
    """What the head's forward pass hands to its loss."""
    parts = [yolox_decode([raw], (stride,)) for raw, stride in zip(maps, STRIDES, strict=True)]
    raws = [raw[:, :4].flatten(2).mT for raw in maps] if use_l1 else []
    cells = ([getattr(part, name) for part in parts] for name in ("x_shifts", "y_shifts", "strides"))
    return None, *cells, labels, torch.cat([part.outputs for part in parts], 1), raws, maps[0].dtype


@PATHS
@VARIANTS
@pytest.mark.parametrize("use_l1", [False, True])
def test_drop_in(path, variant, use_l1):
    labels, maps = inputs()
    found = YOLOXLoss(CLASSES, path=path, **ERAS[variant])(*arguments(labels, maps, use_l1))
    expected = run(labels, maps, use_l1=use_l1, **ERAS[variant])
    values = [torch.as_tensor(value).item() for value in found]
    assert values == pytest.approx([value.item() for value in expected[:6]], rel=1e-6)
    assert [type(value) for value in found] == [torch.Tensor] * 4 + [torch.Tensor if use_l1 else float, float]
    assert norms(found[0], maps) == pytest.approx(norms(expected.total_loss, maps), rel=1e-6)


def test_drop_in_takes_the_place_of_the_method():
    class Head(torch.nn.Module):
        def get_losses(self, *given):
            raise AssertionError

    head = Head()
    head.get_losses = YOLOXLoss(CLASSES)
    labels, maps = inputs()
    assert head.get_losses(*arguments(labels, maps, False))[5] == 1.0
    for copied in (copy.deepcopy(head), head.get_losses and pickle.loads(pickle.dumps(head.get_losses))):
        loss = copied.get_losses if isinstance(copied, Head) else copied
        assert loss(*arguments(labels, maps, False))[0].item() == pytest.approx(12.056066, abs=2e-6)


def test_drop_in_mean_is_an_exact_float():
    crowd = [(g % 2, 16 + g / 8, 16 - g / 8, 9 + g % 5, 11 + g % 7) for g in range(30)]
    labels, maps = inputs(crowd)
    positives = int(run(labels, maps).fg_mask.sum())
    assert YOLOXLoss(CLASSES)(*arguments(labels, maps, False))[5] == positives / 30
    labels, maps = inputs([])
    assert YOLOXLoss(CLASSES)(*arguments(labels, maps, False))[5] == 1.0


def test_drop_in_l1_switch():
    labels, maps = inputs()
    assert YOLOXLoss(CLASSES, use_l1=False)(*arguments(labels, maps, True))[4] == 0.0
    with pytest.raises(ValueError, match="origin_preds"):
        YOLOXLoss(CLASSES, use_l1=True)(*arguments(labels, maps, False))


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_decoded_rows_lose_what_their_maps_lose(reduction):
    labels, maps, settings = random_inputs(2)
    rows = yolox_decode(maps, settings["strides"])
    raw = torch.cat([level[:, :4].flatten(2) for level in maps], 2).mT
    given = labels, rows.outputs, rows.x_shifts, rows.y_shifts, rows.strides, raw
    found = yolox_decoded_loss(*given, num_classes=maps[0].shape[1] - 5, reduction=reduction)
    expected = yolox_loss(labels, maps, **settings, use_l1=True, reduction=reduction)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_decoded_rows_reject_other_shapes():
    labels, maps = inputs()
    rows = yolox_decode(maps, STRIDES)
    cells = rows.x_shifts, rows.y_shifts, rows.strides
    with pytest.raises(ValueError, match="outputs"):
        yolox_decoded_loss(labels, rows.outputs[0], *cells, num_classes=2)
    with pytest.raises(ValueError, match="origin_preds"):
        yolox_decoded_loss(labels, rows.outputs, *cells, rows.outputs, num_classes=2)


# --- Static shapes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("use_l1", [False, True])
def test_compiles_as_one_graph(backend, use_l1):
    """Under torch.compile "auto" takes the static path; a graph break would raise."""
    labels, maps = inputs()
    compiled = torch.compile(run, fullgraph=True, backend=backend)
    found, expected = compiled(labels, maps, use_l1=use_l1), run(labels, maps, use_l1=use_l1, path="static")
    assert torch.equal(found.matched_gt, expected.matched_gt)
    assert [v.item() for v in found[:6]] == pytest.approx([v.item() for v in expected[:6]], rel=1e-6)
    assert norms(found.total_loss, maps) == pytest.approx(norms(expected.total_loss, maps), rel=1e-6)


def test_drop_in_compiles_and_returns_tensors():
    labels, maps = inputs()
    given = arguments(labels, [raw.detach() for raw in maps], True)
    outputs = given[5].requires_grad_()
    found = torch.compile(YOLOXLoss(CLASSES).__call__, fullgraph=True, backend="eager")(*given)
    assert isinstance(found[5], torch.Tensor)
    assert found[0].item() == pytest.approx(13.505628, abs=2e-6)
    assert torch.autograd.grad(found[0], outputs)[0].any()


def test_no_shape_depends_on_a_value():
    """Fake tensors have no values: a shape or a branch that depends on one raises."""
    labels, maps = inputs()
    mode = FakeTensorMode()
    fake, labels = [mode.from_tensor(raw.detach()).requires_grad_() for raw in maps], mode.from_tensor(labels)
    with mode:
        found = run(labels, fake, use_l1=True, path="static")
        grads = torch.autograd.grad(found.total_loss, fake)
    assert [grad.shape for grad in grads] == [raw.shape for raw in maps]
