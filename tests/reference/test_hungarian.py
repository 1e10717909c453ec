"""The adapters of both matchers, against the worked examples A13 and B9 of set_prediction.md."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch

import reference.transformers.hungarian
import reference.ultralytics.hungarian
from reference.pairs import join_pairs

DETR = "transformers==5.23.0"
RTDETR = ["ultralytics==8.4.190", "ultralytics==8.1.47"]

LABELS = [0, 2, 1]
BOXES = [[0.3, 0.4, 0.2, 0.3], [0.6, 0.5, 0.4, 0.2], [0.5, 0.5, 0.3, 0.3]]


def waves(shape, a, b, amplitude, offset):
    """S of section A13."""
    index = torch.arange(math.prod(shape), dtype=torch.float64).reshape(shape)
    return (offset + amplitude * torch.sin(a * index + b)).float()


def case(classes, sizes=(2, 1), labels=LABELS, boxes=BOXES):
    return {
        "logits": waves((2, 4, classes), 0.9, 0.3, 2, 0),
        "pred_boxes": waves((2, 4, 4), 1.1, 0.5, 0.15, 0.4),
        "labels": torch.tensor(labels, dtype=torch.int64),
        "boxes": torch.tensor(boxes).reshape(-1, 4),
    }, {"sizes": list(sizes), "bbox_cost": 5.0, "giou_cost": 2.0}


def detr(**changes):
    tensors, settings = case(4, **changes)
    return tensors, settings | {"variant": "detr", "class_cost": 1.0}


def rtdetr(**changes):
    tensors, settings = case(3, **changes)
    settings |= {"variant": "rtdetr", "class_cost": 2.0, "use_fl": True, "alpha": 0.25, "gamma": 2.0}
    return tensors, settings


def pairs(outputs):
    assert outputs["queries"].dtype == outputs["targets"].dtype == torch.int64
    return outputs["queries"].tolist(), outputs["targets"].tolist()


@pytest.mark.oracle
def test_worked_example_of_detr(oracle):
    tensors, settings = detr()
    answer = oracle(DETR).bind("hungarian", tensors, settings)
    assert pairs(answer["outputs"]) == ([2, 3, 2], [0, 1, 0])  # targets are local to the image
    assert all(torch.equal(tensor, answer["tensors"][name]) for name, tensor in tensors.items())


@pytest.mark.oracle
@pytest.mark.parametrize("spec", RTDETR)
def test_worked_example_of_rtdetr(oracle, spec):
    tensors, settings = rtdetr()
    answer = oracle(spec).bind("hungarian", tensors, settings)
    assert pairs(answer["outputs"]) == ([0, 3, 3], [1, 0, 2])  # targets are counted over the batch
    assert all(torch.equal(tensor, answer["tensors"][name]) for name, tensor in tensors.items())


@pytest.mark.oracle
@pytest.mark.parametrize(("spec", "build"), [(DETR, detr), *((spec, rtdetr) for spec in RTDETR)])
def test_empty_images(oracle, spec, build):
    assert pairs(oracle(spec).bind("hungarian", *build(sizes=(0, 0), labels=[], boxes=[]))["outputs"]) == (
        [],
        [],
    )
    one = oracle(spec).bind("hungarian", *build(sizes=(2, 0), labels=LABELS[:2], boxes=BOXES[:2]))
    assert pairs(one["outputs"]) == (([2, 3], [0, 1]) if spec == DETR else ([0, 3], [1, 0]))


@pytest.mark.oracle
@pytest.mark.parametrize(("spec", "build"), [(DETR, detr), *((spec, rtdetr) for spec in RTDETR)])
def test_more_ground_truths_than_queries(oracle, spec, build):
    many = build(sizes=(6, 1), labels=[0, 1, 2, 0, 1, 2, 0], boxes=[*BOXES, *BOXES, BOXES[0]])
    queries, targets = pairs(oracle(spec).bind("hungarian", *many)["outputs"])
    assert queries[:4] == [0, 1, 2, 3]
    assert len(targets) == 5


@pytest.mark.oracle
def test_every_cost_weight_arrives(oracle):
    for spec, build, weights in [
        (DETR, detr, ["class_cost", "bbox_cost", "giou_cost"]),
        (RTDETR[0], rtdetr, ["class_cost", "bbox_cost", "giou_cost"]),
    ]:
        tensors, settings = build()
        for weight in weights:
            alone = settings | dict.fromkeys(weights, 0.0) | {weight: 1.0}
            opposite = alone | {weight: -1.0}
            least, most = (pairs(oracle(spec).bind("hungarian", tensors, s)["outputs"]) for s in (alone, opposite))
            assert least != most, (spec, weight)


@pytest.mark.oracle
@pytest.mark.parametrize(("spec", "build", "variant"), [(DETR, rtdetr, "detr"), (RTDETR[0], detr, "rtdetr")])
def test_the_other_variant_is_refused(oracle, spec, build, variant):
    with pytest.raises(RuntimeError, match=f"RequestError: hungarian: .* answers variant '{variant}'"):
        oracle(spec).bind("hungarian", *build())


@pytest.mark.oracle
@pytest.mark.parametrize(("spec", "build"), [(DETR, detr), (RTDETR[0], rtdetr)])
def test_quantities_are_the_comparators(oracle, spec, build):
    assert oracle(spec).quantities("hungarian", *build()) == {}


def test_pairs_are_joined_as_they_are():
    raw = [(torch.tensor([3, 1, 1]), torch.tensor([0, -1, 9])), (torch.tensor([2]), torch.tensor([0]))]
    assert pairs(join_pairs(raw)) == ([3, 1, 1, 2], [0, -1, 9, 0])
    assert pairs(join_pairs([])) == ([], [])


def matcher_that_answers_its_arguments(monkeypatch, module):
    class Matcher:
        def __init__(self, **settings):
            self.settings = settings

        def __call__(self, *arguments):
            return self.settings, arguments

    monkeypatch.setitem(sys.modules, module, SimpleNamespace(HungarianMatcher=Matcher))


def test_the_call_of_transformers_gets_the_tensors_of_the_case(monkeypatch):
    matcher_that_answers_its_arguments(monkeypatch, "transformers.loss.loss_for_object_detection")
    tensors, settings = detr()
    chosen, (outputs, targets) = reference.transformers.hungarian.bind(tensors, settings)()
    assert chosen == {"class_cost": 1.0, "bbox_cost": 5.0, "giou_cost": 2.0}
    assert outputs["logits"] is tensors["logits"]
    assert outputs["pred_boxes"] is tensors["pred_boxes"]
    assert [target["class_labels"].tolist() for target in targets] == [LABELS[:2], LABELS[2:]]
    assert torch.equal(torch.cat([target["boxes"] for target in targets]), tensors["boxes"])
    assert [len(target["boxes"]) for target in targets] == settings["sizes"]


def test_the_call_of_ultralytics_gets_the_tensors_of_the_case(monkeypatch):
    matcher_that_answers_its_arguments(monkeypatch, "ultralytics.models.utils.ops")
    tensors, settings = rtdetr()
    chosen, (*arguments, sizes) = reference.ultralytics.hungarian.bind(tensors, settings)()
    gains = {"class": 2.0, "bbox": 5.0, "giou": 2.0}
    assert chosen == {"cost_gain": gains, "use_fl": True, "alpha": 0.25, "gamma": 2.0}
    names = ("pred_boxes", "logits", "boxes", "labels")
    assert all(argument is tensors[name] for argument, name in zip(arguments, names, strict=True))
    assert sizes == settings["sizes"]
