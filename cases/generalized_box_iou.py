"""Cases of the pairwise generalised IoU of set prediction: two sets of corner boxes."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from cases import set_prediction as shared
from cases.boxes import drawn
from cases.case import DTYPES, Case
from cases.flaws import Flaw, perhaps
from cases.labels import LabelImage
from cases.predictions import query_predictions
from cases.scenes import Scene, common_tags, draw_scene, scene_from_labels

#: Change it whenever the same draws give another case.
STRATEGY_VERSION = 1

#: Most boxes of a drawn case in each set, and queries of a labelled image.
_MOST, _QUERIES = 40, 300


@st.composite
def cases(draw: st.DrawFn, *, dtypes: Sequence[str] = ("float32",)) -> Case:
    """Draw a case in one of `dtypes`, in pixels or shares of the image; against predictions or against themselves."""
    pick = drawn(draw)
    dtype = pick.choice(dtypes)
    scene = draw_scene(pick, dtype=dtype, boxes=shared.BOX_KINDS)
    case = build(
        scene,
        dtype,
        pick.integer(0, 8),
        f"drawn:generalized_box_iou/{STRATEGY_VERSION}",
        pixels=pick.choice((True, False)),
        against_itself=pick.choice((False, False, True)),
        infinite=pick.choice(shared.RARELY),
    )
    return perhaps(pick, FLAWS, case)


def from_labels(
    images: Sequence[LabelImage], stage: str, seed: int, dtype: str = "float32", *, queries: int = _QUERIES
) -> Case:
    """All queries of a batch of labelled `images` against all ground truths, as upstream's matcher asks."""
    scene = scene_from_labels(images, stage, seed)
    origin = f"labels:{images[0].name}+{len(images) - 1}/{stage}/{seed}"
    return build(scene, dtype, queries, origin, pixels=False, most=None)


def allows(case: Case) -> bool:
    """Whether `cases` could have drawn `case`."""
    return True


def build(
    scene: Scene,
    dtype: str,
    queries: int,
    origin: str,
    *,
    pixels: bool,
    against_itself: bool = False,
    infinite: bool = False,
    most: int | None = _MOST,
) -> Case:
    """The case of `scene`: its boxes second; first the predictions of `queries` an image, or its boxes again."""
    truths = np.concatenate(scene.boxes)[:most]
    frame = scene.frame
    if against_itself:
        first = truths
    else:
        found = query_predictions(
            scene.prediction, scene.seed, frame, scene.boxes, scene.class_indices, scene.num_classes, queries
        )
        first = found.boxes.reshape(-1, 4)[:most]
    scale = 1 if pixels else np.array([frame.width, frame.height] * 2, dtype=np.float64)
    tensors = {
        name: torch.from_numpy(boxes / scale).to(DTYPES[dtype])
        for name, boxes in (("boxes1", first), ("boxes2", truths))
    }
    tags = common_tags(scene, dtype) | {"pixels" if pixels else "normalised"}
    if against_itself:
        tags.add("identical")
    if infinite and len(first):
        tensors["boxes1"][0, 2] = torch.inf
        tags.add("non-finite")
    return Case("generalized_box_iou", tensors, {}, origin, frozenset(tags))


def _spoiler(name: str, place: int, value: float):
    def make(tensors: dict[str, Tensor], _: dict[str, Any]) -> bool:
        tensors[name][-1:, place] = value
        return len(tensors[name]) > 0

    return make


def _five_columns(tensors: dict[str, Tensor], _: dict[str, Any]) -> bool:
    tensors["boxes2"] = tensors["boxes2"][:, :3].clone()
    return True


FLAWS = (
    Flaw("inverted-box1", "x2 < x1", _spoiler("boxes1", 2, -1e3)),
    Flaw("inverted-box2", "y2 < y1", _spoiler("boxes2", 3, -1e3)),
    Flaw("nan-box", "corners that are not ordered", _spoiler("boxes2", 0, torch.nan)),
    Flaw("three-columns", "a box has four coordinates", _five_columns),
)


def pinned_cases() -> Iterator[tuple[str, Case]]:
    """The example and the edge cases of A1, by name."""

    def case(tags: set[str], boxes1: Sequence[Sequence[float]], boxes2: Sequence[Sequence[float]]) -> Case:
        tensors = {
            name: torch.tensor(boxes, dtype=torch.float32).view(-1, 4)
            for name, boxes in (("boxes1", boxes1), ("boxes2", boxes2))
        }
        return Case("generalized_box_iou", tensors, {}, "pinned", frozenset({"float32", *tags}))

    square, shifted, apart = (0, 0, 2, 2), (1, 1, 3, 3), (5, 5, 6, 6)
    point, other_point, line = (1, 1, 1, 1), (4, 4, 4, 4), (0, 1, 2, 1)
    yield "worked-example", case({"worked-example"}, [square, shifted, apart], [shifted, square])
    yield "no-box", case({"no-box"}, [], [square])
    yield "no-box-at-all", case({"no-box"}, [], [])
    yield "touching", case({"touching"}, [square], [(2, 0, 3, 2), (2, 2, 3, 3), (0, 2, 2, 3)])
    yield "contained", case({"contained"}, [square, (0.5, 0.5, 1, 1)], [(0.5, 0.5, 1, 1), square])
    yield "zero-area-inside", case({"zero-area"}, [point, line], [square, apart])
    yield (
        "zero-area-both",
        case({"zero-area", "divergence:giou-undefined-overlap"}, [point, line, square], [other_point, line, square]),
    )
    yield "inverted", case({"invalid", "inverted"}, [square], [(2, 2, 1, 3)])
    yield "nan", case({"invalid", "nan-box"}, [(0, torch.nan, 1, 1)], [square])
    yield "infinite", case({"non-finite"}, [(0, 0, torch.inf, 1), square], [square])
