"""Cases of the expectation decode: logits over the bins of each side, and the points they belong to."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from cases import detection
from cases.boxes import drawn
from cases.case import DTYPES, Case
from cases.flaws import Flaw, perhaps
from cases.labels import LabelImage
from cases.scenes import scene_from_labels

#: Change it whenever the same draws give another case.
STRATEGY_VERSION = 1

_BINS = (16, 16, 16, 16, 4, 2, 3, 8, 33, 1)
_COUNTS = (*range(1, 13), *range(1, 13), 40, 0)
#: How logits are spread: those of a network mostly; equal ones; ones that saturate; ones that overflow a half exp.
_LOGITS = {"network": 2.0, "equal": 0.0, "saturated": 30.0, "extreme": 1e4}
_LOGIT_KINDS = ("network",) * 6 + ("equal", "saturated", "extreme")
_SPOILED = ("",) * 24 + ("nan", "inf", "minus-inf", "side-of-minus-inf")


@st.composite
def cases(draw: st.DrawFn, *, dtypes: Sequence[str] = ("float32",)) -> Case:
    """Draw a case in one of `dtypes`; half logits stand beside float32 points now and then."""
    pick = drawn(draw)
    dtype, bins = pick.choice(dtypes), pick.choice(_BINS)
    batch, count = pick.choice((1, 2, 3, 1, 2, 3, 0)), pick.choice(_COUNTS)
    kind, spoiled = pick.choice(_LOGIT_KINDS), pick.choice(_SPOILED)
    points = pick.choice((dtype, dtype, "float32")) if dtype != "float64" else dtype
    rng = np.random.default_rng(pick.integer(0, 2**16 - 1))
    logits = _LOGITS[kind] * rng.standard_normal((batch, count, 4, bins))
    tags = {f"logits-{kind}"}
    if spoiled and logits.size:
        place = tuple(rng.integers(0, logits.shape))
        logits[place[:3] if spoiled.startswith("side") else place] = {"nan": np.nan, "inf": np.inf}.get(
            spoiled, -np.inf
        )
        tags |= {"non-finite", spoiled}
    shared = pick.choice((True, True, False))
    anchors = rng.integers(0, 80, (count, 2) if shared else (batch, count, 2)) + 0.5
    case = build(logits, anchors, dtype, f"drawn:dfl_decode/{STRATEGY_VERSION}", points, tags)
    return perhaps(pick, FLAWS, case)


def from_labels(images: Sequence[LabelImage], stage: str, seed: int, dtype: str = "float32") -> Case:
    """The head's box channels for a batch of labelled `images`, 16 bins."""
    scene = scene_from_labels(images, stage, seed)
    logits = detection.head(scene, seed, 16, "float64").boxes.mT.numpy()
    points = scene.frame.points / scene.frame.cells[:, 2:]
    origin = f"labels:{images[0].name}+{len(images) - 1}/{stage}/{seed}"
    return build(logits.reshape(*logits.shape[:2], 4, 16), points, dtype, origin, tags={"labelled", *scene.tags})


def allows(case: Case) -> bool:
    """Whether `cases` could have drawn `case`: there are no options, so it could."""
    return True


def build(
    logits: np.ndarray,
    points: np.ndarray,
    dtype: str,
    origin: str,
    points_dtype: str = "",
    tags: set[str] = frozenset(),
) -> Case:
    """The case of logits (B, N, 4, R) and points (N, 2) or (B, N, 2)."""
    tensors = {
        "logits": torch.from_numpy(logits).to(DTYPES[dtype]).flatten(2).contiguous(),
        "anchor_points": torch.from_numpy(points).to(DTYPES[points_dtype or dtype]),
    }
    tags = {*tags, dtype, f"bins-{logits.shape[3]}"} | (set() if logits.size else {"empty"})
    if points_dtype not in ("", dtype):
        tags.add("mixed-dtype")
    return Case("dfl_decode", tensors, {}, origin, frozenset(tags))


def _points_missing(tensors: dict[str, Tensor], _: dict[str, Any]) -> bool:
    points = tensors["anchor_points"]
    tensors["anchor_points"] = points[..., 1:, :]
    return points.shape[-2] > 2 and tensors["logits"].numel() > 0


def _half_a_side(tensors: dict[str, Tensor], _: dict[str, Any]) -> bool:
    logits = tensors["logits"]
    tensors["logits"] = logits[..., :-1]
    return logits.numel() > 0 and logits.shape[-1] > 4


FLAWS = (
    Flaw("points-missing", "distances from nowhere", _points_missing),
    Flaw("half-a-side", "sides of as many bins", _half_a_side),
)


def pinned_cases() -> Iterator[tuple[str, Case]]:
    """The worked example of boxes.md, section 6, and its edge cases."""
    example = [[0, 1, 0, 0], [2, 0, 0, 0], [0, 0, 0, 3], [0, 0, 0, 0]]

    def case(changes: dict[tuple[int, ...], float], *tags: str, dtype: str = "float32", points_dtype: str = "") -> Case:
        logits = np.array(example, dtype=np.float64)
        for place, value in changes.items():
            logits[place] = value
        return build(logits[None, None], np.array([[2.5, 3.5]]), dtype, "pinned", points_dtype, set(tags))

    for dtype in DTYPES:
        yield f"worked-example-{dtype}", case({}, "worked-example", dtype=dtype)
    yield "half-logits", case({}, "worked-example", dtype="float16", points_dtype="float32")
    for name, value in (("plus-infinite", np.inf), ("minus-infinite", -np.inf), ("nan", np.nan)):
        yield f"{name}-logit", case({(0, 2): value}, "non-finite")
    yield "minus-infinite-side", case({(1,): -np.inf}, "non-finite")
    yield "extreme-logits", case({(0, 0): 1e4, (1, 3): -1e4, (2,): 1e4}, "logits-extreme")
    one_bin = np.array([1, -2, 0.5, 30]).reshape(1, 1, 4, 1)
    yield "one-bin", build(one_bin, np.array([[2.5, 3.5]]), "float32", "pinned", tags={"bins-1"})
    yield "no-anchors", build(np.zeros((2, 0, 4, 16)), np.zeros((0, 2)), "float32", "pinned")
