"""Objectness and class term of YOLOX's head for a given assignment (specification: yolox_losses.md, section 3)."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from reference.bound import Bound
from reference.yolox.head import Recorder, bare_head
from reference.yolox.simota import Answer


def bind(tensors: Mapping[str, Tensor], settings: Mapping[str, object]) -> Bound:
    """Prepare the head's loss with an assigner that answers the case's assignment.

    Every image has one ground truth of class 0, so that the assigner is asked about it; the box term that this adds
    is not read.
    """
    outputs = tensors["outputs"]
    images, anchors = outputs.shape[:2]
    head = bare_head(settings["num_classes"])
    Recorder(head, partial(_answer, tensors))
    labels = outputs.new_tensor([0.0, 1.0, 1.0, 1.0, 1.0]).expand(images, 1, 5)
    cells = [outputs.new_zeros(1, anchors)]
    strides = [outputs.new_ones(1, anchors)]
    call = partial(head.get_losses, None, cells, cells, strides, labels, outputs, [], outputs.dtype)
    return Bound(call, _translate)


def _answer(tensors: Mapping[str, Tensor], image: int, *_: Any) -> Answer:
    mask = tensors["fg_mask"][image]
    classes, overlaps = tensors["matched_classes"][image][mask], tensors["matched_iou"][image][mask]
    return classes, mask, overlaps, torch.zeros_like(classes, dtype=torch.int64), len(classes)


def _translate(raw: tuple[Tensor, ...]) -> dict[str, Tensor]:
    return {"loss_obj": raw[2], "loss_cls": raw[3]}
