"""From the trainer's batch to padded ground truths in one launch; see `cleanroom.losses._yolo_targets`.

Bytes moved: the indices of all objects once an image, which the caches serve; 20 read of an object, 25 written a row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cleanroom.kernels import runtime

BLOCK = 256
"""Objects, or rows, of a program at a time."""


def padded_targets(
    batch_idx: Tensor, cls: Tensor, bboxes: Tensor, images: int, rows: int, size: tuple[float, float]
) -> tuple[Tensor, Tensor, Tensor]:
    """Labels (B, rows) int64, boxes (B, rows, 4) float32 xyxy in pixels, and whether they are valid (B, rows).

    Arguments, results to the bit, and errors are those of `pad_targets` with `sparse=False`, all on one device.

    Raises:
        RuntimeError: by the device itself: `batch_idx` descends, names no image, or has more than `rows` of one.
    """
    given = batch_idx.detach().reshape(-1), cls.detach().reshape(-1), bboxes.detach()
    labels, boxes, valid, fine = _padded(*given, images, rows, *map(float, size))
    if images and rows:
        ordered, enough = fine
        torch._assert_async(ordered, f"batch_idx must not descend, and stay in [0, {images})")
        torch._assert_async(enough, f"max_objects is {rows}, but batch_idx has more objects of one image")
    return labels, boxes, valid


def _fake(batch_idx, cls, bboxes, images, rows, width, height):
    labels = batch_idx.new_empty((images, rows), dtype=torch.int64)
    boxes = batch_idx.new_empty((images, rows, 4), dtype=torch.float32)
    return labels, boxes, torch.empty_like(labels, dtype=torch.bool), labels.new_empty(2, dtype=torch.bool)


@runtime.operator(
    "padded_targets(Tensor batch_idx, Tensor cls, Tensor bboxes, SymInt images, SymInt rows, float width, float height)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _fake,
)
def _padded(
    batch_idx: Tensor, cls: Tensor, bboxes: Tensor, images: int, rows: int, width: float, height: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    device = batch_idx.device
    labels = runtime.empty((images, rows), torch.int64, device)
    boxes = runtime.empty((images, rows, 4), torch.float32, device)
    valid = runtime.empty((images, rows), torch.bool, device)
    fine = runtime.empty((2,), torch.bool, device)
    if images and rows:
        runtime.launch(
            padding_kernel,
            (images,),
            *(batch_idx.contiguous(), cls.contiguous(), bboxes, labels, boxes, valid, fine),
            *(len(batch_idx), rows, images, *bboxes.stride(), width, height),
            BLOCK=BLOCK,
        )
    return labels, boxes, valid, fine


@triton.jit(do_not_specialize=["objects", "rows", "images"])
def padding_kernel(
    batch_idx, cls, bboxes, labels, boxes, valid, fine,
    objects, rows, images, s_object, s_side, width, height, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows of an image: those of its objects, which lie together in the batch, and zeros; one program an image.

    Half the sides off and on to the centres, all in pixels. The first program also looks whether indices never descend
    and name images, and whether none has as many objects that one is the same as `rows` places before.
    """
    image = tl.program_id(0)
    before = tl.zeros((BLOCK,), tl.int32)
    own = tl.zeros((BLOCK,), tl.int32)
    wrong = tl.zeros((BLOCK,), tl.int32)
    many = tl.zeros((BLOCK,), tl.int32)
    for first in range(0, objects, BLOCK):
        index = first + tl.arange(0, BLOCK)
        there = index < objects
        found = tl.load(batch_idx + index, mask=there, other=0).to(tl.int64)
        before += (there & (found < image)).to(tl.int32)
        own += (there & (found == image)).to(tl.int32)
        if image == 0:
            last = tl.load(batch_idx + index - 1, mask=there & (index > 0), other=0).to(tl.int64)
            earlier = tl.load(batch_idx + index - rows, mask=there & (index >= rows), other=-1).to(tl.int64)
            wrong |= (there & ((found < last) | (found < 0) | (found >= images))).to(tl.int32)
            many |= (there & (index >= rows) & (found == earlier)).to(tl.int32)
    if image == 0:
        tl.store(fine, tl.max(wrong) == 0)
        tl.store(fine + 1, tl.max(many) == 0)

    start, count = tl.sum(before), tl.sum(own)
    for first in range(0, rows, BLOCK):
        row = first + tl.arange(0, BLOCK)
        inside = row < rows
        real = inside & (row < count)
        label = tl.load(cls + start + row, mask=real, other=0).to(tl.int64)
        at = bboxes + (start + row) * s_object
        x = tl.load(at, mask=real, other=0.0).to(tl.float32) * width
        y = tl.load(at + s_side, mask=real, other=0.0).to(tl.float32) * height
        across = tl.load(at + 2 * s_side, mask=real, other=0.0).to(tl.float32) * width * 0.5
        along = tl.load(at + 3 * s_side, mask=real, other=0.0).to(tl.float32) * height * 0.5
        left, top, right, bottom = x - across, y - along, x + across, y + along
        place = image.to(tl.int64) * rows + row
        tl.store(labels + place, label, mask=inside)
        tl.store(boxes + place * 4, left, mask=inside)
        tl.store(boxes + place * 4 + 1, top, mask=inside)
        tl.store(boxes + place * 4 + 2, right, mask=inside)
        tl.store(boxes + place * 4 + 3, bottom, mask=inside)
        tl.store(valid + place, left + top + right + bottom > 0, mask=inside)
