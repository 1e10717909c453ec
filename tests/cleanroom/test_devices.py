"""Every operation on a device that is not the CPU: nothing is left behind, and the answer is the CPU's.

A GPU would say so by an error or by a wait that no value shows; here it is said without one (`elsewhere.py`).
"""

from functools import cache

import pytest
import torch

from cases.pin import pinned_cases
from cleanroom.assign.simota import SimOTAAssigner
from cleanroom.losses.rtdetr import RTDETRDetectionLoss
from cleanroom.losses.yolox import YOLOXLoss
from harness.candidates import _OnPath
from harness.execute import execute
from harness.operation import AUTOCAST, DropIn
from harness.operations import NAMES, operation
from harness.worker import as_outputs
from tests.cleanroom.elsewhere import ELSEWHERE, Device, fetched
from tests.cleanroom.test_rtdetr_loss import batch_of
from tests.cleanroom.test_rtdetr_loss import example as rtdetr_example
from tests.cleanroom.test_simota import random_scene
from tests.cleanroom.test_yolox_loss import arguments
from tests.cleanroom.test_yolox_loss import inputs as yolox_inputs

ON_THE_HOST = {"hungarian", "set_loss", "rtdetr_loss"}
"""Operations whose pairs are found, and so may lie, on the host: there are no kernels here."""
WAITS = {"hungarian": 1, "yolox_l1": 1, "make_anchors": 1, "set_class_loss": 4, "set_box_loss": 4, "set_mask_loss": 4}
"""How often the host waits for values, at most: for costs; for the rows of the foreground; for strides that lie on the
device; for pairs that lie there, two tensors an image. Everything else never does, but inside an operator."""


@pytest.fixture(autouse=True)
def _without_autocast(monkeypatch):
    """Autocast has no state for a device that no build has."""
    known = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *of: str(*of) != ELSEWHERE.type and known(*of))


@cache
def pinned():
    found = {}
    for name, case in pinned_cases().items():
        if not case.settings.get(AUTOCAST):
            found.setdefault(case.operation, {})[name] = case
    return found


def on_device_path(implementation):
    """The path that the library takes on a device without kernels, where there is a choice."""
    call = implementation.bind if isinstance(implementation, DropIn) else implementation
    return {"path": call.on_device} if isinstance(call, _OnPath) else {}


def run(name, case, device=None):
    declared = operation(name)
    implementation = declared.candidates["torch"]
    settings = {key: value for key, value in case.settings.items() if key != AUTOCAST}
    settings |= on_device_path(implementation)
    tensors = {key: device.put(value) for key, value in case.tensors.items()} if device else case.tensors
    return execute(
        lambda given: as_outputs(implementation(**given, **settings)),
        tensors,
        track=False,
        gradients=declared.carries_gradient(case.tensors),
    )


@pytest.mark.parametrize("name", NAMES)
def test_the_answer_is_the_cpus_and_no_value_is_waited_for(name):
    asked = 0
    for which, case in pinned()[name].items():
        expected = run(name, case)
        if expected.error:
            continue  # values are not looked at on a device
        with Device() as device:
            found = run(name, case, device)
        assert not found.error, f"{which}: {found.error.text}"
        assert device.waits <= WAITS.get(name, 0), which
        assert found.outputs.keys() == expected.outputs.keys(), which
        for key, value in expected.outputs.items():
            there = fetched(found.outputs[key])
            assert there is not None or name in ON_THE_HOST, f"{which}: {key} is left on the CPU"
            torch.testing.assert_close(
                found.outputs[key] if there is None else there,
                value,
                equal_nan=True,
                msg=f"{which}, {key}: {{}}".format,
            )
        asked += 1
    assert asked


def simota_of_an_image(put):
    scene = {name: put(value) for name, value in random_scene(7).items()}
    number = scene["strides"].shape[1]
    grid = (scene[name] for name in ("strides", "x_shifts", "y_shifts"))
    truths, predicted = (scene[name][0, :2] for name in ("gt_boxes", "gt_classes")), scene["pred_boxes"]
    found = SimOTAAssigner(5)(
        0, 2, number, *truths, predicted[0], *grid, scene["cls_logits"], predicted, scene["obj_logits"]
    )
    return found[:-1]


def yolox_of_a_head(put):
    labels, maps = yolox_inputs()
    given = arguments(put(labels), [put(level) for level in maps], True)
    return YOLOXLoss(2)(*given)[:5]


def rtdetr_of_a_decoder(put):
    given = {
        name: put(value) if isinstance(value, torch.Tensor) else value
        for name, value in rtdetr_example(3, denoising=True).items()
    }
    meta = {"dn_pos_idx": given["dn_pos_idx"].split([4, 2]), "dn_num_group": 2, "dn_num_split": [8, 4]}
    parts = (given["pred_bboxes"], given["pred_scores"]), batch_of(given), given["dn_bboxes"], given["dn_scores"], meta
    return list(RTDETRDetectionLoss(3, use_vfl=True)(*parts).values())


@pytest.mark.parametrize("call", [simota_of_an_image, yolox_of_a_head, rtdetr_of_a_decoder])
def test_what_stands_in_for_upstreams_classes(call):
    expected = call(lambda tensor: tensor.detach().clone())
    with Device() as device:
        found = call(device.put)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(fetched(one), other.detach())
