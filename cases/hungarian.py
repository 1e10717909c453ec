"""Cases of the Hungarian matchers: drawn scenes, labelled images, and inputs that upstream rejects."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from cases import boxes as box_kinds
from cases.boxes import centre_form, drawn
from cases.case import DTYPES, Case
from cases.flaws import Flaw, perhaps
from cases.frame import Frame
from cases.labels import LabelImage
from cases.predictions import query_predictions, spoil
from cases.scenes import Scene, common_tags, draw_scene, scene_from_labels

#: Change it whenever the same draws give another case.
STRATEGY_VERSION = 1

Variant = Literal["detr", "rtdetr"]

#: Class, box and GIoU cost: the models' own, the classes' defaults, and each term alone.
_COSTS = {
    "detr": ((1, 5, 2), (1, 5, 2), (1, 1, 1), (1, 0, 0), (0, 5, 0), (0, 0, 2)),
    "rtdetr": ((2, 5, 2), (2, 5, 2), (1, 5, 2), (1, 0, 0), (0, 5, 0), (0, 0, 2)),
}
#: A sigmoid never gives 0: the least side of a predicted box, as a share of the image.
_LEAST_SIDE = 1e-3


@st.composite
def cases(draw: st.DrawFn, *, dtypes: Sequence[str] = ("float32",), variant: Variant = "detr") -> Case:
    """Draw a case of `variant` ("detr" of transformers, "rtdetr" of ultralytics) in one of `dtypes`."""
    pick = drawn(draw)
    dtype = pick.choice(dtypes)
    # transformers rejects boxes with a negative side; the flaw below makes one.
    kinds = [kind for kind in box_kinds.KINDS if variant == "rtdetr" or kind != "inverted"]
    labels = ("no-object",) if variant == "detr" else ("whole",)
    scene = draw_scene(pick, dtype=dtype, boxes=kinds, labels=labels)
    queries = pick.integer(1, 16) if "small" in scene.tags else pick.choice((100, 50, 300))
    costs = pick.choice(_COSTS[variant])
    use_fl = variant == "rtdetr" and pick.choice((True, True, True, False))
    settings = _settings(scene, variant, costs, use_fl)
    case = build(scene, dtype, queries, settings, f"drawn:hungarian/{STRATEGY_VERSION}/{variant}")
    return perhaps(pick, FLAWS[variant], case)


def from_labels(
    images: Sequence[LabelImage],
    stage: str,
    seed: int,
    dtype: str = "float32",
    *,
    queries: int = 300,
    variant: Variant = "detr",
) -> Case:
    """The case of a batch of labelled `images` at training stage `stage`, with the models' costs."""
    scene = scene_from_labels(images, stage, seed)
    settings = _settings(scene, variant, _COSTS[variant][0], variant == "rtdetr")
    return build(scene, dtype, queries, settings, f"labels:{images[0].name}+{len(images) - 1}/{stage}/{seed}")


def allows(case: Case, *, variant: Variant = "detr") -> bool:
    """Whether `cases` with these options could have drawn `case`."""
    return case.settings["variant"] == variant


