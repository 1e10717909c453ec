"""Walking over logits in blocks that stay in the cache, whatever their layout in memory."""

from collections.abc import Iterator

import torch
from torch import Tensor

from cleanroom.paths import data_dependent

#: Elements that one thread works on at a time: float32 logits and one temporary take an L2 cache of 1 MiB. Half of it
#: costs a tenth more, and twice the hand-overs between threads: hundreds of them wait for whoever else wants a core.
ELEMENTS = 1 << 17
Block = tuple[slice, slice]


def blocks(tensor: Tensor) -> Iterator[Block]:
    """Slices of images and anchors that cover (B, A, C): some images whole, or some anchors of one image.

    On an accelerator, and where a compiler fuses what is done, the tensor is one block.
    """
    images, anchors, classes = tensor.shape
    if not tensor.numel():
        return
    wanted = _wanted(tensor, ELEMENTS)
    some_images = max(1, wanted // (anchors * classes))
    some_anchors = max(1, wanted // classes) if some_images == 1 else anchors
    for image in range(0, images, some_images):
        for anchor in range(0, anchors, some_anchors):
            yield slice(image, image + some_images), slice(anchor, anchor + some_anchors)


def empty_like(tensor: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised dense tensor of the same shape (B, A, C), with anchors innermost where `tensor` has them so."""
    if tensor.stride(1) < tensor.stride(2):
        return torch.empty_like(tensor.mT, dtype=dtype, memory_format=torch.contiguous_format).mT
    return torch.empty_like(tensor, dtype=dtype, memory_format=torch.contiguous_format)


def flat_blocks(tensor: Tensor) -> Iterator[slice | None]:
    """Slices that cover a tensor of one dim; None for all of it.

    Half as large as those of `blocks`: for formulas with temporaries by the dozen.
    """
    count, step = len(tensor), _wanted(tensor, ELEMENTS // 2)
    if count <= step:
        yield None
        return
    for start in range(0, count, step):
        yield slice(start, start + step)


def _wanted(tensor: Tensor, elements: int) -> int:
    return elements * torch.get_num_threads() if data_dependent(tensor) else tensor.numel()
