"""Cases of the set criterion of DETR and YOLOS: drawn scenes, labelled images, and inputs that upstream rejects."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from cases import set_prediction as shared
from cases.boxes import drawn
from cases.case import DTYPES, Case
from cases.flaws import Flaw, perhaps
from cases.labels import LabelImage
from cases.scenes import Scene, draw_scene, scene_from_labels

#: Change it whenever the same draws give another case.
STRATEGY_VERSION = 1

_EOS = (0.1, 0.1, 0.1, 0.5, 1.0, 0.0)
#: Class, box and GIoU cost: the models', the matcher's defaults, and one without a class term.
_COSTS = ((1, 5, 2), (1, 5, 2), (1, 1, 1), (0, 5, 2))
#: Weights of the total: the models', and each term alone, so that a fault of one gradient stands alone.
_COEFFICIENTS = (
    (5.0, 2.0, 1.0, 1.0),
    (5.0, 2.0, 1.0, 1.0),
    (5.0, 0.0, 0.0, 0.0),
    (0.0, 2.0, 0.0, 0.0),
    (0, 0, 1.5, 0.5),
)
_MASKED_TARGETS, _MASKED_QUERIES = 24, 12


@st.composite
def cases(draw: st.DrawFn, *, dtypes: Sequence[str] = ("float32",)) -> Case:
    """Draw a case in one of `dtypes`: half logits and masks stand beside float32 boxes, see `build`."""
    pick = drawn(draw)
    dtype = pick.choice(dtypes)
    labels = ("whole",) * 9 + ("no-object",)
    scene = draw_scene(pick, dtype=dtype, boxes=shared.BOX_KINDS, labels=labels)
    segmentation = pick.choice((False, False, False, True))
    if segmentation:
        scene = replace(scene, images=tuple(image[:_MASKED_TARGETS] for image in scene.images))
    queries = pick.integer(1, _MASKED_QUERIES) if segmentation else shared.query_count(pick, scene)
    layers = pick.choice((1, 1, 2, 3))
    settings = _settings(
        scene,
        pick.choice(_EOS),
        pick.choice(_COSTS),
        pick.choice(_COEFFICIENTS),
        auxiliary=layers > 1 and pick.choice((True,) * 4 + (False,)),
        decoder_layers=max(1, layers + pick.choice((0, 0, 0, -1, 1))),
        autocast=shared.autocast(pick, dtype),
    )
    case = build(
        scene,
        dtype,
        queries,
        settings,
        f"drawn:set_loss/{STRATEGY_VERSION}",
        layers=layers,
        masks=shared.draw_masks(pick, len(scene.images)) if segmentation else None,
        extreme=pick.choice(shared.RARELY),
    )
    return perhaps(pick, FLAWS, case)


def from_labels(
    images: Sequence[LabelImage], stage: str, seed: int, dtype: str = "float32", *, queries: int = 300, layers: int = 1
) -> Case:
    """The case of a batch of labelled `images` at training stage `stage`, with the models' settings."""
    scene = scene_from_labels(images, stage, seed)
    settings = _settings(scene, _EOS[0], _COSTS[0], _COEFFICIENTS[0], auxiliary=layers > 1, decoder_layers=layers)
    origin = f"labels:{images[0].name}+{len(images) - 1}/{stage}/{seed}"
    return build(scene, dtype, queries, settings, origin, layers=layers)


def allows(case: Case) -> bool:
    """Whether `cases` could have drawn `case`."""
    return True


def build(
    scene: Scene,
    dtype: str,
    queries: int,
    settings: dict[str, Any],
    origin: str,
    *,
    layers: int = 1,
    masks: tuple[tuple[int, int], list[list[int]], torch.dtype] | None = None,
    extreme: bool = False,
) -> Case:
    """The case of `scene` with `layers` decoder layers, and `masks` as `cases.set_prediction.draw_masks` gives them.

    The L1 distance of transformers' matcher has no half type on CPU: half cases keep float32 boxes, "mixed-dtype".
    """
    half = dtype in shared.HALVES
    box_dtype = torch.float32 if half else DTYPES[dtype]
    last, *former = (
        shared.predict(scene, dtype, queries, layer=layer, box_dtype=box_dtype, extreme=extreme)
        for layer in range(layers)
    )
    tensors = {"logits": last.logits, "pred_boxes": last.boxes, **shared.targets(scene, box_dtype)}
    if former:
        tensors["aux_logits"] = torch.stack([layer.logits for layer in former])
        tensors["aux_boxes"] = torch.stack([layer.boxes for layer in former])
    tags = shared.tags(scene, dtype, queries) | _tags(settings, layers)
    if masks is not None:
        small, sizes, kind = masks
        given = shared.masks(scene, last.aims, dtype, small, sizes, kind=kind)
        tensors |= {"pred_masks": given.logits, "masks": given.masks}
        settings = settings | {"mask_sizes": given.sizes}
        tags.add("segmentation")
    if half:
        tags.add("mixed-dtype")
    if extreme:
        tags.add("extreme")
    if shared.spoiled(scene, last, {name: tensors[name] for name in ("logits", "pred_boxes")}):
        tags.add("non-finite")
    return Case("set_loss", tensors, settings, origin, frozenset(tags))


