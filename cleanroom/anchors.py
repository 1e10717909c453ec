"""Anchor points: the centre of every cell of every feature map (specification: boxes.md, section 1)."""

from collections.abc import Sequence

import torch
from torch import Tensor


def make_anchors(
    feats: Sequence[Tensor] | Tensor, strides: Sequence[float] | Tensor, grid_cell_offset: float = 0.5
) -> tuple[Tensor, Tensor]:
    """Centre and stride of every cell of every feature map; a drop-in for ``ultralytics.utils.tal.make_anchors``.

    Levels come in the given order, cells row by row. Without gradient and, for maps, without waiting for the device.

    Args:
        feats: feature maps (B, C, h, w), of which only the shapes and the first one's dtype and device count; or their
            sizes, a tensor (L, 2) of (h, w).
        strides: at least one number a map, in order; further ones are ignored.
        grid_cell_offset: where the point lies in its cell. Points are not multiplied by the stride.

    Returns:
        Points (N, 2) as (x, y) in cells, and strides (N, 1), both in the dtype of the first map or of the sizes; points
        of integers in the default dtype. The index of a cell is rounded to the dtype before the offset is added.

    Raises:
        ValueError: a map is not 4-D, sizes are not (L, 2), there is no map, or a tensor of strides is no vector.
        TypeError: `feats` or `strides` is no sequence.
        IndexError: there are fewer strides than maps.
    """
    sizes, like = _sizes(feats)
    _check_strides(strides, len(sizes))
    dtype = like.dtype if like.is_floating_point() else torch.get_default_dtype()
    steps = torch.arange(max(map(max, sizes)), dtype=dtype, device=like.device).add_(grid_cell_offset)
    points, levels = [], []
    for (rows, columns), stride in zip(sizes, strides, strict=False):
        shape = rows, columns
        points.append(torch.stack((steps[:columns].expand(shape), steps[:rows, None].expand(shape)), -1).view(-1, 2))
        if isinstance(stride, Tensor) and stride.device.type != "cpu":  # reading it would wait for the device
            levels.append(stride.detach().to(like.dtype).expand(rows * columns, 1))
        else:
            levels.append(like.new_full((rows * columns, 1), stride))
    return torch.cat(points), torch.cat(levels)


def _sizes(feats: Sequence[Tensor] | Tensor) -> tuple[list[list[int]], Tensor]:
    """Rows and columns of every map, and the tensor whose dtype and device count."""
    if isinstance(feats, Tensor):
        if feats.ndim != 2 or feats.shape[1] != 2 or not len(feats):
            raise ValueError(f"feats must be sizes (L, 2) or a sequence of maps, got shape {tuple(feats.shape)}")
        sizes = [[int(side) for side in size] for size in feats.tolist()]
        if min(map(min, sizes)) < 0:
            raise ValueError(f"feats must not hold negative sizes, got {sizes}")
        return sizes, feats.detach()
    if not isinstance(feats, Sequence):
        raise TypeError(f"feats must be a sequence of maps, got {type(feats).__name__}")
    if not feats:
        raise ValueError("feats is empty")
    for position, feat in enumerate(feats):
        if feat.ndim != 4:
            raise ValueError(f"feats[{position}] must be (B, C, h, w), got shape {tuple(feat.shape)}")
    return [list(feat.shape[2:]) for feat in feats], feats[0].detach()


def _check_strides(strides: Sequence[float] | Tensor, levels: int) -> None:
    if not isinstance(strides, Tensor | Sequence):
        raise TypeError(f"strides must be a sequence of numbers, got {type(strides).__name__}")
    if isinstance(strides, Tensor) and strides.ndim != 1:
        raise ValueError(f"strides must be a vector, got shape {tuple(strides.shape)}")
    if len(strides) < levels:
        raise IndexError(f"strides has {len(strides)} numbers for {levels} maps")
