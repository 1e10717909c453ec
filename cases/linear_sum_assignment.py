"""Cases of linear assignment in batches: rectangles of every form, ties, and the costs of a set loss's layers."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

from cases import hungarian
from cases.boxes import drawn
from cases.case import DTYPES, Case
from cases.labels import LabelImage
from cases.predictions import STAGES

#: Change it whenever the same draws give another case.
STRATEGY_VERSION = 1
#: Decoder layers that a set loss matches at once.
LAYERS = 6
KINDS = ("uniform", "normal", "integers", "equal", "nearly-equal", "large", "one-cheap-column", "detr")


@st.composite
def cases(draw: st.DrawFn, *, dtypes: Sequence[str] = ("float32",)) -> Case:
    """Draw a case in one of `dtypes`; costs of a half dtype are its numbers, stored in float32."""
    pick = drawn(draw)
    dtype, kind = pick.choice(dtypes), pick.choice(KINDS)
    problems = pick.choice((0, 1, 1, 2, 3, 5))
    rows, columns = (pick.choice((0, 1, *range(1, 12), *range(1, 12), 33)) for _ in range(2))
    ragged = pick.choice((False, True))
    seed = pick.integer(0, 2**16 - 1)
    rng = np.random.default_rng(seed)
    whole = [[rows, columns]] * problems
    sizes = [[int(rng.integers(0, side + 1)) for side in pair] for pair in whole] if ragged else whole
    cost = torch.from_numpy(_costs(rng, kind, (problems, rows, columns))).to(DTYPES[dtype])
    tags = {dtype, kind} | ({"ragged"} if ragged else set())
    return build(cost, sizes, f"drawn:linear_sum_assignment/{STRATEGY_VERSION}", tags)


def _costs(rng: np.random.Generator, kind: str, shape: tuple[int, int, int]) -> np.ndarray:
    """(P, T, Q) float64 costs of a kind."""
    uniform = rng.random(shape)
    if kind == "normal":
        return rng.normal(size=shape)
    if kind == "integers":
        return np.floor(uniform * 4) - 1
    if kind == "equal":
        return np.full(shape, 2.5)
    if kind == "nearly-equal":
        return 1 + np.floor(uniform * 3) * 2.0**-20
    if kind == "large":
        return (uniform - 0.5) * 10 ** rng.uniform(0, 4, shape)
    if kind == "one-cheap-column" and shape[2]:
        uniform[..., int(rng.integers(shape[2]))] -= 3
    if kind == "detr":  # a few queries near each target, the others about as far as each other
        return np.where(rng.random(shape) < 0.15, uniform - 2, 5 + 0.2 * uniform)
    return uniform


def from_labels(images: Sequence[LabelImage], stage: str, seed: int, dtype: str = "float32") -> Case:
    """The costs of matching the images in every decoder layer: an early layer predicts as an early stage does."""
    stages = (next(iter(STAGES)), *(stage,) * (LAYERS - 1))
    layers = [hungarian.from_labels(images, some, seed + layer, dtype) for layer, some in enumerate(stages)]
    counts = layers[0].settings["sizes"]
    queries, rows = layers[0].tensors["logits"].shape[1], max(counts, default=0)
    cost = torch.zeros(len(layers) * len(counts), rows, queries, dtype=DTYPES[dtype])
    for index, case in enumerate(layers):
        for image, block in enumerate(_blocks(case)):
            cost[index * len(counts) + image, : len(block)] = block.to(cost.dtype)
    origin = f"labels:{images[0].name}+{len(images) - 1}/{stage}/{seed}"
    return build(cost, [[count, queries] for count in counts] * len(layers), origin, {dtype, "detr"})


def _blocks(case: Case) -> Iterator[torch.Tensor]:
    """(T, Q) costs of each image, by the terms of set_prediction.md A2 but for the overlap, which changes little."""
    tensors, weights = case.tensors, case.settings
    split = zip(*(tensors[name].split(weights["sizes"]) for name in ("labels", "boxes")), strict=True)
    for image, (labels, boxes) in enumerate(split):
        probability = tensors["logits"][image].float().softmax(-1)[:, labels]
        distance = torch.cdist(boxes.float(), tensors["pred_boxes"][image].float(), p=1)
        yield weights["bbox_cost"] * distance - weights["class_cost"] * probability.T


def allows(_: Case) -> bool:
    """Whether `cases` could have drawn the case: there are no options, so it could."""
    return True


def build(cost: torch.Tensor, sizes: Sequence[Sequence[int]], origin: str, tags: set[str]) -> Case:
    """The case of (P, T, Q) costs, of which problem p has the first `sizes[p]` rows and columns."""
    cost = cost.to(torch.promote_types(cost.dtype, torch.float32))
    for problem, (rows, columns) in enumerate(sizes):
        cost[problem, rows:], cost[problem, :, columns:] = torch.nan, torch.nan
    if any(rows > columns for rows, columns in sizes):
        tags = tags | {"more-rows-than-columns"}
    settings: dict[str, Any] = {"sizes": [list(pair) for pair in sizes]}
    return Case("linear_sum_assignment", {"cost": cost}, settings, origin, frozenset(tags))


def pinned_cases() -> Iterator[tuple[str, Case]]:
    """Small problems whose optimum is known, and those without a choice."""

    def case(rows: Sequence[Sequence[float]], *tags: str) -> Case:
        cost = torch.tensor([rows], dtype=torch.float32)
        return build(cost, [cost.shape[1:]], "pinned", {"float32", *tags})

    wide = ((8, 4, 7), (5, 2, 3))
    yield "two-rows", case(wide)
    yield "more-rows", case(((8, 4, 7), (5, 2, 3), (9, 6, 7), (9, 4, 8)))
    yield "greedy-is-wrong", case(((1, 2), (1, 100)))
    yield "one-row", case(((3, 1, 2, 1),), "tie")
    yield "all-equal", case(((1, 1), (1, 1)), "tie")
    yield "empty", build(torch.zeros(0, 3, 4), [], "pinned", {"float32"})
    yield "no-rows", build(torch.zeros(2, 0, 4), [[0, 4]] * 2, "pinned", {"float32"})
    ragged = torch.tensor([wide, wide], dtype=torch.float32)
    yield "ragged", build(ragged, [[2, 3], [1, 2]], "pinned", {"float32", "ragged"})
