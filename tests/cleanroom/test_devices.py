"""What the library makes on the way lies where its inputs do, not where new tensors lie by default."""

import pytest
import torch

from cases.pinned import pinned
from harness.operation import AUTOCAST
from harness.operations import NAMES, operation
from harness.worker import as_outputs

CASES = 3
#: These read or make numbers on the host, or give PyTorch an `out` that its own check then makes on the default device.
ON_THE_HOST = {
    "tal", "rotated_tal", "hungarian", "v8_detection_loss", "v10_detection_loss", "rtdetr_loss", "generalized_box_iou",
    "set_class_loss", "set_mask_loss", "make_anchors", "dfl_decode",
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ON_THE_HOST])
def test_a_default_device_is_left_alone(name):
    declared = operation(name)
    full = [case for case in pinned(name) if all(value.numel() for value in case.tensors.values())]
    for case in full[:CASES]:
        tensors = {key: value.clone() for key, value in case.tensors.items()}
        for key in declared.carries_gradient(tensors):
            tensors[key].requires_grad_()
        settings = {key: value for key, value in case.settings.items() if key != AUTOCAST}
        with torch.device("meta"):
            outputs = as_outputs(declared.candidates["torch"](**tensors, **settings))
            found = [value for value in outputs.values() if isinstance(value, torch.Tensor)]
            for value in found:
                if value.requires_grad and value.is_floating_point():
                    value.sum().backward(retain_graph=True)
        assert {value.device.type for value in found} == {"cpu"}
    assert full
