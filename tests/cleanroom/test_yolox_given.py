"""Objectness, class and L1 term of YOLOX for a given assignment: specification yolox_losses.md, sections 3.3 to 3.8."""

import math

import pytest
import torch
from torch.nn.functional import binary_cross_entropy_with_logits as bce
from torch.nn.functional import one_hot

from cases.yolox_head import WAVE_FRAME, WAVE_LABELS, grid, wave_rows
from cleanroom.losses.yolox_given import yolox_bce, yolox_l1

ANCHORS = [5, 19]


def assignment(anchors=tuple(ANCHORS), classes=(1.0, 0.0), overlaps=(0.168707, 0.652423)):
    """Those of simota.md, section 5.1."""
    mask, found = torch.zeros(1, 20, dtype=torch.bool), torch.zeros(2, 1, 20)
    mask[0, list(anchors)] = True
    found[0, mask], found[1, mask] = torch.tensor(classes), torch.tensor(overlaps)
    return {"fg_mask": mask, "matched_classes": found[0], "matched_iou": found[1]}


def random_assignment(seed=0, images=3, anchors=30, classes=4):
    generator = torch.Generator().manual_seed(seed)
    shape = images, anchors
    return {
        "outputs": torch.randn(*shape, 5 + classes, generator=generator, dtype=torch.float64),
        "fg_mask": torch.rand(shape, generator=generator) < 0.3,
        "matched_classes": torch.randint(classes, shape, generator=generator),
        "matched_iou": torch.rand(shape, generator=generator, dtype=torch.float64),
    }


def test_bce_of_the_worked_example():
    outputs = wave_rows().float().requires_grad_()
    found = yolox_bce(outputs, **assignment(), num_classes=2)
    assert found.loss_obj.item() == pytest.approx(6.847497, rel=1e-6)
    assert found.loss_cls.item() == pytest.approx(1.343862, rel=1e-6)
    norms = [torch.autograd.grad(loss, outputs, retain_graph=True)[0].norm().item() for loss in found]
    assert norms == pytest.approx([1.108574, 0.384329], abs=1e-6)


def test_bce_against_the_plain_formula():
    given = random_assignment()
    outputs = given["outputs"].requires_grad_()
    mask = given["fg_mask"]
    rows = outputs[mask]
    positives = mask.sum()
    target = one_hot(given["matched_classes"][mask], 4) * given["matched_iou"][mask][:, None]
    plain = (
        bce(outputs[..., 4], mask.double(), reduction="sum") / positives,
        bce(rows[:, 5:], target, reduction="sum") / positives,
    )
    for ours, theirs in zip(yolox_bce(**given, num_classes=4), plain, strict=True):
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-13)
        of_ours, of_theirs = (torch.autograd.grad(loss, outputs, retain_graph=True)[0] for loss in (ours, theirs))
        assert torch.allclose(of_ours, of_theirs, rtol=1e-12, atol=1e-15)


def test_bce_gradcheck():
    given = random_assignment(1, images=2, anchors=6)
    outputs = given.pop("outputs").requires_grad_()
    assert torch.autograd.gradcheck(lambda rows: yolox_bce(rows, **given, num_classes=4), (outputs,))


def test_bce_of_no_foreground():
    outputs = torch.zeros(1, 20, 7, requires_grad=True)
    found = yolox_bce(outputs, **assignment((), (), ()), num_classes=2)
    assert found.loss_obj.item() == pytest.approx(20 * math.log(2), rel=1e-6)  # divided by 1
    assert found.loss_cls.item() == 0
    assert not torch.autograd.grad(found.loss_cls, outputs)[0].any()


def test_bce_reads_no_box_and_no_other_anchor():
    outputs = wave_rows().float()
    expected = yolox_bce(outputs, **assignment(), num_classes=2)
    outputs[..., :4] = torch.nan
    background = ~assignment()["fg_mask"]
    outputs[background.nonzero(as_tuple=True)][:, 5:] = torch.nan
    assert yolox_bce(outputs, **assignment(), num_classes=2) == expected


def test_bce_of_infinite_logits():
    outputs = wave_rows().float()
    outputs[0, 0, 4] = torch.inf  # a negative
    assert yolox_bce(outputs, **assignment(), num_classes=2).loss_obj == torch.inf
    outputs = wave_rows().float()
    outputs[0, 5, 4] = torch.inf  # a positive that is sure: upstream's 0 * inf is not made
    assert yolox_bce(outputs, **assignment(), num_classes=2).loss_obj.isfinite()


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_bce_dtypes(half):
    outputs, given = wave_rows().to(half), assignment()
    found = yolox_bce(outputs, **given, num_classes=2)
    assert [loss.dtype for loss in found] == [half, torch.float32]
    with torch.autocast("cpu", half):
        given["matched_iou"] = given["matched_iou"].to(half)
        assert {loss.dtype for loss in yolox_bce(outputs, **given, num_classes=2)} == {torch.float32}


