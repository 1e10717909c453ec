"""Cases of the similarity of rotated boxes: pairs by kind, paired, broadcast and pairwise, with and without a floor."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from cases.anchor_targets import anchor_targets
from cases.boxes import centre_form, drawn
from cases.case import DTYPES, Case
from cases.flaws import Flaw, perhaps
from cases.labels import LabelImage
from cases.predictions import anchor_predictions
from cases.scenes import scene_from_labels

#: Change it whenever the same draws give another case.
STRATEGY_VERSION = 1

#: Angles at which sine and cosine are 0, equal or 1, and where a head's range ends.
ANGLE_EDGES = (0.0, math.pi / 4, -math.pi / 4, math.pi / 2, -math.pi / 2, 3 * math.pi / 4, math.pi)
_COUNTS = (*range(1, 13), *range(1, 13), 40, 0)
_SPOILED = ("",) * 27 + ("nan", "inf", "minus-inf")
_SPECIAL = {"nan": np.nan, "inf": np.inf, "minus-inf": -np.inf}
#: Sides in cells or pixels, tiny and huge.
_SIZES, _HALF_SIZES = (8.0, 8.0, 60.0, 60.0, 400.0, 1e-2, 1e4), (8.0, 8.0, 8.0, 1.0, 60.0)
_LAYOUTS = ("pairs",) * 6 + ("pairwise", "pairwise", "one-and-many", "many-and-one")
_FLOORS = (0.0, 0.0, 0.0, 0.01, 0.01, 1.0)
#: The rotated box loss adds it to variances in squared cells (8.4.84 on).
LOSS_FLOOR = 0.01

Rng = np.random.Generator


def _near(rng: Rng, box: np.ndarray) -> np.ndarray:
    """A prediction that has nearly learned its box."""
    shift = np.append(rng.normal(0, 0.2, 2) * box[2:4], (0, 0, rng.normal(0, 0.2)))
    return box * np.append((1, 1), np.append(1 + rng.normal(0, 0.2, 2), 1)) + shift


def _far(rng: Rng, box: np.ndarray) -> np.ndarray:
    return box + np.append(rng.uniform(1.1, 30, 2) * box[2:4] * rng.choice((-1, 1), 2), (0, 0, rng.uniform(-3, 3)))


def _identical(_: Rng, box: np.ndarray) -> np.ndarray:
    return box.copy()


def _half_turn(_: Rng, box: np.ndarray) -> np.ndarray:
    return box + np.array((0, 0, 0, 0, math.pi))


def _quarter_turn(_: Rng, box: np.ndarray) -> np.ndarray:
    """The same rectangle with its sides named the other way round."""
    return np.array([*box[:2], box[3], box[2], box[4] + math.pi / 2])


def _square(rng: Rng, box: np.ndarray) -> np.ndarray:
    box[3] = box[2]
    return box + np.array((0.1 * box[2], 0, 0, 0, rng.uniform(-2, 2)))


def _on_edge(rng: Rng, box: np.ndarray) -> np.ndarray:
    box[4] = rng.choice(ANGLE_EDGES)
    return np.append(box[:4] + rng.normal(0, 0.1, 4) * box[[2, 3, 2, 3]], rng.choice(ANGLE_EDGES))


def _thinned(rng: Rng, box: np.ndarray) -> None:
    """So thin that float32 cancels, not so thin that the truth in float64 does."""
    box[2 + rng.integers(2)] = box[2:4].max() * 10.0 ** -rng.uniform(1, 4)


def _thin_twins(rng: Rng, box: np.ndarray) -> np.ndarray:
    _thinned(rng, box)
    return box.copy()


def _thin_near(rng: Rng, box: np.ndarray) -> np.ndarray:
    _thinned(rng, box)
    return box + np.append(rng.normal(0, 0.3, 2) * box[2:4], (0, 0, rng.normal(0, 0.01)))


def _thin_and_box(rng: Rng, box: np.ndarray) -> np.ndarray:
    other = _near(rng, box)
    _thinned(rng, box)
    return other


def _flat(rng: Rng, box: np.ndarray) -> np.ndarray:
    box[2 + rng.integers(2)] = 0
    return box.copy()


def _points(rng: Rng, box: np.ndarray) -> np.ndarray:
    box[2:4] = 0
    return box + np.array((0, 0, 0, 0, 0.3) if rng.random() < 0.5 else (0.1, 0, 0, 0, 0))


def _point_and_box(rng: Rng, box: np.ndarray) -> np.ndarray:
    other = _near(rng, box)
    box[2:4] = 0
    return other


def _negative(rng: Rng, box: np.ndarray) -> np.ndarray:
    """A decoded box may have negative sides: the similarity sees their squares."""
    return _near(rng, box) * (1, 1, *rng.choice(((-1, 1), (1, -1), (-1, -1))), 1)


#: How the second box is made from the first, which some change too, and the kind's weight.
KINDS: dict[str, tuple[Callable[[Rng, np.ndarray], np.ndarray], int]] = {
    "near": (_near, 6),
    "far": (_far, 2),
    "identical": (_identical, 2),
    "half-turn": (_half_turn, 1),
    "quarter-turn": (_quarter_turn, 1),
    "square": (_square, 2),
    "angle-edge": (_on_edge, 3),
    "thin-twins": (_thin_twins, 2),
    "thin-near": (_thin_near, 2),
    "thin-and-box": (_thin_and_box, 1),
    "flat": (_flat, 1),
    "points": (_points, 1),
    "point-and-box": (_point_and_box, 1),
    "negative": (_negative, 1),
}


#: Kinds whose determinants are nothing but rounding in half, and in float64 too where a flat box meets another.
_THIN = ("thin-twins", "thin-near", "thin-and-box", "flat", "points", "point-and-box")


def _kinds(dtype: str, pairwise: bool) -> list[str]:
    barred = ["flat"] if pairwise else []
    if dtype in ("float16", "bfloat16"):
        barred += _THIN
    if dtype == "bfloat16":
        barred.append("far")  # slopes below the smallest normal number
    return [kind for kind in KINDS if kind not in barred]


def rotated_pairs(seed: int, count: int, size: float, kinds: Sequence[str]) -> tuple[np.ndarray, np.ndarray, set[str]]:
    """Two arrays (count, 5) of boxes of about `size`, xywhr, and the kinds of their pairs."""
    rng = np.random.default_rng(seed)
    names = [name for name in kinds for _ in range(KINDS[name][1])]
    first, second, seen = np.zeros((count, 5)), np.zeros((count, 5)), set()
    for row in range(count):
        sides = rng.uniform(size / 10, size, 2)
        box = np.array([*rng.uniform(0, 2 * size, 2), *sides, rng.uniform(-math.pi / 4, 3 * math.pi / 4)])
        kind = names[rng.integers(len(names))]
        other = KINDS[kind][0](rng, box)
        first[row], second[row] = (box, other) if rng.random() < 0.5 else (other, box)
        seen.add(kind)
    return first, second, seen


@st.composite
def cases(draw: st.DrawFn, *, dtypes: Sequence[str] = ("float32",), floor: bool = True) -> Case:
    """Draw a case in one of `dtypes`. Before 8.4.84 there is no floor: `floor=False` leaves it 0."""
    pick = drawn(draw)
    dtype = pick.choice(dtypes)
    layout, spoiled = pick.choice(_LAYOUTS[:-4] if dtype == "bfloat16" else _LAYOUTS), pick.choice(_SPOILED)
    size = pick.choice(_HALF_SIZES if dtype == "float16" else _SIZES)
    seed, count = pick.integer(0, 2**16 - 1), pick.choice(_COUNTS)
    paired = layout != "pairwise"
    first, second, kinds = rotated_pairs(seed, count, size, _kinds(dtype, not paired))
    chosen = pick.choice(_FLOORS) if floor and paired else 0.0
    complete = paired and pick.choice((False,) * 5 + (True,))
    settings = _settings(not paired, complete, chosen, pick.choice((1e-7,) * 8 + (1e-6, 1e-3)))
    tags = {*kinds, layout}
    if count and spoiled:
        # An infinite centre in half: 0 or NaN, as the rounding of the covariance decides.
        column = 2 + seed % 3 if dtype in ("float16", "bfloat16") else seed % 5
        (first if seed % 2 else second)[seed % count, column] = _SPECIAL[spoiled]
        tags |= {"non-finite", spoiled}
    other = pick.choice((dtype, dtype, dtype, "float32")) if dtype != "float64" else dtype
    case = build(first, second, dtype, settings, f"drawn:probiou/{STRATEGY_VERSION}", layout, other, tags)
    return perhaps(pick, FLAWS, case)


def from_labels(images: Sequence[LabelImage], stage: str, seed: int, dtype: str = "float32", **_release: bool) -> Case:
    """Foreground anchors' predictions and their ground truths, in cells, turned at random: what the box loss asks.

    Takes the options of `cases` too; there is no floor, which every release answers.
    """
    scene = scene_from_labels(images, stage, seed)
    frame, strides = scene.frame, scene.frame.cells[:, 2:]
    found = anchor_predictions(stage, seed, frame, scene.boxes, scene.class_indices, scene.num_classes)
    targets = anchor_targets(scene)
    rng = np.random.default_rng([seed, 7])
    angles = rng.uniform(-math.pi / 4, 3 * math.pi / 4, (*targets.rows.shape, 1))
    noise = rng.normal(0, 0.1, angles.shape)
    first, second = (
        np.concatenate([centre_form(boxes / strides), turned], axis=-1)[targets.foreground]
        for boxes, turned in ((found.boxes, angles + noise), (targets.boxes, angles))
    )
    origin = f"labels:{images[0].name}+{len(images) - 1}/{stage}/{seed}"
    return build(first, second, dtype, _settings(False, False), origin, tags={"labelled", *scene.tags})


def allows(case: Case, *, floor: bool = True) -> bool:
    """Whether `cases` with these options could have drawn `case`."""
    return floor or not case.settings["floor"]


def build(
    first: np.ndarray,
    second: np.ndarray,
    dtype: str,
    settings: dict[str, Any],
    origin: str,
    layout: str = "pairs",
    other: str = "",
    tags: set[str] = frozenset(),
) -> Case:
    """The case of boxes (N, 5) and (N, 5); `layout` is how they meet."""
    one, two = torch.from_numpy(first).to(DTYPES[dtype]), torch.from_numpy(second).to(DTYPES[other or dtype])
    if layout == "pairwise":
        two = two[:9]
    elif layout == "one-and-many":
        one = one[:1]
    elif layout == "many-and-one":
        two = two[:1]
    tags = {*tags, dtype}
    if not len(first):
        tags.add("empty")
    if settings["floor"]:
        tags.add("floor")
    if settings["CIoU"]:
        tags.add("CIoU")
    if other not in ("", dtype):
        tags.add("mixed-dtype")
    tensors = {"obb1": one.contiguous(), "obb2": two.contiguous()}
    return Case("probiou", tensors, settings, origin, frozenset(tags))


def _settings(pairwise: bool, complete: bool, floor: float = 0.0, eps: float = 1e-7) -> dict[str, Any]:
    return {"pairwise": pairwise, "CIoU": complete, "floor": floor, "eps": eps}


def _four_columns(tensors: dict[str, Tensor], _: dict[str, Any]) -> bool:
    tensors["obb2"] = tensors["obb2"][:, :4].clone()
    return True


def _one_box_less(tensors: dict[str, Tensor], settings: dict[str, Any]) -> bool:
    first, second = tensors["obb1"], tensors["obb2"]
    tensors["obb1"] = first[1:].clone()
    return not settings["pairwise"] and len(first) == len(second) > 2


FLAWS = (
    Flaw("four-columns", "a rotated box has an angle", _four_columns),
    Flaw("one-box-less", "boxes without a partner", _one_box_less),
)

#: boxes.md, section 11: the table, and what people met (issues 10108, 24933 and 25007 of ultralytics).
EDGES = {
    "points": ((5, 5, 0, 0, 0.3), (5, 5, 0, 0, 0.3)),
    "point-and-box": ((5, 5, 0, 0, 0), (5, 5, 8, 4, 0.4)),
    "thin-twins": ((5, 5, 1e-3, 30, 0.5), (5, 5, 1e-3, 30, 0.5)),
    "thin-and-box": ((5, 5, 1e-3, 30, 0.4), (5, 5, 8, 4, 0.1)),
    "thin-beside": ((5, 5, 1e-3, 30, 0.4), (5.001, 5, 1e-3, 30, 0.4)),
    "flat-twins": ((5, 5, 0, 30, 0.7), (5, 5, 0, 30, 0.7)),
    "half-turn": ((5, 5, 8, 4, 0.3), (5, 5, 8, 4, 0.3 + math.pi)),
    "quarter-turn": ((5, 5, 8, 4, 0.3), (5, 5, 4, 8, 0.3 + math.pi / 2)),
    "square": ((5, 5, 6, 6, 0.3), (5, 5, 6, 6, 1.2)),
    "far-apart": ((1, 1, 2, 2, 0), (1e5, 1e5, 2, 2, 1)),
    "huge": ((1e4, 1e4, 1e6, 1e6, 0.1), (1e4, 1e4, 1e6, 1e6, 0.1)),
}
NON_FINITE = {
    "nan": ((5, np.nan, 8, 4, 0), (5, 5, 8, 4, 0)),
    "infinite-width": ((5, 5, np.inf, 4, 0), (5, 5, 8, 4, 0)),
    "infinite-angle": ((5, 5, 8, 4, np.inf), (5, 5, 8, 4, 0)),
}
THIN = ("points", "point-and-box", "thin-twins", "thin-and-box", "thin-beside", "flat-twins")


def pinned_cases() -> Iterator[tuple[str, Case]]:
    """The worked example and the table of boxes.md, section 11, and the thin boxes of practice."""

    def case(pairs: Any, *tags: str, dtype: str = "float32", layout: str = "pairs", **settings: Any) -> Case:
        one, two = (np.array(boxes, dtype=np.float64).reshape(-1, 5) for boxes in zip(*pairs, strict=True))
        chosen = {**_settings(layout == "pairwise", False), **settings}
        return build(one, two, dtype, chosen, "pinned", layout, tags=set(tags))

    worked = ((10, 10, 8, 4, 0.3), (11, 12, 6, 5, 0.7))
    both = (worked, worked[::-1])
    yield "worked-example", case(both, "worked-example")
    yield "worked-example-complete", case(both, "worked-example", CIoU=True)
    yield "worked-example-pairwise", case(both, "worked-example", layout="pairwise")
    for floor in (LOSS_FLOOR, 1.0):
        yield f"worked-example-floor-{floor}", case(both, "worked-example", floor=floor)
    sound = [pair for name, pair in EDGES.items() if name not in THIN]
    yield "edges", case(sound, "edges")
    yield "edges-floor", case(EDGES.values(), "edges", floor=LOSS_FLOOR)
    yield "edges-float64", case(EDGES.values(), "edges", "divergence:probiou-thin-boxes", dtype="float64")
    # The gradient through the logarithm of a determinant that is 0, or less than 0 by cancellation, was NaN.
    for name in THIN:
        tags = {"points", "thin-twins", "flat-twins"} & {name}
        excused = ("divergence:probiou-thin-boxes",) if tags else ()
        yield f"field-u-10108-{name}", case([EDGES[name]], "thin", *excused)
        # Such a pair among sound ones leaves their gradients alone.
        yield f"field-u-24933-{name}-among-others", case([*both, EDGES[name], *sound[:2]], "thin", *excused)
        yield f"field-u-25007-{name}-in-the-loss", case([EDGES[name]], "thin", floor=LOSS_FLOOR)
    for name, pair in NON_FINITE.items():
        yield name, case([worked, pair], "non-finite")
    # In float16 the product of determinants overflows from squares of 20 on, and upstream says that all are alike.
    squares = (((50, 50, 20, 20, 0), (52, 50, 20, 20, 0)), ((50, 50, 60, 60, 0), (52, 50, 60, 60, 0)))
    yield "half-overflow", case(squares, "half-overflow", "divergence:probiou-half-overflow", dtype="float16")
    yield (
        "no-boxes",
        build(np.zeros((0, 5)), np.zeros((0, 5)), "float32", _settings(False, False), "pinned", tags={"empty"}),
    )
