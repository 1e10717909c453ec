"""Cases of the box loss: predictions of every anchor, and targets of which the foreground's matter."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from cases import boxes as box_kinds
from cases import detection
from cases.anchor_targets import FOREGROUNDS, AnchorTargets, anchor_targets
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
#: What happens to some predicted boxes: they are the target itself, a point, turned inside out, beside it, or far away.
_SHAPES = ("target", "point", "inverted", "touching", "far")


@st.composite
def cases(draw: st.DrawFn, *, dtypes: Sequence[str] = ("float32",)) -> Case:
    """Draw a case in one of `dtypes`; half predictions stand beside float32 targets, as in training, mostly."""
    pick = drawn(draw)
    dtype = pick.choice(dtypes)
    # The slopes of boxes without area leave the range of float16.
    steep = dtype == "float16"
    kinds = [kind for kind in box_kinds.KINDS if not steep or kind not in ("zero-area", "inverted")]
    scene = draw_scene(pick, dtype=dtype, boxes=kinds, empty_batch=True)
    if dtype == "float64" and scene.prediction == "saturated":
        # Upstream's own releases part in the last digits that 1 - p has left: until 8.4.112 they summed two entropies.
        tags = scene.tags - {"prediction-saturated"} | {"prediction-late"}
        scene = replace(scene, prediction="late", tags=tags)
    targets = anchor_targets(scene, pick.choice(FOREGROUNDS))
    mixed = dtype in ("float16", "bfloat16") and pick.choice((True, True, False))
    shaped, extreme = pick.choice((True, False, False)) and not steep, pick.choice(_RARELY)
    settings = _settings(scene, pick.choice(detection.REG_MAX))
    case = build(
        scene,
        targets,
        dtype,
        settings,
        f"drawn:bbox_loss/{STRATEGY_VERSION}",
        mixed=mixed,
        shaped=shaped,
        extreme=extreme,
    )
    return perhaps(pick, FLAWS, case)


def from_labels(images: Sequence[LabelImage], stage: str, seed: int, dtype: str = "float32") -> Case:
    """The case of a batch of labelled `images` at training stage `stage`, with 16 bins."""
    scene = scene_from_labels(images, stage, seed)
    origin = f"labels:{images[0].name}+{len(images) - 1}/{stage}/{seed}"
    mixed = dtype in ("float16", "bfloat16")
    return build(scene, anchor_targets(scene), dtype, _settings(scene, 16), origin, mixed=mixed)


def allows(case: Case) -> bool:
    """Whether `cases` could have drawn `case`."""
    return True


def build(
    scene: Scene,
    targets: AnchorTargets,
    dtype: str,
    settings: dict[str, Any],
    origin: str,
    *,
    mixed: bool,
    shaped: bool = False,
    extreme: bool = False,
) -> Case:
    """The case of `scene`, boxes in grid units.

    `mixed` keeps everything but predictions in float32; `shaped` gives some predicted boxes a degenerate shape,
    `extreme` gives some channels logits of 1e4.
    """
    frame, seed = scene.frame, scene.seed
    wide, narrow = torch.float32 if mixed else DTYPES[dtype], DTYPES[dtype]
    strides = frame.cells[:, 2:]
    found = anchor_predictions(scene.prediction, seed, frame, scene.boxes, scene.class_indices, scene.num_classes)
    predicted, wanted = found.boxes / strides, targets.boxes / strides
    if shaped:
        _shape(predicted, wanted, seed)
    scores = np.zeros((*targets.values.shape, scene.num_classes))
    np.put_along_axis(scores, targets.labels[..., None], targets.values[..., None], axis=2)
    scores = torch.from_numpy(scores).to(wide)
    tensors = {
        "pred_dist": detection.head(scene, seed, settings["reg_max"], dtype, extreme=extreme).boxes.mT.contiguous(),
        "pred_bboxes": torch.from_numpy(predicted).to(narrow),
        "anchor_points": torch.from_numpy(frame.points / strides).to(wide),
        "target_bboxes": torch.from_numpy(wanted).to(wide),
        "target_scores": scores,
        "target_scores_sum": scores.sum().clamp(min=1),
        "fg_mask": torch.from_numpy(targets.foreground.copy()),
        "stride": torch.from_numpy(strides).to(wide),
    }
    tags = common_tags(scene, dtype) | {f"reg-max-{settings['reg_max']}", f"foreground-{_amount(targets)}"}
    tags |= {name for name, said in (("mixed-dtype", mixed), ("shaped", shaped), ("extreme", extreme)) if said}
    places = {name: tensors[name] for name in ("pred_dist", "pred_bboxes")}
    # Upstream rejects some distances that are bfloat16: one reason at a time.
    if wide != torch.bfloat16 and spoil(scene.prediction, seed, found.aims, places):
        tags.add("non-finite")
    return Case("bbox_loss", tensors, settings, origin, frozenset(tags))


def _settings(scene: Scene, reg_max: int) -> dict[str, Any]:
    return {"reg_max": reg_max, "imgsz": [scene.frame.height, scene.frame.width]}


def _amount(targets: AnchorTargets) -> str:
    count = int(targets.foreground.sum())
    return "all" if count and count == targets.foreground.size else {0: "none", 1: "one"}.get(count, "some")


def _shape(predicted: np.ndarray, wanted: np.ndarray, seed: int) -> None:
    """Give a third of the predicted boxes (B, A, 4) one of `_SHAPES`, in place."""
    rng = np.random.default_rng([seed, 7])
    kinds = rng.integers(0, 3 * len(_SHAPES), predicted.shape[:2])
    width = (wanted[..., 2] - wanted[..., 0])[..., None] * np.array([1.0, 0, 1, 0])
    made = {
        "target": wanted,
        "point": np.tile(predicted[..., :2], 2),
        "inverted": predicted[..., [2, 3, 0, 1]],
        "touching": wanted + width,
        "far": predicted + 1e3,
    }
    for index, name in enumerate(_SHAPES):
        predicted[kinds == index] = made[name][kinds == index]


def _channels_missing(tensors: dict[str, Tensor], settings: dict[str, Any]) -> bool:
    tensors["pred_dist"] = tensors["pred_dist"][..., :-1]
    return _distances_are_read(tensors, settings)


def _anchors_missing(tensors: dict[str, Tensor], settings: dict[str, Any]) -> bool:
    anchors = len(tensors["anchor_points"])
    tensors["anchor_points"] = tensors["anchor_points"][:-1]
    # One anchor would broadcast.
    return anchors > 2 and _distances_are_read(tensors, settings)


def _targets_missing(tensors: dict[str, Tensor], _: dict[str, Any]) -> bool:
    tensors["target_bboxes"] = tensors["target_bboxes"][:, :-1]
    return len(tensors["fg_mask"]) > 0


def _nan_target(tensors: dict[str, Tensor], settings: dict[str, Any]) -> bool:
    if not _distances_are_read(tensors, settings):
        return False
    tensors["target_bboxes"][tuple(tensors["fg_mask"].nonzero()[0])] = torch.nan
    return True


def _distances_are_read(tensors: dict[str, Tensor], settings: dict[str, Any]) -> bool:
    """Until 8.4.0 nothing is computed of the distances of one bin."""
    return settings["reg_max"] > 1 and bool(tensors["fg_mask"].any())


FLAWS = (
    Flaw("channels-missing", "four times the bins an anchor", _channels_missing),
    Flaw("anchors-missing", "a centre for each anchor", _anchors_missing),
    Flaw("targets-missing", "a target for each anchor", _targets_missing),
    Flaw("nan-target", "there is no bin beside its distances", _nan_target),
)


def example(reg_max: int = 16, every: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and settings of example ExB of yolo_losses.md, section 2.4: each third or `every` anchor foreground."""
    index = torch.arange(10)
    points = torch.stack((index % 5 + 0.5, index.div(5, rounding_mode="floor") + 0.5), 1)
    foreground = ((index % 3 == 0) | every)[None]
    scores = (pattern((1, 10, 3), 0.4, 0.5, 0.1) + 0.5) * foreground[..., None]
    corners = points - 1 - 0.5 * pattern((10, 2), 1, 0.9, 0.2), points + 1.2 + 0.5 * pattern((10, 2), 1, 0.4, 0.7)
    tensors = {
        "pred_dist": pattern((1, 10, 4 * reg_max), 1, 0.7, 0.3) + (1.5 if reg_max == 1 else 0),
        "pred_bboxes": torch.cat(corners, 1)[None],
        "anchor_points": points,
        "target_bboxes": torch.cat((points - 1.3, points + 1.1), 1)[None],
        "target_scores": scores,
        "target_scores_sum": scores.sum().clamp(min=1),
        "fg_mask": foreground,
        "stride": torch.full((10, 1), 8.0),
    }
    return tensors, {"reg_max": reg_max, "imgsz": [64, 96]}


