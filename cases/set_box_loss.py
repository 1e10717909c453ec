"""Cases of the box losses of set prediction: boxes and given pairs."""

from collections.abc import Iterator, Sequence
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


@st.composite
def cases(draw: st.DrawFn, *, dtypes: Sequence[str] = ("float32",)) -> Case:
    """Draw a case in one of `dtypes`, that of all boxes; half predictions meet float32 targets now and then."""
    pick = drawn(draw)
    dtype = pick.choice(dtypes)
    scene = draw_scene(pick, dtype=dtype, boxes=shared.BOX_KINDS)
    case = build(
        scene,
        dtype,
        shared.query_count(pick, scene),
        f"drawn:set_box_loss/{STRATEGY_VERSION}",
        num_boxes=pick.choice((None, None, None, 1.0, 2.5)),
        mixed=dtype in shared.HALVES and pick.choice(shared.NOW_AND_THEN),
        flat=pick.choice(shared.NOW_AND_THEN),
        partial=pick.choice(shared.NOW_AND_THEN),
        autocast=shared.autocast(pick, dtype),
    )
    return perhaps(pick, FLAWS, case)


def from_labels(
    images: Sequence[LabelImage], stage: str, seed: int, dtype: str = "float32", *, queries: int = 300
) -> Case:
    """The case of a batch of labelled `images` at training stage `stage`."""
    scene = scene_from_labels(images, stage, seed)
    return build(scene, dtype, queries, f"labels:{images[0].name}+{len(images) - 1}/{stage}/{seed}")


def allows(case: Case) -> bool:
    """Whether `cases` could have drawn `case`."""
    return True


def build(
    scene: Scene,
    dtype: str,
    queries: int,
    origin: str,
    *,
    num_boxes: float | None = None,
    mixed: bool = False,
    flat: bool = False,
    partial: bool = False,
    autocast: str | None = None,
) -> Case:
    """The case of `scene`; `mixed` has float32 targets, `flat` predictions without width or height, `partial` pairs."""
    found = shared.predict(scene, dtype, queries, flat=flat)
    pairs, counts = shared.pairs(scene, found.aims, partial=partial)
    boxes = shared.targets(scene, torch.float32 if mixed else DTYPES[dtype])["boxes"]
    tags = shared.tags(scene, dtype, queries)
    if shared.spoiled(scene, found, {"pred_boxes": found.boxes}):
        tags.add("non-finite")
    for tag, holds in (
        ("mixed-dtype", mixed),
        ("flat-predictions", flat),
        ("partial-pairs", partial),
        (f"autocast-{autocast}", autocast),
    ):
        if holds:
            tags.add(tag)
    settings = {
        "sizes": scene.counts,
        "pairs": counts,
        "num_boxes": float(max(1, len(boxes))) if num_boxes is None else num_boxes,
        "autocast": autocast,
    }
    return Case("set_box_loss", {"pred_boxes": found.boxes, "boxes": boxes, **pairs}, settings, origin, frozenset(tags))


def _first_matched(tensors: dict[str, Tensor], settings: dict[str, Any], name: str) -> Tensor | None:
    """The box of the first pair, to be changed in place."""
    if not len(tensors["queries"]):
        return None
    image = next(image for image, count in enumerate(settings["pairs"]) if count)
    if name == "pred_boxes":
        return tensors[name][image, tensors["queries"][0]]
    return tensors[name][sum(settings["sizes"][:image]) + int(tensors["targets"][0])]


def _spoiler(name: str, place: int, value: float):
    def make(tensors: dict[str, Tensor], settings: dict[str, Any]) -> bool:
        box = _first_matched(tensors, settings, name)
        if box is not None:
            box[place] = value
        return box is not None

    return make


def _query_beyond(tensors: dict[str, Tensor], _: dict[str, Any]) -> bool:
    tensors["queries"][-1:] = tensors["pred_boxes"].shape[1]
    return len(tensors["queries"]) > 0


