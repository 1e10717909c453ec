"""What is handed on to kernels, seen without running any: who chooses them, by what, and what they are told."""

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cleanroom.assign import hungarian, linear_sum_assignment
from cleanroom.assign._matching_op import LayerPairs
from cleanroom.assign.hungarian import HungarianMatcher, RTDETRHungarianMatcher, hungarian_match
from cleanroom.kernels import runtime
from cleanroom.losses import _set_layers, rtdetr, set_criterion, set_prediction, v8_detection
from cleanroom.losses.set_prediction import set_loss
from cleanroom.losses.v8_detection import v8_detection_loss
from tests.cleanroom.test_v8_detection_loss import tracked
from tests.cleanroom.yolo_examples import example

LONGEST = linear_sum_assignment.LONGEST_SIDE
LOGITS, BOXES = torch.zeros(2, 5, 4), torch.full((2, 5, 4), 0.5)
LABELS, TARGETS, SIZES = torch.zeros(3, dtype=torch.int64), torch.full((3, 4), 0.5), [1, 2]


class Told(Exception):  # noqa: N818 - ends a call where its arguments are known
    """Carries the arguments of the call that raises it."""

    @classmethod
    def instead(cls, monkeypatch, module, name):
        def tell(*given, **named):
            raise cls(given, named)

        monkeypatch.setattr(module, name, tell)


class TestAssignment:
    @pytest.mark.parametrize(
        ("shape", "device", "path", "interpreted", "expected"),
        [
            ((1, LONGEST, LONGEST), "cuda", "auto", False, True),
            ((1, LONGEST + 1, 1), "cuda", "auto", False, False),
            ((1, 1, LONGEST + 1), "cuda", "auto", False, False),
            ((LONGEST + 1, 1, 1), "cuda", "auto", False, True),
            ((1, 2, 2), "cpu", "auto", False, False),
            ((1, 2, 2), "cpu", "auto", True, False),
            ((1, 2, 2), "cpu", "triton", True, True),
            ((1, 2, 2), "cuda", "triton", False, True),
            ((1, 2, 2), "cuda", "scipy", False, False),
            ((1, 2, 2), "cpu", "scipy", True, False),
        ],
    )
    def test_who_solves(self, monkeypatch, shape, device, path, interpreted, expected):
        """Problems that are too long for kernels go to SciPy where nobody insists."""
        monkeypatch.setattr(runtime, "AVAILABLE", True)
        monkeypatch.setattr(runtime, "INTERPRETED", interpreted)
        Told.instead(monkeypatch, linear_sum_assignment, "_assign")
        with FakeTensorMode(), pytest.raises(Told) as told:
            linear_sum_assignment.linear_sum_assignment(torch.empty(shape, device=device), path=path)
        assert told.value.args[0][-1] is expected

    def test_without_triton_nobody_is_asked(self, monkeypatch):
        monkeypatch.setattr(runtime, "AVAILABLE", False)
        with FakeTensorMode():
            for device, interpreted in (("cuda", False), ("cpu", True)):
                monkeypatch.setattr(runtime, "INTERPRETED", interpreted)
                with pytest.raises(RuntimeError, match="path 'triton' cannot run here"):
                    linear_sum_assignment.linear_sum_assignment(torch.empty(1, 2, 2, device=device), path="triton")

    def test_a_device_that_no_kernel_knows(self, monkeypatch):
        monkeypatch.setattr(runtime, "AVAILABLE", True)
        monkeypatch.setattr(runtime, "INTERPRETED", False)
        with pytest.raises(RuntimeError, match="tensors are on cpu"):
            linear_sum_assignment.linear_sum_assignment(torch.empty(1, 2, 2), path="triton")


class TestMatching:
    @pytest.fixture
    def kernels(self, monkeypatch):
        monkeypatch.setattr(hungarian, "choose_solver", lambda *given: "triton")
        Told.instead(monkeypatch, hungarian, "match_on_device")

    @pytest.mark.parametrize("policy", [None, "raise", "largest"])
    @pytest.mark.parametrize("variant", ["detr", "rtdetr"])
    def test_the_policy_and_the_count_of_targets_are_told(self, kernels, policy, variant):
        with pytest.raises(Told) as told:
            hungarian_match(LOGITS, BOXES, LABELS, TARGETS, SIZES, variant=variant, non_finite=policy)
        assert told.value.args[1]["non_finite"] == (policy or "")
        assert told.value.args[1]["local"] == (variant == "detr")
        assert told.value.args[1]["terms"].variant == variant

    @pytest.mark.parametrize("path", ["auto", "scipy", "triton"])
    def test_matchers_hand_their_path_on(self, monkeypatch, path):
        asked = []
        monkeypatch.setattr(hungarian, "choose_solver", lambda *given: asked.append(given) or "scipy")
        parts = zip(LABELS.split(SIZES), TARGETS.split(SIZES), strict=True)
        targets = [{"class_labels": labels, "boxes": boxes} for labels, boxes in parts]
        HungarianMatcher(path=path)({"logits": LOGITS, "pred_boxes": BOXES}, targets)
        RTDETRHungarianMatcher(path=path)(BOXES, LOGITS, TARGETS, LABELS, SIZES)
        for own, queries, *tensors in asked:
            assert (own, queries) == (path, 5)
            wanted = LOGITS, BOXES, LABELS, TARGETS
            assert all(torch.equal(one, other) for one, other in zip(tensors, wanted, strict=True))
        assert len(asked) == 2