def _settings(
    scene: Scene,
    eos_coef: float,
    costs: tuple[float, ...],
    coefficients: tuple[float, ...],
    *,
    auxiliary: bool = False,
    decoder_layers: int = 1,
    autocast: str | None = None,
) -> dict[str, Any]:
    return {
        "sizes": scene.counts,
        "num_classes": scene.num_classes,
        "eos_coef": eos_coef,
        **dict(zip(("class_cost", "bbox_cost", "giou_cost"), map(float, costs), strict=True)),
        **dict(zip(("bbox_coef", "giou_coef", "mask_coef", "dice_coef"), map(float, coefficients), strict=True)),
        "auxiliary": auxiliary,
        "decoder_layers": decoder_layers,
        "autocast": autocast,
    }


def _tags(settings: dict[str, Any], layers: int) -> set[str]:
    found = {f"layers-{layers}"}
    if settings["autocast"]:
        found.add(f"autocast-{settings['autocast']}")
    if layers > 1 and not settings["auxiliary"]:
        found.add("auxiliary-not-looked-at")
    if settings["auxiliary"] and settings["decoder_layers"] < layers:
        found.add("layer-without-weight")
    return found


def _spoiler(name: str, place: int, value: float):
    def make(tensors: dict[str, Tensor], _: dict[str, Any]) -> bool:
        tensors[name].view(-1, 4)[:1, place] = value
        return tensors[name].numel() > 0

    return make


def _zero_costs(_: dict[str, Tensor], settings: dict[str, Any]) -> bool:
    settings |= {"class_cost": 0.0, "bbox_cost": 0.0, "giou_cost": 0.0}
    return True


def _label(value: int | None):
    def make(tensors: dict[str, Tensor], _: dict[str, Any]) -> bool:
        # With as many queries as targets all are matched, and so looked at by the class loss.
        tensors["labels"][:] = tensors["logits"].shape[2] if value is None else value
        return len(tensors["labels"]) > 0

    return make


def _half_boxes(tensors: dict[str, Tensor], _: dict[str, Any]) -> bool:
    for name in ("boxes", "pred_boxes", "aux_boxes"):
        if name in tensors:
            tensors[name] = tensors[name].to(torch.float16)
    return len(tensors["boxes"]) > 0


def _another_number_of_classes(_: dict[str, Tensor], settings: dict[str, Any]) -> bool:
    settings["num_classes"] += 1
    return True


FLAWS = (
    Flaw("inverted-target", "x2 < x1", _spoiler("boxes", 2, -0.25)),
    Flaw("inverted-prediction", "y2 < y1", _spoiler("pred_boxes", 3, -0.25)),
    Flaw("nan-box", "corners that are not ordered", _spoiler("pred_boxes", 0, torch.nan)),
    Flaw("zero-costs", "a matcher that matches by nothing", _zero_costs),
    Flaw("label-beyond-classes", "the cost of a class that has no column", _label(None)),
    Flaw("negative-label", "cross entropy has no class -1", _label(-1)),
    Flaw("half-boxes", "no L1 distance of half tensors on CPU", _half_boxes),
    Flaw("another-number-of-classes", "one weight a column", _another_number_of_classes),
)


