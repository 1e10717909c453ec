"""The adapters of YOLOX's boxes and losses, against the worked examples of yolox_losses.md and simota.md."""

import math

import pytest
import torch

from cases import iou_loss, yolox_bce, yolox_decode, yolox_l1, yolox_loss
from cases.yolox_loss import WAVE_LABELS, example

RELEASE = "yolox==0.3.0"


def pinned(module, name):
    case = dict(module.pinned_cases())[name]
    return {name: tensor.clone() for name, tensor in case.tensors.items()}, dict(case.settings)


def ask(oracle, operation, tensors, settings, *further):
    return oracle(RELEASE).bind(operation, tensors, settings, *further)


@pytest.mark.oracle
def test_decode(oracle):
    tensors, settings = pinned(yolox_decode, "worked-example")
    before = {name: raw.clone() for name, raw in tensors.items()}
    answer = ask(oracle, "yolox_decode", tensors, settings)
    row = [6.596867, 4.015342, 7.303548, 12.538396, 0.331485, -0.272011, -0.477010]
    assert answer["outputs"]["decoded"][0, 5].tolist() == pytest.approx(row, abs=1e-6)
    assert answer["outputs"]["grid"][0, [5, 19]].tolist() == [[1, 1], [1, 1]]
    # Upstream writes into the map that it is given.
    assert all(torch.equal(tensor, before[name]) for name, tensor in answer["tensors"].items())


@pytest.mark.oracle
@pytest.mark.parametrize(("kind", "expected"), [("iou", 2.63609375), ("giou", 3.1688889)])
def test_iou_loss(oracle, kind, expected):
    tensors, settings = pinned(iou_loss, f"{kind}-worked-example")
    tensors = {name: tensor.requires_grad_() for name, tensor in tensors.items()}
    answer = ask(oracle, "iou_loss", tensors, settings)
    assert answer["outputs"]["loss"].sum().item() == pytest.approx(expected, rel=1e-6)
    norms = {"iou": (0.1460908, 0.1459928), "giou": (0.1585673, 0.1543656)}[kind]
    found = [answer["gradients"][name].norm().item() for name in ("pred", "target")]
    assert found == pytest.approx(norms, rel=1e-6)


@pytest.mark.oracle
def test_bboxes_iou(oracle):
    boxes = [torch.tensor(rows, dtype=torch.float32) for rows in iou_loss.WORKED]
    given = {"bboxes_a": boxes[0], "bboxes_b": boxes[1]}
    iou = ask(oracle, "bboxes_iou", given, {"xyxy": False})["outputs"]["iou"]
    assert iou.diagonal().tolist() == pytest.approx([0.6, 1, 0, 0.0625], rel=1e-6)
    assert not torch.equal(ask(oracle, "bboxes_iou", given, {"xyxy": True})["outputs"]["iou"], iou)


@pytest.mark.oracle
def test_bce_of_a_given_assignment(oracle):
    tensors, settings = pinned(yolox_bce, "worked-example")
    tensors["outputs"].requires_grad_()
    settings.pop("autocast")
    answer = ask(oracle, "yolox_bce", tensors, settings)
    assert answer["outputs"]["loss_obj"].item() == pytest.approx(6.847497, rel=1e-6)
    assert answer["outputs"]["loss_cls"].item() == pytest.approx(1.343862, rel=1e-6)
    grad = answer["gradients"]["outputs"]
    assert not grad[..., :4].any()
    assert grad[..., 5:].any(2).nonzero().tolist() == [[0, 5], [0, 19]]


@pytest.mark.oracle
def test_l1_of_a_given_assignment(oracle):
    tensors, settings = pinned(yolox_l1, "worked-example")
    answer = ask(oracle, "yolox_l1", tensors, settings)
    assert answer["outputs"]["loss_l1"].item() == pytest.approx(1.449562, abs=1e-6)
    target = [0.25, 0.5, 0.559616, 0.693147]
    assert answer["outputs"]["l1_target"][0].tolist() == pytest.approx(target, abs=1e-6)


