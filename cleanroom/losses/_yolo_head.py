"""What a YOLO head's box channels mean: anchor grid, distances of the sides, boxes (boxes.md, sections 1, 2 and 6)."""

from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from cleanroom.anchors import make_anchors
from cleanroom.overlap import BoxTerms, box_terms

# Box channels decoded together: those of the anchors asked for stay in the caches, those of all fill a device.
_CHUNK_AT, _CHUNK_ALL = 1 << 18, 1 << 24


class Geometry(NamedTuple):
    """The anchors of an image."""

    points: Tensor  # (A, 2) centres, cells
    strides: Tensor  # (A, 1) pixels a cell
    size: tuple[float, float]  # width and height of the image, pixels

    @property
    def pixels(self) -> Tensor:
        """Centres (A, 2), pixels."""
        return self.points * self.strides


def make_geometry(
    levels: Sequence[Sequence[int]], strides: Sequence[float], dtype: torch.dtype, device: torch.device
) -> Geometry:
    """Geometry of levels of (rows, columns) cells; coordinates are rounded to `dtype`, as those of upstream are."""
    cells = tuple((rows, columns) for rows, columns in levels)
    if torch.compiler.is_compiling() or is_in_torch_dispatch_mode():  # what a mode makes, such as fakes, ends with it
        return _geometry(cells, tuple(strides), dtype, device)
    return _remembered(cells, tuple(strides), dtype, device)


def _geometry(
    levels: tuple[tuple[int, int], ...], strides: tuple[float, ...], dtype: torch.dtype, device: torch.device
) -> Geometry:
    maps = [torch.empty(1, 0, rows, columns, dtype=dtype, device=device) for rows, columns in levels]
    rows, columns = levels[0]
    size = (_rounded(columns * strides[0], dtype), _rounded(rows * strides[0], dtype))
    # Autocast would make it another one, or refuse float16 on the CPU; what is remembered serves inside and outside.
    known = torch.amp.is_autocast_available(device.type)
    with torch.autocast(device.type, enabled=False) if known else nullcontext():
        return Geometry(*make_anchors(maps, strides), size)


@lru_cache(maxsize=16)
@torch.inference_mode(False)
def _remembered(*given) -> Geometry:
    """The same step after step; making it again costs a tenth of a small call. A few sizes: images may vary."""
    return _geometry(*given)


def _rounded(value: float, dtype: torch.dtype) -> float:
    """A size in pixels as `dtype` has it; sizes that occur are exact in every one."""
    exact = dtype in (torch.float32, torch.float64) or value <= 2 / torch.finfo(dtype).eps
    return float(value) if exact else torch.tensor(float(value), dtype=dtype).item()


def distances(rows: Tensor, reg_max: int, *, exact: bool = False) -> Tensor:
    """Distances (..., 4) of the sides in cells, of channels (..., 4 R): expectations of R > 1 bins, else as they are.

    In the dtype of the channels, or of the autocast around: the expectation is a matrix product as upstream's is, whose
    bits decide who is assigned. `exact` ones care for neither.
    """
    if reg_max == 1:
        return rows
    share = rows.unflatten(-1, (4, reg_max)).softmax(-1)
    bins = torch.arange(reg_max, dtype=share.dtype, device=rows.device)
    return (share * bins).sum(-1) if exact else share @ bins


def boxes_around(points: Tensor, sides: Tensor) -> Tensor:
    """Boxes xyxy (..., 4) at the given distances from points (..., 2), in the same unit."""
    return torch.cat((points - sides[..., :2], points + sides[..., 2:]), -1)


class Decoder(NamedTuple):
    """Predicted boxes in pixels, as an assigner sees them: in float32, the dtype of the targets."""

    channels: Tensor  # (B, 4 R, A)
    geometry: Geometry
    reg_max: int

    def all(self) -> BoxTerms:
        """Terms of every box, (B, A) each, decoded some images at a time."""
        _, channels, anchors = self.channels.shape
        parts = self.channels.transpose(1, 2).split(max(1, _CHUNK_ALL // (channels * anchors)))
        return _joined([self._terms(part, slice(None)) for part in parts])

    def at(self, place: Tensor) -> BoxTerms:
        """Terms (P,) of the boxes at flat places b A + a."""
        _, channels, anchors = self.channels.shape
        parts = []
        for part in place.split(max(1, _CHUNK_AT // channels)):
            anchor = part % anchors
            parts.append(self._terms(self.channels[part // anchors, :, anchor], anchor))
        return _joined(parts)

    def buffers(self) -> BoxTerms:
        """Uninitialised terms (B, A)."""
        images, _, anchors = self.channels.shape
        return BoxTerms(*self.channels.new_empty(6, images, anchors, dtype=torch.float32))

    def _terms(self, rows: Tensor, anchor: Tensor | slice) -> BoxTerms:
        boxes = boxes_around(self.geometry.points[anchor], distances(rows, self.reg_max))
        return box_terms((boxes * self.geometry.strides[anchor]).float())


def _joined(parts: Sequence[BoxTerms]) -> BoxTerms:
    return parts[0] if len(parts) == 1 else BoxTerms(*map(torch.cat, zip(*parts, strict=True)))


def rows_at(channels: Tensor, image: Tensor, anchor: Tensor) -> Tensor:
    """Channels (N, K) of N anchors out of (B, K, A), no anchor twice.

    The gradient is made at once: zeros and the rows, with no sum over equal places.
    """
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and channels.requires_grad):
        return channels[image, :, anchor]
    return _Rows.apply(channels, image, anchor)


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, channels: Tensor, image: Tensor, anchor: Tensor) -> Tensor:
        ctx.save_for_backward(image, anchor)
        ctx.shape = channels.shape
        return channels[image, :, anchor]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        image, anchor = ctx.saved_tensors
        result = grad.new_zeros(ctx.shape)
        result[image, :, anchor] = grad
        return result, None, None
