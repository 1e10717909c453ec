"""Class term of RT-DETR over every decoder layer at once: background everywhere, a correction at matched entries.

With `t = softplus(z) = bce(z, 0)`, `p = sigmoid(z)` and the factor `c`, an entry that no pair claims has

    value `c t p^gamma`,    gradient `c p^gamma (p + gamma t (1 - p))`

in all three forms of set_prediction.md B3 (`gamma = 0` and `c = 1` for plain BCE). The entry of a pair with the
quality `s` (the IoU) and `b = bce(z, s) = (1 - s) z + softplus(-z)` has

    varifocal   value `s b`,                             gradient `s (p - s)`
    focal       value `a softplus(-z) (1 - p)^gamma`,    gradient `-a (1 - p)^gamma (1 - p + gamma softplus(-z) p)`
    BCE         value `b`,                               gradient `p - s`

so no one-hot or quality tensor of the scores' size is ever made. Bytes moved: the scores once, the gradient once;
temporaries stay in the cache. Nothing cancels: softplus(z) keeps its digits where `z - logsigmoid(z)` has lost them.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import softplus

#: Elements that one thread works on at a time: PyTorch splits an operation over threads from this size on, and four
#: temporaries of it in float32 take half of an L2 cache of 1 MiB.
_ELEMENTS = 1 << 15
#: Beyond it softplus(z) is z: exp(-threshold) is below half a unit in the last place of the threshold.
_LINEAR_FROM = {torch.float32: 20.0, torch.float64: 40.0}


class ClassForm(NamedTuple):
    """Which class loss, and its numbers: `kind` is "varifocal", "focal" or "bce".

    The factor of the background is `alpha` (varifocal), `1 - alpha` (focal, 1 unless `alpha` > 0) or 1 (BCE).
    """

    kind: str
    gamma: float
    alpha: float

    @property
    def exponent(self) -> float:
        """Exponent of the modulating factor."""
        return 0.0 if self.kind == "bce" else self.gamma

    @property
    def background(self) -> float:
        """Factor `c` of the entries that no pair claims."""
        if self.kind == "varifocal":
            return self.alpha
        return 1 - self.alpha if self.kind == "focal" and self.alpha > 0 else 1.0


def class_sums(
    scores: Tensor,
    images: Tensor,
    entries: Tensor,
    quality: Tensor,
    form: ClassForm,
    *,
    scale: float = 1.0,
    kept: Tensor | None = None,
    counts: Sequence[int] | None = None,
) -> Tensor:
    """Class loss summed over the entries of each image, times `scale`; gradient to the scores only.

    Args:
        scores: (I, Q, C) floating logits; the images of all layers in one row.
        images: (N,) int64, image of each pair in [0, I), ascending.
        entries: (N,) int64, matched entry `query * C + class` of its image; distinct within an image.
        quality: (N,) IoU of the pairs, without gradient.
        form: the class loss.
        scale: what the sums are multiplied with.
        kept: (I, Q) bool, False for queries that take no part; default all take part.
        counts: I host-side numbers of pairs; with them the work is done in blocks that stay in the cache, without
            them on whole tensors.

    Returns:
        (I,) sums, float32, or float64 for float64 scores. Half scores are computed in float32, and their gradient
        is rounded once, after it was multiplied with the gradient of the sums.
    """
    gradient = torch.is_grad_enabled() and scores.requires_grad
    return _ClassSums.apply(scores, images, entries, quality, form, scale, kept, counts, gradient)


class _ClassSums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        scores: Tensor,
        images: Tensor,
        entries: Tensor,
        quality: Tensor,
        form: ClassForm,
        scale: float,
        kept: Tensor | None,
        counts: Sequence[int] | None,
        gradient: bool,
    ) -> Tensor:
        number, queries, classes = scores.shape
        dtype = torch.promote_types(scores.dtype, torch.float32)
        # A view, also for the denoising part of a split along the queries.
        flat = scores.detach().reshape(number, queries * classes)
        whole = scores.new_empty(flat.shape, dtype=dtype) if gradient else None
        sums = scores.new_empty(number, dtype=dtype)
        firsts = [0, len(entries)] if counts is None else [0]
        for count in counts or ():
            firsts.append(firsts[-1] + count)
        for start, end in _spans(number, queries * classes, whole=counts is None):
            values = _background(flat[start:end].to(dtype), form, scale, None if whole is None else whole[start:end])
            pairs = slice(None) if counts is None else slice(firsts[start], firsts[end])
            values[images[pairs] - start, entries[pairs]] = 0
            if kept is not None:
                values.view(-1, queries, classes).masked_fill_(~kept[start:end, :, None], 0)
            sums[start:end] = values.sum(1)
        sums.mul_(scale * form.background)

        poison = None
        if whole is not None and form.kind != "focal" and counts is not None and not bool(quality.isfinite().all()):
            # Upstream multiplies rows of the one-hot matrix with the quality: NaN reaches all classes of a query.
            poison = (quality - quality).to(dtype)
        matched, slope = _matched(flat[images, entries].to(dtype), quality.to(dtype), form, scale)
        if kept is not None:
            matched = matched.masked_fill(~kept[images, entries // classes], 0)
        sums.index_add_(0, images, matched)
        if whole is not None:
            whole[images, entries] = slope
            if poison is not None:
                whole.view(scores.shape)[images, entries // classes] += poison[:, None]
            if kept is not None:
                whole.view(scores.shape).masked_fill_(~kept[..., None], 0)
            ctx.save_for_backward(whole)
        ctx.dtype, ctx.shape = scores.dtype, scores.shape
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        (whole,) = ctx.saved_tensors
        # The total of a training step weighs all sums by 1; looking costs nothing on the CPU, and saves a pass.
        looks = incoming.device.type == "cpu" and not torch.compiler.is_compiling()
        if not (looks and bool((incoming == 1).all())):
            whole = whole * incoming[:, None]
        return whole.view(ctx.shape).to(ctx.dtype), *(None,) * 8


def _spans(images: int, entries: int, *, whole: bool) -> list[tuple[int, int]]:
    """Spans of images that are worked on together."""
    if whole:
        return [(0, images)]
    step = max(1, _ELEMENTS * torch.get_num_threads() // max(1, entries))
    return [(start, min(images, start + step)) for start in range(0, images, step)]


def _background(scores: Tensor, form: ClassForm, scale: float, gradient: Tensor | None) -> Tensor:
    """Return `t p^gamma` in a new tensor; write `scale` times the gradient of the background into `gradient`."""
    exponent, factor = form.exponent, scale * form.background
    value = softplus(scores, threshold=_LINEAR_FROM[scores.dtype])
    if exponent == 0:
        if gradient is not None:
            torch.sigmoid(scores, out=gradient).mul_(factor)
        return value
    p = torch.sigmoid(scores, out=gradient)
    modulation = _power(p, exponent)
    if gradient is not None:
        # 1 - p is exact where p is near 1; gamma t - gamma t p would not be.
        rest = (1 - p).mul_(value)
        p.add_(rest, alpha=exponent)
    value.mul_(modulation)
    if gradient is not None:
        p.mul_(modulation.mul_(factor))
    return value


def _matched(scores: Tensor, quality: Tensor, form: ClassForm, scale: float) -> tuple[Tensor, Tensor]:
    """Values and gradients of the matched entries, both (N,), times `scale`."""
    against = softplus(-scores, threshold=_LINEAR_FROM[scores.dtype])
    if form.kind != "focal":
        entropy, slope = (1 - quality) * scores + against, scores.sigmoid() - quality
        if form.kind == "bce":
            return entropy * scale, slope * scale
        # Upstream's weight depends on the score in a product with 0, which an infinite score makes NaN.
        weight = quality * scale
        return entropy * weight, slope * weight + (entropy - entropy)
    p, rest = scores.sigmoid(), (-scores).sigmoid()
    modulation = _power(rest, form.gamma) * (scale * (form.alpha if form.alpha > 0 else 1.0))
    return modulation * against, -modulation * (rest + form.gamma * against * p)


def _power(base: Tensor, exponent: float) -> Tensor:
    """A new tensor; the exponents in use without the general power, which costs more than all the rest."""
    if exponent == 1.5:
        return base.sqrt().mul_(base)
    if exponent == 1:
        return base.clone()
    return base.square() if exponent == 2 else base.pow(exponent)
