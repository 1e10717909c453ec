"""Workloads have the sizes that they are named for, and the same content every time."""

import tomllib
from pathlib import Path

import pytest
import torch

from cases import hungarian, simota, tal
from cases.labels import LabelImage, LabelSet, read_labels
from cases.workloads import WORKLOADS, labels_case, workload_case, workload_images
from harness.operations import NAMES, operation
from harness.plan import PROFILES

SAMPLE = Path(__file__).parents[3] / "shared" / "data" / "coco_val2014_sample" / "instances.json"

COUNTS = {
    "coco-b1": lambda counts: len(counts) == 1 and sum(counts) == 7,
    "coco-b16": lambda counts: len(counts) == 16 and 6 <= sum(counts) / 16 <= 8 and max(counts) <= 60,
    "coco-b64": lambda counts: len(counts) == 64 and 6 <= sum(counts) / 64 <= 8 and max(counts) <= 60,
    "crowd-b16": lambda counts: counts == [100] * 16,
    "dense-b4": lambda counts: counts == [1000, 5, 5, 5],
    "dense-xview": lambda counts: counts == [4967, 1000, 200, 20],
    "detr-b16": lambda counts: len(counts) == 16 and max(counts) == 100 and min(counts) >= 1,
}


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_workload_has_its_declared_size_and_is_the_same_every_time(name):
    images = workload_images(WORKLOADS[name])
    assert COUNTS[name]([len(image.boxes) for image in images])
    for image, again in zip(images, workload_images(WORKLOADS[name]), strict=True):
        assert torch.equal(image.boxes, again.boxes)
        assert torch.equal(image.classes, again.classes)
        assert (image.width, image.height, image.num_classes) == (640, 640, 80)
        assert bool(((image.boxes >= 0) & (image.boxes <= 640)).all())
        sides = image.boxes[:, 2:] - image.boxes[:, :2]
        assert bool(((sides >= WORKLOADS[name].sides[0] - 1e-9) & (sides <= WORKLOADS[name].sides[1])).all())
        assert bool(((image.classes >= 0) & (image.classes < 80)).all())


def test_workload_cases_have_the_shapes_of_training():
    case = workload_case("coco-b1", "tal", topk2=True)
    assert case.tensors["pd_scores"].shape == (1, 8400, 80)
    assert case.tensors["gt_bboxes"].shape == (1, 7, 4)
    assert case.settings["topk"] == 10
    assert case.settings["topk2"] is None
    assert case.origin == "workload:coco-b1"
    assert case.digest == workload_case("coco-b1", "tal").digest
    case = workload_case("dense-b4", "simota", "bfloat16")
    assert case.tensors["gt_boxes"].shape == (4, 1000, 4)
    assert case.tensors["num_gt"].tolist() == [1000, 5, 5, 5]
    assert case.dtype == "bfloat16"
    for variant, columns in (("detr", 81), ("rtdetr", 80)):
        case = workload_case("detr-b16", "hungarian", variant=variant)
        assert case.tensors["logits"].shape == (16, 300, columns)
        assert sum(case.settings["sizes"]) == len(case.tensors["labels"]) == 844


def test_operations_are_measured_on_what_was_reported_slow():
    """Memory and speed in the field: batches of one, one dense image that pads the batch, thousands of boxes."""
    assert [name for name in NAMES if "coco-b1" not in operation(name).workloads] == []
    for name in ("tal", "simota", "v8_detection_loss"):
        assert {"crowd-b16", "dense-b4"} <= set(operation(name).workloads)
    for name in ("tal", "v8_detection_loss"):
        assert "dense-xview" in operation(name).workloads
    profiles = tomllib.loads(PROFILES.read_text())
    assert [name for name, profile in profiles.items() if "dense-xview" in profile["workloads"]] == []
    assert "coco-b1" in profiles["full"]["workloads"]


def test_an_unknown_request_names_the_argument():
    with pytest.raises(ValueError, match="name: no workload 'coco-b2'"):
        workload_case("coco-b2", "tal")


def labelled(count: int, classes: int = 3, size: int = 640) -> LabelImage:
    boxes = torch.tensor([[10.0, 10, 50 + i, 60] for i in range(count)], dtype=torch.float64).reshape(-1, 4)
    return LabelImage(f"image {count}", size, size, boxes, torch.arange(count) % classes, classes)


@pytest.mark.parametrize("module", [tal, simota, hungarian])
def test_labels_become_cases_by_stage_and_seed(module):
    images = [labelled(4), labelled(0), labelled(1)]
    cases = {
        (stage, seed): module.from_labels(images, stage, seed) for stage in ("early", "mid", "late") for seed in (0, 1)
    }
    assert len({case.digest for case in cases.values()}) == 6
    assert cases["mid", 1].digest == module.from_labels(images, "mid", 1).digest
    case = cases["late", 0]
    assert {"labelled", "prediction-late", "float32", "empty-image"} <= case.tags
    assert case.origin == "labels:image 4+2/late/0"
    with pytest.raises(ValueError, match="images: a batch shares"):
        module.from_labels([labelled(1), labelled(1, size=320)], "mid", 0)


def test_a_label_set_is_a_workload_too():
    few = LabelSet("few", (labelled(2), labelled(5)), ("a", "b", "c"), 0)
    case = labels_case(few, "tal")
    assert case.origin == "workload:labels-b16"
    assert case.tensors["mask_gt"].sum(dim=(1, 2)).tolist() == [2, 5] * 8
    assert case.settings["num_classes"] == 3


@pytest.mark.skipif(not SAMPLE.exists(), reason="no real labels at ../shared/data")
def test_the_real_sample_is_a_workload_for_every_operation():
    labels = read_labels(SAMPLE)
    sizes = [len(image.boxes) for image in labels.images[:16]]
    assert labels_case(labels, "simota").tensors["num_gt"].tolist() == sizes
    assert labels_case(labels, "hungarian", variant="rtdetr").settings["sizes"] == sizes
