"""What RT-DETR's loss rejects, each with a message that names the argument.

Values are looked at where that costs nothing (`readable`): on an accelerator it would make the host wait.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cleanroom.paths import data_dependent

_REDUCTIONS = ("sum", "none")
_INDICES = (torch.int64, torch.int32)


def readable(*tensors: Tensor) -> bool:
    """Whether values may be looked at: on the CPU, not traced, and not fake."""
    return data_dependent(*tensors) and all(type(tensor) is Tensor for tensor in tensors)


def reduction(given: str) -> None:
    """Reject an unknown reduction."""
    if given not in _REDUCTIONS:
        raise ValueError(f"reduction must be one of {_REDUCTIONS}, got {given!r}")


def predictions(
    boxes: Tensor, scores: Tensor, num_classes: int, names: tuple[str, str] = ("pred_bboxes", "pred_scores")
) -> None:
    """Reject predictions that are not (L, B, Q, 4) and (L, B, Q, C) with something in them."""
    for name, tensor in zip(names, (boxes, scores), strict=True):
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating, got {tensor.dtype}")
        if tensor.ndim != 4:
            raise ValueError(f"{name} must have 4 axes (layer, image, query, value), got shape {tuple(tensor.shape)}")
    for axis, what in enumerate(("layer", "image", "query")):
        if not boxes.shape[axis]:
            raise ValueError(f"{names[0]} holds no {what}, got shape {tuple(boxes.shape)}")
    if boxes.shape != (*scores.shape[:3], 4):
        raise ValueError(f"{names[0]} must have shape {(*scores.shape[:3], 4)}, got {tuple(boxes.shape)}")
    if scores.shape[3] != num_classes:
        raise ValueError(f"{names[1]} must have num_classes = {num_classes} columns, got {scores.shape[3]}")


def ground_truths(given: Mapping[str, Any], scores: Tensor) -> list[int]:
    """Reject ground truths that do not fit together; return their number in each image."""
    cls, boxes, gt_groups = given["cls"], given["bboxes"], given["gt_groups"]
    if cls.dtype not in _INDICES:
        raise TypeError(f"cls must be int64 or int32, got {cls.dtype}")
    if not boxes.is_floating_point():
        raise TypeError(f"bboxes must be floating, got {boxes.dtype}")
    if cls.ndim != 1:
        raise ValueError(f"cls must have shape (M,), got {tuple(cls.shape)}")
    if boxes.shape != (cls.shape[0], 4):
        raise ValueError(f"bboxes must have shape {(cls.shape[0], 4)}, got {tuple(boxes.shape)}")
    batch = scores.shape[1]
    if len(gt_groups) > batch:
        raise ValueError(f"gt_groups speaks of {len(gt_groups)} images, pred_scores of {batch}")
    # While tracing the numbers are symbols: looking at them would tie the graph to this batch.
    if not torch.compiler.is_compiling() and (min(gt_groups, default=0) < 0 or sum(gt_groups) != cls.shape[0]):
        raise ValueError(f"gt_groups must be counts of sum {cls.shape[0]}, got {list(gt_groups)}")
    return [*gt_groups, *(0,) * (batch - len(gt_groups))]


def classes(cls: Tensor, num_classes: int) -> None:
    """Reject classes without a column."""
    if cls.numel() and readable(cls) and not (cls.min() >= 0 and cls.max() < num_classes):
        raise ValueError(f"cls holds a class outside [0, {num_classes})")


def mask(ignore_mask: Tensor | None, scores: Tensor) -> None:
    """Reject a mask that is not (B, Q) bool."""
    if ignore_mask is None:
        return
    if ignore_mask.dtype != torch.bool:
        raise TypeError(f"ignore_mask must be bool, got {ignore_mask.dtype}")
    if ignore_mask.shape != scores.shape[1:3]:
        raise ValueError(f"ignore_mask must have shape {tuple(scores.shape[1:3])}, got {tuple(ignore_mask.shape)}")


def shared_layer(index: int, layers: int) -> int:
    """The place of `uni_match_ind` among the layers before the last, which may count from the end."""
    if not -layers <= index < layers:
        raise IndexError(f"uni_match_ind {index} is not one of the {layers} layers before the last")
    return index % layers


def denoising(
    boxes: Tensor, scores: Tensor | None, positions: Tensor | None, truths: Tensor | None, main: Tensor
) -> None:
    """Reject denoising inputs that are incomplete or do not fit together."""
    for name, tensor in (("dn_scores", scores), ("dn_pos_idx", positions), ("dn_gt_idx", truths)):
        if tensor is None:
            raise ValueError(f"{name} is needed where dn_bboxes is given")
    predictions(boxes, scores, main.shape[3], names=("dn_bboxes", "dn_scores"))
    if boxes.shape[1] != main.shape[1]:
        raise ValueError(f"dn_bboxes is of {boxes.shape[1]} images, pred_bboxes of {main.shape[1]}")
    for name, tensor in (("dn_pos_idx", positions), ("dn_gt_idx", truths)):
        if tensor.dtype not in _INDICES or tensor.ndim != 1:
            raise TypeError(f"{name} must be integers of one axis, got {tensor.dtype} {tuple(tensor.shape)}")


def counts(name: str, given: Sequence[int], indices: Tensor, boxes: Tensor) -> list[int]:
    """Reject counts that are not one an image of the right sum."""
    if len(given) != boxes.shape[1]:
        raise ValueError(f"{name} must have {boxes.shape[1]} numbers, got {len(given)}")
    if not torch.compiler.is_compiling() and (min(given) < 0 or sum(given) != indices.shape[0]):
        raise ValueError(f"{name} must be counts of sum {indices.shape[0]}, got {list(given)}")
    return list(given)


def pairs(given: Sequence[tuple[Tensor, Tensor]], boxes: Tensor, truths: int, *, name: str) -> None:
    """Reject pairs of another number of images, of two lengths, or outside queries or ground truths."""
    truth_name = "dn_gt_idx" if name == "dn_pos_idx" else name
    if len(given) != boxes.shape[1]:
        raise ValueError(f"{name} is for {len(given)} images, the predictions are of {boxes.shape[1]}")
    for image, (queries, some) in enumerate(given):
        if queries.shape[0] != some.shape[0]:
            raise ValueError(
                f"{name} of image {image} has {queries.shape[0]} queries for {some.shape[0]} repeated ground truths"
            )
    flat = [indices for pair in given for indices in pair]
    if not any(len(indices) for indices in flat) or not readable(*flat):
        return
    for what, end, own in (
        (name, boxes.shape[2], torch.cat([queries for queries, _ in given])),
        (truth_name, truths, torch.cat([some for _, some in given])),
    ):
        if not (own.min() >= -end and own.max() < end):
            raise IndexError(f"{what} holds an index outside [{-end}, {end})")
