"""The strategies of the detection criteria reach what they promise, and their heads mean the boxes they stand for."""

from collections import Counter

import pytest
import torch

from cases import boxes, detection, predictions, v8_detection_loss, v10_detection_loss
from cases.case import DTYPES
from cases.frame import Frame
from cases.scenes import Scene, Target

BOTH = pytest.mark.parametrize("operation", ["v8_detection_loss", "v10_detection_loss"])


def counts(cases):
    return Counter(tag for case in cases for tag in case.tags)


@BOTH
def test_every_kind_is_reached_often(draw, operation):
    seen = counts(draw(operation))
    assert {kind: seen[kind] for kind in boxes.KINDS if seen[kind] < 40} == {}
    assert {k: seen[f"prediction-{k}"] for k in predictions.KINDS if seen[f"prediction-{k}"] < 4} == {}
    assert {dtype: seen[dtype] for dtype in DTYPES if seen[dtype] < 40} == {}
    assert {bins: seen[f"reg-max-{bins}"] for bins in (16, 8, 4, 2, 1) if seen[f"reg-max-{bins}"] < 15} == {}
    common = {
        "tie": 40,
        "empty-image": 20,
        "no-ground-truth": 4,
        "one-class": 15,
        "class-weights": 40,
        "autocast-bfloat16": 8,
        "autocast-float16": 8,
        "non-finite": 4,
        "invalid": 3,
        "medium": 20,
    }
    assert {tag: seen[tag] for tag, least in common.items() if seen[tag] < least} == {}


@BOTH
def test_most_cases_are_valid_finite_small_and_new(draw, operation):
    cases = draw(operation)
    seen = counts(cases)
    assert seen["invalid"] < len(cases) / 8
    assert seen["non-finite"] < len(cases) / 6
    assert seen["small"] > len(cases) * 0.7
    assert len({case.digest for case in cases}) > len(cases) * 0.9
    for case in cases:
        scores = case.tensors["scores" if operation == "v8_detection_loss" else "o2m_scores"]
        assert scores.shape[2] <= (100 if "small" in case.tags else 2100)
        assert sum(rows * columns for rows, columns in case.settings["levels"]) == scores.shape[2]


@BOTH
def test_labels_in_every_layout(draw, operation):
    cases = [case for case in draw(operation) if "invalid" not in case.tags]
    layouts = {
        (str(case.tensors[name].dtype), case.tensors[name].ndim) for case in cases for name in ("cls", "batch_idx")
    }
    assert layouts == {(f"torch.{dtype}", dims) for dtype in ("float32", "int64") for dims in (1, 2)}
    for case in cases:
        index = case.tensors["batch_idx"].view(-1)
        assert (index[1:] >= index[:-1]).all()
        # Upstream's targets are float32: a float64 case holds numbers that float32 has.
        assert torch.equal(case.tensors["bboxes"].float().double(), case.tensors["bboxes"].double())


def test_settings_of_the_criterion(draw):
    cases = draw("v8_detection_loss")
    seen = counts(cases)
    assert {1, 3, 10, 13} <= {case.settings["topk"] for case in cases}
    assert {(g["box"], g["cls"], g["dfl"]) for g in (case.settings["gains"] for case in cases)} == set(detection.GAINS)
    wanted = ("topk2", "extreme", "labels-fractional", "labels-negative")
    assert {tag: seen[tag] for tag in wanted if seen[tag] < 4} == {}


def test_forms(draw):
    cases = draw("v10_detection_loss")
    seen = counts(cases)
    assert {form: seen[f"form-{form}"] for form in v10_detection_loss.FORMS if seen[f"form-{form}"] < 60} == {}
    assert len({(case.settings["updates"], case.settings["epochs"]) for case in cases}) > 3
    # The branches are two heads: they differ wherever there is any noise.
    for case in cases:
        if "prediction-mid" in case.tags:
            assert not torch.equal(case.tensors["o2m_scores"], case.tensors["o2o_scores"])


@BOTH
def test_older_releases_are_asked_for_less(draw, operation):
    module = {"v8_detection_loss": v8_detection_loss, "v10_detection_loss": v10_detection_loss}[operation]
    options = {"topk2": False, "class_weights": False, "row_order": False}
    if operation == "v10_detection_loss":
        options["forms"] = ("original",)
    older = draw(operation, **options)
    assert all(module.allows(case, **options) for case in older)
    assert not all(module.allows(case, **options) for case in draw(operation))
    assert all(case.settings["class_weights"] is None for case in older)
    assert all(case.settings.get("topk2") is None for case in older)
    assert "unsorted-rows" not in counts(older)


@pytest.mark.parametrize("reg_max", [16, 1])
def test_a_trained_head_decodes_to_its_ground_truth(reg_max):
    frame = Frame(128, 128, (8, 16))
    target = Target((24.0, 16.0, 104.0, 96.0), 1.0, "ordinary")
    scene = Scene(frame, ((target,),), 3, "late", 5, frozenset())
    head = detection.head(scene, 5, reg_max, "float64")
    followers = torch.from_numpy(head.aims[0] >= 0)
    assert followers.sum() > 50
    channels = head.boxes[0].T[followers]
    if reg_max > 1:
        channels = channels.view(-1, 4, reg_max).softmax(-1) @ torch.arange(reg_max, dtype=torch.float64)
    cells = torch.from_numpy(frame.cells)[followers]
    points, strides = cells[:, :2] + 0.5, cells[:, 2:]
    found = torch.cat((points - channels[:, :2], points + channels[:, 2:]), 1) * strides
    error = (found - torch.tensor(target.box)).abs()
    # Noise of 4% of the side; a distribution is cut off at its first bin.
    assert error.median() < 8
    assert head.scores[0, 1, followers].median() > 0
    assert head.scores[0, 0].median() < -5


def test_examples_are_pinned():
    for module in (v8_detection_loss, v10_detection_loss):
        cases = dict(module.pinned_cases())
        assert len(cases) > 8
        assert any("worked-example" in case.tags for case in cases.values())
        assert all(module.allows(case) for case in cases.values())
