"""Cases of the detection criterion of YOLOv8 and later: drawn scenes, labelled images, and what upstream rejects."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from cases import detection
from cases.boxes import drawn
from cases.case import Case
from cases.detection import Rows
from cases.flaws import Flaw, perhaps
from cases.frame import Frame
from cases.labels import LabelImage
from cases.predictions import spoil
from cases.scenes import Scene, common_tags, draw_scene, scene_from_labels

#: Change it whenever the same draws give another case.
STRATEGY_VERSION = 1

_LABELS = ("whole", "fractional", "fraction-below-zero", "negative")
_RARELY = (False,) * 19 + (True,)
#: Every anchor is proposed in small scenes; in larger ones that says nothing new.
_LARGEST_TOPK = 100


@st.composite
def cases(
    draw: st.DrawFn,
    *,
    dtypes: Sequence[str] = ("float32",),
    topk2: bool = True,
    class_weights: bool = True,
    row_order: bool = True,
) -> Case:
    """Draw a case in one of `dtypes`.

    Older releases know less: before 8.4.0 there is no second selection (`topk2=False`), before 8.4.37 there are no
    class weights (`class_weights=False`), and until 8.4.17 rows of any order are taken (`row_order=False`).
    """
    pick = drawn(draw)
    dtype = pick.choice(dtypes)
    scene = draw_scene(pick, dtype=dtype, labels=_LABELS)
    settings = drawn_settings(pick, scene, topk2=topk2, class_weights=class_weights)
    settings["autocast"] = detection.autocast(pick, dtype)
    extreme = pick.choice(_RARELY)
    case = build(scene, dtype, Rows.drawn(pick), settings, f"drawn:v8_detection_loss/{STRATEGY_VERSION}", extreme)
    return perhaps(pick, FLAWS if row_order else FLAWS_OF_ANY_ORDER, case)


def drawn_settings(pick, scene: Scene, *, topk2: bool, class_weights: bool) -> dict[str, Any]:
    """Settings of a drawn case, all but `autocast`."""
    anchors = scene.frame.anchors
    topk = pick.choice([k for k in (10, 10, 13, 1, 3, anchors) if k <= min(anchors, _LARGEST_TOPK)])
    second = pick.choice((None, None, None, 1, 1, 3, 14)) if topk2 else None
    weighted = class_weights and pick.choice((False, False, True))
    return detection.settings(
        scene,
        pick.choice(detection.REG_MAX),
        pick.choice(detection.GAINS),
        topk=topk,
        topk2=None if second is None else min(second, anchors),
        class_weights=detection.class_weights(pick, scene.num_classes) if weighted else None,
    )


def from_labels(images: Sequence[LabelImage], stage: str, seed: int, dtype: str = "float32", **_release: bool) -> Case:
    """The case of a batch of labelled `images` at training stage `stage`, with the trainers' settings.

    Takes the options of `cases` too: what they keep from older releases does not occur in labelled batches.
    """
    scene = scene_from_labels(images, stage, seed)
    settings = detection.settings(scene, 16, detection.GAINS[0], topk=10, topk2=None, class_weights=None, autocast=None)
    origin = f"labels:{images[0].name}+{len(images) - 1}/{stage}/{seed}"
    return build(scene, dtype, Rows(), settings, origin)


def allows(case: Case, *, topk2: bool = True, class_weights: bool = True, row_order: bool = True) -> bool:
    """Whether `cases` with these options could have drawn `case`."""
    return (
        (topk2 or case.settings["topk2"] is None)
        and (class_weights or case.settings["class_weights"] is None)
        and (row_order or "unsorted-rows" not in case.tags)
    )


def build(scene: Scene, dtype: str, rows: Rows, settings: dict[str, Any], origin: str, extreme: bool = False) -> Case:
    """The case of `scene` in `dtype`; targets are never half."""
    head = detection.head(scene, scene.seed, settings["reg_max"], dtype, extreme=extreme)
    tensors = {"boxes": head.boxes, "scores": head.scores, **detection.batch(scene, dtype, rows)}
    tags = common_tags(scene, dtype) | settings_tags(settings) | ({"extreme"} if extreme else set())
    # The last dim of what is spoiled are an anchor's channels.
    places = {name: tensors[name].mT for name in ("boxes", "scores")}
    if spoil(scene.prediction, scene.seed, head.aims, places):
        tags.add("non-finite")
    return Case("v8_detection_loss", tensors, settings, origin, frozenset(tags))


def settings_tags(settings: dict[str, Any]) -> set[str]:
    """What the settings say of a case."""
    tags = {f"reg-max-{settings['reg_max']}"}
    if settings["autocast"]:
        tags.add(f"autocast-{settings['autocast']}")
    if settings["class_weights"] is not None:
        tags.add("class-weights")
    if settings.get("topk2") not in (None, settings.get("topk")):
        tags.add("topk2")
    if settings["num_classes"] == 1:
        tags.add("one-class")
    return tags


def _topk_above_anchors(tensors: dict[str, Tensor], settings: dict[str, Any]) -> bool:
    settings["topk"] = tensors["boxes"].shape[2] + 1
    return len(tensors["bboxes"]) > 0


def _label_beyond_classes(tensors: dict[str, Tensor], settings: dict[str, Any]) -> bool:
    """Only a row with a candidate is looked up: a row as large as the image."""
    if not len(tensors["bboxes"]):
        return False
    tensors["bboxes"][0] = torch.tensor([0.5, 0.5, 1.0, 1.0])
    tensors["cls"][0] = settings["num_classes"]
    return True


def _image_beyond_batch(tensors: dict[str, Tensor], _: dict[str, Any]) -> bool:
    tensors["batch_idx"][-1:] = len(tensors["boxes"])
    return len(tensors["bboxes"]) > 0


def _weights_of_another_length(tensors: dict[str, Tensor], settings: dict[str, Any]) -> bool:
    settings["class_weights"] = [1.0] * (settings["num_classes"] + 1)
    # One weight for all, and all of one class, would broadcast.
    return settings["num_classes"] > 1


def _unsorted_rows(tensors: dict[str, Tensor], _: dict[str, Any]) -> bool:
    index = tensors["batch_idx"].view(-1)
    if not len(index) or index[-1] == 0 or not (index == 0).any():
        return False
    index[-1] = 0
    # Upstream notices where the row's place lies beyond the fullest image.
    return len(index) > int(index.long().bincount().max())


FLAWS_OF_ANY_ORDER = (
    Flaw("topk-above-anchors", "there are not that many anchors to select", _topk_above_anchors),
    Flaw("label-beyond-classes", "the score of a class that does not exist", _label_beyond_classes),
)
FLAWS = (
    *FLAWS_OF_ANY_ORDER,
    Flaw("image-beyond-batch", "a row of an image that does not exist", _image_beyond_batch),
    Flaw("weights-of-another-length", "one weight a class", _weights_of_another_length),
    Flaw("unsorted-rows", "a row's place in its image follows from the order", _unsorted_rows),
)


def pattern(shape: tuple[int, ...], a: float, b: float, c: float) -> Tensor:
    """S of yolo_losses.md: a sin(b n + c) over the row-major index n, float32."""
    index = torch.arange(math.prod(shape), dtype=torch.float64)
    return (a * torch.sin(b * index + c)).float().view(shape)


EXAMPLE_LEVELS = [[8, 12], [4, 6], [2, 3]]


def example(reg_max: int = 16, classes: int = 3) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and settings of example ExD of yolo_losses.md, section 3."""
    boxes = pattern((2, 4 * reg_max, 126), 1, 0.7, 0.3)
    tensors = {
        "boxes": boxes + 1.5 if reg_max == 1 else boxes,
        "scores": pattern((2, classes, 126), 2, 1.1, 0.5) - 2,
        "batch_idx": torch.tensor([0.0, 0.0, 1.0]),
        "cls": torch.tensor([0.0, 2.0, 1.0]) if classes > 1 else torch.zeros(3),
        "bboxes": torch.tensor([[0.30, 0.40, 0.40, 0.50], [0.70, 0.60, 0.35, 0.55], [0.50, 0.50, 0.60, 0.70]]),
    }
    settings = {
        "levels": EXAMPLE_LEVELS,
        "strides": [8, 16, 32],
        "num_classes": classes,
        "reg_max": reg_max,
        "gains": {"box": 7.5, "cls": 0.5, "dfl": 1.5},
        "topk": 10,
        "topk2": None,
        "class_weights": None,
        "autocast": None,
    }
    return tensors, settings


