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
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import softplus

from cleanroom.losses._pair_boxes import WITHOUT_FLOAT64

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
    given = images, entries, quality, form, scale, kept, counts
    if torch.is_grad_enabled() and scores.requires_grad:
        return _ClassSums.apply(scores, *given)
    return _sums(scores, *given, None)


class _ClassSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, *given: Any) -> Tensor:
        whole = scores.new_empty(scores.shape, dtype=_wide(scores))
        sums = _sums(scores, *given, whole)
        ctx.save_for_backward(whole)
        ctx.dtype, ctx.arguments = scores.dtype, len(given)
        return sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, incoming: Tensor) -> tuple[Tensor | None, ...]:
        (whole,) = ctx.saved_tensors
        # The total of a training step weighs all sums by 1; looking costs nothing on the CPU, and saves a pass.
        looks = incoming.device.type == "cpu" and not torch.compiler.is_compiling()
        if not (looks and bool((incoming == 1).all())):
            whole = whole * incoming[:, None, None]
        return whole.to(ctx.dtype), *(None,) * ctx.arguments


def _sums(
    scores: Tensor,
    images: Tensor,
    entries: Tensor,
    quality: Tensor,
    form: ClassForm,
    scale: float,
    kept: Tensor | None,
    counts: Sequence[int] | None,
    gradient: Tensor | None,
) -> Tensor:
    """See `class_sums`; the gradient of the sums is written into `gradient` (I, Q, C), where there is one."""
    number, queries, classes = scores.shape
    dtype = _wide(scores)
    # Views, also of the denoising part of a split along the queries.
    flat = scores.detach().reshape(number, queries * classes)
    slopes = None if gradient is None else gradient.view(number, queries * classes)
    sums = scores.new_empty(number, dtype=dtype)
    firsts = [0, *accumulate(counts or ())]
    for start, end in _spans(number, queries * classes, whole=counts is None):
        values = _background(flat[start:end].to(dtype), form, scale, None if slopes is None else slopes[start:end])
        pairs = slice(None) if counts is None else slice(firsts[start], firsts[end])
        values[images[pairs] - start, entries[pairs]] = 0
        if kept is not None:
            values.view(-1, queries, classes).masked_fill_(~kept[start:end, :, None], 0)
        sums[start:end] = values.sum(1)
    sums.mul_(scale * form.background)

    matched, of_matched = _matched(flat[images, entries].to(dtype), quality.to(dtype), form, scale)
    if kept is not None:
        matched = matched.masked_fill(~kept[images, entries // classes], 0)
    sums.add_(sums_by_image(matched, images, number))
    if slopes is None:
        return sums
    slopes[images, entries] = of_matched
    if form.kind != "focal" and counts is not None and not bool(quality.isfinite().all()):
        # Upstream multiplies rows of the one-hot matrix with the quality: NaN reaches all classes of a query.
        gradient[images, entries // classes] += (quality - quality).to(dtype)[:, None]
    if kept is not None:
        gradient.masked_fill_(~kept[..., None], 0)
    return sums


def sums_by_image(values: Tensor, images: Tensor, number: int) -> Tensor:
    """(I,) sums of the values (N,) of each image; one after another, hence in float64 where there is such a thing."""
    wide = values.dtype if values.device.type in WITHOUT_FLOAT64 else torch.float64
    return values.new_zeros(number, dtype=wide).index_add(0, images, values.to(wide)).to(values.dtype)


def _wide(scores: Tensor) -> torch.dtype:
    return torch.promote_types(scores.dtype, torch.float32)


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
        value = entropy * weight
        return value, slope * weight + (entropy - entropy) if form.gamma else slope * weight
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
