"""Adapters on a device that is not the CPU: what they make for upstream's call lies where the tensors do."""

import pytest
import torch

from cases.pinned import pinned
from harness.operation import AUTOCAST
from harness.parity import options


@pytest.mark.parametrize(
    ("spec", "operation"),
    [
        ("ultralytics==8.4.190", "v8_detection_loss"),
        ("ultralytics==8.1.47", "v8_detection_loss"),
        ("ultralytics==8.4.190", "class_bce"),
        ("transformers==5.23.0", "set_class_loss"),
        ("transformers==5.23.0", "set_loss"),
        ("yolox==0.3.0", "yolox_l1"),
    ],
)
def test_a_call_elsewhere_answers_as_on_the_cpu(oracle, spec, operation):
    given = pinned(operation, **options(operation, spec))
    case = next(case for case in given if "worked-example" in case.origin or operation == "class_bce")
    settings = {key: value for key, value in case.settings.items() if key != AUTOCAST}
    expected = oracle(spec).bind(operation, case.tensors, settings)["outputs"]
    found = oracle(spec).elsewhere(operation, case.tensors, settings)
    for name, value in expected.items():
        if value.is_floating_point():  # decisions may stay on the host, where a matcher takes them
            torch.testing.assert_close(found[name], value.detach())
