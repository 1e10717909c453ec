"""A distribution over bins for each side of a box, to the box it expects (specification: boxes.md, section 6).

After Li et al., Generalized Focal Loss, arXiv:2006.04388. The probabilities of many logits are never written out: on the CPU both
passes take the logits in blocks that stay in the cache. Bytes moved for L float32 logits: 4 L forward, 8 L backward,
where softmax and product on their own move 12 L and 24 L and keep 4 L in between.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cleanroom.codecs import decode_boxes, dist2bbox, joined

# Logits of a block: 1 MiB of float32, the share of an L2 cache of two threads.
_BLOCK = 1 << 18
# Up to this many, computing probabilities again takes longer than keeping them (measured: 2 MiB against 34 MiB).
_KEPT = 1 << 20


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
    if logits.ndim != 3 or logits.shape[2] % 4 or not logits.shape[2]:  # noqa: PLR2004 - (B, N, 4 R)
        raise ValueError(f"logits must be (B, N, 4 R), got shape {tuple(logits.shape)}")
    expected = (*logits.shape[:2], 2)
    fitting = zip(anchor_points.shape[::-1], expected[::-1], strict=False)
    if not 0 < anchor_points.ndim <= 3 or anchor_points.shape[-1] != 2 or any(n not in (1, m) for n, m in fitting):  # noqa: PLR2004
        raise ValueError(f"anchor_points must broadcast to (B, N, 2) = {expected}, got {tuple(anchor_points.shape)}")


class _Decode(torch.autograd.Function):
    """`dfl_decode` with its gradient; between the passes lie the logits themselves and 4 distances a box.

    Few logits leave their probabilities too, which take no more of the cache than a pass over them takes anyway.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, points: Tensor) -> Tensor:
        rows = _rows(logits)
        kept = torch.empty(rows.shape, dtype=_wide(logits)) if ctx.needs_input_grad[0] and _few(rows) else None
        distance = _expected(logits, kept)
        ctx.save_for_backward(logits, distance, kept)
        ctx.points = points.shape, points.dtype
        return _boxes(distance, logits, points)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        logits, distance, kept = ctx.saved_tensors
        left, top, right, bottom = grad.unbind(-1)
        by_logits = by_points = None
        if ctx.needs_input_grad[0]:
            by_distance = joined((left, top, right, bottom), (-1, -1, 1, 1), -1, distance.shape, distance.dtype)
            by_logits = _gradient(logits, distance, by_distance, kept)
        if ctx.needs_input_grad[1]:
            by_points = joined((left + right, top + bottom), (1, 1), -1, *ctx.points)
        return by_logits, by_points


def _wide(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)


def _few(rows: Tensor) -> bool:
    return rows.device.type == "cpu" and rows.numel() <= _KEPT


def _boxes(distance: Tensor, logits: Tensor, points: Tensor) -> Tensor:
    dtype = torch.promote_types(logits.dtype, points.dtype)
    return decode_boxes(distance, points, False, -1, distance.shape, dtype)


def _expected(logits: Tensor, kept: Tensor | None = None) -> Tensor:
    """(B, N, 4) expected distances, at least float32, laid out as the logits are; probabilities go into `kept`."""
    batch, count, channels = logits.shape
    rows, wide = _rows(logits), _wide(logits)
    values = torch.arange(channels // 4, dtype=wide, device=logits.device)
    turned = rows.ndim > 2  # noqa: PLR2004 - (B, 4, R, N)
    sides = torch.empty((batch, 4, count) if turned else (batch * count * 4,), dtype=wide, device=logits.device)
    for block in _blocks(rows):
        likely = torch.softmax(rows[block], _bin_dim(rows), dtype=wide, out=None if kept is None else kept[block])
        # With `out`, autocast leaves the product alone.
        torch.matmul(*((values, likely) if turned else (likely, values)), out=sides[block])
    return sides.transpose(1, 2) if turned else sides.view(batch, count, 4)


def _gradient(logits: Tensor, distance: Tensor, by_distance: Tensor, kept: Tensor | None) -> Tensor:
    """Gradient of the logits, laid out as they are, from the distances and their gradient (B, N, 4)."""
    rows, dtype = _rows(logits), distance.dtype
    dim = _bin_dim(rows)
    values = torch.arange(logits.shape[2] // 4, dtype=dtype, device=rows.device)
    if rows.ndim > 2:  # noqa: PLR2004 - (B, 4, R, N)
        values = values[:, None]
        result = logits.new_empty((len(logits), *logits.shape[:0:-1])).transpose(1, 2)
        distance, by_distance = distance.transpose(1, 2), by_distance.transpose(1, 2)
    else:
        result = logits.new_empty(logits.shape)
        distance, by_distance = distance.reshape(-1), by_distance.reshape(-1)
    results = _rows(result)
    for block in _blocks(rows):
        likely = torch.softmax(rows[block], dim, dtype=dtype) if kept is None else kept[block]
        slope = (values - distance[block].unsqueeze(dim)).mul_(by_distance[block].unsqueeze(dim))
        torch.mul(slope, likely, out=results[block])
    return result


def _rows(logits: Tensor) -> Tensor:
    """Sides of bins (4 B N, R), or, where the anchors of an image are innermost in memory, a view as (B, 4, R, N)."""
    _, count, channels = logits.shape
    if logits.stride(1) == 1 and logits.stride(2) == count > 1:
        return logits.transpose(1, 2).unflatten(1, (4, channels // 4))
    return logits.reshape(-1, channels // 4)


def _bin_dim(rows: Tensor) -> int:
    return -1 if rows.ndim == 2 else -2  # noqa: PLR2004


def _blocks(rows: Tensor) -> Iterator[slice]:
    """Slices of the first dim, small enough for the cache on the CPU."""
    if not rows.numel():
        return
    each = rows[0].numel()
    step = max(1, _BLOCK // each) if rows.device.type == "cpu" else len(rows)
    for start in range(0, len(rows), step):
        yield slice(start, start + step)
