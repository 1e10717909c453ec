"""Cases of YOLOX's objectness and class term for a given assignment."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from cases import yolox_head
from cases.boxes import drawn
from cases.case import DTYPES, Case
from cases.flaws import Flaw, perhaps
from cases.labels import LabelImage
from cases.predictions import spoil
from cases.scenes import Scene, common_tags, draw_scene, scene_from_labels
from cases.yolox_head import wave_rows

#: Change it whenever the same draws give another case.
STRATEGY_VERSION = 1

_RARELY = (False,) * 9 + (True,)
FOREGROUND = ("followers",) * 8 + ("none", "all")


@st.composite
def cases(draw: st.DrawFn, *, dtypes: Sequence[str] = ("float32",)) -> Case:
    """Draw a case in one of `dtypes`."""
    pick = drawn(draw)
    dtype = pick.choice(dtypes)
    scene = draw_scene(pick, dtype=dtype, labels=("fractional", "fraction-below-zero"))
    case = build(
        scene,
        dtype,
        f"drawn:yolox_bce/{STRATEGY_VERSION}",
        foreground=pick.choice(FOREGROUND),
        value=pick.choice((None, None, None, 0.0, 1.0)),
        value_dtype=pick.choice((dtype, dtype, "float32" if dtype != "float64" else dtype)),
        whole=pick.choice((False, True)),
        autocast=yolox_head.autocast(pick, dtype),
        extreme=pick.choice(_RARELY),
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
    value: float | None = None,
    value_dtype: str = "",
    whole: bool = False,
    autocast: str | None = None,
    extreme: bool = False,
) -> Case:
    """The case of `scene` in `dtype`: a few anchors that follow each ground truth are `foreground`, or none, or all.

    `value` replaces the overlaps; `whole` makes classes integers.
    """
    found = yolox_head.head(scene, extreme=extreme)
    mask, rows = yolox_head.assignment(scene, found)
    if foreground != "followers":
        mask[...] = foreground == "all"
    classes = np.zeros(mask.shape)
    for image, labels in enumerate(scene.labels):
        if len(labels):
            classes[image] = labels[rows[image]]
    overlaps = yolox_head.overlaps(scene, found, rows) if value is None else np.full(mask.shape, value)
    outputs = torch.from_numpy(np.concatenate([found.boxes, found.rows[..., 4:]], axis=2)).to(DTYPES[dtype])
    tags = common_tags(scene, dtype) | {f"foreground-{foreground}"} | ({"extreme"} if extreme else set())
    places = {"logits": outputs[..., 4:]}
    if spoil(scene.prediction, scene.seed, found.aims, places):
        tags.add("non-finite")
    value_dtype = value_dtype or dtype
    if value_dtype != dtype:
        tags.add("mixed-dtype")
    class_kind = torch.int64 if whole else DTYPES[value_dtype]
    tensors = {
        "outputs": outputs,
        "fg_mask": torch.from_numpy(mask),
        "matched_classes": torch.from_numpy(classes).to(class_kind),
        "matched_iou": torch.from_numpy(overlaps).to(DTYPES[value_dtype]),
    }
    settings = {"num_classes": scene.num_classes, "autocast": autocast}
    return Case("yolox_bce", tensors, settings, origin, frozenset(tags))


def _class_beyond(tensors: dict[str, Tensor], settings: dict[str, Any]) -> bool:
    return _class(tensors, settings["num_classes"])


def _class_below(tensors: dict[str, Tensor], _: dict[str, Any]) -> bool:
    return _class(tensors, -1)


def _class(tensors: dict[str, Tensor], label: int) -> bool:
    tensors["matched_classes"][tensors["fg_mask"]] = label
    return bool(tensors["fg_mask"].any())


def _missing_channel(tensors: dict[str, Tensor], settings: dict[str, Any]) -> bool:
    settings["num_classes"] += 1
    return bool(tensors["fg_mask"].any())


FLAWS = (
    Flaw("class-beyond-classes", "no one-hot code for the class", _class_beyond),
    Flaw("class-below-zero", "no one-hot code for the class", _class_below),
    Flaw("missing-channel", "targets of more classes than there are logits", _missing_channel),
)


def pinned_cases() -> Iterator[tuple[str, Case]]:
    """The assignment of the worked example of simota.md, section 5.1, and edges of yolox_losses.md, section 3.8."""

    def case(tags: set[str], anchors: Sequence[int] = (5, 19), values: Sequence[float] = (0.168707, 0.652423)) -> Case:
        mask, classes, overlaps = torch.zeros(1, 20, dtype=torch.bool), torch.zeros(1, 20), torch.zeros(1, 20)
        mask[0, anchors], classes[0, anchors[:1]] = True, 1.0
        overlaps[0, anchors] = torch.tensor(values)
        tensors = {
            "outputs": wave_rows().float(),
            "fg_mask": mask,
            "matched_classes": classes,
            "matched_iou": overlaps,
        }
        settings = {"num_classes": 2, "autocast": None}
        return Case("yolox_bce", tensors, settings, "pinned", frozenset({"float32", *tags}))

    yield "worked-example", case({"worked-example"})
    yield "no-foreground", case({"foreground-none"}, (), ())
    yield "all-foreground", case({"foreground-all"}, range(20), [a / 20 for a in range(20)])
    yield "perfect-overlap", case(set(), (5, 19), (1.0, 1.0))
    infinite = case({"non-finite"})
    infinite.tensors["outputs"][0, 0, 4] = torch.inf
    yield "infinite-objectness-of-a-negative", infinite
