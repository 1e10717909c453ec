"""Cases of YOLOX's L1 term and its target for a given assignment."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from cases import boxes as box_kinds
from cases import yolox_head
from cases.boxes import centre_form, drawn
from cases.case import DTYPES, Case
from cases.flaws import Flaw, perhaps
from cases.labels import LabelImage
from cases.predictions import spoil
from cases.scenes import Scene, common_tags, draw_scene, scene_from_labels
from cases.yolox_head import WAVE_FRAME, WAVE_LABELS, wave_rows

#: Change it whenever the same draws give another case.
STRATEGY_VERSION = 1

FOREGROUND = ("followers",) * 8 + ("none", "all")


@st.composite
def cases(draw: st.DrawFn, *, dtypes: Sequence[str] = ("float32",)) -> Case:
    """Draw a case in one of `dtypes`."""
    pick = drawn(draw)
    dtype = pick.choice(dtypes)
    # The logarithm of a negative side is NaN everywhere; beside it the -inf of a flat one in float16 would not show.
    kinds = [kind for kind in box_kinds.KINDS if dtype != "float16" or kind != "inverted"]
    scene = draw_scene(pick, dtype=dtype, boxes=kinds)
    case = build(
        scene,
        dtype,
        f"drawn:yolox_l1/{STRATEGY_VERSION}",
        foreground=pick.choice(FOREGROUND),
        exact=pick.choice((False, False, False, True)),
        box_dtype=pick.choice((dtype, dtype, "float32" if dtype != "float64" else dtype)),
        autocast=yolox_head.autocast(pick, dtype),
    )
    return perhaps(pick, FLAWS, case)


def from_labels(images: Sequence[LabelImage], stage: str, seed: int, dtype: str = "float32") -> Case:
    """The case of a batch of labelled `images` at training stage `stage`."""
    scene = scene_from_labels(images, stage, seed)
    return build(scene, dtype, f"labels:{images[0].name}+{len(images) - 1}/{stage}/{seed}")


def allows(_: Case) -> bool:
    """Whether `cases` could have drawn the case: there are no options, so it could."""
    return True


def build(
    scene: Scene,
    dtype: str,
    origin: str,
    *,
    foreground: str = "followers",
    exact: bool = False,
    box_dtype: str = "",
    autocast: str | None = None,
) -> Case:
    """The case of `scene` in `dtype`; `exact` puts whole raw values, of which some equal their target."""
    found = yolox_head.head(scene)
    mask, rows = yolox_head.assignment(scene, found)
    count = max(scene.counts)
    if foreground != "followers":
        mask[...] = foreground == "all" and min(scene.counts) > 0
    boxes = np.zeros((len(scene.counts), count, 4))
    for image, truths in enumerate(scene.boxes):
        boxes[image, : len(truths)] = centre_form(truths)
    raw = np.round(found.rows[..., :4]) if exact else found.rows[..., :4]
    box_dtype = box_dtype or dtype
    tensors = yolox_head.to_dtype({"origin_preds": raw}, dtype) | yolox_head.to_dtype({"gt_boxes": boxes}, box_dtype)
    tags = common_tags(scene, dtype) | {f"foreground-{foreground}"} | ({"mixed-dtype"} if box_dtype != dtype else set())
    if spoil(scene.prediction, scene.seed, found.aims, {"raw": tensors["origin_preds"]}):
        tags.add("non-finite")
    tensors |= {"fg_mask": torch.from_numpy(mask), "matched_gt": torch.from_numpy(rows)}
    tensors |= yolox_head.grid(scene.frame, dtype)
    return Case("yolox_l1", tensors, {"autocast": autocast}, origin, frozenset(tags))


def _row_beyond(tensors: dict[str, Tensor], _: dict[str, Any]) -> bool:
    tensors["matched_gt"][tensors["fg_mask"]] = tensors["gt_boxes"].shape[1]
    return bool(tensors["fg_mask"].any())


FLAWS = (Flaw("row-beyond-rows", "a ground truth that does not exist", _row_beyond),)


def pinned_cases() -> Iterator[tuple[str, Case]]:
    """The assignment of the worked example of simota.md, section 5.1, and degenerate boxes."""

    def case(tags: set[str], dtype: str = "float32", anchors: Sequence[int] = (5, 19), flat: bool = False) -> Case:
        mask, rows = torch.zeros(1, 20, dtype=torch.bool), torch.zeros(1, 20, dtype=torch.int64)
        mask[0, anchors], rows[0, anchors[1:]] = True, 1
        boxes = torch.tensor(WAVE_LABELS, dtype=DTYPES[dtype])[None, :, 1:]
        if flat:
            boxes[..., 2] = 0
        tensors = {
            "origin_preds": wave_rows()[..., :4].to(DTYPES[dtype]),
            "fg_mask": mask,
            "matched_gt": rows,
            "gt_boxes": boxes,
            **yolox_head.grid(WAVE_FRAME, dtype),
        }
        return Case("yolox_l1", tensors, {"autocast": None}, "pinned", frozenset({dtype, *tags}))

    yield "worked-example", case({"worked-example"})
    yield "no-foreground", case({"foreground-none"}, anchors=())
    yield "flat-ground-truths", case({"zero-area"}, flat=True)
    yield "flat-ground-truths-bfloat16", case({"zero-area"}, "bfloat16", flat=True)
    yield "flat-ground-truths-float16", case({"zero-area", "divergence:yolox-l1-float16"}, "float16", flat=True)