def test_bce_errors():
    outputs, given = wave_rows().float(), assignment()
    for label in (2.0, -1.0):
        with pytest.raises(IndexError, match="matched_classes"):
            yolox_bce(outputs, **assignment(classes=(label, 0.0)), num_classes=2)
    with pytest.raises(ValueError, match="outputs"):
        yolox_bce(outputs, **given, num_classes=3)
    with pytest.raises(ValueError, match="fg_mask"):
        yolox_bce(outputs, **given | {"fg_mask": given["fg_mask"][:, 1:]}, num_classes=2)
    with pytest.raises(TypeError, match="fg_mask"):
        yolox_bce(outputs, **given | {"fg_mask": given["fg_mask"].float()}, num_classes=2)


def test_bce_compiles():
    outputs = wave_rows().float().requires_grad_()
    compiled = torch.compile(yolox_bce, fullgraph=True, backend="eager")
    ours, theirs = (call(outputs, **assignment(), num_classes=2) for call in (compiled, yolox_bce))
    for a, b in zip(ours, theirs, strict=True):
        assert a.item() == pytest.approx(b.item(), rel=1e-6)
        slopes = (torch.autograd.grad(loss, outputs, retain_graph=True)[0] for loss in (a, b))
        assert torch.equal(*slopes)


def l1_inputs(dtype=torch.float32):
    rows = torch.zeros(1, 20, dtype=torch.int64)
    rows[0, 19] = 1
    return {
        "origin_preds": wave_rows()[..., :4].to(dtype),
        "fg_mask": assignment()["fg_mask"],
        "matched_gt": rows,
        "gt_boxes": torch.tensor(WAVE_LABELS, dtype=dtype)[None, :, 1:],
        **{name: cell.to(dtype) for name, cell in grid(WAVE_FRAME, "float64").items()},
    }


def test_l1_of_the_worked_example():
    given = l1_inputs()
    raw = given["origin_preds"].requires_grad_()
    found = yolox_l1(**given)
    assert found.loss_l1.item() == pytest.approx(1.449562, abs=1e-6)
    # Box (10, 12, 14, 16) at stride 8, cell (1, 1).
    assert found.l1_target[0].tolist() == pytest.approx([0.25, 0.5, 0.559616, 0.693147], abs=1e-6)
    (grad,) = torch.autograd.grad(found.loss_l1, raw)
    assert grad.norm().item() == pytest.approx(1.414214, abs=1e-6)
    assert torch.equal(grad[0, ANCHORS].abs(), torch.full((2, 4), 0.5))  # signs, over two anchors
    assert grad.count_nonzero() == 8
    assert not found.l1_target.requires_grad


def test_l1_at_its_target_has_no_gradient():
    given = l1_inputs(torch.float64)
    given["origin_preds"][0, ANCHORS] = yolox_l1(**given).l1_target
    raw = given["origin_preds"].requires_grad_()
    found = yolox_l1(**given)
    assert found.loss_l1.item() == 0
    assert not torch.autograd.grad(found.loss_l1, raw)[0].any()


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.float32, -18.420681), (torch.bfloat16, -18.375), (torch.float16, -18.421875), (torch.float64, -18.420681)],
)
def test_l1_of_a_flat_box(dtype, expected):
    # In float16 upstream's offset vanishes and the target is -inf.
    given = l1_inputs(dtype)
    given["gt_boxes"][..., 2] = 0
    target = yolox_l1(**given).l1_target
    assert target.dtype == dtype
    assert target[:, 2].tolist() == pytest.approx([expected] * 2, rel=1e-7)


def test_l1_of_a_negative_side_is_none():
    given = l1_inputs()
    given["gt_boxes"][0, 0, 2] = -4
    found = yolox_l1(**given)
    assert found.l1_target.isnan().nonzero().tolist() == [[0, 2]]
    assert found.loss_l1.isnan()


def test_l1_of_no_foreground():
    given = l1_inputs() | {"fg_mask": torch.zeros(1, 20, dtype=torch.bool)}
    raw = given["origin_preds"].requires_grad_()
    found = yolox_l1(**given)
    assert found.loss_l1.item() == 0
    assert found.l1_target.shape == (0, 4)
    assert not torch.autograd.grad(found.loss_l1, raw)[0].any()


def test_l1_errors():
    given = l1_inputs()
    with pytest.raises(IndexError, match="matched_gt"):
        yolox_l1(**given | {"matched_gt": given["matched_gt"] + 2})
    with pytest.raises(ValueError, match="origin_preds"):
        yolox_l1(**given | {"origin_preds": given["origin_preds"][..., :3]})
    with pytest.raises(ValueError, match="matched_gt"):
        yolox_l1(**given | {"matched_gt": given["matched_gt"][:, :5]})
