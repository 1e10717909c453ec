"""Cases of the class term of detection criteria: logits of every anchor, and at most one soft target each."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from cases.anchor_targets import FOREGROUNDS, anchor_targets
from cases.boxes import drawn
from cases.case import DTYPES, Case
from cases.flaws import Flaw, perhaps
from cases.labels import LabelImage
from cases.patterns import pattern
from cases.predictions import anchor_predictions, spoil
from cases.scenes import Scene, common_tags, draw_scene, scene_from_labels

#: Change it whenever the same draws give another case.
STRATEGY_VERSION = 1

_RARELY = (False,) * 19 + (True,)
#: A divisor as the trainers have it, and what else may be handed over.
_NORMALISERS = ("floored", "floored", "sum", "one")
_EXTREME = 1e4
#: Saturated logits are 12 here, not 30: upstream's sum of 1e-13 has no digits, not even in float64.
_SATURATED = 0.4


@st.composite
def cases(draw: st.DrawFn, *, dtypes: Sequence[str] = ("float32",)) -> Case:
    """Draw a case in one of `dtypes`; a half dtype is that of the logits, and of the targets now and then."""
    pick = drawn(draw)
    dtype = pick.choice(dtypes)
    scene = draw_scene(pick, dtype=dtype, empty_batch=True)
    mixed = dtype in ("float16", "bfloat16") and pick.choice((True, True, False))
    choices = pick.choice(FOREGROUNDS), pick.choice(_NORMALISERS), mixed
    extreme = pick.choice(_RARELY)
    case = build(scene, dtype, *choices, f"drawn:class_bce/{STRATEGY_VERSION}", extreme=extreme)
    return perhaps(pick, FLAWS, case)


def from_labels(images: Sequence[LabelImage], stage: str, seed: int, dtype: str = "float32") -> Case:
    """The case of a batch of labelled `images` at training stage `stage`."""
    scene = scene_from_labels(images, stage, seed)
    origin = f"labels:{images[0].name}+{len(images) - 1}/{stage}/{seed}"
    return build(scene, dtype, "assigned", "floored", dtype in ("float16", "bfloat16"), origin)


def allows(case: Case) -> bool:
    """Whether `cases` could have drawn `case`."""
    return True


def build(
    scene: Scene,
    dtype: str,
    foreground: str,
    normaliser: str,
    mixed: bool,
    origin: str,
    *,
    extreme: bool = False,
) -> Case:
    """The case of `scene`; `mixed` keeps targets in float32, as training in half precision does."""
    frame = scene.frame
    found = anchor_predictions(scene.prediction, scene.seed, frame, scene.boxes, scene.class_indices, scene.num_classes)
    targets = anchor_targets(scene, foreground)
    wide = torch.float32 if mixed else DTYPES[dtype]
    logits = found.logits * (_SATURATED if scene.prediction == "saturated" else 1)
    scores = torch.from_numpy(logits).to(DTYPES[dtype])
    if extreme and scores.numel():
        rng = np.random.default_rng([scene.seed, 3])
        places = torch.from_numpy(rng.integers(0, scores.numel(), 3))
        scores.view(-1)[places] = torch.from_numpy(rng.choice([-_EXTREME, _EXTREME], 3)).to(scores.dtype)
    values = torch.from_numpy(targets.values).to(wide)
    total = values.sum()
    divisors = {"floored": total.clamp(min=1), "sum": total.clamp(min=1e-3), "one": torch.ones_like(total)}
    tags = common_tags(scene, dtype) | {f"foreground-{foreground}", f"normaliser-{normaliser}"}
    tags |= {"mixed-dtype"} if mixed else set()
    tags |= {"extreme"} if extreme else set()
    tags |= {"one-class"} if scene.num_classes == 1 else set()
    if spoil(scene.prediction, scene.seed, found.aims, {"scores": scores}):
        tags.add("non-finite")
    tensors = {
        "scores": scores,
        "labels": torch.from_numpy(targets.labels),
        "values": values,
        "normaliser": divisors[normaliser],
    }
    return Case("class_bce", tensors, {}, origin, frozenset(tags))


def _label_beyond_classes(tensors: dict[str, Tensor], _: dict[str, Any]) -> bool:
    places = (tensors["values"] > 0).nonzero()
    if not len(places):
        return False
    tensors["labels"][tuple(places[0])] = tensors["scores"].shape[2]
    return True


FLAWS = (Flaw("label-beyond-classes", "the logit of a class that does not exist", _label_beyond_classes),)


def pinned_cases() -> Iterator[tuple[str, Case]]:
    """Infinite, extreme and saturated logits of section 0 of yolo_losses.md, and sizes 0 and 1, by name."""

    def case(tags: set[str], scores: Tensor, labels: Tensor, values: Tensor, normaliser: float = 1.0) -> Case:
        tensors = {"scores": scores, "labels": labels, "values": values, "normaliser": torch.tensor(normaliser)}
        return Case("class_bce", tensors, {}, "pinned", frozenset({"float32", *tags}))

    labels = torch.tensor([[0, 1, 2, 0, 1], [2, 2, 0, 1, 0]])
    values = torch.tensor([[0.5, 0, 1, 0, 0.25], [0, 0, 0, 0.9, 1.0]])
    scores = pattern((2, 5, 3), 2, 0.9, 0.1)
    yield "pattern", case(set(), scores, labels, values, 3.65)
    yield "no-anchor", case(set(), scores[:, :0], labels[:, :0], values[:, :0])
    yield "no-image", case(set(), scores[:0], labels[:0], values[:0])
    yield "no-foreground", case(set(), scores, labels, values * 0)
    yield "normaliser-below-one", case(set(), scores, labels, values, 0.125)
    # Only the anchors' own classes are left, rightly answered: all that is summed is tiny.
    yield (
        "saturated-right",
        case({"saturated"}, torch.full((1, 4, 1), 20.0), labels[:1, :4] * 0, values[:1, :4] * 0 + 1),
    )
    yield "saturated-wrong", case({"saturated"}, torch.full((1, 4, 1), -20.0), labels[:1, :4] * 0, torch.ones(1, 4))
    for name, logit in (("extreme", 1e4), ("extreme-negative", -1e4), ("infinite", torch.inf), ("nan", torch.nan)):
        for target in (0.0, 0.5, 1.0):
            spoiled = scores.clone()
            spoiled[0, 2, 2] = logit
            tags = {name} if abs(logit) == 1e4 else {name, "non-finite"}
            changed = values.clone()
            changed[0, 2] = target
            yield f"{name}-target-{target:g}", case(tags, spoiled, labels, changed)
    # A class that is ruled out costs nothing; upstream: NaN.
    spoiled = scores.clone()
    spoiled[1, 0, 0] = -torch.inf
    yield "minus-infinite", case({"non-finite", "divergence:class-bce-minus-infinity"}, spoiled, labels, values)
