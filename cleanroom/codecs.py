"""Boxes as distances of a point to their sides, and back (specification: boxes.md, sections 2 and 3).

Each coordinate of a result is written straight into its place, one strided pass a coordinate; slicing halves off and
joining them again takes several times as long. Both codecs are linear but for a clamp, so that nothing but that
clamp's inputs is kept for the backward pass.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def dist2bbox(distance: Tensor, anchor_points: Tensor, xywh: bool = True, dim: int = -1) -> Tensor:
    """Boxes from the distances of a point to the sides; a drop-in for ``ultralytics.utils.tal.dist2bbox``.

    ``p1 = a - (l, t)``, ``p2 = a + (r, b)``; corners ``(p1, p2)``, centre form ``((p1 + p2) / 2, p2 - p1)``. Nothing
    is clamped. Differentiable once, in both arguments.

    Args:
        distance: left, top, right and bottom along `dim`, any real dtype.
        anchor_points: x and y along the same dim counted from the end, in one unit with `distance`; otherwise of a
            shape that broadcasts: (B, N, 4) with (N, 2), or (B, 4, N) with (1, 2, N) and dim=1.
        xywh: centre form, else corners.
        dim: the dim of the coordinates.

    Returns:
        The broadcast shape with 4 along `dim`, in the promoted dtype (centre form of integers: the default dtype).

    Raises:
        ValueError: not 4 distances or not 2 coordinates along `dim`, or shapes do not broadcast.
        IndexError: `distance` has no such `dim`.
    """
    if not -distance.ndim <= dim < distance.ndim:
        raise IndexError(f"dim {dim} is out of range for distance of shape {tuple(distance.shape)}")
    axis = dim - distance.ndim if dim >= 0 else dim
    if distance.shape[axis] != 4:
        raise ValueError(f"distance must have size 4 along dim {dim}, got shape {tuple(distance.shape)}")
    shape = _common_shape(anchor_points, distance, axis, "distance")
    dtype = torch.promote_types(distance.dtype, anchor_points.dtype)
    if xywh and not dtype.is_floating_point:
        dtype = torch.get_default_dtype()
    if torch.compiler.is_compiling():
        near, far = distance.split(2, axis)
        low, high = anchor_points - near, anchor_points + far
        return torch.cat(((low + high) / 2, high - low) if xywh else (low, high), axis)
    decode = _Decode.apply if _tracked(distance, anchor_points) else decode_boxes
    return decode(distance, anchor_points, xywh, axis, shape, dtype)


def bbox2dist(anchor_points: Tensor, bbox: Tensor, reg_max: float | None = None) -> Tensor:
    """Distances of a point to the sides of a box; a drop-in for ``ultralytics.utils.tal.bbox2dist``.

    ``d = (a - (x1, y1), (x2, y2) - a)``, with `reg_max` m clamped to ``[0, m - 0.01]``; the bound is formed in double
    precision and then rounded to the dtype (in bfloat16 15 - 0.01 becomes 15). NaN stays NaN. Differentiable once, in
    both arguments; a clamp passes all of the gradient on its bounds and none outside.

    Args:
        anchor_points: (..., 2), any real dtype, in one unit with `bbox`.
        bbox: (..., 4) corners, any real dtype, of a shape that broadcasts.
        reg_max: None, or a number; losses pass the number of bins less 1.

    Returns:
        Left, top, right and bottom (..., 4), in the promoted dtype.

    Raises:
        ValueError: a last size is wrong, or shapes do not broadcast.
        TypeError: `reg_max` is no number, or given with integers, which cannot hold its bound.
    """
    if bbox.ndim == 0 or bbox.shape[-1] != 4:
        raise ValueError(f"bbox must have last size 4, got shape {tuple(bbox.shape)}")
    shape = _common_shape(anchor_points, bbox, -1, "bbox")
    dtype = torch.promote_types(anchor_points.dtype, bbox.dtype)
    if reg_max is not None and not isinstance(reg_max, int | float):
        raise TypeError(f"reg_max must be a number or None, got {type(reg_max).__name__}")
    if reg_max is not None and not dtype.is_floating_point:
        raise TypeError(f"reg_max is given, but anchor_points and bbox are integers: {dtype} cannot hold its bound")
    bound = None if reg_max is None else reg_max - 0.01
    if torch.compiler.is_compiling():
        low, high = bbox.split(2, -1)
        distance = torch.cat((anchor_points - low, high - anchor_points), -1)
        return distance if bound is None else distance.clamp(0, bound)
    encode = _Encode.apply if _tracked(anchor_points, bbox) else _encode
    return encode(anchor_points, bbox, bound, shape, dtype)


def _tracked(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _common_shape(points: Tensor, other: Tensor, axis: int, name: str) -> list[int]:
    """The shape that points and other broadcast to, 4 along `axis`; checks the points."""
    if points.ndim < -axis or points.shape[axis] != 2:
        raise ValueError(f"anchor_points must have size 2 along dim {axis}, got shape {tuple(points.shape)}")
    long, short = (other.shape, points.shape) if other.ndim >= points.ndim else (points.shape, other.shape)
    shape = list(long)
    for position in range(-1, -len(short) - 1, -1):
        one, two = long[position], short[position]
        if position == axis:
            shape[position] = 4
        elif one == 1:
            shape[position] = two
        elif two not in (1, one):
            raise ValueError(f"anchor_points and {name} do not broadcast: {tuple(points.shape)}, {tuple(other.shape)}")
    return shape


def decode_boxes(
    distance: Tensor, points: Tensor, xywh: bool, axis: int, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """`dist2bbox` of checked arguments: `shape` and `dtype` of the result are known, `axis` counts from the end."""
    result = torch.empty(shape, dtype=dtype, device=distance.device)
    (x, y), (left, top, right, bottom) = points.unbind(axis), distance.unbind(axis)
    first, second, third, fourth = result.unbind(axis)
    if xywh:
        for point, near, far, centre, side in ((x, left, right, first, third), (y, top, bottom, second, fourth)):
            low, high = point - near, point + far
            torch.sub(high, low, out=side)
            torch.div(low + high, 2, out=centre)
    else:
        torch.sub(x, left, out=first)
        torch.sub(y, top, out=second)
        torch.add(x, right, out=third)
        torch.add(y, bottom, out=fourth)
    return result


class _Decode(torch.autograd.Function):
    """`decode_boxes` with its gradient."""

    @staticmethod
    def forward(
        ctx, distance: Tensor, points: Tensor, xywh: bool, axis: int, shape: Sequence[int], dtype: torch.dtype
    ) -> Tensor:
        ctx.xywh, ctx.axis = xywh, axis
        ctx.distance, ctx.points = (distance.shape, distance.dtype), (points.shape, points.dtype)
        return decode_boxes(distance, points, xywh, axis, shape, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        first, second, third, fourth = grad.unbind(ctx.axis)
        distance = points = None
        if ctx.needs_input_grad[0]:
            if (
                ctx.xywh
            ):  # of half the centre's gradient the near sides get minus, the far ones plus; and all of the size's
                pairs = ((first, third), (second, fourth))
                sides = [torch.add(size, centre, alpha=half) for half in (-0.5, 0.5) for centre, size in pairs]
                distance = joined(sides, (1, 1, 1, 1), ctx.axis, *ctx.distance)
            else:
                distance = joined((first, second, third, fourth), (-1, -1, 1, 1), ctx.axis, *ctx.distance)
        if ctx.needs_input_grad[1]:
            points = point_gradient(grad, 0 if ctx.xywh else 1, ctx.axis, *ctx.points)
        return distance, points, None, None, None, None


def joined(
    coordinates: Sequence[Tensor], signs: Sequence[int], axis: int, shape: torch.Size, dtype: torch.dtype
) -> Tensor:
    """Gradients, coordinate by coordinate, as that of a tensor of `shape`: summed over what was broadcast."""
    result = torch.empty(shape, dtype=dtype, device=coordinates[0].device)
    for place, coordinate, sign in zip(result.unbind(axis), coordinates, signs, strict=True):
        torch.mul(coordinate.sum_to_size(place.shape), sign, out=place)
    return result


def point_gradient(grad: Tensor, far: int, axis: int, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    """Gradient of points: what the near corner or centre has, and `far` times what the far corner has.

    All four are summed over what was broadcast before they are added, as in autograd, and in one pass over memory.
    """
    whole = list(shape)
    whole[axis] = 4
    first, second, third, fourth = grad.sum_to_size(whole).unbind(axis)
    result = torch.empty(shape, dtype=dtype, device=grad.device)
    for place, near, other in zip(result.unbind(axis), (first, second), (third, fourth), strict=True):
        if far:
            torch.add(near, other, alpha=far, out=place)
        else:
            place.copy_(near)
    return result


def _encode(points: Tensor, boxes: Tensor, bound: float | None, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """`bbox2dist` of checked arguments."""
    result = torch.empty(shape, dtype=dtype, device=boxes.device)
    (x, y), (x1, y1, x2, y2) = points.unbind(-1), boxes.unbind(-1)
    left, top, right, bottom = result.unbind(-1)
    torch.sub(x, x1, out=left)
    torch.sub(y, y1, out=top)
    torch.sub(x2, x, out=right)
    torch.sub(y2, y, out=bottom)
    return result if bound is None else result.clamp_(0, bound)


class _Encode(torch.autograd.Function):
    """`_encode` with its gradient."""

    @staticmethod
    def forward(
        ctx, points: Tensor, boxes: Tensor, bound: float | None, shape: Sequence[int], dtype: torch.dtype
    ) -> Tensor:
        ctx.bound = bound
        ctx.points, ctx.boxes = (points.shape, points.dtype), (boxes.shape, boxes.dtype)
        if bound is not None:
            ctx.save_for_backward(points, boxes)
        return _encode(points, boxes, bound, shape, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        slopes = grad.unbind(-1)
        if ctx.bound is not None:
            (x, y), (x1, y1, x2, y2) = (tensor.unbind(-1) for tensor in ctx.saved_tensors)
            sides = (x, x1), (y, y1), (x2, x), (y2, y)
            slopes = [_unclamped(a - b, ctx.bound).mul_(slope) for (a, b), slope in zip(sides, slopes, strict=True)]
        outward = joined(slopes, (-1, -1, 1, 1), -1, grad.shape, grad.dtype)
        points = boxes = None
        if ctx.needs_input_grad[0]:
            points = point_gradient(outward, 1, -1, *ctx.points).neg_()
        if ctx.needs_input_grad[1]:
            boxes = outward.sum_to_size(ctx.boxes[0]).to(ctx.boxes[1])
        return points, boxes, None, None, None


def _unclamped(distance: Tensor, bound: float) -> Tensor:
    """1 where a clamp to [0, bound] leaves the distance as it is, else 0, in its dtype.

    A selection by an unpredictable mask takes ten times as long on a CPU.
    """
    if bound < 0:
        return torch.zeros_like(distance)
    clamped = distance.clamp(0, bound)
    return torch.eq(clamped, distance, out=clamped)
