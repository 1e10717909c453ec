"""A distribution over bins for each side of a box, to the box it expects (specification: boxes.md, section 6).

After Li et al., Generalized Focal Loss, arXiv:2006.04388. On the CPU both passes take the logits in blocks that stay in
the cache, and the probabilities of many logits are never written out. Bytes moved for L float32 logits: 4 L forward,
8 L backward, where softmax and product on their own move 12 L and 24 L and keep 4 L in between.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cleanroom.codecs import decode_boxes, dist2bbox, joined, point_gradient

# PyTorch's own kernel of p (g - sum_j p_j g_j): its rounding is that of autograd through a softmax.
_softmax_gradient = torch.ops.aten._softmax_backward_data
# Logits of a block: 1 MiB of float32, the share of an L2 cache of two threads.
_BLOCK = 1 << 18
# Up to this many logits, probabilities are cheaper kept than computed again, and blocks only add calls (measured with
# 2 MiB and 34 MiB, where fresh memory costs more than the softmax).
_FEW = 1 << 20


def dfl_decode(logits: Tensor, anchor_points: Tensor) -> Tensor:
    """Boxes (corners) from the distributions of their distances to an anchor point.

    ``d = sum_i i softmax(z)_i`` for each side, the box is ``(a - (l, t), a + (r, b))``. With one bin a side the logits
    are the distances. Half dtypes are computed with in float32. Differentiable once, in both arguments:
    ``dd/dz_i = p_i (i - d)``.

    Args:
        logits: (B, N, 4 R), floating, channel ``side * R + bin``, sides left, top, right, bottom. A transposed view of
            (B, 4 R, N) memory is read as it lies, and its gradient laid out alike.
        anchor_points: (N, 2) or what broadcasts to (B, N, 2), real, in cells.

    Returns:
        (B, N, 4) in cells, in the promoted dtype. A bin of -inf has no part; NaN, +inf and -inf alone give NaN.

    Raises:
        ValueError: `logits` is not 3-D with 4 R channels, or `anchor_points` does not broadcast.
        TypeError: `logits` is not floating.
    """
    _check(logits, anchor_points)
    bins = logits.shape[2] // 4
    if bins == 1:
        return dist2bbox(logits, anchor_points, xywh=False)
    if torch.compiler.is_compiling():
        likely = torch.softmax(logits.unflatten(-1, (4, bins)), -1, dtype=_wide(logits))
        distance = (likely * torch.arange(bins, device=logits.device)).sum(-1).to(logits.dtype)
        return dist2bbox(distance, anchor_points, xywh=False)
    if torch.is_grad_enabled() and (logits.requires_grad or anchor_points.requires_grad):
        return _Decode.apply(logits, anchor_points)
    return _boxes(_expected(logits), logits, anchor_points)


def _check(logits: Tensor, anchor_points: Tensor) -> None:
    if not logits.is_floating_point():
        raise TypeError(f"logits must be floating, got {logits.dtype}")
    if logits.ndim != 3 or logits.shape[2] % 4 or not logits.shape[2]:
        raise ValueError(f"logits must be (B, N, 4 R), got shape {tuple(logits.shape)}")
    shape, whole = anchor_points.shape, (*logits.shape[:2], 2)
    fitting = all(size in (1, most) for size, most in zip(shape[::-1], whole[::-1], strict=False))
    if not 1 <= len(shape) <= 3 or shape[-1] != 2 or not fitting:
        raise ValueError(f"anchor_points must broadcast to (B, N, 2) = {whole}, got shape {tuple(shape)}")


class _Decode(torch.autograd.Function):
    """`dfl_decode` with its gradient; between the passes lie the logits themselves.

    Few logits leave their probabilities too.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, points: Tensor) -> Tensor:
        sides = _sides(logits)
        few = logits.device.type == "cpu" and sides.numel() <= _FEW
        kept = torch.empty(sides.shape, dtype=_wide(logits)) if few and ctx.needs_input_grad[0] else None
        ctx.save_for_backward(logits, kept)
        ctx.points = points.shape, points.dtype
        return _boxes(_expected(logits, kept), logits, points)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        by_logits = by_points = None
        if ctx.needs_input_grad[0]:
            logits, kept = ctx.saved_tensors
            by_distance = joined(grad.unbind(-1), (-1, -1, 1, 1), -1, grad.shape, _wide(logits))
            by_logits = _gradient(logits, kept, by_distance)
        if ctx.needs_input_grad[1]:
            by_points = point_gradient(grad, 1, -1, *ctx.points)
        return by_logits, by_points


def _wide(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _boxes(distance: Tensor, logits: Tensor, points: Tensor) -> Tensor:
    dtype = torch.promote_types(logits.dtype, points.dtype)
    return decode_boxes(distance, points, False, -1, distance.shape, dtype)


def _expected(logits: Tensor, kept: Tensor | None = None) -> Tensor:
    """(B, N, 4) expected distances, at least float32, laid out as the logits are; probabilities go into `kept`."""
    batch, count, channels = logits.shape
    sides, wide = _sides(logits), _wide(logits)
    values = torch.arange(channels // 4, dtype=wide, device=logits.device)
    turned = sides.ndim == 4
    distance = torch.empty((batch, 4, count) if turned else batch * count * 4, dtype=wide, device=logits.device)
    for block in _blocks(sides):
        likely = torch.softmax(sides[block], _bin_dim(sides), dtype=wide, out=None if kept is None else kept[block])
        # With `out`, autocast leaves the product alone.
        torch.matmul(*((values, likely) if turned else (likely, values)), out=distance[block])
    return distance.transpose(1, 2) if turned else distance.view(batch, count, 4)


def _gradient(logits: Tensor, kept: Tensor | None, by_distance: Tensor) -> Tensor:
    """Gradient of the logits, laid out as they are, from that of the distances (B, N, 4)."""
    sides, wide = _sides(logits), _wide(logits)
    dim, turned = _bin_dim(sides), sides.ndim == 4
    values = torch.arange(logits.shape[2] // 4, dtype=wide, device=logits.device)
    if turned:
        result = logits.new_empty((len(logits), *logits.shape[:0:-1])).transpose(1, 2)
        by_distance, values = by_distance.transpose(1, 2), values[:, None]
    else:
        result = logits.new_empty(logits.shape)
        by_distance = by_distance.reshape(-1)
    results = _sides(result)
    for block in _blocks(sides):
        likely = torch.softmax(sides[block], dim, dtype=wide) if kept is None else kept[block]
        slope = values * by_distance[block].unsqueeze(dim)
        if result.dtype == wide:
            _softmax_gradient.out(slope, likely, dim, wide, grad_input=results[block])
        else:
            results[block] = _softmax_gradient(slope, likely, dim, wide)
    return result


def _sides(logits: Tensor) -> Tensor:
    """Distributions (4 B N, R), or, where the anchors of an image are innermost in memory, a view as (B, 4, R, N)."""
    _, count, channels = logits.shape
    if logits.stride(1) == 1 and logits.stride(2) == count > 1:
        return logits.transpose(1, 2).unflatten(1, (4, channels // 4))
    return logits.reshape(-1, channels // 4)


def _bin_dim(sides: Tensor) -> int:
    return -1 if sides.ndim == 2 else -2


def _blocks(sides: Tensor) -> Iterator[slice]:
    """Slices of the first dim, small enough for the cache on the CPU where there are many."""
    if not sides.numel():
        return
    whole = sides.device.type != "cpu" or sides.numel() <= _FEW
    step = len(sides) if whole else max(1, _BLOCK // sides[0].numel())
    for start in range(0, len(sides), step):
        yield slice(start, start + step)
