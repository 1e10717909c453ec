"""The strategies of YOLOX's boxes and losses reach what they promise, by the tags of a few hundred draws."""

from collections import Counter
from importlib import import_module

import numpy as np
import pytest
import torch

from cases import centre_pairs, yolox_head
from cases.case import DTYPES
from cases.frame import Frame
from cases.scenes import Scene, Target
from cases.workloads import workload_case

OPERATIONS = ("yolox_decode", "bboxes_iou", "iou_loss", "yolox_bce", "yolox_l1", "yolox_loss")
each_operation = pytest.mark.parametrize("operation", OPERATIONS)
#: Tags and how often they come at least, in 300 draws.
REACHED = {
    "yolox_decode": {"channels-last": 60, "extreme": 15, "empty-batch": 4, "non-finite": 4},
    "bboxes_iou": {"corners": 100, "centres": 100, "mixed-dtype": 60, "empty": 10, "non-finite": 3},
    "iou_loss": {"loss-iou": 100, "loss-giou": 100, "reduction-whatever": 30, "empty": 3, "mixed-dtype": 20},
    "yolox_bce": {"foreground-none": 10, "foreground-all": 10, "mixed-dtype": 30, "extreme": 10, "non-finite": 5},
    "yolox_l1": {"foreground-none": 10, "foreground-all": 10, "mixed-dtype": 30, "zero-area": 50, "non-finite": 5},
    "yolox_loss": {
        "l1": 80,
        "conflict": 100,
        "empty-image": 30,
        "no-ground-truth": 5,
        "padding": 80,
        "gap": 3,
        "extreme": 3,
        "mixed-dtype": 10,
        "integer-labels": 2,
        "no-candidate": 2,
        "non-finite": 8,
    },
}


def counts(cases):
    return Counter(tag for case in cases for tag in case.tags)


@each_operation
def test_what_it_is_for_is_reached_often(draw, operation):
    cases = draw(operation)
    seen = counts(cases)
    assert {tag: seen[tag] for tag, least in REACHED[operation].items() if seen[tag] < least} == {}
    assert {dtype: seen[dtype] for dtype in DTYPES if seen[dtype] < 30} == {}
    assert 2 <= seen["invalid"] < len(cases) / 8
    assert seen["non-finite"] < len(cases) / 6
    assert len({case.digest for case in cases}) > len(cases) * 0.9


def test_pairs_of_every_kind(draw):
    for operation in ("bboxes_iou", "iou_loss"):
        seen = counts(draw(operation))
        assert {kind: seen[kind] for kind in (*centre_pairs.KINDS, "flat-target") if seen[kind] < 20} == {}


def test_autocast_of_every_loss(draw):
    for operation in ("iou_loss", "yolox_bce", "yolox_l1", "yolox_loss"):
        of = Counter((case.settings["autocast"], case.dtype) for case in draw(operation))
        assert min(of["bfloat16", "bfloat16"], of["float16", "float16"]) >= 3
        assert not any(dtype == "float64" for autocast, dtype in of if autocast)


@each_operation
def test_every_flaw_can_be_made_and_leaves_the_case_alone(draw, operation):
    sound = [case for case in draw(operation) if "invalid" not in case.tags][:60]
    before = [case.digest for case in sound]
    for flaw in import_module(f"cases.{operation}").FLAWS:
        made = [flaw.applied(case) for case in sound]
        flawed = [new for new, old in zip(made, sound, strict=True) if new is not old]
        assert len(flawed) >= 10, flaw
        assert all({"invalid", flaw.name} <= case.tags for case in flawed)
    assert [type(case)(case.operation, case.tensors, case.settings, "", case.tags).digest for case in sound] == before


def test_maps_decode_to_the_scene_s_boxes():
    frame = Frame(64, 32, (8, 16))
    scene = Scene(frame, ((Target((4.0, 4.0, 30.0, 20.0), 1.0, "ordinary"),),), 3, "late", 7, frozenset())
    found = yolox_head.head(scene)
    maps = yolox_head.maps(torch.from_numpy(found.rows), frame)
    assert [tuple(raw.shape) for raw in maps.values()] == [(1, 8, 4, 8), (1, 8, 2, 4)]
    cells, strides = frame.cells[:, :2], frame.cells[:, 2:]
    raw = torch.cat([level.flatten(2) for level in maps.values()], 2)[0].T.numpy()
    assert np.allclose((raw[:, :2] + cells) * strides, found.boxes[0, :, :2])
    assert np.allclose(np.exp(raw[:, 2:4]) * strides, found.boxes[0, :, 2:])


def test_a_gap_is_one_zero_row_after_the_first():
    target = Target((4.0, 4.0, 30.0, 20.0), 1.0, "ordinary")
    scene = Scene(Frame(64, 32, (8,)), ((target,) * 3, ()), 3, "late", 7, frozenset())
    labels = yolox_head.label_rows(scene, extra=1, gap=True)
    assert (labels.sum(2) > 0).tolist() == [[True, False, True, True, False], [False] * 5]


def test_workloads_have_the_sizes_of_training():
    case = workload_case("coco-b16", "yolox_loss")
    assert [case.tensors[f"raw{level}"].shape for level in range(3)] == [(16, 85, s, s) for s in (80, 40, 20)]
    foreground = workload_case("coco-b16", "yolox_bce").tensors["fg_mask"].sum().item()
    assert 200 < foreground < 16 * 8400 / 50  # about ten anchors a ground truth