def pinned_cases() -> Iterator[tuple[str, Case]]:
    """The worked example A13 with its auxiliary layers and masks, and the edge cases of A11, by name."""
    given, _ = shared.example()
    logits, predicted, labels, boxes = given.values()
    masks, mask_sizes = shared.example_masks()
    former = {
        "aux_logits": torch.stack([logits / 2, logits.flip(1)]),
        "aux_boxes": torch.stack([predicted, predicted.flip(1)]),
    }

    def case(tags: set[str], more: dict[str, Tensor] | None = None, **changes: Any) -> Case:
        tensors, settings = shared.example()
        settings |= {"num_classes": 3, "eos_coef": 0.1, "class_cost": 1.0, "bbox_cost": 5.0, "giou_cost": 2.0}
        settings |= {"bbox_coef": 5.0, "giou_coef": 2.0, "mask_coef": 1.0, "dice_coef": 1.0}
        settings |= {"auxiliary": False, "decoder_layers": 1, "autocast": None}
        tensors |= more or {}
        if "pred_masks" in tensors:
            settings["mask_sizes"] = mask_sizes
        tensors |= {name: value for name, value in changes.items() if isinstance(value, Tensor)}
        settings |= {name: value for name, value in changes.items() if not isinstance(value, Tensor)}
        return Case("set_loss", tensors, settings, "pinned", frozenset({"float32", *tags}))

    yield "worked-example", case({"worked-example"})
    yield "masks", case({"worked-example", "segmentation"}, masks)
    yield "auxiliary", case({"worked-example", "layers-3"}, former, auxiliary=True, decoder_layers=3)
    yield (
        "auxiliary-and-masks",
        case({"worked-example", "layers-3", "segmentation"}, former | masks, auxiliary=True, decoder_layers=3),
    )
    yield (
        "auxiliary-layer-without-weight",
        case({"worked-example", "layers-3", "layer-without-weight"}, former, auxiliary=True, decoder_layers=2),
    )
    yield "auxiliary-not-looked-at", case({"layers-3", "auxiliary-not-looked-at"}, former)
    yield "autocast", case({"autocast-bfloat16"}, autocast="bfloat16")

    none = {"labels": labels[:0], "boxes": boxes[:0]}
    yield "no-ground-truth", case({"no-ground-truth", "empty-image"}, sizes=[0, 0], **none)
    yield (
        "no-ground-truth-and-no-weight",
        case({"no-ground-truth", "divergence:set-loss-undefined"}, sizes=[0, 0], eos_coef=0.0, **none),
    )
    yield "first-image-empty", case({"empty-image"}, labels=labels[1:], boxes=boxes[1:], sizes=[0, 2])
    yield "second-image-empty", case({"empty-image"}, labels=labels[:2], boxes=boxes[:2], sizes=[2, 0])
    crowd = torch.tensor([[0.1 + 0.13 * i, 0.8 - 0.1 * i, 0.1 + 0.05 * i, 0.3 - 0.04 * i] for i in range(6)])
    yield (
        "more-targets-than-queries",
        case(
            {"more-targets-than-queries"},
            labels=torch.tensor([0, 1, 2, 0, 1, 2, 1]),
            boxes=torch.cat([crowd, boxes[2:]]),
            sizes=[6, 1],
        ),
    )
    yield "identical-ground-truths", case({"identical", "tie"}, labels=labels[[0, 0, 2]], boxes=boxes[[0, 0, 2]])
    outside = boxes.clone()
    outside[0] = torch.tensor([3.0, -2.0, 0.5, 0.5])
    yield "off-image", case({"off-image"}, boxes=outside)
    flat = boxes.clone()
    flat[0, 2:] = 0
    yield "zero-area-target", case({"zero-area"}, boxes=flat)
    points = predicted.clone()
    points[..., 2:] = 0
    # Pairs of two points cost the largest number, are forced all the same, and overlap by 0/0.
    yield (
        "zero-area-everywhere",
        case({"zero-area", "tie", "divergence:set-loss-undefined"}, boxes=flat, pred_boxes=points),
    )
    for name, value in (("nan", torch.nan), ("inf", torch.inf)):
        poisoned = logits.clone()
        poisoned[:, 3, 1] = value
        yield f"{name}-logit", case({"non-finite"}, logits=poisoned)
    wide = predicted.clone()
    wide[:, 1, 2] = torch.inf
    yield "infinite-width-unmatched", case({"non-finite"}, pred_boxes=wide)
    yield (
        "one-image",
        case(set(), logits=logits[:1], pred_boxes=predicted[:1], labels=labels[:2], boxes=boxes[:2], sizes=[2]),
    )
    yield (
        "all-costs-equal",
        case({"tie"}, logits=torch.zeros_like(logits), pred_boxes=torch.full_like(predicted, 0.4)),
    )
    yield (
        "negative-width",
        case({"invalid", "inverted-prediction"}, pred_boxes=predicted * torch.tensor([1, 1, -1, 1.0])),
    )
    yield "no-query", case({"invalid"}, logits=logits[:, :0], pred_boxes=predicted[:, :0])
    yield "negative-label", case({"invalid", "negative-label"}, labels=torch.tensor([0, -1, 1]))
