"""Cases of the mask losses of set prediction: mask logits, padded masks and given pairs."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from cases import set_prediction as shared
from cases.boxes import drawn
from cases.case import Case
from cases.flaws import Flaw, perhaps
from cases.labels import LabelImage
from cases.scenes import Scene, draw_scene, scene_from_labels

#: Change it whenever the same draws give another case.
STRATEGY_VERSION = 1

#: Most targets and queries: every one has a mask.
_TARGETS, _QUERIES = 24, 12
#: Grids of the logits and of the masks of labelled images: a quarter of each side, as DETR's head has it.
_LABELLED = (40, 40), [160, 160]


@st.composite
def cases(draw: st.DrawFn, *, dtypes: Sequence[str] = ("float32",)) -> Case:
    """Draw a case in one of `dtypes`, that of the logits."""
    pick = drawn(draw)
    dtype = pick.choice(dtypes)
    scene = draw_scene(pick, dtype=dtype, boxes=shared.BOX_KINDS)
    scene = _cut(scene)
    small, sizes, kind = shared.draw_masks(pick, len(scene.images))
    case = build(
        scene,
        dtype,
        pick.integer(1, _QUERIES),
        small,
        sizes,
        f"drawn:set_mask_loss/{STRATEGY_VERSION}",
        kind=kind,
        num_boxes=pick.choice((None, None, None, 1.0, 2.5)),
        partial=pick.choice(shared.NOW_AND_THEN),
        extreme=pick.choice(shared.NOW_AND_THEN),
    )
    return perhaps(pick, FLAWS, case)


def from_labels(
    images: Sequence[LabelImage], stage: str, seed: int, dtype: str = "float32", *, queries: int = 100
) -> Case:
    """The case of a batch of labelled `images` at training stage `stage`."""
    scene = scene_from_labels(images, stage, seed)
    small, size = _LABELLED
    origin = f"labels:{images[0].name}+{len(images) - 1}/{stage}/{seed}"
    return build(scene, dtype, queries, small, [size] * len(images), origin)


def allows(case: Case) -> bool:
    """Whether `cases` could have drawn `case`."""
    return True


def build(
    scene: Scene,
    dtype: str,
    queries: int,
    small: tuple[int, int],
    sizes: list[list[int]],
    origin: str,
    *,
    kind: torch.dtype = torch.bool,
    num_boxes: float | None = None,
    partial: bool = False,
    extreme: bool = False,
) -> Case:
    """The case of `scene` with logits on a grid `small` and masks of `sizes`, see `cases.set_prediction`."""
    found = shared.predict(scene, dtype, queries)
    given = shared.masks(scene, found.aims, dtype, small, sizes, kind=kind, extreme=extreme)
    pairs, counts = shared.pairs(scene, found.aims, partial=partial)
    tensors = {"pred_masks": given.logits, "masks": given.masks, **pairs}
    tags = shared.tags(scene, dtype, queries)
    if shared.spoiled(scene, found, {"pred_masks": given.logits.view(*given.logits.shape[:2], -1)}):
        tags.add("non-finite")
    for tag, holds in (("partial-pairs", partial), ("extreme", extreme), ("equal-sizes", list(small) == sizes[0])):
        if holds:
            tags.add(tag)
    settings = {
        "sizes": scene.counts,
        "pairs": counts,
        "mask_sizes": given.sizes,
        "num_boxes": float(max(1, sum(scene.counts))) if num_boxes is None else num_boxes,
    }
    return Case("set_mask_loss", tensors, settings, origin, frozenset(tags))


def _cut(scene: Scene) -> Scene:
    """The scene with few enough targets an image."""
    return Scene(
        scene.frame,
        tuple(image[:_TARGETS] for image in scene.images),
        scene.num_classes,
        scene.prediction,
        scene.seed,
        scene.tags,
    )


def _query_beyond(tensors: dict[str, Tensor], _: dict[str, Any]) -> bool:
    tensors["queries"][-1:] = tensors["pred_masks"].shape[1]
    return len(tensors["queries"]) > 0


FLAWS = (Flaw("query-beyond", "a query that does not exist", _query_beyond),)


def pinned_cases() -> Iterator[tuple[str, Case]]:
    """The worked example A13 and edge cases, by name."""

    def case(tags: set[str], **changes: Any) -> Case:
        tensors, mask_sizes = shared.example_masks()
        pairs, counts = shared.example_pairs()
        tensors |= pairs
        settings = {"sizes": [2, 1], "pairs": counts, "mask_sizes": mask_sizes, "num_boxes": 3.0}
        tensors |= {name: value for name, value in changes.items() if name in tensors}
        settings |= {name: value for name, value in changes.items() if name in settings}
        return Case("set_mask_loss", tensors, settings, "pinned", frozenset({"float32", *tags}))

    tensors, _ = shared.example_masks()
    logits, masks = tensors["pred_masks"], tensors["masks"]
    nothing = torch.empty(0, dtype=torch.int64)
    yield "worked-example", case({"worked-example"})
    yield (
        "no-pair",
        case({"no-ground-truth"}, masks=masks[:0], queries=nothing, targets=nothing, sizes=[0, 0], pairs=[0, 0]),
    )
    yield "all-background", case(set(), masks=torch.zeros_like(masks))
    yield "numbers-as-masks", case({"soft-masks"}, masks=masks.float())
    yield "saturated", case({"saturated"}, pred_masks=logits * 20)
    yield "far-saturated", case({"saturated", "extreme"}, pred_masks=logits * 1e3)
    poisoned = logits.clone()
    poisoned[0, 2, 1, 1] = torch.nan
    yield "nan-logit", case({"non-finite"}, pred_masks=poisoned)
    unmatched = logits.clone()
    unmatched[0, 0] = torch.nan
    yield "unmatched-is-not-looked-at", case({"non-finite"}, pred_masks=unmatched)
