"""Releases that bracket an era: each answers worked examples, and means what `spec/eras.md` says it meant."""

import pytest
import torch

from cases import bbox_loss, v8_detection_loss, v10_detection_loss
from cases.patterns import pattern
from cleanroom.assign.tal import TaskAlignedAssigner
from harness.operations import operation
from tests.reference.test_tal import ROW_OF, THREE, grid, scene, settings, worked_example

FIRST, CONTROL, FORMER, LATER = (f"ultralytics=={version}" for version in ("8.0.0", "8.0.100", "8.3.253", "8.4.127"))
ULTRALYTICS = [FIRST, CONTROL, FORMER, LATER]
TRANSFORMERS = "transformers==4.57.6"
EACH = pytest.mark.parametrize("spec", ULTRALYTICS)


def era(oracle, spec, name):
    """Settings under which a candidate is that release."""
    process = oracle(spec)
    return operation(name).upstreams[process.name].era(process.era(name))


@pytest.mark.oracle
@EACH
def test_assigner(oracle, spec):
    found = oracle(spec).bind("tal", worked_example(), settings())["outputs"]
    positives = sorted(THREE)
    assert found["fg_mask"][0].nonzero().flatten().tolist() == positives
    rows = [ROW_OF[anchor] for anchor in positives]
    assert found["target_gt_idx"][0, positives].tolist() == rows
    expected = torch.tensor([THREE[anchor] for anchor in positives])
    torch.testing.assert_close(found["target_scores"][0, positives, rows], expected)


def conflict():
    """Rows 0 and 1 propose anchor 5; row 2, which does not contain it, overlaps its prediction most."""
    tensors = scene([[4.5, 4.5, 19, 19], [5, 5, 19.5, 19.5], [12.5, 12.5, 30, 30]], [0.0, 0, 1], 1.0, 0.5)
    tensors["pd_bboxes"][0, 5] = torch.tensor([8.0, 8, 26, 26])
    return tensors


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("spec", "tensors", "topk", "row", "positives"),
    [
        (FIRST, conflict(), 1, 2, [5, 10]),
        (CONTROL, conflict(), 1, 1, [5, 10]),
        (FORMER, scene([[13.0, 13, 15, 15]], [0.0], 16.0), 16, 0, []),
        (LATER, scene([[13.0, 13, 15, 15]], [0.0], 16.0), 16, 0, [5, 6, 9, 10]),
        (LATER, scene([[13.0, 13, 23, 23]], [0.0], 16.0), 16, 0, [10]),
    ],
    ids=["all pairs", "candidates", "no small-box rule", "below 8", "from 8 up"],
)
def test_what_an_era_decides(oracle, spec, tensors, topk, row, positives):
    """Upstream and ours alike under the era's settings, and not alike under those of today."""
    chosen = settings(topk=topk)
    theirs = oracle(spec).bind("tal", tensors, chosen)["outputs"]
    assert theirs["fg_mask"][0].nonzero().flatten().tolist() == positives
    assert theirs["target_gt_idx"][0, 5] == row
    mine = [TaskAlignedAssigner(**chosen, **own)(*tensors.values()) for own in (era(oracle, spec, "tal"), {})]
    index = [outputs[4][outputs[3]].tolist() for outputs in mine]
    assert mine[0][3].equal(theirs["fg_mask"].bool())
    assert index[0] == theirs["target_gt_idx"][theirs["fg_mask"].bool()].tolist()
    if spec != CONTROL and positives != [5, 6, 9, 10]:  # those two are alike today
        assert not (torch.equal(mine[1][3], mine[0][3]) and index[1] == index[0])


@pytest.mark.oracle
@EACH
def test_detection_criterion(oracle, spec):
    found = oracle(spec).bind("v8_detection_loss", *v8_detection_loss.example())["outputs"]
    wrong = spec == CONTROL
    expected = [197.136, 42.0272, 128.480] if wrong else [6.346406, 42.02716, 4.206256]
    assert found["items"].tolist() == pytest.approx(expected, rel=1e-5 if wrong else 1e-6)
    assert found["fg_mask"].sum(1).tolist() == [20, 10]


@pytest.mark.oracle
def test_the_score_sum_of_the_first_release_has_no_floor(oracle):
    tensors, chosen = v8_detection_loss.example()
    tensors |= {name: tensors[name][:1] for name in ("batch_idx", "cls", "bboxes")}
    tensors["boxes"] = tensors["boxes"] * 0
    first, later = (oracle(spec).bind("v8_detection_loss", tensors, chosen)["outputs"] for spec in (FIRST, FORMER))
    share = later["items"] / first["items"]
    assert share[1] < 0.9
    torch.testing.assert_close(share, share[1].expand(3))


