"""What YOLOX's losses compute an anchor: objectness for all, the other terms for foreground rows only.

Each function returns losses and their derivatives by the prediction, so that the backward pass only scales them.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from cleanroom.losses.yolox_iou import pair_terms

#: Offset of the logarithm of the L1 target.
LOG_OFFSET = 1e-8


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

    def total(self, values: Tensor, images: int | None) -> Tensor:
        """Sum of values (R, ...), or with the number of `images` sums (B,)."""
        values = self.keep(values)
        if images is None:
            return values.sum()
        if self.valid is not None:
            return values.reshape(images, -1).sum(1)
        values = values if values.ndim == 1 else values.sum(1)
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
    """Binary cross entropy of logits (B, N) against a mask, and with `slopes` sigmoid - target, (B, N) both.

    Formed as PyTorch forms it, `(1 - t) x - ln sigmoid(x)`, so that single elements have upstream's bits.
    """
    loss = torch.where(mask, 0, logits).sub_(logsigmoid(logits))
    if ignore is not None:
        loss = loss.masked_fill(ignore, 0)
    if not slopes:
        return loss, loss[:0]
    slope = logits.sigmoid().sub_(mask.to(logits.dtype))
    return loss, slope if ignore is None else slope.masked_fill(ignore, 0)


def class_terms(logits: Tensor, labels: Tensor, values: Tensor, slopes: bool) -> tuple[Tensor, Tensor]:
    """Binary cross entropy of logits (R, C) against `values` at `labels` and 0 elsewhere, and slopes, (R, C)."""
    place = labels[:, None]
    own, target = logits.gather(1, place), values[:, None].to(logits.dtype)
    log = logsigmoid(logits)
    own_loss = (1 - target) * own - log.gather(1, place)
    loss = (logits - log).scatter_(1, place, own_loss)
    if not slopes:
        return loss, logits[:0]
    probability = logits.sigmoid()
    return loss, probability.scatter_(1, place, probability.gather(1, place) - target)


def distance_targets(boxes: Tensor, cells: Tensor) -> Tensor:
    """Raw values (R, 4) that decode to boxes (R, 4) at cells (3, R): columns, rows and strides.

    A side of 0 gives ln 1e-8 = -18.42, a negative one NaN.
    """
    found = boxes / cells[2, :, None]
    found[:, :2] -= cells[:2].mT
    found[:, 2:].add_(LOG_OFFSET).log_()
    return found


def distance_terms(raw: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """L1 distance of raw values (R, 4), and slopes, 0 where equal."""
    difference = raw - targets
    return difference.abs(), difference.sign()


def overlap_terms(pred: Tensor, boxes: Tensor, slopes: bool) -> tuple[Tensor, Tensor, Tensor]:
    """`1 - IoU^2` of boxes (R, 4): losses (R,), slopes (R, 4), and the plain IoU (R,), 0 where the union is."""
    found = pair_terms(pred, boxes, "iou", slopes)
    return found.loss, found.by_pred.mT, torch.where(found.union == 0, 0, found.inner / found.union)
