"""The adapters of anchors, codecs and overlaps, against the worked examples of boxes.md, sections 1, 2, 3, 6 and 9."""

import pytest
import torch

ORACLES = ["ultralytics==8.4.190", "ultralytics==8.1.47"]
POINT = torch.tensor([2.5, 3.5])

pytestmark = [pytest.mark.oracle, pytest.mark.parametrize("spec", ORACLES)]


def test_anchors(oracle, spec):
    tensors = {"feat0": torch.zeros(1, 1, 2, 3), "feat1": torch.zeros(1, 1, 1, 2)}
    for strides_as in ("list", "tensor"):
        settings = {"strides": [8, 16], "strides_as": strides_as, "grid_cell_offset": 0.5}
        outputs = oracle(spec).bind("make_anchors", tensors, settings)["outputs"]
        rows = [[0.5, 0.5], [1.5, 0.5], [2.5, 0.5], [0.5, 1.5], [1.5, 1.5], [2.5, 1.5], [0.5, 0.5], [1.5, 0.5]]
        assert outputs["points"].tolist() == rows
        assert outputs["point_strides"].flatten().tolist() == [8] * 6 + [16] * 2


def test_sizes_are_for_later_releases(oracle, spec):
    settings = {"strides": [8], "strides_as": "list", "grid_cell_offset": 0.5}
    tensors = {"sizes": torch.tensor([[1.0, 2]])}
    if spec == ORACLES[0]:
        assert oracle(spec).bind("make_anchors", tensors, settings)["outputs"]["points"].tolist() == [
            [0.5, 0.5],
            [1.5, 0.5],
        ]
    else:
        with pytest.raises(RuntimeError, match="not enough values"):
            oracle(spec).bind("make_anchors", tensors, settings)


def test_decoding(oracle, spec):
    tensors = {"distance": torch.tensor([1, 2, 3, 4.5]), "anchor_points": POINT}
    for xywh, expected in ((False, [1.5, 1.5, 5.5, 8]), (True, [3.5, 4.75, 4, 6.5])):
        answer = oracle(spec).bind("dist2bbox", tensors, {"xywh": xywh, "dim": -1})
        assert answer["outputs"]["boxes"].tolist() == expected
    assert all(torch.equal(tensor, answer["tensors"][name]) for name, tensor in tensors.items())


def test_encoding(oracle, spec):
    tensors = {"anchor_points": POINT, "bbox": torch.tensor([1.5, 1.5, 5.5, 8])}
    answer = oracle(spec).bind("bbox2dist", tensors, {"reg_max": 4})
    assert answer["outputs"]["distance"].tolist() == torch.tensor([1, 2, 3, 3.99]).tolist()
    if spec == ORACLES[0]:
        answer = oracle(spec).bind("bbox2dist", tensors, {"reg_max": None})
        assert answer["outputs"]["distance"].tolist() == [1, 2, 3, 4.5]
    else:
        with pytest.raises(RuntimeError, match=r"RequestError: bbox2dist: .* needs a reg_max"):
            oracle(spec).bind("bbox2dist", tensors, {"reg_max": None})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_expectation_decode(oracle, spec, dtype):
    logits = torch.tensor([0, 1, 0, 0, 2, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0], dtype=dtype).view(1, 1, 16)
    tensors = {"logits": logits, "anchor_points": POINT[None].to(dtype)}
    boxes = oracle(spec).bind("dfl_decode", tensors, {})["outputs"]["boxes"]
    assert boxes.dtype == dtype
    assert boxes[0, 0].tolist() == pytest.approx((1.15024447, 2.92246914, 5.24009705, 5), abs=1e-6)
    one_bin = {"logits": logits[..., :4], "anchor_points": tensors["anchor_points"]}
    assert oracle(spec).bind("dfl_decode", one_bin, {})["outputs"]["boxes"].tolist() == [[[2.5, 2.5, 2.5, 3.5]]]


def test_overlaps(oracle, spec):
    tensors = {"box1": torch.tensor([[0.0, 0, 10, 10]]), "box2": torch.tensor([[5.0, 5, 15, 20]])}
    expected = {"IoU": 0.11111111, "GIoU": -0.13888890, "DIoU": -0.01888888, "CIoU": -0.01916454}
    for kind, value in expected.items():
        flags = {name: name == kind for name in ("GIoU", "DIoU", "CIoU")}
        answer = oracle(spec).bind("bbox_iou", tensors, {"xywh": False, "eps": 1e-7, **flags})
        assert answer["outputs"]["iou"].shape == (1, 1)
        assert answer["outputs"]["iou"].item() == pytest.approx(value, abs=1e-8)