def total(oracle, case, *further, dtype=torch.float32):
    tensors = {name: tensor.to(dtype) for name, tensor in case.tensors.items()}
    tensors |= {name: raw.requires_grad_() for name, raw in tensors.items() if name != "labels"}
    settings = {name: value for name, value in case.settings.items() if name != "autocast"}
    return ask(oracle, "yolox_loss", tensors, settings, *further)


@pytest.mark.oracle
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_total(oracle, dtype):
    answer = total(oracle, example(), dtype=dtype)
    found = answer["outputs"]
    names = ["total_loss", "iou_loss", "conf_loss", "cls_loss", "l1_loss", "num_fg"]
    expected = [13.505628, 3.864706, 6.847497, 1.343862, 1.449562, 1.0]
    assert [found[name].item() for name in names] == pytest.approx(expected, abs=1.5e-6)
    assert {found[name].dtype for name in names[:5]} == {dtype}
    assert found["fg_mask"].nonzero().tolist() == [[0, 5], [0, 19]]
    assert found["matched_gt"][0, [5, 19]].tolist() == [0, 1]
    norms = [answer["gradients"][name].norm().item() for name in ("raw0", "raw1")]
    assert norms == pytest.approx([2 * 1.654284, 2 * 6.919179], rel=1e-6)  # the terms and their sum


@pytest.mark.oracle
def test_total_without_ground_truth(oracle):
    found = total(oracle, example(()))["outputs"]
    assert found["total_loss"].item() == pytest.approx(13.855240, abs=2e-6)
    assert found["num_fg"].item() == 1
    assert not found["fg_mask"].any()
    assert (found["matched_gt"] == -1).all()


@pytest.mark.oracle
def test_total_under_another_assignment(oracle):
    own = total(oracle, example())["outputs"]
    same = total(oracle, example(), {name: own[name] for name in ("fg_mask", "matched_gt")})["outputs"]
    assert all(torch.equal(value, same[name]) for name, value in own.items())
    mask, rows = torch.zeros(1, 20, dtype=torch.bool), torch.full((1, 20), -1)
    mask[0, [6, 19]], rows[0, [6, 19]] = True, torch.tensor([0, 1])
    # What the repository's head of 2023 chooses.
    other = total(oracle, example(), {"fg_mask": mask, "matched_gt": rows})["outputs"]
    assert other["total_loss"].item() == pytest.approx(13.247174, abs=1.5e-6)
    assert torch.equal(other["matched_gt"], rows)


@pytest.mark.oracle
def test_what_the_assigner_is_handed(oracle):
    case = example(images=2)
    settings = {name: value for name, value in case.settings.items() if name != "autocast"}
    tensors, assigner, answer = oracle(RELEASE).assigner_inputs("yolox_loss", case.tensors, settings)
    assert assigner == {"num_classes": 2}
    assert tensors["num_gt"].tolist() == [2, 0]
    assert tensors["gt_boxes"][0, :2].tolist() == [list(row[1:]) for row in WAVE_LABELS]
    assert tensors["pred_boxes"][0, 5].tolist() == pytest.approx([6.596867, 4.015342, 7.303548, 12.538396], abs=1e-6)
    alone = ask(oracle, "simota", tensors, assigner)["outputs"]
    assert all(torch.equal(value, answer[name]) for name, value in alone.items())
    assert answer["matched_gt"][0, [5, 19]].tolist() == [0, 1]


@pytest.mark.oracle
def test_no_candidate_is_upstreams_error(oracle):
    with pytest.raises(RuntimeError, match="selected index k out of range"):
        total(oracle, example(((0, 900, 900, 2, 2),)))


@pytest.mark.oracle
def test_upstream_is_not_finite_without_area(oracle):
    found = total(oracle, dict(yolox_loss.pinned_cases())["zero-area-on-zero-area"])["outputs"]
    assert math.isnan(found["cls_loss"].item())
    assert found["iou_loss"].item() == 5
