"""The adapter of SimOTA, against the worked examples of simota.md, section 5."""

import math

import pytest
import torch

from reference.yolox.simota import translate

RELEASE = "yolox==0.3.0"
SETTINGS = {"num_classes": 2}

# A checkout newer than the release: another signature, and a name from a third module of yolox.utils.
CHECKOUT = {
    "__init__.py": "__version__ = '0.3.0'\nraise RuntimeError('a heavy __init__ was run')",
    "models/__init__.py": "raise RuntimeError('a heavy __init__ was run')",
    "models/yolo_head.py": """
import torch, torchvision
from yolox.utils import bboxes_iou, draw, meshgrid

class YOLOXHead(torch.nn.Module):
    def get_assignments(self, image, count, truths, classes, boxes, strides, xs, ys, cls_logits, obj_logits):
        assert truths.shape == (count, 4) and classes.shape == (count,)
        assert boxes.shape == strides.shape[1:] + (4,)
        assert xs.shape == ys.shape == strides.shape and cls_logits.shape[2] == self.num_classes
        assert obj_logits.shape[2] == 1 and draw() == "drawn"
        mask = torch.arange(len(boxes)) == 7 + image
        return classes[-1:], mask, torch.tensor([0.25]), torch.tensor([count - 1]), 1
""",
    "utils/__init__.py": "raise RuntimeError('a heavy __init__ was run')",
    "utils/boxes.py": "def bboxes_iou(): ...",
    "utils/compat.py": "def meshgrid(): ...",
    "utils/visualize.py": "def draw(): return 'drawn'",
}


