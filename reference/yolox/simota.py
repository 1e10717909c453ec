"""SimOTA assignment of YOLOX's head (specification: simota.md)."""

import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from reference.bound import Bound

HEAD = "head"

# Upstream's answer for one image: classes (F,), mask (N,), IoUs (F,), ground-truth indices (F,), F.
Answer = tuple[Tensor, Tensor, Tensor, Tensor, int]


def bind(tensors: Mapping[str, Tensor], settings: Mapping[str, object]) -> Bound:
    """Prepare a call an image that has ground truths; as upstream's loss, it never asks about the others.

    The release takes the number of anchors and two arguments that it ignores; newer checkouts take neither.
    """
    from yolox.models.yolo_head import YOLOXHead

    head = YOLOXHead.__new__(YOLOXHead)  # without layers: the assignment needs none, and they would draw random numbers
    nn.Module.__init__(head)
    head.num_classes = settings["num_classes"]
    prepare = _repository if variant() == HEAD else _release
    counts = tensors["num_gt"].tolist()
    calls = [prepare(tensors, image, count) if count else None for image, count in enumerate(counts)]
    return Bound(partial(_run, head.get_assignments, calls), partial(translate, tensors=tensors))


def variant() -> str:
    """ "head" for the repository since 2023, "" for the release: both say 0.3.0, the signature tells them apart."""
    from yolox.models.yolo_head import YOLOXHead

    return "" if "total_num_anchors" in inspect.signature(YOLOXHead.get_assignments).parameters else HEAD


def _release(tensors: Mapping[str, Tensor], image: int, count: int) -> tuple[Any, ...]:
    boxes = tensors["pred_boxes"]
    truths = tensors["gt_boxes"][image, :count], tensors["gt_classes"][image, :count]
    grid = tensors["strides"], tensors["x_shifts"], tensors["y_shifts"]
    logits = tensors["cls_logits"], boxes, tensors["obj_logits"]
    return image, count, boxes.shape[1], *truths, boxes[image], *grid, *logits, None, None


def _repository(tensors: Mapping[str, Tensor], image: int, count: int) -> tuple[Any, ...]:
    truths = tensors["gt_boxes"][image, :count], tensors["gt_classes"][image, :count]
    grid = tensors["strides"], tensors["x_shifts"], tensors["y_shifts"]
    logits = tensors["cls_logits"], tensors["obj_logits"]
    return image, count, *truths, tensors["pred_boxes"][image], *grid, *logits


def _run(assign, calls: Sequence[tuple[Any, ...] | None]) -> list[Answer | None]:
    return [assign(*arguments) if arguments else None for arguments in calls]


def translate(raw: Sequence[Answer | None], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Spread each image's foreground rows over its anchors; background is False, -1 and 0."""
    batch, anchors = tensors["pred_boxes"].shape[:2]
    outputs = {
        "fg_mask": torch.zeros(batch, anchors, dtype=torch.bool),
        "matched_gt": torch.full((batch, anchors), -1),
        "matched_classes": torch.zeros(batch, anchors, dtype=tensors["gt_classes"].dtype),
        "matched_iou": torch.zeros(batch, anchors, dtype=_iou_dtype(raw, tensors)),
        "num_fg": torch.zeros(batch, dtype=torch.int64),
    }
    outputs = {name: output.to(tensors["pred_boxes"].device) for name, output in outputs.items()}
    for image, answer in enumerate(raw):
        if answer is not None:
            classes, mask, ious, indices, count = answer
            outputs["fg_mask"][image] = mask
            outputs["matched_gt"][image, mask] = indices
            outputs["matched_classes"][image, mask] = classes
            outputs["matched_iou"][image, mask] = ious
            outputs["num_fg"][image] = count
    return outputs


def _iou_dtype(raw: Sequence[Answer | None], tensors: Mapping[str, Tensor]) -> torch.dtype:
    given = [answer[2].dtype for answer in raw if answer is not None]
    return given[0] if given else torch.promote_types(tensors["gt_boxes"].dtype, tensors["pred_boxes"].dtype)


@torch.no_grad()
def quantities(tensors: Mapping[str, Tensor], settings: Mapping[str, object]) -> dict[str, Tensor]:
    """Return "iou" (B, M, N) of every row of `gt_boxes`, padding included, with every predicted box."""
    from yolox.utils import bboxes_iou

    images = zip(tensors["gt_boxes"], tensors["pred_boxes"], strict=True)
    return {"iou": torch.stack([bboxes_iou(truths, boxes, xyxy=False) for truths, boxes in images])}
