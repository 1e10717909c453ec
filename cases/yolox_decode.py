"""Cases of decoding YOLOX's raw maps: levels of drawn scenes, extreme sizes, and maps that upstream rejects."""

from collections.abc import Iterator, Sequence
from typing import Any

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
from cases.yolox_head import WAVE_FRAME, wave_rows

#: Change it whenever the same draws give another case.
STRATEGY_VERSION = 1

_RARELY = (False,) * 9 + (True,)
#: Raw sizes whose exponential leaves float16, float32, or underflows.
_SIZES = (11.0, 90.0, -20.0, -200.0)


@st.composite
def cases(draw: st.DrawFn, *, dtypes: Sequence[str] = ("float32",)) -> Case:
    """Draw a case in one of `dtypes`."""
    pick = drawn(draw)
    dtype = pick.choice(dtypes)
    scene = draw_scene(pick, dtype=dtype, empty_batch=True)
    size = pick.choice(_SIZES) if pick.choice(_RARELY) else 0.0
    layout = pick.choice(("contiguous", "contiguous", "channels-last"))
    case = build(scene, dtype, f"drawn:yolox_decode/{STRATEGY_VERSION}", size, layout)
    return perhaps(pick, FLAWS, case)


def from_labels(images: Sequence[LabelImage], stage: str, seed: int, dtype: str = "float32") -> Case:
    """The case of a batch of labelled `images` at training stage `stage`."""
    scene = scene_from_labels(images, stage, seed)
    return build(scene, dtype, f"labels:{images[0].name}+{len(images) - 1}/{stage}/{seed}")


def allows(_: Case) -> bool:
    """Whether `cases` could have drawn the case: there are no options, so it could."""
    return True


def build(scene: Scene, dtype: str, origin: str, size: float = 0.0, layout: str = "contiguous") -> Case:
    """The case of `scene` in `dtype`; `size` other than 0 is the raw width of a few anchors."""
    found = yolox_head.head(scene)
    if size:
        found.rows[:, ::3, 2] = size
    rows = torch.from_numpy(found.rows).to(DTYPES[dtype])
    tags = common_tags(scene, dtype) | {layout} | ({"extreme"} if size else set())
    if spoil(scene.prediction, scene.seed, found.aims, {"rows": rows}):
        tags.add("non-finite")
    maps = yolox_head.maps(rows, scene.frame)
    if layout == "channels-last":
        maps = {name: raw.to(memory_format=torch.channels_last) for name, raw in maps.items()}
    return Case("yolox_decode", maps, {"strides": list(scene.frame.strides)}, origin, frozenset(tags))


def _another_batch(tensors: dict[str, Tensor], _: dict[str, Any]) -> bool:
    if len(tensors) == 1 or not len(tensors["raw0"]):
        return False
    tensors["raw1"] = torch.cat([tensors["raw1"], tensors["raw1"]])
    return True


FLAWS = (Flaw("another-batch", "levels of different numbers of images", _another_batch),)


def pinned_cases() -> Iterator[tuple[str, Case]]:
    """The worked example of simota.md, section 5, and a map with more columns than bfloat16 tells apart."""

    def case(rows: Tensor, tags: set[str]) -> Case:
        settings = {"strides": list(WAVE_FRAME.strides)}
        return Case("yolox_decode", yolox_head.maps(rows, WAVE_FRAME), settings, "pinned", frozenset(tags))

    yield "worked-example", case(wave_rows(2).float(), {"float32", "worked-example"})
    wide = torch.zeros(1, 6, 1, 300, dtype=torch.bfloat16)
    yield (
        "columns-of-bfloat16",
        Case("yolox_decode", {"raw0": wide}, {"strides": [8]}, "pinned", frozenset({"bfloat16"})),
    )
    overflow = wave_rows().half()
    overflow[0, 5, 2] = 11.0
    yield "overflow-of-float16", case(overflow, {"float16", "extreme"})
