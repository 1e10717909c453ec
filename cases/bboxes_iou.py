"""Cases of YOLOX's pairwise overlap: boxes of every kind in both forms, and an image's boxes against its anchors."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from cases import yolox_head
from cases.boxes import centre_form, drawn
from cases.case import DTYPES, Case
from cases.centre_pairs import pairs
from cases.flaws import Flaw, perhaps
from cases.labels import LabelImage
from cases.scenes import scene_from_labels

#: Change it whenever the same draws give another case.
STRATEGY_VERSION = 1

_RARELY = (False,) * 24 + (True,)


@st.composite
def cases(draw: st.DrawFn, *, dtypes: Sequence[str] = ("float32",)) -> Case:
    """Draw a case in one of `dtypes`."""
    pick = drawn(draw)
    dtype = pick.choice(dtypes)
    seed, xyxy = pick.integer(0, 2**16 - 1), pick.choice((False, True))
    rows, columns = (pick.choice((0, *range(1, 10), *range(1, 10), 40)) for _ in range(2))
    size = pick.choice((20.0, 20.0, 60.0, 1.0) if dtype == "float16" else (20.0, 60.0, 400.0, 1.0, 1e-3))
    size = 400.0 if pick.choice(_RARELY) else size
    # Pairs of related boxes, of which some lose their partner.
    first, second, kinds = pairs(seed, max(rows, columns), size=size, whole=size > 1 and pick.choice((False, True)))
    other = pick.choice((dtype, dtype, dtype, "float32", "int64"))
    case = build(first[:rows], second[:columns], dtype, f"drawn:bboxes_iou/{STRATEGY_VERSION}", xyxy, other, kinds)
    if pick.choice(_RARELY) and rows:
        case.tensors["bboxes_a"][seed % rows, seed % 4] = pick.choice((torch.nan, torch.inf))
        case = Case(case.operation, case.tensors, case.settings, case.origin, case.tags | {"non-finite"})
    return perhaps(pick, FLAWS, case)


def from_labels(images: Sequence[LabelImage], stage: str, seed: int, dtype: str = "float32") -> Case:
    """The ground truths of the fullest image against its anchors' boxes, as the assigner asks."""
    scene = scene_from_labels(images, stage, seed)
    image = int(np.argmax(scene.counts))
    boxes = yolox_head.head(scene).boxes[image]
    origin = f"labels:{images[0].name}+{len(images) - 1}/{stage}/{seed}"
    return build(centre_form(scene.boxes[image]), boxes, dtype, origin, xyxy=False)


def allows(_: Case) -> bool:
    """Whether `cases` could have drawn the case: there are no options, so it could."""
    return True


def build(
    first: np.ndarray,
    second: np.ndarray,
    dtype: str,
    origin: str,
    xyxy: bool,
    other: str = "",
    kinds: set[str] = frozenset(),
) -> Case:
    """The case of boxes in centre form (N, 4) and (M, 4), turned into corners with `xyxy`; `other` is M's dtype."""
    if xyxy:
        first, second = (np.concatenate([b[:, :2] - b[:, 2:] / 2, b[:, :2] + b[:, 2:] / 2], 1) for b in (first, second))
    tags = {dtype, *kinds, "corners" if xyxy else "centres"} | ({"mixed-dtype"} if other not in ("", dtype) else set())
    kind = torch.int64 if other == "int64" else DTYPES[other or dtype]
    tensors = {"bboxes_a": torch.from_numpy(first).to(DTYPES[dtype]), "bboxes_b": torch.from_numpy(second).to(kind)}
    if not first.size or not second.size:
        tags.add("empty")
    return Case("bboxes_iou", tensors, {"xyxy": xyxy}, origin, frozenset(tags))


def _five_columns(tensors: dict[str, Tensor], _: dict[str, Any]) -> bool:
    tensors["bboxes_a"] = torch.nn.functional.pad(tensors["bboxes_a"], (0, 1))
    return True


FLAWS = (Flaw("five-columns", "what is no box", _five_columns),)


def pinned_cases() -> Iterator[tuple[str, Case]]:
    """The examples and edges of yolox_losses.md, section 1."""

    def case(first: Any, second: Any, *tags: str, dtype: str = "float32") -> Case:
        boxes = (np.array(side, dtype=np.float64).reshape(-1, 4) for side in (first, second))
        return build(*boxes, dtype, "pinned", xyxy=False, kinds=set(tags))

    rows = ((10, 10, 8, 6), (20, 14, 10, 10), (40, 40, 4, 4))
    columns = ((11, 9, 6, 8), (20, 14, 10, 10), (30, 30, 6, 6))
    yield "worked-example", case(rows, columns, "worked-example")
    whole = case(rows, columns)
    whole.tensors["bboxes_b"] = whole.tensors["bboxes_b"].long()
    yield "integers", whole
    yield "zero-areas", case(((5, 5, 0, 0),), ((50, 5, 0, 0), (5, 5, 4, 4)), "divergence:bboxes-iou-no-union")
    yield "empty", case((), columns, "empty")
    yield "large-float16", case(((300, 300, 600, 600),), rows, "divergence:bboxes-iou-no-union", dtype="float16")
    yield "infinite-side", case(((5, 5, torch.inf, 4),), columns, "non-finite")