class TestSetLoss:
    def test_every_tensor_has_a_say(self, monkeypatch):
        Told.instead(monkeypatch, set_prediction, "choose_matched_path")
        with pytest.raises(Told) as told:
            set_loss(LOGITS, BOXES, LABELS, TARGETS, SIZES)
        path, queries, *tensors = told.value.args[0]
        assert (path, queries) == ("auto", 5)
        assert all(one is other for one, other in zip(tensors, (LOGITS, BOXES, LABELS, TARGETS), strict=True))

    def test_the_policy_is_told(self, monkeypatch):
        monkeypatch.setattr(set_prediction, "choose_matched_path", lambda *given: "triton")
        Told.instead(monkeypatch, set_prediction, "match_on_device")
        with pytest.raises(Told) as told:
            set_loss(LOGITS, BOXES, LABELS, TARGETS, SIZES, non_finite="raise")
        assert told.value.args[1] == {"non_finite": "raise"}

    @pytest.mark.parametrize("number", [2.5, torch.tensor(2.5)])
    def test_weights_and_the_number_of_boxes_are_told(self, monkeypatch, number):
        monkeypatch.setattr(set_prediction, "choose_matched_path", lambda *given: "triton")
        pairs = LayerPairs(*torch.zeros(3, 3, dtype=torch.int64))
        monkeypatch.setattr(set_prediction, "match_on_device", lambda *given, **named: pairs)
        Told.instead(monkeypatch, _set_layers, "fused_terms")
        with pytest.raises(Told) as told:
            set_loss(LOGITS, BOXES, LABELS, TARGETS, SIZES, num_boxes=number, bbox_coef=3.0, giou_coef=4.0)
        named = told.value.args[1]
        assert torch.equal(named["normaliser"], torch.tensor(2.5))
        assert (named["counted"], named["bbox"], named["giou"]) == (1, 3.0, 4.0)

    @pytest.mark.parametrize(("layers", "counted"), [(None, 2), (2, 2), (1, 1), (0, 1)])
    def test_the_last_layer_always_counts(self, monkeypatch, layers, counted):
        monkeypatch.setattr(set_prediction, "choose_matched_path", lambda *given: "triton")
        pairs = LayerPairs(*torch.zeros(3, 6, dtype=torch.int64))
        monkeypatch.setattr(set_prediction, "match_on_device", lambda *given, **named: pairs)
        Told.instead(monkeypatch, _set_layers, "fused_terms")
        auxiliary = {"aux_logits": [LOGITS], "aux_boxes": [BOXES], "decoder_layers": layers}
        with pytest.raises(Told) as told:
            set_loss(LOGITS, BOXES, LABELS, TARGETS, SIZES, **auxiliary)
        assert told.value.args[1]["counted"] == counted

    @pytest.mark.parametrize(("layers", "counted"), [(2, 2), (1, 1), (0, 1)])
    def test_weights_of_a_configuration_are_told(self, monkeypatch, layers, counted):
        costs = {"class_cost": 1, "bbox_cost": 5, "giou_cost": 2, "num_labels": 3, "eos_coefficient": 0.1}
        weights = {"bbox_loss_coefficient": 3.0, "giou_loss_coefficient": 0.5}
        config = SimpleNamespace(**costs, **weights, auxiliary_loss=True, decoder_layers=layers)
        monkeypatch.setattr(set_criterion, "choose_matched_path", lambda *given: "triton")
        pairs = LayerPairs(*torch.zeros(3, 6, dtype=torch.int64))
        monkeypatch.setattr(set_criterion, "match_on_device", lambda *given, **named: pairs)
        Told.instead(monkeypatch, _set_layers, "fused_terms")
        batch = zip(LABELS.split(SIZES), TARGETS.split(SIZES), strict=True)
        targets = [{"class_labels": labels, "boxes": boxes} for labels, boxes in batch]
        stacked = LOGITS.expand(2, -1, -1, -1), BOXES.expand(2, -1, -1, -1)
        with pytest.raises(Told) as told:
            set_criterion.ForObjectDetectionLoss(LOGITS, targets, None, BOXES, config, *stacked)
        named = told.value.args[1]
        assert (named["counted"], named["bbox"], named["giou"]) == (counted, 3.0, 0.5)
        assert len(told.value.args[0][0]) == 2


class TestRTDETR:
    @pytest.mark.parametrize(
        ("path", "solver", "sparse"),
        [("triton", "triton", False), ("static", "scipy", False), ("sparse", "scipy", True)],
    )
    def test_the_solver_is_told(self, monkeypatch, path, solver, sparse):
        monkeypatch.setattr(rtdetr, "choose_matched_path", lambda *given: path)
        Told.instead(monkeypatch, rtdetr, "match_stack")
        with pytest.raises(Told) as told:
            rtdetr.rtdetr_loss(BOXES[None], LOGITS[None], LABELS, TARGETS, gt_groups=SIZES, num_classes=4)
        assert (told.value.args[1]["solver"], told.value.args[1]["sparse"]) == (solver, sparse)


class TestV8:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_the_assignment_records_nothing_and_sees_pixels_in_float32(self, monkeypatch, dtype):
        """Not even the decoding of boxes that the loss differentiates by itself is recorded."""
        recorded = []
        monkeypatch.setattr(v8_detection, "choose_path", lambda *given, **named: "triton")
        monkeypatch.setattr(v8_detection, "decode", lambda *given: recorded.append(torch.is_grad_enabled()))
        Told.instead(monkeypatch, v8_detection, "assigned_by_kernel")
        given, settings = example(16)
        given |= {name: given[name].to(dtype) for name in ("boxes", "scores")}
        with pytest.raises(Told) as told:
            v8_detection_loss(**tracked(given), **settings)
        assert recorded == [False]
        assert told.value.args[0][2].dtype == torch.float32
