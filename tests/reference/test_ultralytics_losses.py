"""The adapters of ultralytics' element losses, against the worked examples of yolo_losses.md, section 2."""

import pytest
import torch

from cases import bbox_loss, varifocal_loss
from cases.patterns import pattern

NEWEST, STABLE, CONTROL = "ultralytics==8.4.190", "ultralytics==8.1.47", "ultralytics==8.0.100"
RELEASES = [NEWEST, STABLE]
FOCAL = {"gamma": 1.5, "alpha": 0.25}
each_release = pytest.mark.parametrize("release", RELEASES)


def loss(oracle, release, operation, tensors, settings):
    """Outputs of upstream on copies: some releases clamp their targets in place."""
    given = {name: tensor.clone() for name, tensor in tensors.items()}
    return oracle(release).bind(operation, given, settings)["outputs"]


@pytest.mark.oracle
@each_release
def test_dfl(oracle, release):
    tensors = {
        "pred_dist": pattern((8, 6), 1.5, 0.8, 0.2),
        "target": torch.tensor([[0, 0.25, 1, 4.5], [4.99, 5, 7, -1]]),
    }
    found = loss(oracle, release, "dfl_loss", tensors, {})["loss"]
    assert found.shape == (2, 1)
    assert found.flatten().tolist() == pytest.approx([3.044196, 1.954426], abs=1e-6)
    exact = loss(oracle, release, "dfl_loss", {name: tensor.double() for name, tensor in tensors.items()}, {})["loss"]
    assert exact.dtype == torch.float64


@pytest.mark.oracle
@each_release
def test_bbox(oracle, release):
    found = loss(oracle, release, "bbox_loss", *bbox_loss.example())
    assert [found[name].item() for name in ("loss_iou", "loss_dfl")] == pytest.approx([0.5557734, 3.044912], rel=1e-6)
    one_bin = loss(oracle, release, "bbox_loss", *bbox_loss.example(1))
    expected = 0.09264529 if release == NEWEST else 0
    assert one_bin["loss_dfl"].item() == pytest.approx(expected, rel=1e-6)
    assert one_bin["loss_iou"].item() == pytest.approx(0.5557734, rel=1e-6)


@pytest.mark.oracle
def test_the_control_multiplies_by_all_pairs(oracle):
    """In 8.0.100 alone the sum over anchors is the product of the sums; with one anchor there is no difference."""
    tensors, settings = bbox_loss.example()
    found = loss(oracle, CONTROL, "bbox_loss", tensors, settings)
    assert found["loss_iou"].item() > 2 * 0.5557734
    weights = tensors["target_scores"].sum(-1)[tensors["fg_mask"]]
    one = torch.zeros_like(tensors["fg_mask"])
    one[0, 0] = True
    single = {name: loss(oracle, name, "bbox_loss", tensors | {"fg_mask": one}, settings) for name in (CONTROL, NEWEST)}
    for name in ("loss_iou", "loss_dfl"):
        assert single[CONTROL][name].item() == pytest.approx(single[NEWEST][name].item(), rel=1e-5)
    every = []
    for anchor in tensors["fg_mask"][0].nonzero()[:, 0]:
        alone = torch.zeros_like(one)
        alone[0, anchor] = True
        weight = tensors["target_scores"][0, anchor].sum()
        every.append(loss(oracle, NEWEST, "bbox_loss", tensors | {"fg_mask": alone}, settings)["loss_iou"] / weight)
    assert found["loss_iou"].item() == pytest.approx((sum(every) * weights.sum()).item(), rel=1e-5)


@pytest.mark.oracle
@each_release
def test_class_bce(oracle, release):
    tensors = {
        "scores": pattern((2, 5, 3), 2, 0.9, 0.1),
        "labels": torch.tensor([[0, 1, 2, 0, 1], [2, 2, 0, 1, 0]]),
        "values": torch.tensor([[0.5, 0, 1, 0, 0.25], [0, 0, 0, 0.9, 1.0]]),
        "normaliser": torch.tensor(3.65),
    }
    scores = tensors["scores"].double()
    target = torch.zeros(2, 5, 3).scatter_(2, tensors["labels"].unsqueeze(2), tensors["values"].unsqueeze(2))
    expected = ((1 - target) * scores - scores.sigmoid().log()).sum() / 3.65
    assert loss(oracle, release, "class_bce", tensors, {})["loss"].item() == pytest.approx(expected.item(), rel=1e-6)


@pytest.mark.oracle
@each_release
def test_varifocal_and_focal(oracle, release):
    tensors = varifocal_loss.example()
    found = loss(oracle, release, "varifocal_loss", tensors, {"gamma": 2.0, "alpha": 0.75})["loss"]
    assert found.item() == pytest.approx(2.626276, abs=1e-6)
    tensors = {"pred": tensors["pred_score"], "label": tensors["label"]}
    for changes, expected in (({}, 2.216421), ({"alpha": 0.0}, 3.823347), ({"gamma": 0.5}, 2.891854)):
        found = loss(oracle, release, "focal_loss", tensors, FOCAL | changes)["loss"]
        assert found.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.oracle
def test_one_alpha_a_class_is_for_newer_releases(oracle):
    tensors = varifocal_loss.example()
    tensors = {"pred": tensors["pred_score"], "label": tensors["label"]}
    settings = FOCAL | {"alpha": [0.1, 0.5, 0.9]}
    assert loss(oracle, NEWEST, "focal_loss", tensors, settings)["loss"].item() == pytest.approx(1.851976, abs=1e-6)
    with pytest.raises(RuntimeError, match="TypeError"):
        loss(oracle, STABLE, "focal_loss", tensors, settings)


@pytest.mark.oracle
def test_a_release_without_the_class_says_so(oracle):
    tensors = varifocal_loss.example()
    tensors = {"pred": tensors["pred_score"], "label": tensors["label"]}
    with pytest.raises(RuntimeError, match="RequestError: this version of ultralytics has no public FocalLoss"):
        loss(oracle, CONTROL, "focal_loss", tensors, FOCAL)
