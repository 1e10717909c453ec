"""Cases of the task-aligned assigner of rotated boxes: the scenes of the other one, turned."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from cases import tal
from cases.boxes import centre_form, drawn
from cases.case import DTYPES, Case
from cases.flaws import Flaw, perhaps
from cases.frame import Frame
from cases.labels import LabelImage
from cases.predictions import STAGES, anchor_predictions, spoil
from cases.probiou import ANGLE_EDGES
from cases.scenes import (
    PADDING_CONTENTS,
    PADDING_PLACES,
    Scene,
    common_tags,
    draw_scene,
    padded,
    scene_from_labels,
)
from cases.tal import EXPONENTS, LARGEST_TOPK, Layout, settings_of

#: Change it whenever the same draws give another case.
STRATEGY_VERSION = 1

#: How boxes are turned: anyhow in the range of the head, by angles on edges, not at all, or as thin as they come.
TURNS = ("any", "any", "any", "edges", "none", "needles", "squares")


@st.composite
def cases(
    draw: st.DrawFn,
    *,
    dtypes: Sequence[str] = ("float32",),
    topk2: bool = True,
    padding_labels: bool = True,
    empty_batch: bool = True,
    wider_truths: bool = False,
) -> Case:
    """Draw a case in one of `dtypes`; the options are those of `cases.tal.cases`."""
    pick = drawn(draw)
    dtype = pick.choice(dtypes)
    labels = ("fractional", "fraction-below-zero", "negative")
    scene = draw_scene(pick, dtype=dtype, labels=labels, empty_batch=empty_batch)
    layout = Layout(
        extra=pick.choice((0, 0, 1, 2)),
        place=pick.choice(PADDING_PLACES),
        content=pick.choice([c for c in PADDING_CONTENTS if padding_labels or c != "labels"]),
        # Upstream's overlaps of half boxes are those of other boxes: its products overflow (boxes.md, section 11).
        mixed=dtype in ("float16", "bfloat16") and pick.choice((True,) * 5 + (False,)),
    )
    turn = pick.choice(TURNS)
    anchors = scene.frame.anchors
    topk = pick.choice([k for k in (10, 13, 1, 3, anchors) if k <= min(anchors, LARGEST_TOPK)])
    second = pick.choice((None, None, None, 1, 1, 3, 14)) if topk2 else None
    alpha, beta = pick.choice(EXPONENTS)
    settings = settings_of(scene, topk, None if second is None else min(second, anchors), alpha, beta)
    case = build(scene, dtype, layout, turn, settings, f"drawn:rotated_tal/{STRATEGY_VERSION}")
    return perhaps(pick, [flaw for flaw in FLAWS if not (wider_truths and flaw.name == tal.WIDER)], case)


def from_labels(images: Sequence[LabelImage], stage: str, seed: int, dtype: str = "float32", **_release: bool) -> Case:
    """The case of a batch of labelled `images`, their boxes turned anyhow, with the trainers' settings.

    Takes the options of `cases` too: what they keep from older releases does not occur in labelled batches.
    """
    scene = scene_from_labels(images, stage, seed)
    settings = settings_of(scene, topk=10, topk2=None, alpha=0.5, beta=6.0)
    origin = f"labels:{images[0].name}+{len(images) - 1}/{stage}/{seed}"
    return build(scene, dtype, Layout(), "any", settings, origin)


def allows(case: Case, **options: bool) -> bool:
    """Whether `cases` with these options could have drawn `case`."""
    return tal.allows(case, **options)


def build(scene: Scene, dtype: str, layout: Layout, turn: str, settings: dict[str, Any], origin: str) -> Case:
    """The case of `scene` in `dtype`, laid out as `layout` says and turned as `turn` does."""
    wide = torch.float32 if layout.mixed else DTYPES[dtype]
    rows = max(scene.counts, default=0) + layout.extra
    boxes, labels, valid = padded(scene, rows, layout.place, layout.content)
    predictions = anchor_predictions(
        scene.prediction, scene.seed, scene.frame, scene.boxes, scene.class_indices, scene.num_classes
    )
    turned = [turned_boxes(image, turn, scene.seed) for image in scene.boxes]
    truths = np.concatenate([centre_form(boxes), np.zeros((*boxes.shape[:2], 1))], axis=2)
    for image, own in enumerate(turned):
        truths[image, valid[image]] = own
    scores = 1 / (1 + np.exp(-predictions.logits))
    tensors = {
        "pd_scores": torch.from_numpy(scores).to(DTYPES[dtype]),
        "pd_bboxes": torch.from_numpy(_predicted(scene, predictions.boxes, predictions.aims, turned)).to(wide),
        "anc_points": torch.from_numpy(scene.frame.points).to(wide),
        "gt_labels": torch.from_numpy(labels).unsqueeze(-1).to(wide),
        "gt_bboxes": torch.from_numpy(truths).to(wide),
        "mask_gt": torch.from_numpy(valid).unsqueeze(-1).to(wide),
    }
    tags = common_tags(scene, dtype) | {f"turn-{turn}"} | _tags(scene, layout, settings, valid, turned)
    places = {name: tensors[name] for name in ("pd_scores", "pd_bboxes")}
    if spoil(scene.prediction, scene.seed, predictions.aims, places):
        tags.add("non-finite")
    return Case("rotated_tal", tensors, settings, origin, frozenset(tags))


def turned_boxes(boxes: np.ndarray, turn: str, seed: int) -> np.ndarray:
    """(n, 5) xywhr of xyxy `boxes` (n, 4); equal boxes are turned alike, so that they stay equal."""
    found = np.concatenate([centre_form(boxes), np.zeros((len(boxes), 1))], axis=1)
    rng, known = np.random.default_rng([seed, 7]), {}
    for row, box in zip(found, map(tuple, boxes), strict=True):
        if box not in known:
            angle = rng.uniform(-math.pi / 4, 3 * math.pi / 4)
            known[box] = angle, rng.choice(ANGLE_EDGES), rng.integers(2), 10.0 ** -rng.uniform(0, 5)
        angle, edge, side, thinner = known[box]
        row[4] = 0.0 if turn == "none" else edge if turn == "edges" else angle
        if turn == "needles":
            row[2 + side] *= thinner
        elif turn == "squares":
            row[3 - side] = row[2 + side]
    return found


def _predicted(scene: Scene, boxes: np.ndarray, aims: np.ndarray, turned: Sequence[np.ndarray]) -> np.ndarray:
    """(B, A, 5): predictions (B, A, 4) xyxy, turned about as the ground truths that they follow."""
    rng = np.random.default_rng([scene.seed, 8])
    angles = rng.uniform(-math.pi / 4, 3 * math.pi / 4, (*aims.shape, 1))
    found = centre_form(boxes)
    noise = STAGES[scene.prediction].noise if scene.prediction in STAGES else 0.0
    for image, truths in enumerate(turned):
        follows = np.flatnonzero(aims[image] >= 0)
        own = truths[aims[image, follows]]
        angles[image, follows] = own[:, 4:] + noise * rng.normal(0, 1, (len(follows), 1))
        # A head that has learned predicts thin boxes too.
        thin = np.minimum(np.abs(own[:, 2:4]), found[image, follows, 2:])
        found[image, follows, 2:] = np.where(np.abs(own[:, 2:4]) < 1, thin, found[image, follows, 2:])
    if scene.prediction == "uniform":
        angles[:] = 0
    elif scene.prediction == "tied":
        count = aims.shape[1] // 2 * 2
        for part in (angles, found):
            part[:, 1:count:2] = part[:, 0:count:2]
    return np.concatenate([found, angles], axis=2)


def candidates(frame: Frame, boxes: np.ndarray) -> np.ndarray:
    """(n, A) bool: anchors inside rotated `boxes` (n, 5) or on their edges, short sides lengthened."""
    least = frame.strides[1] if len(frame.strides) > 1 else frame.strides[0]
    sides = np.where(boxes[:, 2:4] < least, least, boxes[:, 2:4])
    return _inside(frame.points, boxes, sides / 2)


def _inside(points: np.ndarray, boxes: np.ndarray, reach: np.ndarray) -> np.ndarray:
    cosine, sine = np.cos(boxes[:, 4:]), np.sin(boxes[:, 4:])
    dx, dy = (points[:, axis] - boxes[:, axis : axis + 1] for axis in (0, 1))
    across, along = np.abs(dx * cosine + dy * sine), np.abs(dy * cosine - dx * sine)
    return (across <= reach[:, :1]) & (along <= reach[:, 1:])


def _tags(
    scene: Scene, layout: Layout, settings: dict[str, Any], valid: np.ndarray, turned: Sequence[np.ndarray]
) -> set[str]:
    tags = set()
    if not valid.all():
        tags |= {"padding", f"padding-{layout.place}", f"padding-{layout.content}"}
    if layout.mixed:
        tags.add("mixed-dtype")
    if settings["topk2"] not in (None, settings["topk"]):
        tags.add("topk2")
    for boxes in turned:
        counts = candidates(scene.frame, boxes)
        per_row = counts.sum(axis=1)
        if (counts.sum(axis=0) > 1).any():
            # An anchor inside two ground truths: both may propose it.
            tags.add("conflict")
        if ((per_row > 0) & (per_row < settings["topk"])).any():
            tags.add("k-exceeds-candidates")
        if (per_row == 0).any():
            tags.add("no-candidate-row")
        if ((boxes[:, 2:4] > 0) & (boxes[:, 2:4] < 0.1)).any():
            tags.add("needle")
    return tags


def _label_beyond_classes(tensors: dict[str, Tensor], settings: dict[str, Any]) -> bool:
    points, valid = tensors["anc_points"].double().numpy(), tensors["mask_gt"][..., 0] > 0
    for image, boxes in enumerate(tensors["gt_bboxes"].double().numpy()):
        # Only a row with a candidate is looked up, so the flaw goes where an anchor is well inside.
        found = _inside(points, boxes, boxes[:, 2:4] / 2 - 0.5).any(axis=1) & valid[image].numpy()
        if found.any():
            tensors["gt_labels"][image, int(found.argmax())] = settings["num_classes"]
            return True
    return False


FLAWS = (
    *(flaw for flaw in tal.FLAWS if flaw.name in ("topk-above-anchors", tal.WIDER)),
    Flaw("label-beyond-classes", "the score of a class that does not exist", _label_beyond_classes),
)

_GRID = Frame(32, 32, (8,))
_TRAINER = {"topk2": None, "alpha": 0.5, "beta": 6.0, "eps": 1e-9, "stride": [8, 16, 32]}


def _scene(
    rows: Sequence[Sequence[float]],
    labels: Sequence[float],
    predictions: dict[int, Sequence[float]],
    scores: dict[tuple[int, int], float],
    tags: set[str],
    *,
    valid: Sequence[int] = (),
    reach: tuple[float, float] = (12, 12),
    topk: int = 4,
    **settings: Any,
) -> Case:
    """One image on a 4 x 4 grid of stride 8: predictions around their anchors and scores of .25 but where told."""
    points = torch.from_numpy(_GRID.points).float()
    boxes = torch.cat([points, torch.tensor(reach).float().expand(16, 2), torch.zeros(16, 1)], dim=1)
    for anchor, box in predictions.items():
        boxes[anchor] = torch.tensor(box)
    every = torch.full((1, 16, 2), 0.25)
    for (anchor, label), score in scores.items():
        every[0, anchor, label] = score
    tensors = {
        "pd_scores": every,
        "pd_bboxes": boxes[None],
        "anc_points": points,
        "gt_labels": torch.tensor(labels, dtype=torch.float32).reshape(1, -1, 1),
        "gt_bboxes": torch.tensor(rows, dtype=torch.float32).reshape(1, -1, 5),
        "mask_gt": torch.tensor(valid or [1] * len(rows), dtype=torch.float32).reshape(1, -1, 1),
    }
    return Case(
        "rotated_tal", tensors, {**_TRAINER, "num_classes": 2, "topk": topk, **settings}, "pinned", frozenset(tags)
    )


def pinned_cases() -> Iterator[tuple[str, Case]]:
    """The worked example of task_aligned.md, section 9, its edges, and what people met."""
    rows = [(16, 16, 24, 10, 0.5), (8, 24, 6, 4, 1.0), (0, 0, 0, 0, 0)]
    near = {5: (15, 16, 22, 10, 0.4), 12: (8, 25, 7, 4, 0.9)}
    scores = {(5, 0): 0.81, (12, 1): 0.64}
    yield "worked-example", _scene(rows, (0, 1, 0), near, scores, {"worked-example"}, valid=(1, 1, 0))
    topk2 = _scene(rows, (0, 1, 0), near, scores, {"topk2"}, valid=(1, 1, 0), topk2=1)
    yield "worked-example-topk2-1", topk2
    # Edges are inclusive: anchors 0 1 2 4 5 6 8 9 10, where the other assigner takes 5 alone.
    square = [(12, 12, 16, 16, 0)]
    yield "inclusive-edges", _scene(square, (0,), {}, {}, {"edge", "tie"}, topk=16)
    for name, angle in (("quarter-turn", math.pi / 2), ("eighth-turn", math.pi / 4), ("half-turn", math.pi)):
        yield f"edges-{name}", _scene([(12, 12, 16, 16, angle)], (0,), {}, {}, {"edge", "tie"}, topk=16)
    # Sides below 8, and from 8 to 16: a release that enlarged them in its input gave other targets ever after.
    yield (
        "field-u-24260-input-unchanged",
        _scene([(8, 24, 6, 4, 1.0), (20, 12, 10, 3, 0.3)], (1, 0), near, scores, {"tiny", "tie", "field:U#24260"}),
    )
    same = [(16, 16, 24, 10, 0.5)] * 2
    yield "identical-ground-truths", _scene(same, (0, 0), near, scores, {"identical", "tie"})
    yield "identical-boxes-two-classes", _scene(same, (0, 1), near, scores, {"identical", "tie"})
    # The overlap of thin boxes was NaN, and with it every score of the image.
    needle = (16, 16, 30, 1e-3, 0.5)
    yield (
        "thin-box",
        _scene([needle], (0,), {5: needle, 6: needle}, scores, {"thin", "tie"}),
    )
    point = (12, 12, 0, 0, 0.3)
    yield "point", _scene([point], (0,), {5: point}, scores, {"zero-area", "tie"})
    yield "no-ground-truth", _scene([], (), {}, {}, {"no-ground-truth"})
    yield "only-padding", _scene([(0, 0, 0, 0, 0)] * 2, (1, 0), {}, {}, {"padding"}, valid=(0, 0))
    poisoned = {5: (15, 16, 22, 10, math.nan)}
    yield "nan-angle", _scene(rows[:1], (0,), poisoned, scores, {"non-finite"})