def pinned_cases() -> Iterator[tuple[str, Case]]:
    """Example ExB of yolo_losses.md, section 2.4, and the edge cases of its list, by name."""

    def case(tags: set[str], changes: dict[str, Tensor] | None = None, *, given=None) -> Case:
        tensors, settings = given or example()
        return Case("bbox_loss", tensors | (changes or {}), settings, "pinned", frozenset({"float32", *tags}))

    tensors, _ = example()
    yield "worked-example", case({"worked-example"})
    yield "worked-example-one-bin", case({"worked-example", "reg-max-1"}, given=example(1))
    yield "every-anchor-foreground", case({"foreground-all"}, given=example(every=True))
    # Two anchors of other overlaps and other weights: every overlap times every weight is another sum.
    two = torch.zeros_like(tensors["fg_mask"])
    two[0, [3, 8]] = True
    weights = tensors["target_scores"].clone()
    weights[0, 3], weights[0, 8] = torch.tensor([0.9, 0.0, 0.0]), torch.tensor([0.1, 0.0, 0.0])
    yield (
        "field-ultralytics-8.0.100-two-anchors",
        case({"foreground-two"}, {"fg_mask": two, "target_scores": weights, "target_scores_sum": torch.tensor(1.0)}),
    )
    one = torch.zeros_like(tensors["fg_mask"])
    one[0, 3] = True
    yield "one-foreground-anchor", case({"foreground-one"}, {"fg_mask": one})
    for bins in (16, 1):
        nothing = {"fg_mask": torch.zeros_like(one)}
        yield f"no-foreground-{bins}-bins", case({"foreground-none"}, nothing, given=example(bins))
    boxes = tensors["pred_bboxes"].clone()
    boxes[0, 0, 0] = torch.nan
    yield "nan-box", case({"non-finite"}, {"pred_bboxes": boxes})
    spoiled = {name: tensors[name].clone() for name in ("pred_dist", "pred_bboxes", "target_bboxes", "target_scores")}
    for tensor in spoiled.values():
        tensor[0, 1] = torch.nan
    yield "nan-background", case({"non-finite"}, spoiled)
    same = {"pred_bboxes": tensors["target_bboxes"].clone()}
    yield "identical-boxes", case({"shaped"}, same)
    points = {"pred_bboxes": tensors["pred_bboxes"][..., [0, 1, 0, 1]]}
    yield "point-predictions", case({"shaped"}, points)
    inverted = {"pred_bboxes": tensors["pred_bboxes"][..., [2, 3, 0, 1]]}
    yield "inverted-predictions", case({"shaped"}, inverted)
