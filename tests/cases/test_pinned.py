"""The pinned files are the ones that their script writes, and each shows what its name says."""

import pytest
import torch

from cases import pin
from cases.case import CaseError
from cases.pinned import FOLDER, pinned
from harness.operations import NAMES


def case(name: str):
    return next(found for found in pinned() if found.origin == f"pinned:{name}")


def test_the_files_are_what_the_script_writes(tmp_path):
    pin.main(tmp_path)
    written = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    assert len(written) >= 50
    # A counterexample that a run found may lie beside them.
    stored = {name: (FOLDER / name).read_bytes() for name in written}
    assert [name for name in written if written[name] != stored[name]] == []


def test_cases_come_sorted_by_name_and_for_an_operation():
    names = [found.origin for found in pinned()]
    assert names == sorted(names)
    assert {found.operation for found in pinned()} == set(NAMES)
    assert {found.operation for found in pinned("tal")} == {"tal"}
    older = pinned("tal", topk2=False, padding_labels=False, empty_batch=False)
    assert all(found.settings["topk2"] is None for found in older)
    assert 0 < len(older) < len(pinned("tal"))
    for variant in ("detr", "rtdetr"):
        assert {found.settings["variant"] for found in pinned("hungarian", variant=variant)} == {variant}


def test_a_damaged_pinned_file_is_not_skipped(tmp_path, monkeypatch):
    pin.main(tmp_path)
    file = sorted(tmp_path.iterdir())[3]
    file.write_bytes(file.read_bytes()[:-1])
    monkeypatch.setattr("cases.pinned.FOLDER", tmp_path)
    with pytest.raises(CaseError, match=file.name):
        pinned()


def test_the_worked_examples_have_the_inputs_of_the_specification():
    detr = case("hungarian-detr-worked-example")
    logits, boxes = detr.tensors["logits"], detr.tensors["pred_boxes"]
    assert detr.settings["sizes"] == [2, 1]
    # Costs of image 0, query 2: 1.538672 and 4.177118 (set_prediction.md A13), here without the GIoU term by hand.
    index = torch.arange(32, dtype=torch.float64).reshape(2, 4, 4)
    assert torch.equal(logits, (2 * torch.sin(0.9 * index + 0.3)).float())
    assert torch.equal(boxes, (0.4 + 0.15 * torch.sin(1.1 * index + 0.5)).float())
    decoded = case("simota-worked-example").tensors
    expected = {
        5: (6.596867, 4.015342, 7.303548, 12.538396),
        6: (12.513697, 5.177839, 10.242013, 12.992684),
        19: (21.356558, 23.158329, 14.543722, 9.719543),
    }
    for anchor, box in expected.items():
        assert decoded["pred_boxes"][0, anchor].tolist() == pytest.approx(box, abs=2e-6)
    assert decoded["obj_logits"][0, 5, 0].item() == pytest.approx(0.331485, abs=1e-6)
    assert decoded["cls_logits"][0, 19].tolist() == pytest.approx((0.406837, 0.388897), abs=1e-6)
    tal = case("tal-worked-example-topk-3-topk2-1")
    assert tal.tensors["anc_points"][5].tolist() == [12, 12]
    assert (tal.settings["topk"], tal.settings["topk2"]) == (3, 1)


def test_the_field_cases_contain_what_they_are_named_for():
    assert case("hungarian-field-hf-28865-detr-more-targets-than-queries").settings["sizes"][0] > 4
    assert bool(case("hungarian-field-rf-431-rtdetr-nan-row").tensors["logits"][:, 3].isnan().all())
    zero = case("tal-field-multimediatechlab-yolo-103-all-metrics-zero").tensors
    assert float(zero["pd_scores"].abs().max()) == 0
    tiny = case("tal-field-u-19514-no-anchor-centre").tensors
    box = tiny["gt_bboxes"][0, 0]
    assert not bool(((tiny["anc_points"] > box[:2]) & (tiny["anc_points"] < box[2:])).all(dim=1).any())
    votes = case("tal-field-paddledetection-5710-padding-votes").tensors
    assert votes["mask_gt"].flatten().tolist() == [0, 1, 0, 0]
    same = case("simota-identical-ground-truths").tensors["gt_boxes"][0]
    assert torch.equal(same[0], same[1])
    assert case("simota-empty-image-and-padding-of-nan").tensors["num_gt"].tolist() == [2, 0, 1]
