"""Cases of YOLOX's IoU loss: pairs of boxes of every kind, matched pairs of labelled images, shapes that do not fit."""

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
_COUNTS = (0, *range(1, 13), *range(1, 13), 64, 200)


@st.composite
def cases(draw: st.DrawFn, *, dtypes: Sequence[str] = ("float32",)) -> Case:
    """Draw a case in one of `dtypes`."""
    pick = drawn(draw)
    dtype = pick.choice(dtypes)
    seed, count = pick.integer(0, 2**16 - 1), pick.choice(_COUNTS)
    # Areas of float16 overflow from 256 pixels on.
    size = pick.choice((20.0, 20.0, 60.0, 1.0, 0.01) if dtype == "float16" else (20.0, 60.0, 400.0, 1.0, 1e-3))
    size = 400.0 if pick.choice(_RARELY) else size
    first, second, kinds = pairs(seed, count, size=size, whole=size > 1 and pick.choice((False, True)))
    if dtype == "float16":
        # A hull without area has slopes of 1e16, which no float16 holds: infinity, NaN upstream.
        flat = ((first[:, 2:] == 0) & (second[:, 2:] == 0)).sum(1) == 1
        second[flat, 2:] = np.maximum(second[flat, 2:], size / 4)
    target = pick.choice((dtype, dtype, dtype, "float32" if dtype != "float64" else dtype))
    settings = {
        "reduction": pick.choice(("none", "none", "sum", "mean", "whatever")),
        "loss_type": pick.choice(("iou", "giou")),
        "autocast": yolox_head.autocast(pick, dtype),
    }
    case = build(first, second, dtype, settings, f"drawn:iou_loss/{STRATEGY_VERSION}", target, kinds)
    if pick.choice(_RARELY) and count:
        case.tensors["pred"][seed % count, seed % 4] = pick.choice((torch.nan, torch.inf))
        case = Case(case.operation, case.tensors, settings, case.origin, case.tags | {"non-finite"})
    if count and count % 2 == 0 and pick.choice((False, False, False, True)):
        case.tensors.update({name: tensor.view(count // 2, 2, 4) for name, tensor in case.tensors.items()})
    return perhaps(pick, FLAWS, case)


def from_labels(images: Sequence[LabelImage], stage: str, seed: int, dtype: str = "float32") -> Case:
    """The matched pairs of a batch of labelled `images`: a few anchors a ground truth, as the head's loss has them."""
    scene = scene_from_labels(images, stage, seed)
    found = yolox_head.head(scene)
    mask, rows = yolox_head.assignment(scene, found)
    truths = [centre_form(boxes)[rows[image][mask[image]]] for image, boxes in enumerate(scene.boxes) if len(boxes)]
    settings = {"reduction": "none", "loss_type": "iou", "autocast": None}
    origin = f"labels:{images[0].name}+{len(images) - 1}/{stage}/{seed}"
    return build(found.boxes[mask], np.concatenate(truths), dtype, settings, origin)


def allows(_: Case) -> bool:
    """Whether `cases` could have drawn the case: there are no options, so it could."""
    return True


def build(
    pred: np.ndarray,
    target: np.ndarray,
    dtype: str,
    settings: dict[str, Any],
    origin: str,
    target_dtype: str = "",
    kinds: set[str] = frozenset(),
) -> Case:
    """The case of boxes (P, 4) in centre form."""
    tags = {dtype, *kinds, f"loss-{settings['loss_type']}", f"reduction-{settings['reduction']}"}
    if not len(pred):
        tags.add("empty")
    if target_dtype not in ("", dtype):
        tags.add("mixed-dtype")
    tensors = {
        "pred": torch.from_numpy(pred).to(DTYPES[dtype]),
        "target": torch.from_numpy(target).to(DTYPES[target_dtype or dtype]),
    }
    return Case("iou_loss", tensors, settings, origin, frozenset(tags))


def _one_target_less(tensors: dict[str, Tensor], _: dict[str, Any]) -> bool:
    tensors["target"] = tensors["target"][1:]
    return len(tensors["pred"]) > 0


def _unknown_type(_: dict[str, Tensor], settings: dict[str, Any]) -> bool:
    settings["loss_type"] = "diou"
    return True


FLAWS = (
    Flaw("one-target-less", "boxes without a partner", _one_target_less),
    Flaw("unknown-type", "no such loss", _unknown_type),
)

WORKED = (
    ((10, 10, 8, 6), (20, 14, 10, 10), (40, 40, 4, 4), (5, 5, 2, 2)),
    ((11, 9, 6, 8), (20, 14, 10, 10), (30, 30, 6, 6), (5, 5, 8, 8)),
)
#: The table of yolox_losses.md, section 2: prediction and target.
EDGES = {
    "zero-area-same-place": ((5, 5, 0, 0), (5, 5, 0, 0)),
    "zero-area-apart": ((5, 5, 0, 0), (9, 9, 0, 0)),
    "zero-area-inside": ((5, 5, 0, 0), (5, 5, 4, 4)),
    "touching": ((2, 2, 4, 4), (6, 2, 4, 4)),
    "negative-width": ((5, 5, -2, 2), (5, 5, 4, 4)),
    "infinite-width": ((5, 5, torch.inf, 4), (5, 5, 4, 4)),
    "nan": ((5, torch.nan, 4, 4), (5, 5, 4, 4)),
}


def pinned_cases() -> Iterator[tuple[str, Case]]:
    """The worked example and the edge table of yolox_losses.md, section 2."""

    def case(pred: Any, target: Any, loss: str, dtype: str, *tags: str, reduction: str = "none") -> Case:
        boxes = (np.array(side, dtype=np.float64).reshape(-1, 4) for side in (pred, target))
        settings = {"reduction": reduction, "loss_type": loss, "autocast": None}
        return build(*boxes, dtype, settings, "pinned", kinds=set(tags))

    for loss in ("iou", "giou"):
        yield f"{loss}-worked-example", case(*WORKED, loss, "float32", "worked-example")
        for name, pair in EDGES.items():
            tags = {"non-finite"} if name in ("infinite-width", "nan") else set()
            yield f"{loss}-{name}", case(*pair, loss, "float32", *tags)
        half = "divergence:iou-loss-float16"
        yield f"{loss}-zero-area-float16", case(*EDGES["zero-area-same-place"], loss, "float16", half)
        yield f"{loss}-large-float16", case((300, 300, 300, 300), (300, 300, 300, 300), loss, "float16", half)
        for reduction in ("sum", "mean"):
            yield f"{loss}-empty-{reduction}", case((), (), loss, "float32", "empty", reduction=reduction)
