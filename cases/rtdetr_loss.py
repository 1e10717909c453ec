"""Cases of RT-DETR's set losses: drawn scenes, labelled images, and inputs that upstream rejects."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from cases.boxes import Picker, centre_form, drawn
from cases.case import DTYPES, Case
from cases.flaws import Flaw, perhaps
from cases.labels import LabelImage
from cases.predictions import Predictions, query_predictions, spoil
from cases.scenes import Scene, common_tags, draw_scene, scene_from_labels

#: Change it whenever the same draws give another case.
STRATEGY_VERSION = 1

LAYOUTS = ("grouped", "halves")
"""Positives of each group before its negatives (from 8.4.175), or all positives before all negatives."""

_RARELY = (False,) * 19 + (True,)
#: `use_fl` and `use_vfl`; the model trains with both.
_CLASS_TERMS = ((True, True),) * 3 + ((True, False),) * 2 + ((False, False), (False, True))
#: gamma and alpha: upstream's, and others that are exact in float32. Alpha 0 drops a factor.
_FOCAL = ((1.5, 0.25),) * 3 + ((2.0, 0.75), (1.0, 0.5), (0.0, 0.25), (3.0, 0.25), (2.0, 0.0), (1.5, -1.0))
_GAINS = (
    {"class": 1.0, "bbox": 5.0, "giou": 2.0},
    {"class": 1.0, "bbox": 5.0, "giou": 2.0},
    {"class": 0.5, "bbox": 1.0, "giou": 3.0},
)
#: A sigmoid never gives 0: the least side of a predicted box, as a share of the image.
_LEAST_SIDE = 1e-3
#: Beyond 18 a sigmoid is 0 or 1 in float32. Between 20 and 40 it is so in float64 too but for a digit or two, and
#: upstream's float64 sums are no truth; beyond they are again.
_SATURATED, _EXTREME_LOGITS = 18.0, (18.0, -18.0, 100.0, -100.0, 1e4, -1e4)
#: What a training step has: six decoder layers and the encoder, denoising in the decoder only.
_LAYERS, _DECODER_LAYERS, _NUM_DN = 7, 6, 100


@st.composite
def cases(
    draw: st.DrawFn,
    *,
    dtypes: Sequence[str] = ("float32",),
    focal: bool = True,
    subset: bool = True,
) -> Case:
    """Draw a case in one of `dtypes`.

    Older releases know less: until 8.3.117 gamma and alpha are fixed (`focal=False`), and until 8.4.125 every ground
    truth is denoised (`subset=False`).
    """
    pick = drawn(draw)
    dtype = pick.choice(dtypes)
    scene = draw_scene(pick, dtype=dtype)
    small = "small" in scene.tags
    layers = pick.choice((1, 2, 2, 3))
    queries = pick.integer(1, 12) if small else pick.choice((20, 50))
    gamma, alpha = pick.choice(_FOCAL) if focal else _FOCAL[0]
    use_fl, use_vfl = pick.choice(_CLASS_TERMS)
    shares = layers > 1 and pick.choice((False, False, False, True))
    settings = _settings(
        scene,
        loss_gain=dict(pick.choice(_GAINS)),
        aux_loss=pick.choice((True,) * 5 + (False,)),
        use_fl=use_fl,
        use_vfl=use_vfl,
        use_uni_match=shares,
        uni_match_ind=pick.integer(1 - layers, layers - 2) if shares else 0,
        gamma=gamma,
        alpha=alpha,
    )
    settings["autocast"] = _autocast(pick, dtype)
    denoised = pick.integer(1, 12) if pick.choice((True, True, False)) else 0
    layout = pick.choice((LAYOUTS[0], *LAYOUTS))
    extreme = pick.choice(_RARELY)
    case = build(
        scene,
        dtype,
        settings,
        f"drawn:rtdetr_loss/{STRATEGY_VERSION}",
        layers=layers,
        queries=queries,
        denoised=denoised,
        denoising_layers=pick.integer(1, layers),
        layout=layout,
        subset=subset,
        extreme=extreme,
    )
    return perhaps(pick, FLAWS, case)


def from_labels(
    images: Sequence[LabelImage],
    stage: str,
    seed: int,
    dtype: str = "float32",
    *,
    queries: int = 300,
    **_release: bool,
) -> Case:
    """The case of a batch of labelled `images` at training stage `stage`, as the model's training step has it.

    Takes the options of `cases` too: releases without subsets denoise every ground truth.
    """
    scene = scene_from_labels(images, stage, seed)
    return build(
        scene,
        dtype,
        _settings(scene, use_vfl=True),
        f"labels:{images[0].name}+{len(images) - 1}/{stage}/{seed}",
        layers=_LAYERS,
        queries=queries,
        denoised=_NUM_DN,
        denoising_layers=_DECODER_LAYERS,
        subset=_release.get("subset", True),
    )


def allows(case: Case, *, focal: bool = True, subset: bool = True) -> bool:
    """Whether `cases` with these options could have drawn `case`."""
    chosen = case.settings["gamma"], case.settings["alpha"]
    return (focal or chosen == _FOCAL[0]) and (subset or "denoising-subset" not in case.tags)


def build(
    scene: Scene,
    dtype: str,
    settings: dict[str, Any],
    origin: str,
    *,
    layers: int,
    queries: int,
    denoised: int = 0,
    denoising_layers: int = 1,
    layout: str = LAYOUTS[0],
    subset: bool = True,
    extreme: bool = False,
) -> Case:
    """The case of `scene` in `dtype`: `layers` layers of `queries` queries, and `denoised` queries of each sign.

    Upstream takes no half boxes in both places, so half cases keep float32 boxes beside half scores and are
    tagged "mixed-dtype".
    """
    tags = common_tags(scene, dtype) | _settings_tags(settings) | {f"layers-{layers}"}
    mixed = dtype in ("float16", "bfloat16")
    box_dtype = torch.float32 if mixed else DTYPES[dtype]
    predictions, aims = _stack(scene, scene.seed, layers, queries)
    truths = np.concatenate([_normalised(scene, boxes) for boxes in scene.boxes])
    tensors = {
        "pred_bboxes": torch.from_numpy(predictions.boxes).to(box_dtype),
        "pred_scores": torch.from_numpy(predictions.logits).to(DTYPES[dtype]),
        "cls": torch.from_numpy(np.concatenate(scene.class_indices)),
        "bboxes": torch.from_numpy(truths).to(box_dtype),
    }
    if extreme:
        _make_extreme(scene.seed, tensors["pred_scores"])
        tags.add("extreme")
    if denoised and any(scene.counts):
        tags.add("denoising")
        positions, chosen, groups = denoising_indices(scene.counts, denoised, scene.seed, layout, subset=subset)
        if any(len(some) < count for some, count in zip(chosen, scene.counts, strict=True)):
            tags.add("denoising-subset")
        rows = max(map(len, chosen))
        of_denoising, _ = _stack(scene, scene.seed + 1, denoising_layers, 2 * rows * groups)
        tensors |= {
            "dn_bboxes": torch.from_numpy(of_denoising.boxes).to(box_dtype),
            "dn_scores": torch.from_numpy(of_denoising.logits).to(DTYPES[dtype]),
            "dn_pos_idx": torch.from_numpy(np.concatenate(positions)),
            "dn_gt_idx": torch.from_numpy(np.concatenate(chosen)),
        }
        settings = settings | {
            "dn_pos_counts": [len(some) for some in positions],
            "dn_gt_counts": [len(some) for some in chosen],
            "dn_num_group": groups,
        }
    if mixed:
        tags.add("mixed-dtype")
    if max(scene.counts) > queries:
        tags.add("more-targets-than-queries")
    if queries == 1:
        tags.add("one-query")
    last = {name: tensors[name][-1] for name in ("pred_bboxes", "pred_scores")}
    if spoil(scene.prediction, scene.seed, aims, last):
        tags.add("non-finite")
    return Case("rtdetr_loss", tensors, settings, origin, frozenset(tags))


def denoising_indices(
    counts: Sequence[int], wanted: int, seed: int, layout: str, *, subset: bool
) -> tuple[list[np.ndarray], list[np.ndarray], int]:
    """Positions of the positives of each image, their ground truths in one group, and the number of groups."""
    rng = np.random.default_rng(seed)
    rows = min(max(counts), wanted) if subset else max(counts)
    groups = max(1, wanted // rows)
    stride = 2 * rows if layout == "grouped" else rows
    positions, chosen, first = [], [], 0
    for count in counts:
        some = np.sort(rng.permutation(count)[:rows])
        chosen.append(first + some)
        positions.append((stride * np.arange(groups)[:, None] + np.arange(len(some))).ravel())
        first += count
    return positions, chosen, groups


def _stack(scene: Scene, seed: int, layers: int, queries: int) -> tuple[Predictions, np.ndarray]:
    """Boxes (L, B, Q, 4) normalised and logits (L, B, Q, C) of every layer; whom the last one's queries follow."""
    made = [
        query_predictions(
            scene.prediction,
            seed + 101 * layer,
            scene.frame,
            scene.boxes,
            scene.class_indices,
            scene.num_classes,
            queries,
        )
        for layer in range(layers)
    ]
    boxes = _normalised(scene, np.stack([one.boxes for one in made]))
    if scene.prediction != "saturated":
        boxes[..., 2:] = np.maximum(boxes[..., 2:], _LEAST_SIDE)
    logits = np.stack([one.logits for one in made])
    if scene.prediction == "saturated":
        logits = logits.clip(-_SATURATED, _SATURATED)
    return Predictions(logits, np.empty(0), boxes, made[-1].aims), made[-1].aims