FLAWS = (
    Flaw("inverted-prediction", "x2 < x1", _spoiler("pred_boxes", 2, -0.25)),
    Flaw("inverted-target", "y2 < y1", _spoiler("boxes", 3, -0.25)),
    Flaw("nan-prediction", "corners that are not ordered", _spoiler("pred_boxes", 0, torch.nan)),
    Flaw("query-beyond", "a query that does not exist", _query_beyond),
)


def pinned_cases() -> Iterator[tuple[str, Case]]:
    """The worked example A13 and the edge cases of A6 and A11, by name."""

    def case(tags: set[str], **changes: Any) -> Case:
        given, settings = shared.example()
        pairs, counts = shared.example_pairs()
        tensors = {"pred_boxes": given["pred_boxes"], "boxes": given["boxes"], **pairs}
        settings |= {"pairs": counts, "num_boxes": 3.0, "autocast": None}
        tensors |= {name: value for name, value in changes.items() if name in tensors}
        settings |= {name: value for name, value in changes.items() if name in settings}
        return Case("set_box_loss", tensors, settings, "pinned", frozenset({"float32", *tags}))

    given, _ = shared.example()
    predicted, boxes = given["pred_boxes"], given["boxes"]

    def with_boxes(**places: Sequence[float]) -> dict[str, Tensor]:
        """The example with the first pair's prediction, its target, or the second pair's target replaced."""
        found = {"pred_boxes": predicted.clone(), "boxes": boxes.clone()}
        for name, box in places.items():
            tensor, index = {
                "prediction": (found["pred_boxes"][0], 2),
                "target": (found["boxes"], 0),
                "other": (found["boxes"], 1),
            }[name]
            tensor[index] = torch.tensor(box)
        return found

    nothing = torch.empty(0, dtype=torch.int64)
    point, elsewhere = (0.4, 0.4, 0.0, 0.0), (0.7, 0.6, 0.0, 0.0)
    yield "worked-example", case({"worked-example"})
    yield (
        "no-pair",
        case({"no-ground-truth"}, boxes=boxes[:0], queries=nothing, targets=nothing, sizes=[0, 0], pairs=[0, 0]),
    )
    yield "all-counted-of-seven", case(set(), num_boxes=7.0)
    yield "identical", case({"identical"}, **with_boxes(prediction=boxes[0].tolist()))
    yield "touching", case({"touching"}, **with_boxes(prediction=(0.5, 0.4, 0.2, 0.3)))
    yield "far-outside", case({"off-image"}, **with_boxes(target=(3.0, -2.0, 0.5, 0.5)))
    yield "zero-area-target", case({"zero-area"}, **with_boxes(target=(0.4, 0.4, 0.0, 0.0)))
    # Upstream's gradient is NaN by an overlap of two boxes that are not a pair.
    yield (
        "zero-area-across-pairs",
        case({"zero-area", "divergence:set-box-undefined-overlap"}, **with_boxes(prediction=point, other=elsewhere)),
    )
    # And here its loss is.
    yield (
        "zero-area-pair",
        case({"zero-area", "divergence:set-box-undefined-overlap"}, **with_boxes(prediction=point, target=elsewhere)),
    )
    yield (
        "zero-area-pair-in-one-place",
        case({"zero-area", "divergence:set-box-undefined-overlap"}, **with_boxes(prediction=point, target=point)),
    )
    yield "infinite-width", case({"non-finite"}, **with_boxes(prediction=(0.4, 0.4, torch.inf, 0.2)))
    yield "negative-width", case({"invalid", "inverted-prediction"}, **with_boxes(prediction=(0.4, 0.4, -0.1, 0.2)))
    yield "nan-target", case({"invalid", "nan-target"}, **with_boxes(target=(torch.nan, 0.4, 0.1, 0.2)))
    unmatched = predicted.clone()
    unmatched[0, 0] = torch.tensor([torch.nan, 0.1, -0.5, 0.2])
    yield "unmatched-is-not-looked-at", case({"non-finite"}, pred_boxes=unmatched)