def scene(truths, classes, counts, dtype=torch.float32):
    """The maps of section 5: strides 8 and 16 on 32 x 32, two classes, decoded as section 3.1 says."""
    batch = len(counts)
    index = torch.arange(20, dtype=torch.float64)
    small, level = torch.arange(16), torch.arange(4)
    xs = torch.cat([small % 4, level % 2]).to(dtype)
    ys = torch.cat([small // 4, level // 2]).to(dtype)
    strides = torch.cat([torch.full((16,), 8.0), torch.full((4,), 16.0)]).to(dtype)
    phase = 0.7 * index[None, :, None] + 1.3 * torch.arange(7.0, dtype=torch.float64)
    raw = (0.5 * torch.sin(phase + 0.4 * torch.arange(batch, dtype=torch.float64)[:, None, None])).to(dtype)
    centres = (raw[..., :2] + torch.stack([xs, ys], 1)) * strides[:, None]
    return {
        "gt_boxes": torch.tensor(truths).to(dtype),
        "gt_classes": torch.tensor(classes).to(dtype),
        "num_gt": torch.tensor(counts),
        "pred_boxes": torch.cat([centres, raw[..., 2:4].exp() * strides[:, None]], 2),
        "cls_logits": raw[..., 5:],
        "obj_logits": raw[..., 4:5],
        "strides": strides[None],
        "x_shifts": xs[None],
        "y_shifts": ys[None],
    }


ROWS = [[10.0, 12.0, 14.0, 16.0], [20.0, 22.0, 18.0, 12.0], [0.0, 0.0, 0.0, 0.0]]


def two_images(dtype=torch.float32):
    """The scene of 5.1 with a padding row, and an image without ground truths."""
    return scene([ROWS, [[0.0] * 4] * 3], [[1.0, 0.0, 0.0], [0.0] * 3], [2, 0], dtype)


@pytest.mark.oracle
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_worked_example(oracle, dtype):
    tensors = two_images(dtype)
    answer = oracle(RELEASE).bind("simota", tensors, SETTINGS)
    outputs = answer["outputs"]
    assert outputs["fg_mask"].nonzero().tolist() == [[0, 5], [0, 19]]
    assert outputs["matched_gt"][0, [5, 19]].tolist() == [0, 1]
    assert outputs["matched_classes"][0, [5, 19]].tolist() == [1, 0]
    assert outputs["matched_iou"][0, [5, 19]].tolist() == pytest.approx([0.168707, 0.652423], abs=1e-6)
    assert outputs["num_fg"].tolist() == [2, 0]
    background = ~outputs["fg_mask"]
    assert (outputs["matched_gt"][background] == -1).all()
    assert (outputs["matched_classes"][background] == 0).all()
    assert (outputs["matched_iou"][background] == 0).all()
    dtypes = {name: output.dtype for name, output in outputs.items()}
    assert dtypes == {
        "fg_mask": torch.bool,
        "matched_gt": torch.int64,
        "matched_classes": dtype,
        "matched_iou": dtype,
        "num_fg": torch.int64,
    }
    assert answer["raw"][1] is None  # upstream's loss never asks about an image without ground truths
    assert all(torch.equal(tensor, answer["tensors"][name]) for name, tensor in tensors.items())


@pytest.mark.oracle
def test_an_image_of_a_batch_is_that_image_alone(oracle):
    other = [[14.0, 9.0, 20.0, 12.0], [6.0, 26.0, 10.0, 8.0], [22.0, 20.0, 9.0, 16.0]]
    tensors = scene([ROWS, ROWS, other], [[1.0, 0.0, 0.0], [0.0] * 3, [0.0, 1.0, 1.0]], [2, 0, 3])
    # Confident logits, opposite in images 0 and 2: the class costs of another image would decide otherwise.
    tensors["cls_logits"][2] = 20 * (1 - 2 * (torch.arange(20) % 2)[:, None]) * torch.tensor([1.0, -1.0])
    tensors["cls_logits"][0] = -tensors["cls_logits"][2]
    batch = oracle(RELEASE).bind("simota", tensors, SETTINGS)["outputs"]
    grid = ("strides", "x_shifts", "y_shifts")
    for image in range(3):
        alone = {name: tensor if name in grid else tensor[image : image + 1] for name, tensor in tensors.items()}
        for name, output in oracle(RELEASE).bind("simota", alone, SETTINGS)["outputs"].items():
            assert torch.equal(batch[name][image : image + 1], output)


@pytest.mark.oracle
def test_region_edges(oracle):
    # 5.2: anchors 0 to 4, 8 and 12 are no candidates of this box; centres on an edge are outside.
    tensors = scene([[[24.0, 24.0, 2.0, 2.0]]], [[0.0]], [1])
    tensors["pred_boxes"][:] = torch.tensor([24.0, 24.0, 2.0, 2.0])  # every IoU is 1, so k is 10
    outputs = oracle(RELEASE).bind("simota", tensors, SETTINGS)["outputs"]
    assert outputs["num_fg"].tolist() == [10]
    assert outputs["fg_mask"][0, 19]  # the only free pair
    assert not outputs["fg_mask"][0, [0, 1, 2, 3, 4, 8, 12]].any()


@pytest.mark.oracle
def test_no_candidate_is_upstreams_error(oracle):
    tensors = scene([[[900.0, 900.0, 2.0, 2.0]]], [[0.0]], [1])
    with pytest.raises(RuntimeError, match="selected index k out of range"):
        oracle(RELEASE).bind("simota", tensors, SETTINGS)


@pytest.mark.oracle
def test_overlaps(oracle):
    iou = oracle(RELEASE).quantities("simota", two_images(torch.float64), SETTINGS)["iou"]
    assert iou.shape == (2, 3, 20)
    assert iou.dtype == torch.float64
    assert iou[0, [0, 0, 1], [5, 6, 19]].tolist() == pytest.approx([0.168707, 0.260208, 0.652423], abs=1e-6)
    assert (iou[0, 2] == 0).all()


def test_checkout_with_the_newer_signature(start_oracle, tmp_path):
    for name, content in CHECKOUT.items():
        file = tmp_path / "yolox" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    checkout = start_oracle(f"yolox={tmp_path}")
    assert (checkout.version, checkout.source) == ("0.3.0", str(tmp_path))
    outputs = checkout.bind("simota", two_images(), SETTINGS)["outputs"]
    assert outputs["fg_mask"].nonzero().tolist() == [[0, 7]]
    assert outputs["matched_gt"][0, 7] == 1
    assert outputs["matched_iou"][0, 7] == 0.25
    assert checkout.era("simota") == "0.3.0+head"


@pytest.mark.oracle
def test_the_release_is_no_head(start_oracle):
    assert start_oracle("yolox==0.3.0").era("simota") == "0.3.0"


def test_translate_only_places():
    mask = torch.zeros(20, dtype=torch.bool)
    mask[[3, 9]] = True
    raw = [(torch.tensor([1.5, -2.0]), mask, torch.tensor([math.nan, 1.25]), torch.tensor([7, 0]), 5), None]
    outputs = translate(raw, two_images())
    assert outputs["matched_gt"][0, [3, 9]].tolist() == [7, 0]
    assert outputs["matched_classes"][0, [3, 9]].tolist() == [1.5, -2.0]
    assert outputs["matched_iou"][0, 3].isnan()
    assert outputs["matched_iou"][0, 9] == 1.25
    assert outputs["num_fg"].tolist() == [5, 0]
    assert not outputs["fg_mask"][1].any()
