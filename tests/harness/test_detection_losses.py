"""The declarations of the detection criteria: eras by version, and the assigner's answer behind a decision."""

import pytest
import torch

from cases import v8_detection_loss, v10_detection_loss
from cleanroom.assign.tal import TaskAlignedAssigner
from harness.operations import operation, tal_answer
from harness.worker import as_outputs


@pytest.mark.parametrize(
    ("version", "small_box", "alpha", "reg1"),
    [
        ("8.1.47", "off", "legacy", "zero"),
        ("8.4.0", "first_stride", "legacy", "l1"),
        ("8.4.128", "min_side", "legacy", "l1"),
        ("8.4.144", "min_side", "stable", "l1"),
        ("8.4.190", "min_side", "stable", "l1"),
    ],
)
def test_eras(version, small_box, alpha, reg1):
    era = tal_answer.era(version)
    assert (era["small_box"], era["ciou_alpha"], era["reg1_distance"]) == (small_box, alpha, reg1)
    assert era["edge_round_trip"] == (small_box != "off")


def test_older_releases_have_fewer_settings():
    assert tal_answer.options("8.1.47") == {"topk2": False, "class_weights": False, "row_order": False}
    assert tal_answer.options("8.4.30") == {"topk2": True, "class_weights": False, "row_order": True}
    assert all(tal_answer.options("8.4.190").values())
    of_v10 = operation("v10_detection_loss").upstreams["ultralytics"].options
    assert of_v10("8.1.47")["forms"] == ("original",)
    assert set(of_v10("8.4.190")["forms"]) == set(v10_detection_loss.FORMS)


def test_the_answer_behind_a_decision_is_the_assigners():
    """Given what the assigner decided, all of its outputs come back."""
    generator = torch.Generator().manual_seed(0)
    points = torch.stack(torch.meshgrid(torch.arange(8), torch.arange(8), indexing="xy"), -1).view(-1, 2) * 8 + 4.0
    near = torch.rand(2, 5, 2, generator=generator) * 30
    reach = torch.rand(2, 64, 2, generator=generator) * 16 + 4
    inputs = {
        "pd_scores": torch.rand(2, 64, 3, generator=generator),
        "pd_bboxes": torch.cat((points - reach, points + reach), -1),
        "anc_points": points,
        "gt_labels": torch.tensor([[[0.0], [1.0], [2.0], [-1.0], [1.0]]] * 2),
        "gt_bboxes": torch.cat((near, near + 10 + torch.rand(2, 5, 2, generator=generator) * 20), -1),
        "mask_gt": torch.ones(2, 5, 1),
    }
    settings = {
        "topk": 4,
        "num_classes": 3,
        "alpha": 0.5,
        "beta": 6.0,
        "eps": 1e-9,
        "stride": [8, 16, 32],
        "topk2": None,
    }
    labels, boxes, scores, foreground, index = TaskAlignedAssigner(**settings)(*inputs.values())
    foreground = scores.sum(-1) > 0
    assert foreground.sum() > 10
    found = tal_answer.answer(inputs, settings, foreground, index * foreground)
    assert torch.equal(found["target_labels"][foreground], labels[foreground])
    assert torch.equal(found["target_bboxes"][foreground], boxes[foreground])
    assert found["target_scores"].dtype == torch.float32
    torch.testing.assert_close(found["target_scores"], scores, rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("module", [v8_detection_loss, v10_detection_loss])
def test_the_drop_in_gives_the_declared_outputs(module):
    name = module.__name__.rpartition(".")[2]
    declared = operation(name)
    case = dict(module.pinned_cases())["e2e-worked-example" if "v10" in name else "worked-example"]
    settings = {key: value for key, value in case.settings.items() if key != "autocast"}
    tensors = {
        key: value.clone().requires_grad_() if key in declared.gradients else value
        for key, value in case.tensors.items()
    }
    call, read = declared.candidates["torch"].bind(**tensors, **settings, **tal_answer.era("8.4.190"))
    outputs = as_outputs(read(call()))
    assert list(outputs) == [output.name for output in declared.outputs]
    assert [key for key, value in outputs.items() if value.requires_grad] == ["total"]
    assert declared.invariants(case, outputs) is None
    wrong = outputs | {"target_gt_idx": outputs["target_gt_idx"] + 1}
    assert "target_gt_idx of a background anchor" in declared.invariants(case, wrong)
    wrong = outputs | {"target_gt_idx": outputs["target_gt_idx"] + 5 * outputs["fg_mask"]}
    assert "no ground truth of its image" in declared.invariants(case, wrong)
    assert declared.minimum_bytes(case, outputs) > sum(v.nbytes for k, v in case.tensors.items() if "scores" in k)
