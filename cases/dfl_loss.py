"""Cases of the distribution focal loss: logits over bins, and real-valued distances."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from cases.anchor_targets import anchor_targets
from cases.boxes import drawn
from cases.case import DTYPES, Case
from cases.flaws import Flaw, perhaps
from cases.labels import LabelImage
from cases.patterns import pattern
from cases.scenes import scene_from_labels

#: Change it whenever the same draws give another case.
STRATEGY_VERSION = 1

_BINS = (16, 16, 16, 2, 3, 6, 8, 33)
_ROWS = (0, *range(1, 13), *range(1, 13), 60)
#: How logits are spread: those of a network mostly; equal ones; ones that saturate; ones that overflow a half exp.
_LOGITS = {"network": 2.0, "equal": 0.0, "saturated": 30.0, "extreme": 1e4}
_LOGIT_KINDS = ("network",) * 6 + ("equal", "saturated", "extreme")
_DISTANCES = ("inside", "inside", "inside", "whole", "edges", "beyond")
_SPOILED = ("",) * 18 + ("nan", "inf")
_MINUS_INF = (False,) * 29 + (True,)
_EDGES = np.array([0.0, 1e-7, 1.0, 1 - 1e-7])


@st.composite
def cases(draw: st.DrawFn, *, dtypes: Sequence[str] = ("float32",)) -> Case:
    """Draw a case in one of `dtypes`; half logits stand beside float32 distances, as in training, mostly."""
    pick = drawn(draw)
    dtype = pick.choice(dtypes)
    rows, bins = pick.choice(_ROWS), pick.choice(_BINS)
    logits, distances = pick.choice(_LOGIT_KINDS), pick.choice(_DISTANCES)
    if dtype == "float64" and logits == "saturated":
        # Upstream's own releases part in the last digits that 1 - p has left: until 8.4.112 they summed two entropies.
        logits = "network"
    mixed = dtype in ("float16", "bfloat16") and pick.choice((True, True, False))
    spoiled, seed = pick.choice(_SPOILED), pick.integer(0, 2**16 - 1)
    rng = np.random.default_rng(seed)
    values = _LOGITS[logits] * rng.standard_normal((4 * rows, bins))
    target = _distances(rng, distances, rows, bins)
    tags = {f"logits-{logits}", f"distances-{distances}", f"bins-{bins}"}
    tags |= {"empty"} if not rows else set()
    # Upstream rejects some distances that are bfloat16: one reason at a time.
    spoilable = rows and (dtype != "bfloat16" or mixed)
    if spoilable and spoiled:
        values[rng.integers(4 * rows), rng.integers(bins)] = np.nan if spoiled == "nan" else np.inf
        tags |= {"non-finite", spoiled}
    if pick.choice(_MINUS_INF) and spoilable:
        values[rng.integers(4 * rows), rng.integers(bins)] = -np.inf
        tags |= {"non-finite", "minus-infinite"}
    case = build(values, target, dtype, mixed, f"drawn:dfl_loss/{STRATEGY_VERSION}", tags)
    return perhaps(pick, FLAWS, case)


def from_labels(images: Sequence[LabelImage], stage: str, seed: int, dtype: str = "float32") -> Case:
    """The case of the foreground anchors of labelled `images`, 16 bins, logits around the distances."""
    scene = scene_from_labels(images, stage, seed)
    targets = anchor_targets(scene)
    image, anchor = targets.foreground.nonzero()
    points, strides = scene.frame.points[anchor], scene.frame.cells[anchor, 2:]
    box = targets.boxes[image, anchor]
    target = np.concatenate([points - box[:, :2], box[:, 2:] - points], axis=1) / strides
    rng = np.random.default_rng([seed, 2])
    spread = np.abs(np.arange(16) - target.clip(0, 15).reshape(-1, 1))
    values = -spread + 0.5 * rng.standard_normal(spread.shape)
    origin = f"labels:{images[0].name}+{len(images) - 1}/{stage}/{seed}"
    return build(values, target, dtype, dtype in ("float16", "bfloat16"), origin, {"labelled", *scene.tags})


def allows(case: Case) -> bool:
    """Whether `cases` could have drawn `case`."""
    return True


def build(logits: np.ndarray, target: np.ndarray, dtype: str, mixed: bool, origin: str, tags: set[str]) -> Case:
    """The case of `logits` (4 N, R) and distances (N, 4); `mixed` keeps the distances in float32."""
    wide = torch.float32 if mixed else DTYPES[dtype]
    tensors = {"pred_dist": torch.from_numpy(logits).to(DTYPES[dtype]), "target": torch.from_numpy(target).to(wide)}
    tags = {*tags, dtype} | ({"mixed-dtype"} if mixed else set())
    return Case("dfl_loss", tensors, {}, origin, frozenset(tags))


def _distances(rng: np.random.Generator, kind: str, rows: int, bins: int) -> np.ndarray:
    last = bins - 1
    if kind == "inside":
        return rng.uniform(0, last, (rows, 4))
    if kind == "whole":
        return rng.integers(0, bins, (rows, 4)).astype(np.float64)
    if kind == "edges":
        bounds = np.array([last - 0.01, last - 0.01 - 1e-6, last, last - 1.0])
        return rng.choice(np.concatenate([_EDGES, bounds]), (rows, 4))
    return rng.uniform(-bins, 2 * bins, (rows, 4)) * rng.choice([1.0, 1e6], (rows, 4), p=[0.9, 0.1])


def _nan_target(tensors: dict[str, Tensor], _: dict[str, Any]) -> bool:
    tensors["target"][:1, 2] = torch.nan
    return len(tensors["target"]) > 0


def _row_missing(tensors: dict[str, Tensor], _: dict[str, Any]) -> bool:
    tensors["pred_dist"] = tensors["pred_dist"][:-1]
    return len(tensors["target"]) > 0


def _single_bin(tensors: dict[str, Tensor], _: dict[str, Any]) -> bool:
    tensors["pred_dist"] = tensors["pred_dist"][:, :1]
    return len(tensors["target"]) > 0


FLAWS = (
    Flaw("nan-target", "there is no bin beside it", _nan_target),
    Flaw("row-missing", "one row of logits a distance", _row_missing),
    Flaw("single-bin", "a distance lies between two bins", _single_bin),
)


def pinned_cases() -> Iterator[tuple[str, Case]]:
    """The worked example of yolo_losses.md, section 2.3, and the edge cases of its list, by name."""

    def case(tags: set[str], logits: Tensor, target: Tensor) -> Case:
        tensors = {"pred_dist": logits, "target": target}
        dtype = str(logits.dtype).removeprefix("torch.")
        return Case("dfl_loss", tensors, {}, "pinned", frozenset({dtype, *tags}))

    logits = pattern((8, 6), 1.5, 0.8, 0.2)
    target = torch.tensor([[0, 0.25, 1, 4.5], [4.99, 5, 7, -1]])
    yield "worked-example", case({"worked-example"}, logits, target)
    yield "empty", case({"empty"}, logits[:0], target[:0])
    yield "two-bins", case({"bins-2"}, pattern((8, 2), 1.5, 0.8, 0.2), target)
    yield "infinite-target", case({"infinite-target"}, logits, target + torch.tensor([torch.inf, 0, 0, -torch.inf]))
    yield "float16", case(set(), logits.half(), target.half())
    # R - 1.01 rounds to R - 1, and upstream looks for the bin R.
    bound = {"divergence:dfl-bfloat16-bound"}
    yield "bfloat16-at-the-bound", case(bound, logits.bfloat16(), target.bfloat16())
    for name, value in (("plus-infinite", torch.inf), ("minus-infinite", -torch.inf), ("nan", torch.nan), ("1e4", 1e4)):
        for place in ("used", "unused"):
            spoiled = logits.clone()
            spoiled[1, 0 if place == "used" else 4] = value
            tags = {"logits-extreme"} if name == "1e4" else {"non-finite"}
            yield f"{name}-logit-{place}", case(tags, spoiled, target)
