"""What losses of single elements are tried on: logits, labels in {0, 1} and soft values, all (B, N, C) float64."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from cases.boxes import Picker
from cases.labels import LabelImage
from cases.predictions import query_predictions
from cases.scenes import scene_from_labels

_QUERIES = 300
#: How logits are spread: a network's mostly; equal; saturated; beyond what a half number holds after an exponential.
_SPREADS = {"network": 2.0, "wide": 5.0, "equal": 0.0, "saturated": 12.0, "extreme": 1.0}
#: Beyond 16 upstream's 1 - p has no digits that a float32 result could be held against, not even in float64; far
#: beyond, all of them are 0 or 1.
_LARGEST, _EXTREME = 16.0, 1e4
_KINDS = ("network",) * 6 + ("wide", "wide", "equal", "saturated", "extreme")
_SPOILED = ("",) * 27 + ("nan", "inf", "minus-inf")
_POSITIVES = (0.1, 0.1, 0.5, 0.0, 1.0)


@dataclass(frozen=True)
class Elements:
    """`logits`, `label` (0 or 1) and `value` in [0, 1], of one shape, float64; `tags` say what is in them."""

    logits: Tensor
    label: Tensor
    value: Tensor
    tags: frozenset[str]


def draw_elements(pick: Picker) -> Elements:
    """Draw a small shape, and numbers from a drawn seed."""
    shape = (pick.choice((1, 2, 3, 1, 2, 3, 0)), pick.choice((*range(1, 16), 40, 0)), pick.integer(1, 8))
    kind, positives, spoiled = pick.choice(_KINDS), pick.choice(_POSITIVES), pick.choice(_SPOILED)
    rng = np.random.default_rng(pick.integer(0, 2**16 - 1))
    logits = (_SPREADS[kind] * rng.standard_normal(shape)).clip(-_LARGEST, _LARGEST)
    if kind == "extreme":
        logits = np.sign(logits) * _EXTREME
    label = rng.random(shape) < positives
    value = rng.choice([0.0, 1.0, 0.5, np.nan], shape, p=[0.1, 0.2, 0.1, 0.6])
    value = np.where(np.isnan(value), rng.random(shape), value)
    tags = {f"logits-{kind}", f"positives-{positives:g}"}
    if kind == "saturated":
        # Rightly answered: what is left of the loss is tiny.
        logits = np.where(label, np.abs(logits), -np.abs(logits))
    if not logits.size:
        tags.add("empty")
    elif spoiled:
        place = tuple(rng.integers(0, shape))
        logits[place] = {"nan": np.nan, "inf": np.inf, "minus-inf": -np.inf}[spoiled]
        tags |= {"non-finite", spoiled}
    return Elements(*map(torch.from_numpy, (logits, label.astype(np.float64), value)), frozenset(tags))


def from_labels(images: Sequence[LabelImage], stage: str, seed: int) -> Elements:
    """300 queries an image at training stage `stage`; one that follows a ground truth is a positive of its class."""
    scene = scene_from_labels(images, stage, seed)
    found = query_predictions(stage, seed, scene.frame, scene.boxes, scene.class_indices, scene.num_classes, _QUERIES)
    label = np.zeros(found.logits.shape)
    for image, classes in enumerate(scene.class_indices):
        followers = np.flatnonzero(found.aims[image] >= 0)
        label[image, followers, classes[found.aims[image, followers]]] = 1
    value = label * np.random.default_rng([seed, 6]).random(label.shape)
    return Elements(*map(torch.from_numpy, (found.logits, label, value)), frozenset({"labelled", *scene.tags}))