@pytest.mark.oracle
@pytest.mark.parametrize(("spec", "form"), [(FORMER, "original"), (FORMER, "ultralytics"), (LATER, "ultralytics")])
def test_end_to_end_criterion(oracle, spec, form):
    found = oracle(spec).bind("v10_detection_loss", *v10_detection_loss.example(form))["outputs"]
    assert found["total"].item() == pytest.approx(295.0305, rel=1e-6)


@pytest.mark.oracle
@EACH
def test_element_losses(oracle, spec):
    bound = oracle(spec)
    given = {name: tensor.clone() for name, tensor in bbox_loss.example()[0].items()}
    distance = bound.bind("bbox_loss", given, bbox_loss.example()[1])["outputs"]["loss_dfl"]
    assert (distance.item() == pytest.approx(3.044912, rel=1e-6)) == (spec != CONTROL)
    label = (pattern((2, 4, 3), 1, 1.3, 0.2) > 0.4).float()
    tensors = {
        "pred_score": pattern((2, 4, 3), 2, 0.9, 0.1),
        "gt_score": (pattern((2, 4, 3), 0.5, 0.6, 0.9) + 0.5) * label,
        "label": label,
    }
    found = bound.bind("varifocal_loss", tensors, {"gamma": 2.0, "alpha": 0.75})["outputs"]["loss"]
    summed = spec in (FIRST, CONTROL)
    assert found.item() == pytest.approx(10.50511 if summed else 2.626276, rel=1e-6)
    assert era(oracle, spec, "varifocal_loss") == ({"vfl_reduction": "sum"} if summed else {})


@pytest.mark.oracle
@EACH
def test_overlaps_and_anchors(oracle, spec):
    boxes = {"box1": torch.tensor([[0.0, 0, 10, 10]]), "box2": torch.tensor([[5.0, 5, 15, 20]])}
    chosen = {"xywh": False, "GIoU": False, "DIoU": False, "CIoU": True, "eps": 1e-7}
    found = oracle(spec).bind("bbox_iou", boxes, chosen)["outputs"]["iou"]
    assert found.item() == pytest.approx(-0.01916454, rel=1e-5)
    maps = {"feat0": torch.zeros(1, 1, 4, 4)}
    anchors = {"strides": [8], "strides_as": "list", "grid_cell_offset": 0.5}
    points = oracle(spec).bind("make_anchors", maps, anchors)["outputs"]["points"]
    assert torch.equal(points * 8, grid())


@pytest.mark.oracle
@pytest.mark.parametrize("spec", [FIRST, CONTROL])
def test_what_a_release_lacks_is_said(oracle, spec):
    labels = torch.zeros(1, dtype=torch.int64)
    lacking = {
        "hungarian": ({"labels": labels}, {"variant": "rtdetr"}),
        "focal_loss": ({"pred": torch.zeros(1, 2), "label": torch.zeros(1, 2)}, {"gamma": 1.5, "alpha": 0.25}),
        "rtdetr_loss": ({"cls": labels}, {"gamma": 1.5, "alpha": 0.25}),
    }
    for name, given in lacking.items():
        upstream = operation(name).upstreams["ultralytics"]
        assert [upstream.has(release.partition("==")[2]) for release in (spec, FORMER)] == [False, True]
        with pytest.raises(RuntimeError, match="RequestError: this version of ultralytics has no public "):
            oracle(spec).bind(name, *given)


@pytest.mark.oracle
def test_transformers_refused_costs_that_are_not_finite(oracle):
    tensors = {
        "logits": pattern((1, 3, 4), 2, 0.9, 0.3),
        "pred_boxes": pattern((1, 3, 4), 0.1, 1.1, 0.5) + 0.4,
        "labels": torch.tensor([0, 2]),
        "boxes": torch.tensor([[0.3, 0.4, 0.2, 0.3], [0.6, 0.5, 0.4, 0.2]]),
    }
    weights = {"class_cost": 1.0, "bbox_cost": 5.0, "giou_cost": 2.0}
    chosen = {"variant": "detr", "sizes": [2], **weights}
    former, now = (oracle(spec) for spec in (TRANSFORMERS, "transformers==5.23.0"))
    answers = [one.bind("hungarian", tensors, chosen)["outputs"] for one in (former, now)]
    assert all(torch.equal(answers[0][name], answers[1][name]) for name in ("queries", "targets"))
    tensors["logits"][0, 0] = torch.nan
    assert now.bind("hungarian", tensors, chosen)["outputs"]["queries"].tolist() == [1, 2]
    with pytest.raises(RuntimeError, match="ValueError: matrix contains invalid numeric entries"):
        former.bind("hungarian", tensors, chosen)
    for name in ("hungarian", "set_loss"):
        assert era(oracle, TRANSFORMERS, name) == {"non_finite": "raise"}
        assert era(oracle, "transformers==5.23.0", name) == {}
