"""Total loss of YOLOX's head, decoding and assignment included (specification: yolox_losses.md, section 3)."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from reference.bound import Bound
from reference.yolox import simota
from reference.yolox.head import Recorder, bare_head, constant_strides, decode, levels
from reference.yolox.simota import Answer, variant

__all__ = ["assigner_inputs", "bind", "variant"]

LOSSES = ("total_loss", "iou_loss", "conf_loss", "cls_loss", "l1_loss", "num_fg")
Result = tuple[Sequence[Any], dict[int, Answer]]


def bind(
    tensors: Mapping[str, Tensor], settings: Mapping[str, object], assignment: Mapping[str, Tensor] | None = None
) -> Bound:
    """Prepare decoding and loss; with `assignment` (fg_mask, matched_gt) the assigner answers that."""
    call, _ = _prepare(tensors, settings, assignment)
    return Bound(call, partial(_translate, tensors=tensors), _losses)


@torch.no_grad()
def assigner_inputs(
    tensors: Mapping[str, Tensor], settings: Mapping[str, object]
) -> tuple[dict[str, Tensor], dict[str, object], dict[str, Tensor]]:
    """Return tensors, settings and outputs of `simota`, as the head hands them to its assigner and gets them back."""
    call, recorder = _prepare(tensors, settings, None)
    _, answers = call()
    labels, maps = tensors["labels"], levels(tensors)
    sizes = constant_strides(maps, settings["strides"])
    decoded, grids = decode(bare_head(settings["num_classes"], settings["strides"]), maps)
    rows, grid = torch.cat(decoded, 1), torch.cat(grids, 1)
    counts = [len(recorder.given[image][0]) if image in recorder.given else 0 for image in range(len(labels))]
    if not labels.is_floating_point():
        labels = labels.float()  # what upstream's first division makes of whole numbers
    given = {
        "gt_boxes": labels[..., 1:5].clone(),
        "gt_classes": labels[..., 0].clone(),
        "num_gt": torch.tensor(counts, device=labels.device),
        "pred_boxes": rows[..., :4].clone(),
        "cls_logits": rows[..., 5:].clone(),
        "obj_logits": rows[..., 4:5].clone(),
        "strides": torch.cat(sizes, 1),
        "x_shifts": grid[..., 0],
        "y_shifts": grid[..., 1],
    }
    for image, (boxes, classes, predicted, *_) in recorder.given.items():
        given["gt_boxes"][image, : len(boxes)], given["gt_classes"][image, : len(boxes)] = boxes, classes
        given["pred_boxes"][image] = predicted
    listed = [
        (answers[image][0].to(labels.dtype), *answers[image][1:]) if image in answers else None
        for image in range(len(labels))
    ]
    return given, {"num_classes": settings["num_classes"]}, simota.translate(listed, given)


def _prepare(
    tensors: Mapping[str, Tensor], settings: Mapping[str, object], assignment: Mapping[str, Tensor] | None
) -> tuple[partial, Recorder]:
    maps = levels(tensors)
    head = bare_head(settings["num_classes"], settings["strides"], settings["use_l1"])
    recorder = Recorder(head, None if assignment is None else partial(_answer, assignment))
    sizes = constant_strides(maps, settings["strides"])
    return partial(_run, head, recorder, maps, sizes, tensors["labels"]), recorder


def _run(head: Any, recorder: Recorder, maps: Sequence[Tensor], sizes: Sequence[Tensor], labels: Tensor) -> Result:
    recorder.forget()
    rows, grids = decode(head, maps)
    raws = [raw[:, :4].flatten(2).mT for raw in maps] if head.use_l1 else []
    columns, lines = [grid[:, :, 0] for grid in grids], [grid[:, :, 1] for grid in grids]
    outputs = torch.cat(rows, 1)
    losses = head.get_losses(None, columns, lines, sizes, labels, outputs, raws, maps[0].dtype)
    return losses, dict(recorder.answers)


def _answer(
    assignment: Mapping[str, Tensor], image: int, gt_boxes: Tensor, gt_classes: Tensor, pred_boxes: Tensor
) -> Answer:
    from yolox.utils import bboxes_iou

    mask = assignment["fg_mask"][image]
    rows = assignment["matched_gt"][image][mask]
    with torch.no_grad():
        overlaps = bboxes_iou(gt_boxes, pred_boxes, False)[:, mask].gather(0, rows[None])[0]
    return gt_classes[rows], mask, overlaps, rows, len(rows)


def _losses(raw: Result) -> dict[str, Tensor]:
    return {name: value for name, value in zip(LOSSES, raw[0], strict=True) if isinstance(value, Tensor)}


def _translate(raw: Result, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Floats become tensors; images that the assigner was not asked about are background."""
    losses, answers = raw
    outputs = dict(zip(LOSSES, losses, strict=True))
    total = outputs["total_loss"]
    if not isinstance(outputs["l1_loss"], Tensor):
        outputs["l1_loss"] = total.detach().new_tensor(outputs["l1_loss"])
    outputs["num_fg"] = torch.tensor(outputs["num_fg"], dtype=torch.float32, device=total.device)
    images, anchors = len(tensors["labels"]), sum(raw.shape[2:].numel() for raw in levels(tensors))
    mask = torch.zeros(images, anchors, dtype=torch.bool, device=total.device)
    rows = torch.full((images, anchors), -1, device=total.device)
    for image, (_, chosen, _, indices, _) in answers.items():
        mask[image] = chosen
        rows[image, chosen] = indices
    return outputs | {"fg_mask": mask, "matched_gt": rows}
