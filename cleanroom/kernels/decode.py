"""Boxes of a YOLO head for its assigner: every box channel read once, each side's expectation, corners in pixels.

Specification: boxes.md, sections 2 and 6. Bytes moved for L channels of s bytes: s L read, 16 bytes an anchor written.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from cleanroom.kernels import runtime
from cleanroom.kernels.numbers import round_bfloat16

BLOCK = 128
"""Anchors of a program."""
DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def decode(channels: Tensor, points: Tensor, strides: Tensor, reg_max: int) -> Tensor:
    """Boxes that the assigner decides by: expected distances around the anchors, rounded where upstream's are.

    Probabilities and distances are rounded to the dtype of the channels, or of the autocast around, and corners to the
    dtype that distances and points promote to; everything in between is float32.

    Args:
        channels: (B, 4 R, A) logits, side by side, any strides; R = 1: distances in cells.
        points, strides: (A, 2) centres in cells, (A, 1) pixels a cell, in one dtype.
        reg_max: R.

    Returns:
        (B, A, 4) float32 xyxy, pixels; NaN where the logits of a side are NaN, hold +inf, or are all -inf.
    """
    if 0 in channels.shape:
        return _empty(channels)
    return _decode(channels.detach(), points, strides, reg_max, rounding_dtype(channels, reg_max))


def rounding_dtype(channels: Tensor, reg_max: int) -> torch.dtype:
    """The dtype that expected distances are rounded to."""
    device = channels.device.type
    if reg_max > 1 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return channels.dtype


def _empty(channels: Tensor) -> Tensor:
    return runtime.empty((channels.shape[0], channels.shape[2], 4), torch.float32, channels.device)


def _fake(channels, points, strides, reg_max, low):
    return channels.new_empty(channels.shape[0], channels.shape[2], 4, dtype=torch.float32)


@runtime.operator(
    "yolo_decode(Tensor channels, Tensor points, Tensor strides, int reg_max, ScalarType low) -> Tensor", _fake
)
def _decode(channels: Tensor, points: Tensor, strides: Tensor, reg_max: int, low: torch.dtype) -> Tensor:
    images, _, anchors = channels.shape
    out = _empty(channels)
    runtime.launch(
        decode_kernel,
        (triton.cdiv(anchors, BLOCK), images),
        channels,
        points,
        strides,
        out,
        anchors,
        *channels.stride(),
        R=reg_max,
        LOW=DTYPES[low],
        CORNER=DTYPES[torch.promote_types(low, points.dtype)],
        BLOCK=BLOCK,
        BINS=triton.next_power_of_2(reg_max),
        enable_fp_fusion=True,
    )
    return out


@triton.jit(do_not_specialize=["s_channel", "s_anchor"])
def decode_kernel(
    channels, points, strides, out, anchors, s_image, s_channel, s_anchor,
    R: tl.constexpr, LOW: tl.constexpr, CORNER: tl.constexpr, BLOCK: tl.constexpr, BINS: tl.constexpr,
):  # fmt: skip
    """``d = sum_j j softmax(z)_j`` a side, box ``(p - (l, t), p + (r, b)) s``; one program a tile of an image.

    Reads 4 R channels an anchor, writes 16 bytes.
    """
    image = tl.program_id(1).to(tl.int64)
    anchor = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = anchor < anchors
    stride = tl.load(strides + anchor, mask=inside, other=1.0).to(tl.float32)
    row = (image * anchors + anchor) * 4
    for side in tl.static_range(4):
        at = channels + image * s_image + (side * R) * s_channel
        if R == 1:
            distance = tl.load(at + anchor * s_anchor, mask=inside, other=0.0).to(tl.float32)
        else:
            distance = expectation(at, anchor, inside, s_channel, s_anchor, R, BINS, LOW)
        point = tl.load(points + anchor * 2 + side % 2, mask=inside, other=0.0).to(tl.float32)
        corner = point - distance if side < 2 else point + distance
        pixels = rounded(rounded(corner, CORNER) * stride, CORNER)
        tl.store(out + row + side, pixels, mask=inside)


@triton.jit
def bins_of(at, anchor, read, s_channel, s_anchor, R: tl.constexpr, BINS: tl.constexpr, POLICY: tl.constexpr):
    """Logits (BINS, BLOCK) of a side, 0 for anchors that are not read, -infinity where there is no bin; and the bins.

    Loads of the same logits by another eviction policy are not made one, which would keep them in registers.
    """
    bins = tl.arange(0, BINS)[:, None]
    mask = (bins < R) & read[None, :]
    at += bins * s_channel + anchor[None, :] * s_anchor
    x = tl.load(at, mask=mask, other=0.0, eviction_policy=POLICY).to(tl.float32)
    if R != BINS:
        x = tl.where(bins < R, x, float("-inf"))
    return x, bins


@triton.jit
def expectation(at, anchor, inside, s_channel, s_anchor, R: tl.constexpr, BINS: tl.constexpr, LOW: tl.constexpr):
    """Expected bin of one side, probabilities and result rounded to `LOW`."""
    x, bins = bins_of(at, anchor, inside, s_channel, s_anchor, R, BINS, "")
    share = tl.exp(x - tl.max(x, 0)[None, :])
    share = rounded(share / tl.sum(share, 0)[None, :], LOW)
    return rounded(tl.sum(share * bins, 0), LOW)


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """Float32 rounded to a dtype, still float32."""
    result = x
    if DTYPE.is_bf16():
        result = round_bfloat16(x)
    elif DTYPE.is_fp16():
        result = x.to(tl.float16).to(tl.float32)
    return result