def build(scene: Scene, dtype: str, queries: int, settings: dict[str, Any], origin: str) -> Case:
    """The case of `scene` in `dtype` with `queries` queries.

    The L1 distance of transformers has no half type on CPU, so half cases of "detr" keep float32 boxes beside
    half logits and are tagged "mixed-dtype".
    """
    detr = settings["variant"] == "detr"
    mixed = detr and dtype in ("float16", "bfloat16")
    box_dtype = torch.float32 if mixed else DTYPES[dtype]
    # The no-object class of "detr" is one more column, which no ground truth follows.
    predictions = query_predictions(
        scene.prediction,
        scene.seed,
        scene.frame,
        scene.boxes,
        scene.class_indices,
        scene.num_classes + detr,
        queries,
    )
    predicted = _normalised(predictions.boxes, scene.frame)
    if scene.prediction != "saturated":
        predicted[..., 2:] = np.maximum(predicted[..., 2:], _LEAST_SIDE)
    truths = [_normalised(boxes, scene.frame) for boxes in scene.boxes]
    tensors = {
        "logits": torch.from_numpy(predictions.logits).to(DTYPES[dtype]),
        "pred_boxes": torch.from_numpy(predicted).to(box_dtype),
        "labels": torch.from_numpy(np.concatenate(scene.class_indices)),
        "boxes": torch.from_numpy(np.concatenate(truths)).to(box_dtype),
    }
    tags = common_tags(scene, dtype) | {f"variant-{settings['variant']}"}
    if mixed:
        tags.add("mixed-dtype")
    if max(scene.counts) > queries:
        tags.add("more-targets-than-queries")
    # transformers rejects NaN boxes; the flaw below makes one.
    places = ("logits",) if detr and scene.prediction == "nan-one-place" else ("logits", "pred_boxes")
    if spoil(scene.prediction, scene.seed, predictions.aims, {name: tensors[name] for name in places}):
        tags.add("non-finite")
    return Case("hungarian", tensors, settings, origin, frozenset(tags))


def _normalised(boxes: np.ndarray, frame: Frame) -> np.ndarray:
    """Centre form as shares of the image (..., 4), of xyxy `boxes` in pixels."""
    return centre_form(boxes) / np.array([frame.width, frame.height] * 2, dtype=np.float64)


def _settings(scene: Scene, variant: Variant, costs: tuple[float, ...], use_fl: bool) -> dict[str, Any]:
    settings: dict[str, Any] = {"variant": variant, "sizes": scene.counts}
    settings |= dict(zip(("class_cost", "bbox_cost", "giou_cost"), map(float, costs), strict=True))
    return settings | ({"use_fl": use_fl, "alpha": 0.25, "gamma": 2.0} if variant == "rtdetr" else {})


def _inverted_box(tensors: dict[str, Tensor], _: dict[str, Any]) -> bool:
    tensors["boxes"][:1, 2] = -0.25
    return len(tensors["boxes"]) > 0


def _nan_box(tensors: dict[str, Tensor], _: dict[str, Any]) -> bool:
    tensors["pred_boxes"][0, 0, 0] = torch.nan
    return len(tensors["boxes"]) > 0


def _zero_costs(_: dict[str, Tensor], settings: dict[str, Any]) -> bool:
    settings |= {"class_cost": 0.0, "bbox_cost": 0.0, "giou_cost": 0.0}
    return True


def _label_beyond_classes(tensors: dict[str, Tensor], _: dict[str, Any]) -> bool:
    tensors["labels"][:1] = tensors["logits"].shape[2]
    return len(tensors["labels"]) > 0


def _half_boxes(tensors: dict[str, Tensor], _: dict[str, Any]) -> bool:
    for name in ("boxes", "pred_boxes"):
        tensors[name] = tensors[name].to(torch.float16)
    return len(tensors["boxes"]) > 0


def _float_labels(tensors: dict[str, Tensor], _: dict[str, Any]) -> bool:
    tensors["labels"] = tensors["labels"].to(torch.float32)
    return len(tensors["labels"]) > 0


def _sizes_do_not_sum(_: dict[str, Tensor], settings: dict[str, Any]) -> bool:
    settings["sizes"] = [*settings["sizes"][:-1], settings["sizes"][-1] + 1]
    return sum(settings["sizes"]) > 1


_BEYOND = Flaw("label-beyond-classes", "the cost of a class that has no column", _label_beyond_classes)
FLAWS = {
    "detr": (
        Flaw("inverted-box", "x2 < x1", _inverted_box),
        Flaw("nan-box", "corners that are not ordered", _nan_box),
        Flaw("zero-costs", "a matcher that matches by nothing", _zero_costs),
        Flaw("half-boxes", "no L1 distance of half tensors on CPU", _half_boxes),
        _BEYOND,
    ),
    "rtdetr": (
        Flaw("sizes-do-not-sum", "ground truths that belong to no image", _sizes_do_not_sum),
        Flaw("float-labels", "labels index the scores", _float_labels),
        _BEYOND,
    ),
}
