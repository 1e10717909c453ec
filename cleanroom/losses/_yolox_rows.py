"""What YOLOX's losses compute an anchor: objectness for all, the other terms for foreground rows only.

Each function returns losses and their derivatives by the prediction, so that the backward pass only scales them.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from cleanroom.losses.yolox_iou import pair_terms

#: Offset of the logarithm of the L1 target.
LOG_OFFSET = 1e-8
#: Where softplus(x) is x in every dtype.
SOFTPLUS_LINEAR = 40


class Foreground(NamedTuple):
    """Distinct anchors (image, anchor), (R,) int64 each; `valid` (R,) bool tells real ones from spare slots."""

    image: Tensor
    anchor: Tensor
    valid: Tensor | None

    def of(self, values: Tensor) -> Tensor:
        """Their rows (R, ...) of values (B, N, ...)."""
        return values[self.image, self.anchor]

    def keep(self, values: Tensor) -> Tensor:
        """Rows (R, ...) with zeros in spare slots."""
        if self.valid is None:
            return values
        return torch.where(self.valid.view(-1, *[1] * (values.ndim - 1)), values, 0)

    def per_image(self, values: Tensor, images: int) -> Tensor:
        """Sums (B,) of values (R,)."""
        values = self.keep(values)
        if self.valid is not None:
            return values.view(images, -1).sum(1)
        return values.new_zeros(images).index_add_(0, self.image, values)


def foreground(mask: Tensor, slots: int | None) -> Foreground:
    """The anchors of mask (B, N) in ascending order, or with `slots` so many an image, the spare ones background.

    With `slots` no shape depends on a value. There must be at least as many as an image has anchors in the mask.
    """
    if slots is None:
        return Foreground(*mask.nonzero(as_tuple=True), None)
    images, anchors = mask.shape
    slots = min(slots, anchors)
    count = mask.sum(1, keepdim=True)
    # Anchors of the mask come first, the others after them: each has a place of its own.
    ahead = mask.cumsum(1)
    index = torch.arange(anchors, device=mask.device)
    place = torch.where(mask, ahead - 1, count + index - ahead)
    order = torch.empty_like(place).scatter_(1, place, index.expand(images, -1))
    image = torch.arange(images, device=mask.device)[:, None].expand(-1, slots)
    valid = torch.arange(slots, device=mask.device) < count
    return Foreground(image.reshape(-1), order[:, :slots].reshape(-1), valid.view(-1))


def objectness_terms(logits: Tensor, mask: Tensor, ignore: Tensor | None, slopes: bool) -> tuple[Tensor, Tensor]:
    """Binary cross entropy of logits (B, N) against a mask: sums (B,), and with `slopes` sigmoid - target (B, N).

    A positive is a negative of the opposite sign: nothing cancels, and a logit that is infinite on the right side
    costs 0.
    """
    signed = torch.where(mask, -logits, logits)
    loss = torch.ops.aten.softplus(signed, 1, SOFTPLUS_LINEAR)
    if ignore is not None:
        loss = loss.masked_fill(ignore, 0)
    if not slopes:
        return loss.sum(1), loss[:0]
    slope = signed.sigmoid_()
    slope = torch.where(mask, -slope, slope)
    return loss.sum(1), slope if ignore is None else slope.masked_fill(ignore, 0)


def class_terms(logits: Tensor, labels: Tensor, values: Tensor, slopes: bool) -> tuple[Tensor, Tensor]:
    """Binary cross entropy of logits (R, C) against `values` at `labels` and 0 elsewhere: sums (R,), slopes (R, C)."""
    place = labels[:, None]
    own = logits.gather(1, place)
    target = values[:, None].to(logits.dtype)
    loss = torch.ops.aten.softplus(logits, 1, SOFTPLUS_LINEAR)
    own_loss = (1 - target) * own + torch.ops.aten.softplus(-own, 1, SOFTPLUS_LINEAR)
    sums = loss.scatter_(1, place, own_loss).sum(1)
    if not slopes:
        return sums, logits[:0]
    return sums, logits.sigmoid().scatter_(1, place, own.sigmoid() - target)


def distance_targets(boxes: Tensor, x: Tensor, y: Tensor, stride: Tensor) -> Tensor:
    """Raw values (R, 4) that decode to boxes (R, 4) at cells x, y of strides, (R,) each; a side of 0 gives -18.42."""
    centre = boxes[:, :2] / stride[:, None] - torch.stack([x, y], 1)
    return torch.cat([centre, (boxes[:, 2:] / stride[:, None] + LOG_OFFSET).log()], 1)


def distance_terms(raw: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """L1 distance of raw values (R, 4): sums (R,) and slopes (R, 4), 0 where equal."""
    difference = raw - targets
    return difference.abs().sum(1), difference.sign()


def overlap_terms(pred: Tensor, boxes: Tensor, slopes: bool) -> tuple[Tensor, Tensor]:
    """`1 - IoU^2` of boxes (R, 4): losses (R,) and slopes (R, 4)."""
    loss, slope, _ = pair_terms(pred, boxes, "iou", slopes)
    return loss, slope.mT