def _normalised(scene: Scene, boxes: np.ndarray) -> np.ndarray:
    """Centre form as shares of the image (..., 4), of xyxy `boxes` in pixels."""
    return centre_form(boxes) / np.array([scene.frame.width, scene.frame.height] * 2, dtype=np.float64)


def _make_extreme(seed: int, scores: Tensor) -> None:
    """Some logits where exponentials overflow or vanish, in place."""
    rng = np.random.default_rng([seed, 2])
    flat = scores.view(-1)
    places = torch.from_numpy(rng.integers(0, len(flat), 1 + len(flat) // 8))
    flat[places] = torch.from_numpy(rng.choice(_EXTREME_LOGITS, len(places))).to(scores.dtype)


def _settings(scene: Scene, **chosen: Any) -> dict[str, Any]:
    gamma, alpha = _FOCAL[0]
    return {
        "gt_groups": scene.counts,
        "num_classes": scene.num_classes,
        "loss_gain": dict(_GAINS[0]),
        "aux_loss": True,
        "use_fl": True,
        "use_vfl": False,
        "use_uni_match": False,
        "uni_match_ind": 0,
        "gamma": gamma,
        "alpha": alpha,
        "dn_pos_counts": [],
        "dn_gt_counts": [],
        "dn_num_group": 1,
        "autocast": None,
    } | chosen


def _settings_tags(settings: dict[str, Any]) -> set[str]:
    kind = "bce"
    if settings["use_fl"]:
        kind = "varifocal" if settings["use_vfl"] else "focal"
    tags = {kind}
    if settings["autocast"]:
        tags.add(f"autocast-{settings['autocast']}")
    if settings["use_uni_match"]:
        tags.add("shared-matching")
    if not settings["aux_loss"]:
        tags.add("no-auxiliary-layers")
    if settings["num_classes"] == 1:
        tags.add("one-class")
    return tags


def _autocast(pick: Picker, dtype: str) -> str | None:
    """Seldom, the dtype of half cases, or one of both for float32."""
    if dtype == "float64":
        return None
    return pick.choice((None,) * 6 + (("bfloat16", "float16") if dtype == "float32" else (dtype,)))


def _another_number_of_classes(_: dict[str, Tensor], settings: dict[str, Any]) -> bool:
    settings["num_classes"] += 1
    return True


def _class_beyond(tensors: dict[str, Tensor], settings: dict[str, Any]) -> bool:
    tensors["cls"][-1:] = settings["num_classes"]
    return len(tensors["cls"]) > 0


def _float_classes(tensors: dict[str, Tensor], _: dict[str, Any]) -> bool:
    tensors["cls"] = tensors["cls"].float()
    return len(tensors["cls"]) > 0


def _groups_do_not_sum(_: dict[str, Tensor], settings: dict[str, Any]) -> bool:
    settings["gt_groups"] = [*settings["gt_groups"][:-1], settings["gt_groups"][-1] + 1]
    return sum(settings["gt_groups"]) > 1


def _no_such_layer(tensors: dict[str, Tensor], settings: dict[str, Any]) -> bool:
    settings |= {"use_uni_match": True, "uni_match_ind": len(tensors["pred_bboxes"]) - 1}
    return settings["aux_loss"]


def _positives_and_truths_differ(tensors: dict[str, Tensor], settings: dict[str, Any]) -> bool:
    settings["dn_num_group"] += 1
    return "dn_bboxes" in tensors


def _positive_beyond(tensors: dict[str, Tensor], _: dict[str, Any]) -> bool:
    if "dn_bboxes" not in tensors:
        return False
    tensors["dn_pos_idx"][-1] = tensors["dn_bboxes"].shape[2]
    return True


def _half_boxes(tensors: dict[str, Tensor], _: dict[str, Any]) -> bool:
    # What upstream rejects ours answers, which must be finite: no slope of a box without area beyond float16 either.
    if not all(bool(value.isfinite().all()) for value in tensors.values()):
        return False
    for name in ("pred_bboxes", "bboxes", "dn_bboxes"):
        if name in tensors:
            tensors[name][..., 2:] = tensors[name][..., 2:].abs().clamp(min=0.05)
            tensors[name] = tensors[name].to(torch.float16)
    return len(tensors["cls"]) > 0


FLAWS = (
    Flaw("another-number-of-classes", "targets with another number of columns", _another_number_of_classes),
    Flaw("class-beyond-classes", "the cost of a class that has no column", _class_beyond),
    Flaw("float-classes", "classes index the scores", _float_classes),
    Flaw("groups-do-not-sum", "ground truths that belong to no image", _groups_do_not_sum),
    Flaw("no-such-layer", "a matching of a layer that does not exist", _no_such_layer),
    Flaw("positives-and-truths-differ", "a positive without a ground truth", _positives_and_truths_differ),
    Flaw("positive-beyond-queries", "a denoising query that does not exist", _positive_beyond),
    Flaw("half-boxes", "overlaps are written into a float32 tensor", _half_boxes),
)


def wave(shape: tuple[int, ...], a: float, b: float, amplitude: float, offset: float) -> Tensor:
    """S of set_prediction.md A13: offset + amplitude sin(a i + b) over the row-major index i, float32."""
    index = torch.arange(math.prod(shape), dtype=torch.float64)
    return (offset + amplitude * torch.sin(a * index + b)).float().view(shape)


def example(layers: int = 1, *, denoising: bool = False, **chosen: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and settings of the worked example, set_prediction.md B9; varifocal unless `chosen` says otherwise."""
    tensors = {
        "pred_bboxes": wave((layers, 2, 4, 4), 1.1, 0.5, 0.15, 0.4),
        "pred_scores": wave((layers, 2, 4, 3), 0.9, 0.3, 2, 0),
        "cls": torch.tensor([0, 2, 1]),
        "bboxes": torch.tensor([[0.3, 0.4, 0.2, 0.3], [0.6, 0.5, 0.4, 0.2], [0.5, 0.5, 0.3, 0.3]]),
    }
    settings = {
        "gt_groups": [2, 1],
        "num_classes": 3,
        "loss_gain": dict(_GAINS[0]),
        "aux_loss": True,
        "use_fl": True,
        "use_vfl": True,
        "use_uni_match": False,
        "uni_match_ind": 0,
        "gamma": 1.5,
        "alpha": 0.25,
        "dn_pos_counts": [],
        "dn_gt_counts": [],
        "dn_num_group": 1,
        "autocast": None,
    }
    if denoising:
        tensors |= {
            "dn_bboxes": wave((1, 2, 8, 4), 1.3, 0.1, 0.15, 0.4),
            "dn_scores": wave((1, 2, 8, 3), 0.6, 0.2, 2, 0),
            "dn_pos_idx": torch.tensor([0, 1, 4, 5, 0, 4]),
            "dn_gt_idx": torch.tensor([0, 1, 2]),
        }
        settings |= {"dn_pos_counts": [4, 2], "dn_gt_counts": [2, 1], "dn_num_group": 2}
    return tensors, settings | chosen


def pinned_cases() -> Iterator[tuple[str, Case]]:
    """The worked example B9 of set_prediction.md and the edge cases of its table B7, by name."""

    def case(*tags: str, given: tuple[dict[str, Tensor], dict[str, Any]] | None = None, **changes: Any) -> Case:
        tensors, settings = given or example()
        settings = settings | {name: value for name, value in changes.items() if name in settings}
        tensors = tensors | {name: value for name, value in changes.items() if name not in settings}
        narrow = {value.dtype for value in tensors.values() if value.is_floating_point()} - {torch.float32}
        dtype = str(next(iter(narrow), torch.float32)).removeprefix("torch.")
        return Case("rtdetr_loss", tensors, settings, "pinned", frozenset({dtype, *tags, *_settings_tags(settings)}))

    def truths(cls: Sequence[int], boxes: Sequence[Sequence[float]], groups: Sequence[int]) -> dict[str, Any]:
        return {
            "cls": torch.tensor(cls, dtype=torch.int64),
            "bboxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            "gt_groups": list(groups),
        }

    tensors, _ = example()
    boxes = tensors["bboxes"].tolist()
    for name, terms in (
        ("varifocal", {}),
        ("focal", {"use_vfl": False}),
        ("bce", {"use_fl": False, "use_vfl": False}),
    ):
        yield f"worked-example-{name}", case("worked-example", **terms)
        yield f"no-ground-truth-{name}", case("no-ground-truth", **truths([], [], (0, 0)), **terms)
    yield "worked-example-layers", case("worked-example", given=example(3))
    for index in (0, 1):
        shared = example(3, use_uni_match=True, uni_match_ind=index)
        yield f"worked-example-shared-matching-{index}", case("worked-example", given=shared)
    yield "worked-example-denoising", case("worked-example", "denoising", given=example(denoising=True))
    yield "layers-and-denoising-bce", case("denoising", given=example(3, denoising=True, use_fl=False))
    yield "second-image-empty", case("empty-image", **truths([0, 2], boxes[:2], (2, 0)))
    yield "first-image-empty", case("empty-image", **truths([2, 1], boxes[1:], (0, 2)))
    crowd = [(0.1 + 0.13 * i, 0.8 - 0.1 * i, 0.1 + 0.05 * i, 0.3 - 0.04 * i) for i in range(6)]
    yield (
        "more-targets-than-queries",
        case("more-targets-than-queries", **truths([0, 1, 2, 0, 1, 2, 1], [*crowd, boxes[2]], (6, 1))),
    )
    yield "identical-ground-truths", case("identical", "tie", **truths([0, 0, 1], [boxes[0], *boxes[::2]], (2, 1)))
    level = {
        "pred_bboxes": torch.tensor(boxes[0]).expand(1, 2, 4, 4).clone(),
        "pred_scores": torch.zeros(1, 2, 4, 3),
    }
    yield "all-costs-equal", case("tie", **truths([0, 0, 0], [boxes[0]] * 3, (2, 1)), **level)
    yield "zero-area-ground-truth", case("zero-area", **truths([0, 2, 1], [*boxes[:2], (0.45, 0.45, 0, 0)], (2, 1)))
    point = [0.5, 0.5, 0.0, 0.0]
    points = {"pred_bboxes": torch.tensor(point).expand(1, 2, 4, 4).clone()}
    yield "zero-area-everywhere", case("zero-area", "tie", **truths([0, 2, 1], [point] * 3, (2, 1)), **points)
    yield "ground-truth-outside", case("off-image", **truths([0, 2, 1], [*boxes[:2], (3, -2, 0.3, 0.3)], (2, 1)))
    yield "saturated-logits", case("extreme", pred_scores=tensors["pred_scores"].sign() * 1e4)
    negative = tensors["pred_bboxes"].clone()
    negative[0, 0, 0, 2] = -0.2
    yield "negative-width", case("inverted", pred_bboxes=negative)
    poisoned = tensors["pred_scores"].clone()
    poisoned[:, :, 3] = torch.nan
    yield "nan-logits-of-a-query", case("non-finite", pred_scores=poisoned)
    broken = tensors["pred_bboxes"].clone()
    broken[0, 0, 1, 0] = torch.nan
    yield "nan-box", case("non-finite", pred_bboxes=broken)
    wide = tensors["pred_bboxes"].clone()
    wide[0, :, 1, 2] = torch.inf
    yield "infinite-width", case("non-finite", pred_bboxes=wide)
    for dtype in ("bfloat16", "float16"):
        half = tensors["pred_scores"].to(DTYPES[dtype])
        yield f"{dtype}-scores", case("mixed-dtype", "tie", pred_scores=half, autocast=dtype)
    narrow = {name: tensors[name].half() for name in ("pred_bboxes", "bboxes")}
    yield "half-boxes", case("invalid", "divergence:rtdetr-loss-half-boxes", **narrow)
