"""Cases of the class loss of set prediction: logits, labels and given pairs."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from cases import set_prediction as shared
from cases.boxes import drawn
from cases.case import Case
from cases.flaws import Flaw, perhaps
from cases.labels import LabelImage
from cases.scenes import Scene, draw_scene, scene_from_labels

#: Change it whenever the same draws give another case.
STRATEGY_VERSION = 1

_EOS = (0.1, 0.1, 0.1, 0.5, 1.0, 0.0)
#: Class of targets that PyTorch's cross entropy passes over.
_IGNORED = -100


@st.composite
def cases(draw: st.DrawFn, *, dtypes: Sequence[str] = ("float32",)) -> Case:
    """Draw a case in one of `dtypes`, that of the logits and of upstream's criterion."""
    pick = drawn(draw)
    dtype = pick.choice(dtypes)
    scene = draw_scene(pick, dtype=dtype, boxes=shared.BOX_KINDS, labels=("no-object",))
    case = build(
        scene,
        dtype,
        shared.query_count(pick, scene),
        pick.choice(_EOS),
        f"drawn:set_class_loss/{STRATEGY_VERSION}",
        autocast=shared.autocast(pick, dtype),
        extreme=pick.choice(shared.NOW_AND_THEN),
        partial=pick.choice(shared.NOW_AND_THEN),
        ignored=pick.choice(shared.RARELY),
    )
    return perhaps(pick, FLAWS, case)


def from_labels(
    images: Sequence[LabelImage], stage: str, seed: int, dtype: str = "float32", *, queries: int = 300
) -> Case:
    """The case of a batch of labelled `images` at training stage `stage`."""
    scene = scene_from_labels(images, stage, seed)
    return build(scene, dtype, queries, _EOS[0], f"labels:{images[0].name}+{len(images) - 1}/{stage}/{seed}")


def allows(case: Case) -> bool:
    """Whether `cases` could have drawn `case`."""
    return True


def build(
    scene: Scene,
    dtype: str,
    queries: int,
    eos_coef: float,
    origin: str,
    *,
    autocast: str | None = None,
    extreme: bool = False,
    partial: bool = False,
    ignored: bool = False,
) -> Case:
    """The case of `scene`; `partial` pairs, a label that is `ignored`, see `cases.set_prediction` for the rest."""
    found = shared.predict(scene, dtype, queries, extreme=extreme)
    pairs, counts = shared.pairs(scene, found.aims, partial=partial)
    labels = shared.targets(scene, torch.float32)["labels"]
    tags = shared.tags(scene, dtype, queries)
    if ignored and len(labels):
        labels[0] = _IGNORED
        tags.add("ignored-label")
    tensors = {"logits": found.logits, "labels": labels, **pairs}
    if shared.spoiled(scene, found, {"logits": found.logits}):
        tags.add("non-finite")
    for tag, holds in (("extreme", extreme), ("partial-pairs", partial), (f"autocast-{autocast}", autocast)):
        if holds:
            tags.add(tag)
    settings = {
        "sizes": scene.counts,
        "pairs": counts,
        "num_classes": scene.num_classes,
        "eos_coef": eos_coef,
        "autocast": autocast,
    }
    return Case("set_class_loss", tensors, settings, origin, frozenset(tags))


def _matched_label(value: int | None):
    def make(tensors: dict[str, Tensor], settings: dict[str, Any]) -> bool:
        if not len(tensors["queries"]):
            return False
        first = next(image for image, count in enumerate(settings["pairs"]) if count)
        place = sum(settings["sizes"][:first]) + int(tensors["targets"][0])
        tensors["labels"][place] = tensors["logits"].shape[2] if value is None else value
        return True

    return make


def _another_number_of_classes(_: dict[str, Tensor], settings: dict[str, Any]) -> bool:
    settings["num_classes"] += 1
    return True


def _query_beyond(tensors: dict[str, Tensor], _: dict[str, Any]) -> bool:
    tensors["queries"][-1:] = tensors["logits"].shape[1]
    return len(tensors["queries"]) > 0


FLAWS = (
    Flaw("label-beyond-classes", "the logit of a class that has no column", _matched_label(None)),
    Flaw("negative-label", "cross entropy has no class -1", _matched_label(-1)),
    Flaw("another-number-of-classes", "one weight a column", _another_number_of_classes),
    Flaw("query-beyond", "a query that does not exist", _query_beyond),
)


def pinned_cases() -> Iterator[tuple[str, Case]]:
    """The worked example A13 and the edge cases of A4 and A11, by name."""

    def case(tags: set[str], *, without: bool = False, **changes: Any) -> Case:
        given, settings = shared.example()
        pairs, counts = shared.example_pairs()
        tensors = {"logits": given["logits"], "labels": given["labels"], **pairs}
        settings |= {"pairs": counts, "num_classes": 3, "eos_coef": 0.1, "autocast": None}
        if without:
            tensors |= {name: tensors[name][:0] for name in ("labels", "queries", "targets")}
            settings |= {"sizes": [0, 0], "pairs": [0, 0]}
        tensors |= {name: value for name, value in changes.items() if name in tensors}
        settings |= {name: value for name, value in changes.items() if name in settings}
        return Case("set_class_loss", tensors, settings, "pinned", frozenset({"float32", *tags}))

    logits = shared.example()[0]["logits"]
    yield "worked-example", case({"worked-example"})
    yield "no-ground-truth", case({"no-ground-truth"}, without=True)
    # 0/0: nothing is matched, and no object has no weight.
    yield (
        "no-weight-at-all",
        case({"no-ground-truth", "divergence:set-class-no-weight"}, without=True, eos_coef=0.0),
    )
    yield "no-object-weighs-nothing", case(set(), eos_coef=0.0)
    yield "label-of-no-object", case({"labels-no-object"}, labels=torch.tensor([0, 3, 1]))
    yield "ignored-label", case({"ignored-label"}, labels=torch.tensor([0, -100, 1]))
    yield "negative-label", case({"invalid", "negative-label"}, labels=torch.tensor([0, -1, 1]))
    yield "label-beyond-classes", case({"invalid", "label-beyond-classes"}, labels=torch.tensor([0, 4, 1]))
    yield "saturated-right", case({"saturated"}, logits=logits.sign() * 1e4)
    for name, value in (("nan", torch.nan), ("inf", torch.inf), ("minus-inf", -torch.inf)):
        poisoned = logits.clone()
        poisoned[0, 3, 1] = value
        yield f"{name}-logit", case({"non-finite"}, logits=poisoned)
    one = {"queries": torch.tensor([0]), "targets": torch.tensor([0]), "labels": torch.tensor([0])}
    yield (
        "one-of-each",
        case({"one-class"}, logits=logits[:1, :1, :2], sizes=[1], pairs=[1], num_classes=1, **one),
    )
