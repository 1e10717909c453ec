"""What every anchor learns of the ground truth that it was assigned, gathered in one launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cleanroom.kernels import runtime

BLOCK = 512
"""Anchors a program."""


@triton.jit(do_not_specialize=["label_image", "label_row", "truth_image", "truth_row", "truth_side"])
def _gather(
    owner, labels, truths, label, box, foreground, index,
    images, anchors, label_image, label_row, truth_image, truth_row, truth_side, BLOCK: tl.constexpr,
):  # fmt: skip
    """Label, box, whether foreground, and row of the owner; of background, those of row 0. 4 bytes read, 33 written."""
    flat = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    image = flat // anchors
    exists = image < images
    owned_by = tl.load(owner + flat, mask=exists, other=-1)
    row = tl.maximum(owned_by, 0)
    found = tl.load(labels + image * label_image + row * label_row, mask=exists, other=0)
    tl.store(label + flat, tl.maximum(found, 0), mask=exists)
    tl.store(foreground + flat, owned_by >= 0, mask=exists)
    tl.store(index + flat, row.to(tl.int64), mask=exists)
    side = tl.arange(0, 4)[None, :]
    place = (image * truth_image + row * truth_row)[:, None] + side * truth_side
    tl.store(
        box + flat[:, None] * 4 + side, tl.load(truths + place, mask=exists[:, None], other=0), mask=exists[:, None]
    )


def gather_all(owner: Tensor, labels: Tensor, gt_boxes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch; see `targets`."""
    images, anchors = owner.shape
    label = runtime.empty((images, anchors), torch.int64, owner.device)
    box = runtime.empty((images, anchors, 4), gt_boxes.dtype, owner.device)
    foreground = runtime.empty((images, anchors), torch.bool, owner.device)
    index = runtime.empty((images, anchors), torch.int64, owner.device)
    runtime.launch(
        _gather, (triton.cdiv(images * anchors, BLOCK),),
        owner, labels, gt_boxes, label, box, foreground, index,
        images, anchors, *labels.stride(), *gt_boxes.stride(), BLOCK=BLOCK,
    )  # fmt: skip
    return label, box, foreground, index


def _fake(owner: Tensor, labels: Tensor, gt_boxes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    index = torch.empty_like(owner, dtype=torch.int64)
    return index, gt_boxes.new_empty((*owner.shape, 4)), torch.empty_like(owner, dtype=torch.bool), index.clone()


@runtime.operator(
    "tal_targets(Tensor owner, Tensor labels, Tensor gt_boxes) -> (Tensor, Tensor, Tensor, Tensor)", _fake
)
def tal_targets(owner, labels, gt_boxes):
    """Operator of `targets`."""
    return gather_all(owner, labels, gt_boxes)


def targets(owner: Tensor, labels: Tensor, gt_boxes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Targets of anchors, of row 0 where an anchor is background; without gradient.

    Args:
        owner: (B, A) int32 row of the ground truth, -1 for background; contiguous, as `tal.assigned` gives it.
        labels: (B, n) int64, n > 0; negative ones become 0.
        gt_boxes: (B, n, 4) of any dtype; of any layout, as `labels`.

    Returns:
        Labels (B, A) int64, boxes (B, A, 4) in the dtype of `gt_boxes`, foreground (B, A) bool, rows (B, A) int64.
    """
    return tal_targets(owner, labels, gt_boxes.detach())
