"""The strategies of rotated boxes reach what they promise."""

from collections import Counter
from importlib import import_module

import pytest
import torch

from cases import probiou, rotated_tal
from cases.case import DTYPES
from cases.workloads import workload_case

OPERATIONS = ("probiou", "rotated_tal")
each_operation = pytest.mark.parametrize("operation", OPERATIONS)
WANTED = {
    "probiou": dict.fromkeys((*probiou.KINDS, "pairwise", "floor", "CIoU"), 15) | {"one-and-many": 6, "empty": 4},
    "rotated_tal": dict.fromkeys(
        ("conflict", "k-exceeds-candidates", "topk2", "padding", "tie", "identical", "turn-edges", "turn-squares"), 15
    )
    | {"needle": 10, "empty-image": 10, "medium": 10},
}


def counts(cases):
    return Counter(tag for case in cases for tag in case.tags)


@each_operation
def test_every_kind_is_reached_often(draw, operation):
    seen = counts(draw(operation))
    wanted = {"invalid": 4, "non-finite": 6, "mixed-dtype": 10, **dict.fromkeys(DTYPES, 40), **WANTED[operation]}
    assert {tag: seen[tag] for tag, least in wanted.items() if seen[tag] < least} == {}


@each_operation
def test_every_flaw_can_be_made_and_leaves_the_case_alone(draw, operation):
    sound = [case for case in draw(operation) if "invalid" not in case.tags][:60]
    before = [case.digest for case in sound]
    for flaw in import_module(f"cases.{operation}").FLAWS:
        made = [flaw.applied(case) for case in sound]
        assert sum(new is not old for new, old in zip(made, sound, strict=True)) >= 5, flaw
    assert [case.digest for case in sound] == before


def test_older_releases_are_spared_what_they_do_not_know(draw):
    older = draw("probiou", floor=False)
    assert all(probiou.allows(case, floor=False) and not case.settings["floor"] for case in older)
    options = {"topk2": False, "padding_labels": False, "empty_batch": False, "wider_truths": True}
    older = draw("rotated_tal", **options)
    assert all(rotated_tal.allows(case, **options) for case in older)
    assert not all(rotated_tal.allows(case, **options) for case in draw("rotated_tal"))


def test_equal_boxes_are_turned_alike_and_needles_are_thin(draw):
    alike = needles = 0
    for case in draw("rotated_tal", dtypes=("float64",)):
        valid = case.tensors["mask_gt"][..., 0] > 0
        boxes = case.tensors["gt_bboxes"][valid]
        if "identical" in case.tags and len(boxes) < 100:
            same = (boxes[:, None] == boxes).all(-1).sum() > len(boxes)
            alike += bool(same)
        if "needle" in case.tags:
            assert bool(((boxes[:, 2:4] > 0) & (boxes[:, 2:4] < 0.1)).any())
            needles += 1
    assert alike > 20
    assert needles > 10


@each_operation
def test_workloads_have_rotated_boxes(operation):
    tensors = workload_case("coco-b1", operation).tensors
    boxes = tensors["obb1"] if operation == "probiou" else tensors["pd_bboxes"]
    assert boxes.shape[-1] == 5
    assert boxes[..., 4].std() > 0.5
    if operation == "rotated_tal":
        assert boxes.shape[:2] == (1, 8400)
    assert bool(torch.isfinite(boxes).all())
