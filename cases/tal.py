"""Cases of the task-aligned assigner: drawn scenes, labelled images, and inputs that upstream rejects."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from cases.boxes import drawn
from cases.case import DTYPES, Case
from cases.flaws import Flaw, perhaps
from cases.frame import Frame
from cases.labels import LabelImage
from cases.predictions import anchor_predictions, spoil
from cases.scenes import (
    PADDING_CONTENTS,
    PADDING_PLACES,
    Scene,
    common_tags,
    draw_scene,
    inside,
    padded,
    scene_from_labels,
)

#: Change it whenever the same draws give another case.
STRATEGY_VERSION = 1

#: Every anchor is proposed in small scenes; in larger ones that says nothing new.
LARGEST_TOPK = 100
EXPONENTS = ((1.0, 6.0), (0.5, 6.0), (1.0, 6.0), (0.5, 6.0), (1.0, 1.0), (0.0, 6.0), (2.0, 3.0))
_EPS = 1e-9
#: Name of a flaw that former releases don't mind.
WIDER = "wider-ground-truths"


@dataclass(frozen=True)
class Layout:
    """How ground truths become rows: `extra` padded rows, their place and content; and whether half cases are
    `mixed`: float32 boxes beside half scores, which is what mixed-precision training hands over.
    """

    extra: int = 0
    place: str = "end"
    content: str = "zeros"
    mixed: bool = False


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
    """Draw a case in one of `dtypes`.

    Older releases know less. Before 8.4.0 there is no second selection: `topk2=False` leaves it None. Before
    8.4.134 a label that no class has is rejected on padded rows too: `padding_labels=False` keeps them out. Before
    8.4.155 a batch of no images with rows is: `empty_batch=False`. Before 8.0.52 ground truths may be wider than
    predictions: `wider_truths=True` keeps that from being drawn as a flaw.
    """
    pick = drawn(draw)
    dtype = pick.choice(dtypes)
    labels = ("fractional", "fraction-below-zero", "negative")
    scene = draw_scene(pick, dtype=dtype, labels=labels, empty_batch=empty_batch)
    layout = Layout(
        extra=pick.choice((0, 0, 1, 2)),
        place=pick.choice(PADDING_PLACES),
        content=pick.choice([c for c in PADDING_CONTENTS if padding_labels or c != "labels"]),
        mixed=dtype in ("float16", "bfloat16") and pick.choice((True, True, False)),
    )
    anchors = scene.frame.anchors
    topk = pick.choice([k for k in (10, 13, 1, 3, anchors) if k <= min(anchors, LARGEST_TOPK)])
    second = pick.choice((None, None, None, 1, 1, 3, 14)) if topk2 else None
    alpha, beta = pick.choice(EXPONENTS)
    settings = settings_of(scene, topk, None if second is None else min(second, anchors), alpha, beta)
    case = build(scene, dtype, layout, settings, f"drawn:tal/{STRATEGY_VERSION}")
    return perhaps(pick, [flaw for flaw in FLAWS if not (wider_truths and flaw.name == WIDER)], case)


def from_labels(
    images: Sequence[LabelImage],
    stage: str,
    seed: int,
    dtype: str = "float32",
    **_release: bool,
) -> Case:
    """The case of a batch of labelled `images` at training stage `stage`, with the trainers' settings.

    Takes the options of `cases` too: what they keep from older releases does not occur in labelled batches.
    """
    scene = scene_from_labels(images, stage, seed)
    settings = settings_of(scene, topk=10, topk2=None, alpha=0.5, beta=6.0)
    return build(scene, dtype, Layout(), settings, f"labels:{images[0].name}+{len(images) - 1}/{stage}/{seed}")


def allows(
    case: Case,
    *,
    topk2: bool = True,
    padding_labels: bool = True,
    empty_batch: bool = True,
    wider_truths: bool = False,
) -> bool:
    """Whether `cases` with these options could have drawn `case`."""
    return (
        (topk2 or case.settings["topk2"] is None)
        and (padding_labels or "padding-labels" not in case.tags)
        and (empty_batch or "empty-batch" not in case.tags)
        and not (wider_truths and WIDER in case.tags)
    )


def build(scene: Scene, dtype: str, layout: Layout, settings: dict[str, Any], origin: str) -> Case:
    """The case of `scene` in `dtype`, laid out as `layout` says."""
    wide = torch.float32 if layout.mixed else DTYPES[dtype]
    rows = max(scene.counts, default=0) + layout.extra
    boxes, labels, valid = padded(scene, rows, layout.place, layout.content)
    predictions = anchor_predictions(
        scene.prediction, scene.seed, scene.frame, scene.boxes, scene.class_indices, scene.num_classes
    )
    scores = 1 / (1 + np.exp(-predictions.logits))
    tensors = {
        "pd_scores": torch.from_numpy(scores).to(DTYPES[dtype]),
        "pd_bboxes": torch.from_numpy(predictions.boxes).to(wide),
        "anc_points": torch.from_numpy(scene.frame.points).to(wide),
        "gt_labels": torch.from_numpy(labels).unsqueeze(-1).to(wide),
        "gt_bboxes": torch.from_numpy(boxes).to(wide),
        "mask_gt": torch.from_numpy(valid).unsqueeze(-1).to(wide),
    }
    tags = common_tags(scene, dtype) | _tags(scene, layout, settings, valid)
    places = {name: tensors[name] for name in ("pd_scores", "pd_bboxes")}
    if spoil(scene.prediction, scene.seed, predictions.aims, places):
        tags.add("non-finite")
    return Case("tal", tensors, settings, origin, frozenset(tags))


def candidates(frame: Frame, boxes: np.ndarray) -> np.ndarray:
    """(n, A) bool: anchors inside `boxes` (n, 4) xyxy, short sides lengthened; task_aligned.md 4, step 1."""
    least = frame.strides[1] if len(frame.strides) > 1 else frame.strides[0]
    centres, sides = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    sides = np.where(sides < least, least, sides)
    return inside(frame.points, np.concatenate([centres - sides / 2, centres + sides / 2], axis=1))


def settings_of(scene: Scene, topk: int, topk2: int | None, alpha: float, beta: float) -> dict[str, Any]:
    """The settings of a case of `scene`."""
    return {
        "topk": topk,
        "topk2": topk2,
        "num_classes": scene.num_classes,
        "alpha": alpha,
        "beta": beta,
        "stride": list(scene.frame.strides),
        "eps": _EPS,
    }


def _tags(scene: Scene, layout: Layout, settings: dict[str, Any], valid: np.ndarray) -> set[str]:
    tags = set()
    if not valid.all():
        tags |= {"padding", f"padding-{layout.place}", f"padding-{layout.content}"}
    if layout.mixed:
        tags.add("mixed-dtype")
    if settings["topk2"] not in (None, settings["topk"]):
        tags.add("topk2")
    for boxes in scene.boxes:
        counts = candidates(scene.frame, boxes)
        per_row = counts.sum(axis=1)
        if (counts.sum(axis=0) > 1).any():
            # An anchor inside two ground truths: both may propose it.
            tags.add("conflict")
        if ((per_row > 0) & (per_row < settings["topk"])).any():
            tags.add("k-exceeds-candidates")
        if (per_row == 0).any():
            tags.add("no-candidate-row")
    return tags


def _topk_above_anchors(tensors: dict[str, Tensor], settings: dict[str, Any]) -> bool:
    settings["topk"] = len(tensors["anc_points"]) + 1
    # Upstream returns before the selection where there is no row, and selects nothing in an empty batch.
    return tensors["gt_bboxes"].numel() > 0


def _label_beyond_classes(tensors: dict[str, Tensor], settings: dict[str, Any]) -> bool:
    points = tensors["anc_points"]
    boxes, valid = tensors["gt_bboxes"], tensors["mask_gt"][..., 0] > 0
    # Only a row with a candidate is looked up, so the flaw goes where an anchor is well inside.
    near, far = boxes[:, :, None, :2] + 0.5, boxes[:, :, None, 2:] - 0.5
    found = ((points > near) & (points < far)).all(dim=-1).any(dim=-1) & valid
    if not found.any():
        return False
    image, row = found.nonzero()[0]
    tensors["gt_labels"][image, row] = settings["num_classes"]
    return True


def _wider_ground_truths(tensors: dict[str, Tensor], _: dict[str, Any]) -> bool:
    wider = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.float32: torch.float64}
    if tensors["pd_bboxes"].dtype not in wider:
        return False
    tensors["gt_bboxes"] = tensors["gt_bboxes"].to(wider[tensors["pd_bboxes"].dtype])
    return tensors["gt_bboxes"].numel() > 0


FLAWS = (
    Flaw("topk-above-anchors", "there are not that many anchors to select", _topk_above_anchors),
    Flaw("label-beyond-classes", "the score of a class that does not exist", _label_beyond_classes),
    Flaw(WIDER, "overlaps are written in the dtype of the predictions", _wider_ground_truths),
)
