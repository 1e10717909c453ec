"""Probabilistic IoU of rotated boxes with its gradient (specification: boxes.md, sections 11 and 12).

After Llerena et al. (2021), arXiv:2106.06072. Values and gradients are those of the order of operations of the
specification, so that they have upstream's bits, except where that order gives no number: thin boxes, whose
determinants cancel, and boxes without area, where a root has an infinite slope. There they are those of
`cleanroom.rotated_overlap.stable_form`, number by number, and finite.
"""

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cleanroom.overlap import EPS
from cleanroom.paths import data_dependent
from cleanroom.rotated_overlap import GaussianRule, gaussian_iou, gaussian_terms, ordered_form, stable_form

# A box whose similarity has a slope everywhere: it takes the place of those whose slope is not looked at.
HARMLESS = (0.0, 0.0, 2.0, 1.0, 0.0)


def probiou(
    obb1: Tensor,
    obb2: Tensor,
    CIoU: bool = False,  # noqa: N803 - upstream's name
    eps: float = EPS,
    floor: float = 0.0,
) -> Tensor:
    """Similarity of pairs of rotated boxes; a drop-in for ``ultralytics.utils.metrics.probiou``.

    Half dtypes are computed with in float32 and without cancellation: upstream's determinants of boxes of 20 pixels
    overflow float16.

    Args:
        obb1, obb2: (N, 5) centre x, centre y, width, height (one unit) and angle (radians, any), real dtypes; one of
            them may be (1, 5).
        CIoU: subtract the aspect term of complete IoU; 0 for a pair with a box without width and height.
        eps: added to every denominator and under the root; also the least distance of two Gaussians.
        floor: added to both variances of both boxes, in squared units of the boxes; the rotated box loss takes 0.01.

    Returns:
        (N, 1), in the promoted dtype (of integers: the default dtype); differentiable once. Identical boxes reach 1
        less the root of 2 eps. NaN where a number of either box is NaN or infinite, but an infinite centre may give 0.

    Raises:
        ValueError: a shape is wrong, or numbers of boxes differ.
        TypeError: bool or complex boxes.
    """
    _check(obb1, obb2)
    if len(obb1) != len(obb2) and 1 not in (len(obb1), len(obb2)):
        raise ValueError(f"obb1 and obb2 do not broadcast: {tuple(obb1.shape)}, {tuple(obb2.shape)}")
    return _similarity(obb1, obb2, GaussianRule(bool(CIoU), eps, floor)).unsqueeze(-1)


def batch_probiou(obb1: Tensor | np.ndarray, obb2: Tensor | np.ndarray, eps: float = EPS) -> Tensor:
    """Similarity of every box of one set with every box of another; a drop-in for upstream's of this name.

    Args:
        obb1, obb2: (N, 5) and (M, 5) as in `probiou`, tensors or arrays.
        eps: as in `probiou`; there is no floor.

    Returns:
        (N, M); entries are those of `probiou`, bit for bit.

    Raises:
        ValueError, TypeError: as `probiou`.
    """
    obb1, obb2 = (torch.from_numpy(boxes) if isinstance(boxes, np.ndarray) else boxes for boxes in (obb1, obb2))
    _check(obb1, obb2)
    return _similarity(obb1[:, None], obb2[None], GaussianRule(eps=eps))


def _similarity(one: Tensor, two: Tensor, rule: GaussianRule) -> Tensor:
    """(...) of boxes (..., 5) that broadcast."""
    dtype = torch.promote_types(one.dtype, two.dtype)
    dtype = dtype if dtype.is_floating_point else torch.get_default_dtype()
    wide = torch.promote_types(dtype, torch.float32)
    half = {one.dtype, two.dtype} & {torch.float16, torch.bfloat16}
    one, two = one.to(wide), two.to(wide)
    if half:  # upstream's bits are those of other numbers
        return _stable(one, two, rule).to(dtype)
    if not (torch.is_grad_enabled() and (one.requires_grad or two.requires_grad)):
        return gaussian_iou(gaussian_terms(one, rule), gaussian_terms(two, rule), rule)
    if torch.compiler.is_compiling():  # a compiler fuses and differentiates plain formulas
        return _traced(one, two, rule)
    return _Similarity.apply(one, two, rule)


_as_upstream = functools.partial(ordered_form, anew=True)


class _Similarity(torch.autograd.Function):
    """The ordered form differentiated as it stands, and the stable one for slopes that are not finite."""

    @staticmethod
    def forward(ctx: Any, one: Tensor, two: Tensor, rule: GaussianRule) -> Tensor:
        with torch.enable_grad():
            leaves = tuple(box.detach().requires_grad_() for box in (one, two))
            value = _as_upstream(*(gaussian_terms(leaf, rule) for leaf in leaves), rule)
        ctx.leaves, ctx.value, ctx.rule = leaves, value, rule
        value = value.detach().clone()
        undefined = value.isnan()
        if data_dependent(value):
            if undefined.any():
                value[undefined] = _stable(_expanded(one, value)[undefined], _expanded(two, value)[undefined], rule)
            return value
        return torch.where(undefined, _stable(one, two, rule), value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        found = torch.autograd.grad(ctx.value, ctx.leaves, grad, retain_graph=True)
        if not data_dependent(grad) or not all(bool(slope.isfinite().all()) for slope in found):
            with torch.enable_grad():
                value = _stable(*ctx.leaves, ctx.rule)
            stable = torch.autograd.grad(value, ctx.leaves, grad)
            found = [torch.where(one.isfinite(), one, other) for one, other in zip(found, stable, strict=True)]
        return *(slope if needed else None for slope, needed in zip(found, ctx.needs_input_grad, strict=False)), None


def _stable(one: Tensor, two: Tensor, rule: GaussianRule) -> Tensor:
    return stable_form(gaussian_terms(one, rule), gaussian_terms(two, rule), rule)


def _expanded(boxes: Tensor, value: Tensor) -> Tensor:
    return boxes.expand(*value.shape, 5)


def _traced(one: Tensor, two: Tensor, rule: GaussianRule) -> Tensor:
    """Both forms with autograd's gradients: the ordered one never sees a pair whose slope would not be finite."""
    with torch.no_grad():
        terms = gaussian_terms(one, rule), gaussian_terms(two, rule)
        value = ordered_form(*terms, rule)
        own = terms[0].determinant * terms[1].determinant
        bad = value.isnan() | (own == 0) | ~own.isfinite()
        if rule.complete:
            bad = bad | (terms[0].height == 0) | (terms[1].height == 0)
    tame = [torch.where(bad[..., None], box.new_tensor(HARMLESS), box) for box in (one, two)]
    ordered = ordered_form(*(gaussian_terms(box, rule) for box in tame), rule)
    stable = _stable(one, two, rule)
    # Where only the slope of the ordered form is lost its value stays.
    stable = torch.where(value.isnan(), stable, value.nan_to_num() + (stable - stable.detach()))
    return torch.where(bad, stable, ordered)


def _check(obb1: Tensor, obb2: Tensor) -> None:
    for name, boxes in (("obb1", obb1), ("obb2", obb2)):
        if boxes.ndim != 2 or boxes.shape[-1] != 5:
            raise ValueError(f"{name} must be (N, 5), got shape {tuple(boxes.shape)}")
        if boxes.dtype == torch.bool or boxes.is_complex():
            raise TypeError(f"{name} must be real, got {boxes.dtype}")
