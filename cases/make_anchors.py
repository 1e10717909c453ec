"""Cases of the anchor grid: feature maps, of which only shapes and dtypes matter, or their sizes."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from cases.boxes import drawn
from cases.case import DTYPES, Case
from cases.flaws import Flaw, perhaps
from cases.frame import TRAINING_STRIDES
from cases.labels import LabelImage

#: Change it whenever the same draws give another case.
STRATEGY_VERSION = 1

_SIDES = (*range(1, 9), *range(1, 9), 0)
_STRIDES = (8, 16, 32, 4, 64, 8.5, 0.1)
_OFFSETS = (0.5, 0.5, 0.5, 0.5, 0.0, 0.3, 1, -0.25)
_RARELY = (False,) * 14 + (True,)
#: Cells in a row that are told apart neither in bfloat16 (from 256 on) nor, with their offset, in float16.
_LONG = (260, 300, 1030)

Size = tuple[int, int]


@st.composite
def cases(
    draw: st.DrawFn, *, dtypes: Sequence[str] = ("float32",), sizes: bool = True, more_strides: bool = True
) -> Case:
    """Draw a case in one of `dtypes`.

    Older releases know less: `sizes` says whether a tensor of sizes may stand for maps, `more_strides` whether there
    may be more strides than maps, which 8.1.47 rejects; it takes fewer, which is left out there.
    """
    pick = drawn(draw)
    dtype = pick.choice(dtypes)
    levels = [(pick.choice(_SIDES), pick.choice(_SIDES)) for _ in range(pick.integer(1, 4))]
    tags = set()
    if pick.choice(_RARELY):
        levels[0] = (1, pick.choice(_LONG)) if pick.choice((True, False)) else (pick.choice(_LONG), 1)
        tags.add("long")
    given_sizes = sizes and pick.choice((False, False, True))
    strides = [pick.choice(_STRIDES) for _ in levels]
    if more_strides and pick.choice(_RARELY):
        strides.append(pick.choice(_STRIDES))
        tags.add("more-strides")
    settings = {
        "strides": strides,
        "strides_as": pick.choice(("list", "tensor")),
        "grid_cell_offset": pick.choice(_OFFSETS),
    }
    other = pick.choice((dtype, dtype, *DTYPES)) if dtype != "float64" else dtype
    batch = pick.choice((1, 1, 2, 0))
    case = build(levels, dtype, settings, f"drawn:make_anchors/{STRATEGY_VERSION}", given_sizes, batch, other, tags)
    return perhaps(pick, FLAWS if more_strides else FORMER_FLAWS, case)


def from_labels(images: Sequence[LabelImage], stage: str, seed: int, dtype: str = "float32", **_release: bool) -> Case:
    """The case of a batch of labelled `images`: three levels."""
    image = images[0]
    levels = [(image.height // stride, image.width // stride) for stride in TRAINING_STRIDES]
    settings = {"strides": list(TRAINING_STRIDES), "strides_as": "tensor", "grid_cell_offset": 0.5}
    origin = f"labels:{image.name}+{len(images) - 1}/{stage}/{seed}"
    return build(levels, dtype, settings, origin, batch=len(images), tags={"labelled"})


def allows(case: Case, *, sizes: bool = True, more_strides: bool = True) -> bool:
    """Whether `cases` with these options could have drawn `case`."""
    differs = bool({"more-strides", "a-stride-less", "one-stride-more"} & case.tags)
    return (sizes or "sizes" not in case.tensors) and (more_strides or not differs)


def build(
    levels: Sequence[Size],
    dtype: str,
    settings: dict[str, Any],
    origin: str,
    given_sizes: bool = False,
    batch: int = 1,
    other: str = "",
    tags: set[str] = frozenset(),
) -> Case:
    """The case of levels (rows, columns): maps feat0, feat1, ..., from the second on of dtype `other`, or `sizes`."""
    tags = {*tags, dtype, f"strides-{settings['strides_as']}"}
    if any(0 in level for level in levels):
        tags.add("no-cells")
    if given_sizes:
        tensors = {"sizes": torch.tensor(levels, dtype=DTYPES[dtype])}
        tags.add("sizes")
    else:
        kinds = [dtype] + [other or dtype] * (len(levels) - 1)
        tensors = {
            f"feat{level}": torch.zeros(batch, 1, *size, dtype=DTYPES[kind])
            for level, (size, kind) in enumerate(zip(levels, kinds, strict=True))
        }
    return Case("make_anchors", tensors, settings, origin, frozenset(tags))


def _three_dims(tensors: dict[str, Tensor], _: dict[str, Any]) -> bool:
    if "sizes" in tensors:
        return False
    last = max(tensors)
    tensors[last] = tensors[last][:, 0]
    return True


def _a_stride_less(tensors: dict[str, Tensor], settings: dict[str, Any]) -> bool:
    settings["strides"] = settings["strides"][: len(tensors.get("sizes", tensors)) - 1]
    return True


def _one_stride_more(_: dict[str, Tensor], settings: dict[str, Any]) -> bool:
    settings["strides"] = [*settings["strides"], 8]
    return True


_THREE_DIMS = Flaw("three-dims", "a map has rows and columns, of a batch and channels", _three_dims)
FLAWS = (_THREE_DIMS, Flaw("a-stride-less", "cells without a stride", _a_stride_less))
FORMER_FLAWS = (_THREE_DIMS,)


def pinned_cases() -> Iterator[tuple[str, Case]]:
    """The worked example and the edge cases of boxes.md, section 1."""

    def case(
        levels: Sequence[Size],
        strides: list[float],
        *tags: str,
        dtype: str = "float32",
        offset: float = 0.5,
        **kind: Any,
    ) -> Case:
        settings = {"strides": strides, "strides_as": "list", "grid_cell_offset": offset}
        return build(levels, dtype, settings, "pinned", tags=set(tags), **kind)

    example = ((2, 3), (1, 2)), [8, 16]
    yield "worked-example", case(*example, "worked-example")
    yield "sizes", case(*example, given_sizes=True)
    yield "bfloat16-collapses", case(((1, 260),), [8], "long", dtype="bfloat16")
    yield "float16-collapses", case(((1, 1030),), [8], "long", dtype="float16")
    yield "a-map-without-cells", case(((0, 3), (1, 2)), [8, 16])
    yield "no-cells", case(((0, 3), (2, 0)), [8, 16])
    yield "stride-rounds", case(((2, 2),), [8.3], dtype="bfloat16", offset=0.3)
    yield "more-strides-than-maps", case(((2, 3),), [8, 16], "more-strides")
    yield "fewer-strides-than-maps", case(((2, 3), (1, 2)), [8], "invalid", "a-stride-less")
    three_dims = case(*example, "invalid", "three-dims")
    _three_dims(three_dims.tensors, three_dims.settings)
    yield "three-dims", three_dims
