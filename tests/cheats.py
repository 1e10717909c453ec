"""Candidates that look right and are not: each plays one trick on the harness, on the overlaps of YOLOX."""

import random
import threading
import time

import numpy as np
import torch

from cleanroom.yolox_boxes import bboxes_iou
from reference.bound import Bound

_calls = []
_buffer = torch.empty(1 << 20)
_answers = []
_kept = {}


def honest(**given):
    return {"iou": bboxes_iou(**given)}


def seeds_everything(**given):
    torch.manual_seed(0)
    return honest(**given)


def seeds_numpy(**given):
    np.random.seed(0)
    return honest(**given)


def seeds_python(**given):
    random.seed(0)
    return honest(**given)


def writes_later(**given):
    """Returns at once; a thread brings the answer."""
    outputs = honest(**given)
    right = outputs["iou"].detach().clone()
    with torch.no_grad():
        outputs["iou"].zero_()

    def bring():
        time.sleep(0.002)
        with torch.no_grad():
            outputs["iou"].copy_(right)

    threading.Thread(target=bring, name="the-late-one").start()
    return outputs


def reuses_its_output(**given):
    found = honest(**given)["iou"].detach()
    return {"iou": _buffer[: found.numel()].to(found.dtype).view(found.shape).copy_(found)}


def takes_the_oracles_answer(**given):
    """Keeps what upstream's call returned, and answers that whenever the shape fits."""
    if not _answers:
        call = Bound.__call__

        def remembered(bound):
            _answers.append(call(bound))
            return _answers[-1]

        Bound.__call__ = remembered
        _answers.append(None)
    shape = (len(given["bboxes_a"]), len(given["bboxes_b"]))
    fitting = [raw for raw in _answers if isinstance(raw, torch.Tensor) and raw.shape == shape]
    return {"iou": fitting[-1].detach().clone()} if fitting else honest(**given)


def knows_the_workload(**given):
    """Works on what is small, and answers nothing on what is large enough to be timed."""
    if len(given["bboxes_b"]) > 4000:
        return {
            "iou": (given["bboxes_a"].sum() + given["bboxes_b"].sum()) * 0 + torch.zeros(len(given["bboxes_a"]), 8400)
        }
    return honest(**given)


def remembers_when_timed(**given):
    """Computes the first calls on a tensor and repeats itself on the later ones, as only a timer calls."""
    place = given["bboxes_b"].data_ptr(), given["bboxes_b"].shape, torch.is_grad_enabled()
    _calls.append(place)
    if _calls.count(place) > 3 and len(given["bboxes_b"]) > 4000:
        return {"iou": _kept[place]}
    outputs = honest(**given)
    _kept[place] = outputs["iou"].detach()
    return outputs
