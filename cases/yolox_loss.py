"""Cases of the total loss of YOLOX's head: drawn scenes, labelled images, and inputs that upstream rejects."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from cases import boxes as box_kinds
from cases import yolox_head
from cases.boxes import drawn
from cases.case import DTYPES, Case
from cases.flaws import Flaw, perhaps
from cases.labels import LabelImage
from cases.predictions import spoil
from cases.scenes import Scene, common_tags, draw_scene, scene_from_labels
from cases.simota import candidates
from cases.yolox_head import WAVE_FRAME, WAVE_LABELS, wave_rows

#: Change it whenever the same draws give another case.
STRATEGY_VERSION = 1

_RARELY = (False,) * 19 + (True,)


@st.composite
def cases(draw: st.DrawFn, *, dtypes: Sequence[str] = ("float32",)) -> Case:
    """Draw a case in one of `dtypes`."""
    pick = drawn(draw)
    dtype = pick.choice(dtypes)
    use_l1 = pick.choice((False, True))
    # The L1 target of a negative side is NaN, beside which nothing else of the total would show.
    kinds = [kind for kind in box_kinds.KINDS if not use_l1 or kind != "inverted"]
    scene = draw_scene(pick, dtype=dtype, boxes=kinds, labels=("fractional", "fraction-below-zero"))
    label_dtype = pick.choice((dtype, dtype, dtype, "float32" if dtype != "float64" else dtype))
    case = build(
        scene,
        dtype,
        f"drawn:yolox_loss/{STRATEGY_VERSION}",
        use_l1=use_l1,
        autocast=yolox_head.autocast(pick, dtype),
        # Beside half maps upstream rounds areas of whole numbers twice over, in int64 and in the half type.
        label_dtype="int64" if pick.choice(_RARELY) and dtype in ("float32", "float64") else label_dtype,
        extra=pick.choice((0, 0, 1, 2)),
        gap=pick.choice(_RARELY),
        extreme=pick.choice(_RARELY),
    )
    return perhaps(pick, FLAWS, case)


def from_labels(images: Sequence[LabelImage], stage: str, seed: int, dtype: str = "float32") -> Case:
    """The case of a batch of labelled `images` at training stage `stage`, L1 off as in most epochs."""
    scene = scene_from_labels(images, stage, seed)
    return build(scene, dtype, f"labels:{images[0].name}+{len(images) - 1}/{stage}/{seed}")


def allows(_: Case) -> bool:
    """Whether `cases` could have drawn the case: there are no options, so it could."""
    return True


def build(
    scene: Scene,
    dtype: str,
    origin: str,
    *,
    use_l1: bool = False,
    autocast: str | None = None,
    label_dtype: str = "",
    extra: int = 0,
    gap: bool = False,
    extreme: bool = False,
) -> Case:
    """The case of `scene` in `dtype`, with `extra` zero rows after the labels and, with `gap`, one between them."""
    found = yolox_head.head(scene, extreme=extreme)
    rows = torch.from_numpy(found.rows).to(DTYPES[dtype])
    labels = yolox_head.label_rows(scene, extra, gap)
    # Without any ground truth upstream forgets the dtype of the labels; one pinned case shows it.
    label_dtype = label_dtype if label_dtype and bool(_counted(labels).any()) else dtype
    labels = labels.round().long() if label_dtype == "int64" else labels.to(DTYPES[label_dtype])
    tags = common_tags(scene, dtype) | _tags(scene)
    named = {
        "l1": use_l1,
        "gap": gap,
        "extreme": extreme,
        "padding": bool(extra),
        "integer-labels": label_dtype == "int64",
        "mixed-dtype": label_dtype not in ("int64", dtype),
        f"autocast-{autocast}": autocast is not None,
    }
    tags |= {name for name, holds in named.items() if holds}
    if spoil(scene.prediction, scene.seed, found.aims, yolox_head.spoiled_places(rows, scene.prediction)):
        tags.add("non-finite")
    tensors = {"labels": labels, **yolox_head.maps(rows, scene.frame)}
    settings = {
        "num_classes": scene.num_classes,
        "strides": list(scene.frame.strides),
        "use_l1": use_l1,
        "autocast": autocast,
    }
    return Case("yolox_loss", tensors, settings, origin, frozenset(tags))


def _tags(scene: Scene) -> set[str]:
    tags = set()
    for boxes in scene.boxes:
        in_box, in_square = candidates(scene.frame, boxes)
        if len(boxes) and not (in_box | in_square).any():
            # Upstream fails in its top-k; an empty foreground is a sound alternative.
            tags |= {"no-candidate", "invalid"}
        if ((in_box & in_square).sum(axis=0) > 1).any():
            tags.add("conflict")
    return tags


def _counted(labels: Tensor) -> Tensor:
    """(B,) ground truths of each image as upstream counts them."""
    return (labels.sum(2) > 0).sum(1)


def _label_beyond_classes(tensors: dict[str, Tensor], settings: dict[str, Any]) -> bool:
    return _class(tensors["labels"], settings["num_classes"])


def _label_below_zero(tensors: dict[str, Tensor], _: dict[str, Any]) -> bool:
    return _class(tensors["labels"], -1)


def _class(labels: Tensor, label: int) -> bool:
    """Give a row that counts, and still does then, a class that does not exist."""
    images = (labels[:, :1, 1:].sum((1, 2)) > 1).nonzero()
    if not len(images):
        return False
    labels[images[0, 0], 0, 0] = label
    return True


def _nan_logits(tensors: dict[str, Tensor], _: dict[str, Any]) -> bool:
    # At every anchor, so that a candidate is among them.
    for name in (name for name in tensors if name.startswith("raw")):
        tensors[name][:, 5:] = torch.nan
    return bool(_counted(tensors["labels"]).any())


def _far_outside(tensors: dict[str, Tensor], _: dict[str, Any]) -> bool:
    tensors["labels"][..., 1:3] += 10_000
    return True


def _no_image(tensors: dict[str, Tensor], _: dict[str, Any]) -> bool:
    tensors |= {name: tensor[:0] for name, tensor in tensors.items()}
    return True


FLAWS = (
    Flaw("label-beyond-classes", "no one-hot code for the class", _label_beyond_classes),
    Flaw("label-below-zero", "no one-hot code for the class", _label_below_zero),
    Flaw("nan-logits", "a probability that is not in [0, 1]", _nan_logits),
    Flaw("no-candidate", "nothing to select from", _far_outside),
    Flaw("no-image", "nothing to concatenate", _no_image),
)


def example(labels: Sequence[Sequence[float]] = WAVE_LABELS, images: int = 1, rows: int = 4) -> Case:
    """The worked example of yolox_losses.md, section 3.11, L1 on; `labels` are those of image 0, padded to `rows`."""
    padded = torch.zeros(images, max(rows, len(labels)), 5)
    if labels:
        padded[0, : len(labels)] = torch.tensor(labels, dtype=torch.float32)
    tensors = {"labels": padded, **yolox_head.maps(wave_rows(images).float(), WAVE_FRAME)}
    settings = {"num_classes": 2, "strides": [8, 16], "use_l1": True, "autocast": None}
    return Case("yolox_loss", tensors, settings, "pinned", frozenset({"float32"}))


def pinned_cases() -> Iterator[tuple[str, Case]]:
    """The worked example, and the edge cases of yolox_losses.md, sections 3.2, 3.7 and 3.8, by name."""

    def case(tags: set[str], given: Case | None = None, *, dtype: str = "float32", **changed: Any) -> Case:
        given = given or example()
        names = {name: changed.pop(name) for name in tuple(changed) if name in given.tensors}
        tensors = {name: tensor.to(DTYPES[dtype]) for name, tensor in given.tensors.items()} | names
        return Case("yolox_loss", tensors, given.settings | changed, "pinned", frozenset({dtype, *tags}))

    first, second = WAVE_LABELS
    yield "worked-example", case({"worked-example"})
    yield "worked-example-without-l1", case({"worked-example"}, use_l1=False)
    for dtype in ("float16", "bfloat16"):
        yield f"worked-example-{dtype}", case({"worked-example", "tie"}, dtype=dtype)
        yield f"worked-example-{dtype}-autocast", case({"worked-example", "tie"}, dtype=dtype, autocast=dtype)
        mixed = example().tensors["labels"]
        yield f"worked-example-{dtype}-float32-labels", case({"mixed-dtype", "tie"}, dtype=dtype, labels=mixed)
    yield "no-ground-truth", case({"no-ground-truth"}, example(()))
    none = example(())
    yield (
        "no-ground-truth-half-maps",
        case(
            {"mixed-dtype", "divergence:yolox-no-ground-truth-dtype"},
            none,
            dtype="bfloat16",
            labels=none.tensors["labels"],
        ),
    )
    yield "no-label-rows", case({"no-ground-truth"}, example((), rows=0))
    yield "one-empty-image", case({"empty-image"}, example(images=2))
    # Twins differ in nothing but their row.
    yield "identical-ground-truths", case({"identical", "tie"}, example((first, first)))
    crowd = [(g % 2, 16 + g / 8, 16 - g / 8, 9 + g % 5, 11 + g % 7) for g in range(30)]
    yield "more-ground-truths-than-anchors", case({"tie"}, example(crowd))
    yield "zero-area-ground-truth", case({"zero-area", "tie"}, example(((0, 12, 12, 0, 0),)))
    outside = (0, 60, 16, 10, 10)
    yield "ground-truth-outside", case({"off-image", "tie"}, example((first, outside)))
    # A zero row between two real ones counts, and the last real one does not.
    yield "zero-row-between", case({"gap", "tie"}, example((first, (0, 0, 0, 0, 0), second)))
    # Coordinates and class sum to less than 0: not counted, and the row after it is the one that is dropped.
    yield "negative-sum-row", case({"off-image", "tie"}, example(((0, -30, 12, 10, 6), second)))
    yield "fractional-class", case({"fractional"}, example(((0.9, *second[1:]),)))
    yield "integer-labels", case({"integer-labels"}, labels=example().tensors["labels"].long())
    wide = torch.nn.functional.pad(example().tensors["labels"], (0, 1), value=-40.0)
    yield "sixth-column-counts", case({"no-ground-truth"}, labels=wide)
    yield "no-candidate", case({"invalid", "divergence:yolox-no-candidate"}, example(((0, 900, 900, 2, 2),)))
    flat = example(((0, 12, 12, 0, 0),))
    for raw in (flat.tensors["raw0"], flat.tensors["raw1"]):
        raw[:, :2], raw[:, 2:4] = 0.5, -200.0
    yield "zero-area-on-zero-area", case({"zero-area", "divergence:yolox-undefined-overlap"}, flat, use_l1=False)
    yield (
        "zero-width-l1-float16",
        case({"zero-area", "divergence:yolox-undefined-overlap"}, example(((0, 12, 12, 0, 0),)), dtype="float16"),
    )
    spoilt = example()
    spoilt.tensors["raw0"][0, 4, 0, 3] = torch.inf
    yield "infinite-objectness-of-a-negative", case({"non-finite"}, spoilt)