def close_scores() -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The example with every anchor at its object's box and logits a thousandth apart: half steps are wider."""
    tensors, settings = example(reg_max=1)
    frame = Frame(96, 64, (8, 16, 32))
    cells = torch.from_numpy(frame.cells).float()
    centre, side = tensors["bboxes"].mul(torch.tensor([96.0, 64.0] * 2)).split(2, 1)
    points = torch.from_numpy(frame.points).float()
    owner = torch.stack(((points[:, 0] > 48).long(), torch.full((len(points),), 2)))
    near, far = ((centre + sign * side / 2)[owner] for sign in (-1, 1))
    distances = torch.cat((points - near, far - points), -1) / cells[:, 2:]
    order = (torch.arange(126) * 37 % 126).float()
    return tensors | {
        "boxes": distances.mT.contiguous(),
        "scores": (-2 - order / 1000).expand(2, 3, -1).clone(),
    }, settings


def pinned_cases() -> Iterator[tuple[str, Case]]:
    """The worked example of yolo_losses.md, section 3, and the edge cases of its list, by name."""

    def case(tags: set[str], changes: dict[str, Tensor] | None = None, *, given=None, **settings: Any) -> Case:
        tensors, chosen = given or example()
        return Case(
            "v8_detection_loss", tensors | (changes or {}), chosen | settings, "pinned", frozenset({"float32", *tags})
        )

    tensors, _ = example()
    labels = ("batch_idx", "cls", "bboxes")
    yield "worked-example", case({"worked-example"})
    yield "field-u-25941-no-dfl-head", case({"worked-example"}, given=example(reg_max=1))
    yield "class-weights", case({"class-weights"}, class_weights=[0.5, 1.0, 2.0])
    yield "one-to-one-by-topk", case({"one-to-one"}, topk=1)
    yield "one-to-one-by-topk2", case({"one-to-one", "topk2"}, topk=7, topk2=1)
    yield "one-class", case({"one-class"}, given=example(classes=1))
    yield (
        "field-u-25209-one-class-topk2",
        case({"one-class", "one-to-one", "topk2"}, given=example(classes=1), topk=7, topk2=1),
    )
    yield "field-multimediatechlab-yolo-48-predictions-detached", case({"detached"}, topk=5)
    yield "field-yolov7-306-one-device", case({"one-device"}, topk=3)
    yield "field-u-490-no-objects", case({"no-ground-truth"}, {name: tensors[name][:0] for name in labels})
    yield "field-u-490-empty-image", case({"empty-image"}, {name: tensors[name][:2] for name in labels})
    outside = tensors["bboxes"] + torch.tensor([3.0, 0, 0, 0])
    yield "no-foreground", case({"off-image"}, {"bboxes": outside})
    # A corner sum of 0 or less: the row counts as padding.
    yield "box-taken-for-padding", case({"off-image"}, {"bboxes": tensors["bboxes"] - torch.tensor([0.8, 0.8, 0, 0])})
    every = {
        "boxes": pattern((1, 64, 11), 1, 0.7, 0.3),
        "scores": pattern((1, 3, 11), 2, 1.1, 0.5) - 2,
        "batch_idx": torch.zeros(1),
        "cls": torch.zeros(1),
        "bboxes": torch.tensor([[0.5, 0.5, 4.0, 4.0]]),
    }
    yield "every-anchor-foreground", case({"huge"}, every, topk=11, levels=[[3, 3], [1, 1], [1, 1]])
    twin = tensors["bboxes"][[0, 0, 2]]
    yield "identical-ground-truths", case({"identical", "tie"}, {"bboxes": twin, "cls": torch.zeros(3)})
    sides = torch.tensor([[0.4, 0.4, 0.0, 0.0], [0.5, 0.5, 0.3, 0.0], [0.5, 0.5, 0.01, 0.9]])
    yield "zero-area-and-thin", case({"zero-area", "thin", "tie"}, {"bboxes": sides})
    yield "integer-columns", case({"columns"}, {n: tensors[n].long().view(-1, 1) for n in ("batch_idx", "cls")})
    yield "saturated-scores", case({"saturated"}, {"scores": tensors["scores"].sign() * 30})
    fresh = {name: torch.zeros_like(tensors[name]) for name in ("boxes", "scores")}
    yield "fresh-head", case({"prediction-uniform", "tie"}, fresh)
    differs = "divergence:v8-detection-non-finite-prediction"
    # Anchor 0 of image 0 lies in no box, anchor 40 in the first one. A NaN of a class that no box has costs that alone.
    for name, channel, anchor, value, tags in (
        ("nan-score-outside-all-boxes", ("scores", 1), 0, torch.nan, set()),
        ("nan-score-of-the-class-of-a-box", ("scores", 0), 40, torch.nan, {differs}),
        ("nan-score-of-another-class", ("scores", 1), 40, torch.nan, set()),
        ("nan-box-channel-outside-all-boxes", ("boxes", 0), 0, torch.nan, {differs}),
        ("nan-box-channel-inside-a-box", ("boxes", 0), 40, torch.nan, {differs}),
        ("infinite-box-channel-inside-a-box", ("boxes", 20), 40, torch.inf, {differs}),
        ("impossible-bin", ("boxes", 15), 40, -torch.inf, set()),
        ("infinite-score-of-background", ("scores", 1), 0, torch.inf, set()),
        ("impossible-score-of-background", ("scores", 1), 0, -torch.inf, {differs}),
    ):
        tensor, place = tensors[channel[0]].clone(), channel[1]
        tensor[0, place, anchor] = value
        yield name, case({"non-finite", *tags}, {channel[0]: tensor})
    for dtype in ("bfloat16", "float16"):
        tags = {f"autocast-{dtype}", "reg-max-1"}
        yield f"field-u-25990-autocast-{dtype}", case(tags, given=close_scores(), autocast=dtype, topk=5)
