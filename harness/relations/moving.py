"""Images, rows and columns of a case put in another order or taken alone, and the same done to what was answered."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from cases.case import Case
from harness.operation import gradient_name
from harness.relations.declaration import Axis, Images, Rows


def shuffled(count: int, generator: torch.Generator) -> Tensor:
    """An order of `count` things that is not the one they have, if there are two."""
    order = torch.randperm(count, generator=generator)
    return order.roll(1) if torch.equal(order, torch.arange(count)) else order


def inverse(order: Tensor) -> Tensor:
    """Where each thing went."""
    return torch.argsort(order)


def named(table: Mapping[str, Any]) -> dict[str, Any]:
    """The table, with the gradient of each input where the input is."""
    return {**table, **{gradient_name(name): value for name, value in table.items()}}


# Axes: the same order in every image.


def length(axis: Axis, tensors: Mapping[str, Tensor]) -> int:
    """How many things an axis has: the fewest that any tensor shows, those of size 1 apart."""
    sizes = []
    for name, dim in axis.along.items():
        if name in tensors:
            size = tensors[name].shape[dim] - axis.first.get(name, 0) - axis.last.get(name, 0)
            sizes.append(size // axis.neighbours.get(name, 1))
    return min((size for size in sizes if size != 1), default=min(sizes, default=0))


def take(axis: Axis, values: Mapping[str, Tensor], order: Tensor, count: int) -> dict[str, Tensor]:
    """`values` with the things of `axis`, of which there are `count`, in `order`; some may be left out."""
    along, first, last, counted = (named(table) for table in (axis.along, axis.first, axis.last, axis.counted))
    found = dict(values)
    for name, dim in along.items():
        if name in values:
            found[name] = _taken(values[name], dim, order, count, first.get(name, 0), last.get(name, 0))
    if len(order) == count:
        for name, column in counted.items():
            if name in values and not name.startswith("gradient"):
                found[name] = _renamed(found[name], inverse(order), column, axis.real)
    return found


def _taken(value: Tensor, dim: int, order: Tensor, count: int, first: int, last: int) -> Tensor:
    if value.dim() == 0:
        return value
    size = value.shape[dim] - first - last
    if size == 1 and count != 1:
        return value
    neighbours = size // count if count else 1
    inner = (order[:, None] * neighbours + torch.arange(neighbours)).flatten()
    whole = torch.cat((torch.arange(first), inner + first, torch.arange(value.shape[dim] - last, value.shape[dim])))
    return value.index_select(dim, whole.to(value.device))


def _renamed(
    value: Tensor, places: Tensor, column: int | None, real: Callable[[Tensor], Tensor] | None = None
) -> Tensor:
    if not len(places):
        return value
    part = value if column is None else value[..., column]
    inside = (part >= 0) & (part < len(places))
    if real is not None:
        inside &= real(value)
    index = torch.where(inside, part, torch.zeros_like(part)).long()
    moved = torch.where(inside, places.to(value.device)[index].to(part.dtype), part)
    if column is None:
        return moved
    value = value.clone()
    value[..., column] = moved
    return value


def with_axis(axis: Axis, case: Case, order: Tensor) -> Case:
    """The case with the things of `axis` in `order`."""
    count = length(axis, case.tensors)
    settings = dict(case.settings)
    for name in axis.lists:
        if isinstance(settings.get(name), list) and len(settings[name]) == count:
            settings[name] = [settings[name][index] for index in order.tolist()]
    return replace(case, tensors=take(axis, case.tensors, order, count), settings=settings)


# Images.


def counts(images: Images, case: Case, name: str) -> list[int]:
    """Rows of each image in a tensor of rows, image after image."""
    setting = images.blocks[name]
    if setting:
        return list(case.settings[setting])
    return case.tensors[images.member].flatten().long().bincount(minlength=number(images, case)).tolist()


def number(images: Images, case: Case) -> int:
    """Images of the batch."""
    return next(case.tensors[name].shape[dim] for name, dim in images.along.items() if name in case.tensors)


def with_images(images: Images, case: Case, order: list[int]) -> Case:
    """The case with the images in `order`; some may be left out."""
    chosen = torch.tensor(order, dtype=torch.int64)
    tensors, settings = dict(case.tensors), dict(case.settings)
    for name, dim in images.along.items():
        if name in tensors:
            tensors[name] = tensors[name].index_select(dim, chosen.to(tensors[name].device))
    for name in images.blocks:
        if name not in tensors:
            continue
        sizes = counts(images, case, name)
        parts = list(tensors[name].split(sizes))
        if name in images.shifted:
            rows = case.settings[images.shifted[name]]
            before = [0, *accumulate(rows)]
            after = dict(zip(order, [0, *accumulate(rows[image] for image in order)][:-1], strict=True))
            parts = [part - before[image] + after.get(image, 0) for image, part in enumerate(parts)]
        if name == images.member:
            places = {image: place for place, image in enumerate(order)}
            parts = [torch.full_like(part, places.get(image, 0)) for image, part in enumerate(parts)]
        tensors[name] = torch.cat([parts[image] for image in order]) if order else tensors[name][:0]
    for name in images.lists:
        if settings.get(name):
            settings[name] = [settings[name][image] for image in order]
    return replace(case, tensors=tensors, settings=settings)


def of_images(images: Images, outputs: Mapping[str, Tensor], order: list[int]) -> dict[str, Tensor]:
    """What was answered of the images in `order`; outputs without images are left out."""
    chosen = torch.tensor(order, dtype=torch.int64)
    return {
        name: outputs[name].index_select(dim, chosen.to(outputs[name].device))
        for name, dim in named(images.along).items()
        if name in outputs
    }


# Rows: another order in every image.


def orders(rows: Rows, case: Case, generator: torch.Generator) -> list[Tensor]:
    """An order for the rows of each image."""
    return [shuffled(count, generator) for count in rows.count(case)]


def with_rows(rows: Rows, case: Case, new: list[Tensor]) -> Case:
    """The case with the rows of each image in the order given."""
    tensors = moved_rows(rows, case.tensors, new)
    sizes = [len(order) for order in new]
    for name in rows.blocks:
        if name in tensors and sum(sizes):
            parts = tensors[name].split(sizes)
            tensors[name] = torch.cat([part[order] for part, order in zip(parts, new, strict=True)])
    for name, setting in rows.listed.items():
        if name in tensors:
            parts = tensors[name].split(list(case.settings[setting]))
            tensors[name] = torch.cat([inverse(order)[part] for part, order in zip(parts, new, strict=True)])
    return replace(case, tensors=tensors)


def moved_rows(rows: Rows, values: Mapping[str, Tensor], new: list[Tensor]) -> dict[str, Tensor]:
    """What has rows in a dim, or numbers of rows, with the rows of each image in the order given."""
    found = dict(values)
    for name, dim in named(rows.dense).items():
        if name in values:
            images = [_taken_leading(image, dim - 1, order) for image, order in zip(values[name], new, strict=True)]
            found[name] = torch.stack(images) if images else values[name]
    for name, dim in rows.counted.items():
        if name in values:
            images = values[name].unbind(dim)
            renamed = [_renamed(image, inverse(order), None) for image, order in zip(images, new, strict=True)]
            found[name] = torch.stack(renamed, dim) if renamed else values[name]
    return found


def _taken_leading(value: Tensor, dim: int, order: Tensor) -> Tensor:
    rest = torch.arange(len(order), value.shape[dim])
    return value.index_select(dim, torch.cat((order, rest)))
