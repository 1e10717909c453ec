"""From the trainer's batch to padded ground truths: one list of objects becomes rows an image (yolo_losses.md, 1.3)."""

from typing import NamedTuple

import torch
from torch import Tensor


class Targets(NamedTuple):
    """Ground truths of B images, M rows each, zeros where an image has fewer."""

    labels: Tensor  # (B, M) int64
    boxes: Tensor  # (B, M, 4) float32 xyxy, pixels
    valid: Tensor  # (B, M) bool: the sum of the corners is above 0


def pad_targets(
    batch_idx: Tensor,
    cls: Tensor,
    bboxes: Tensor,
    images: int,
    size: tuple[float, float],
    *,
    max_objects: int | None = None,
    sparse: bool = True,
) -> Targets:
    """Pack n objects, whose image indices do not descend, into rows of their images.

    Args:
        batch_idx: (n,) or (n, 1) image of each object, any real dtype.
        cls: (n,) or (n, 1) class of each, any real dtype, truncated to integers.
        bboxes: (n, 4) centre x, centre y, width and height as shares of the image.
        images: B.
        size: width and height of the image, pixels.
        max_objects: rows an image; default: as many as the fullest image has, or n on the static path.
        sparse: False: nothing depends on values, and the host waits for no device.

    Raises:
        ValueError: `batch_idx` descends, or names an image that is not there; an image has more than `max_objects`. Off
            the sparse path a RuntimeError, raised by the device itself.
    """
    image = batch_idx.detach().reshape(-1).long()
    objects = len(image)
    numbers = torch.arange(images, device=image.device)
    first = torch.searchsorted(image, numbers)
    slot = torch.arange(objects, device=image.device)
    if sparse:
        _check_images(image, images)
        slot = slot - first[image]
        fullest = int(slot.max()) + 1 if objects else 0
        if max_objects is not None and fullest > max_objects:
            raise ValueError(f"max_objects is {max_objects}, but batch_idx has {fullest} objects of one image")
        rows = fullest if max_objects is None else max_objects
    else:
        rows = objects if max_objects is None else max_objects
        inside = ((image >= 0) & (image < images)).all() & (image[1:] >= image[:-1]).all()
        torch._assert_async(inside, f"batch_idx must not descend, and stay in [0, {images})")
        slot = slot - first[image]
        torch._assert_async((slot < rows).all(), f"max_objects is {rows}, but batch_idx has more objects of one image")

    place = image * rows + slot
    # Numbers, not a tensor of them: to make one on a device, the host would wait for it.
    x, y, w, h = (share * side for share, side in zip(bboxes.detach().float().unbind(1), (*size, *size), strict=True))
    w, h = w / 2, h / 2
    corners = torch.stack((x - w, y - h, x + w, y + h), 1)
    boxes = corners.new_zeros(images * rows, 4).index_copy_(0, place, corners).view(images, rows, 4)
    labels = place.new_zeros(images * rows).index_copy_(0, place, cls.detach().reshape(-1).long())
    return Targets(labels.view(images, rows), boxes, boxes.sum(2) > 0)


def _check_images(image: Tensor, images: int) -> None:
    if len(image) == 0:
        return
    least, most = int(image.min()), int(image.max())
    if least < 0 or most >= images:
        raise ValueError(f"batch_idx must be in [0, {images}), got {least} to {most}")
    if bool((image[1:] < image[:-1]).any()):
        raise ValueError("batch_idx must not descend: the objects of an image must lie together, image after image")
