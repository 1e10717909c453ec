"""Numbers that a call gets without asking: those of the newest releases (specifications, signatures of upstream)."""

import importlib
import inspect

import pytest

from cleanroom.assign._matching_checks import INFEASIBLE, INVALID, SOLVED

COSTS = {"class_cost": 1, "bbox_cost": 1, "giou_cost": 1}
MATCHING_FOCAL = {"alpha": 0.25, "gamma": 2.0}
TAL = {"topk": 13, "alpha": 1.0, "beta": 6.0, "eps": 1e-9}
SIMOTA = {"radius": 2.5, "penalty": 1e5}
RTDETR = {"alpha": 0.25, "gamma": 1.5, "uni_match_ind": 0}
DEFAULTS = {
    "anchors.make_anchors": {"grid_cell_offset": 0.5},
    "assign.hungarian.hungarian_match": COSTS | MATCHING_FOCAL,
    "assign.hungarian.HungarianMatcher": COSTS,
    "assign.hungarian.RTDETRHungarianMatcher": MATCHING_FOCAL,
    "assign.matching_cost.CostTerms": COSTS | MATCHING_FOCAL,
    "assign.simota.simota_assign": SIMOTA,
    "assign.simota.SimOTAAssigner": SIMOTA,
    "assign.tal.task_aligned_assign": TAL,
    "assign.tal.TaskAlignedAssigner": TAL | {"num_classes": 80},
    "box_iou.bbox_iou": {"eps": 1e-7},
    "codecs.dist2bbox": {"dim": -1},
    "losses._query_class.class_sums": {"scale": 1.0},
    "losses.bbox.bbox_loss": {"reg_max": 16},
    "losses.bbox.BboxLoss": {"reg_max": 16},
    "losses.class_bce.class_bce": {"normaliser": 1.0},
    "losses.class_bce.dense_class_bce": {"normaliser": 1.0},
    "losses.denoising.denoising_indices": {"num_dn": 100},
    "losses.dfl.DFLoss": {"reg_max": 16},
    "losses.focal.varifocal_loss": {"alpha": 0.75, "gamma": 2.0},
    "losses.focal.VarifocalLoss": {"alpha": 0.75, "gamma": 2.0},
    "losses.focal.focal_loss": {"alpha": 0.25, "gamma": 1.5},
    "losses.focal.FocalLoss": {"alpha": 0.25, "gamma": 1.5},
    "losses.masks.sigmoid_focal_loss": {"alpha": 0.25, "gamma": 2.0},
    "losses.rtdetr.rtdetr_loss": RTDETR | {"num_classes": 80, "dn_num_group": 1},
    "losses.rtdetr.DETRLoss": RTDETR | {"nc": 80},
    "losses.rtdetr.RTDETRDetectionLoss": RTDETR | {"nc": 80},
    "losses.set_prediction.set_loss": {"eos_coef": 0.1, "class_cost": 1, "bbox_cost": 5, "giou_cost": 2}
    | {"bbox_coef": 5, "giou_coef": 2, "mask_coef": 1, "dice_coef": 1},
    "losses.v10_detection.v10_detection_loss": {"updates": 0, "epochs": 100, "reg_max": 16},
    "losses.v8_detection.v8_detection_loss": {"reg_max": 16, "topk": 10},
    "losses.v8_detection.v8DetectionLoss": {"tal_topk": 10},
    "losses.yolox.yolox_loss": SIMOTA,
    "losses.yolox.yolox_decoded_loss": SIMOTA,
    "losses.yolox.YOLOXLoss": SIMOTA,
    "overlap.Rule": {"eps": 1e-7},
}


@pytest.mark.parametrize("place", DEFAULTS)
def test_defaults(place):
    module, _, name = place.rpartition(".")
    found = inspect.signature(getattr(importlib.import_module(f"cleanroom.{module}"), name)).parameters
    numbers = {
        parameter: value.default
        for parameter, value in found.items()
        if isinstance(value.default, int | float) and not isinstance(value.default, bool)
    }
    assert numbers == DEFAULTS[place]


def test_statuses_of_an_assignment_are_told_apart():
    # 0 is what a program that found nothing wrong leaves.
    assert (SOLVED, INFEASIBLE, INVALID) == (0, 1, 2)
