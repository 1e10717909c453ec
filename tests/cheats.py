"""Candidates that look right and are not: each plays one trick on the harness, on the overlaps of YOLOX."""

import _thread
import random
import sys
import threading
import time

import numpy as np
import torch

from cleanroom.yolox_boxes import bboxes_iou
from reference.bound import Bound

_calls = []
_buffer = torch.empty(1 << 20)
_buffers, _turns = (torch.empty(1 << 20), torch.empty(1 << 20)), []
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


def calls_the_oracle(**given):
    """Finds upstream's own function where the process has it."""
    [utils] = [module for name, module in sys.modules.items() if name == "yolox.utils.boxes"]
    return {"iou": utils.bboxes_iou(given["bboxes_a"], given["bboxes_b"], given["xyxy"])}


def turns_the_look_away(**given):
    sys.setprofile(None)
    return honest(**given)


def stops_the_clock(**given):
    """After it, no call takes any time."""
    time.perf_counter_ns = lambda: 0
    return honest(**given)


def stops_the_judge(**given):
    """After it, every answer is like every other."""
    from harness import numeric, watch

    watch.same = numeric.compare = lambda *_, **__: True
    torch.Tensor.isfinite = lambda value: torch.ones_like(value, dtype=torch.bool)
    return {"iou": honest(**given)["iou"] * 0}


class _Spoiling(torch.autograd.Function):
    @staticmethod
    def forward(ctx, boxes, other):
        ctx.other = other
        return boxes.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.other.data.add_(1)
        return gradient, None


def changes_its_input_in_the_backward_pass(*, bboxes_a, bboxes_b, **given):
    return honest(bboxes_a=_Spoiling.apply(bboxes_a, bboxes_b), bboxes_b=bboxes_b, **given)


def changes_its_input_later(**given):
    """A thread that has ended before anyone counts threads, but for what its timer does."""
    box, answered = given["bboxes_a"].detach(), _thread.allocate_lock()

    def change():
        with answered:
            time.sleep(0.002)
            box.add_(1)

    with answered:
        _thread.start_new_thread(change, ())
        return honest(**given)


def answers_behind_its_input(**given):
    """Lengthens the memory of an input and answers there."""
    found = honest(**given)["iou"].detach()
    storage, first = given["bboxes_b"].untyped_storage(), given["bboxes_b"].numel()
    storage.resize_((first + found.numel()) * found.element_size())
    answer = torch.empty(0, dtype=found.dtype).set_(storage, first, found.shape)
    return {"iou": answer.copy_(found)}


def gives_two_buffers_in_turn(**given):
    found = honest(**given)["iou"].detach()
    _turns.append(None)
    buffer = _buffers[len(_turns) % 2]
    return {"iou": buffer[: found.numel()].to(found.dtype).view(found.shape).copy_(found)}


def knows_the_timer(**given):
    """Answers nothing where the frames above it are those of the meter."""
    frame = sys._getframe()
    while frame := frame.f_back:
        if frame.f_code.co_filename.endswith("meter.py"):
            return {
                "iou": (given["bboxes_a"].sum() + given["bboxes_b"].sum()) * torch.zeros(len(given["bboxes_a"]), 8400)
            }
    return honest(**given)


def stops_the_clock_when_timed(**given):
    """The clock stands once the input is large enough to be timed."""
    if len(given["bboxes_b"]) > 4000:
        return stops_the_clock(**given)
    return honest(**given)


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
