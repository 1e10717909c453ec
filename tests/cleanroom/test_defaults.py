"""Numbers that a call gets without asking: those of the newest releases (specifications, signatures of upstream)."""

import contextlib
import inspect

import pytest

from cleanroom import anchors, box_iou, codecs, overlap
from cleanroom.assign import hungarian, matching_cost, rotated_tal, simota, tal
from cleanroom.assign._matching_checks import INFEASIBLE, INVALID, SOLVED
from cleanroom.losses import (
    _query_class,
    bbox,
    class_bce,
    denoising,
    dfl,
    focal,
    masks,
    rtdetr,
    set_prediction,
    v8_detection,
    v10_detection,
    yolox,
)

COSTS = {"class_cost": 1, "bbox_cost": 1, "giou_cost": 1}
MATCHING_FOCAL = {"alpha": 0.25, "gamma": 2.0}
TAL = {"topk": 13, "alpha": 1.0, "beta": 6.0, "eps": 1e-9}
SIMOTA = {"radius": 2.5, "penalty": 1e5}
RTDETR = {"alpha": 0.25, "gamma": 1.5, "uni_match_ind": 0}
DEFAULTS = {
    (anchors, "make_anchors"): {"grid_cell_offset": 0.5},
    (hungarian, "hungarian_match"): COSTS | MATCHING_FOCAL,
    (hungarian, "HungarianMatcher"): COSTS,
    (hungarian, "RTDETRHungarianMatcher"): MATCHING_FOCAL,
    (matching_cost, "CostTerms"): COSTS | MATCHING_FOCAL,
    (simota, "simota_assign"): SIMOTA,
    (simota, "SimOTAAssigner"): SIMOTA,
    (tal, "task_aligned_assign"): TAL,
    (tal, "TaskAlignedAssigner"): TAL | {"num_classes": 80},
    (rotated_tal, "rotated_task_aligned_assign"): TAL,
    (rotated_tal, "RotatedTaskAlignedAssigner"): TAL | {"num_classes": 80},
    (box_iou, "bbox_iou"): {"eps": 1e-7},
    (codecs, "dist2bbox"): {"dim": -1},
    (_query_class, "class_sums"): {"scale": 1.0},
    (bbox, "bbox_loss"): {"reg_max": 16},
    (bbox, "BboxLoss"): {"reg_max": 16},
    (class_bce, "class_bce"): {"normaliser": 1.0},
    (class_bce, "dense_class_bce"): {"normaliser": 1.0},
    (denoising, "denoising_indices"): {"num_dn": 100},
    (dfl, "DFLoss"): {"reg_max": 16},
    (focal, "varifocal_loss"): {"alpha": 0.75, "gamma": 2.0},
    (focal, "VarifocalLoss"): {"alpha": 0.75, "gamma": 2.0},
    (focal, "focal_loss"): {"alpha": 0.25, "gamma": 1.5},
    (focal, "FocalLoss"): {"alpha": 0.25, "gamma": 1.5},
    (masks, "sigmoid_focal_loss"): {"alpha": 0.25, "gamma": 2.0},
    (rtdetr, "rtdetr_loss"): RTDETR | {"num_classes": 80, "dn_num_group": 1},
    (rtdetr, "DETRLoss"): RTDETR | {"nc": 80},
    (rtdetr, "RTDETRDetectionLoss"): RTDETR | {"nc": 80},
    (set_prediction, "set_loss"): {"eos_coef": 0.1, "class_cost": 1, "bbox_cost": 5, "giou_cost": 2}
    | {"bbox_coef": 5, "giou_coef": 2, "mask_coef": 1, "dice_coef": 1},
    (v10_detection, "v10_detection_loss"): {"updates": 0, "epochs": 100, "reg_max": 16},
    (v8_detection, "v8_detection_loss"): {"reg_max": 16, "topk": 10},
    (v8_detection, "v8DetectionLoss"): {"tal_topk": 10},
    (yolox, "yolox_loss"): SIMOTA,
    (yolox, "yolox_decoded_loss"): SIMOTA,
    (yolox, "YOLOXLoss"): SIMOTA,
    (overlap, "Rule"): {"eps": 1e-7},
}


@pytest.mark.parametrize(("module", "name"), DEFAULTS, ids=[name for _, name in DEFAULTS])
def test_defaults(module, name):
    function = getattr(module, name)
    parameters = inspect.signature(function).parameters
    numbers = {
        parameter: value.default
        for parameter, value in parameters.items()
        if isinstance(value.default, int | float) and not isinstance(value.default, bool)
    }
    # Called with nothing useful, so that `harness mutate` sees whose defaults these are.
    with contextlib.suppress(Exception):
        required = [name for name, value in parameters.items() if value.default is value.empty]
        function(**dict.fromkeys(required))
    assert numbers == DEFAULTS[module, name]


def test_statuses_of_an_assignment_are_told_apart():
    # 0 is what a program that found nothing wrong leaves.
    assert (SOLVED, INFEASIBLE, INVALID) == (0, 1, 2)
