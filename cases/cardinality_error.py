"""Cases of the cardinality error of set prediction: logits and numbers of targets."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from hypothesis import strategies as st

from cases import set_prediction as shared
from cases.boxes import drawn
from cases.case import Case
from cases.labels import LabelImage
from cases.scenes import Scene, draw_scene, scene_from_labels

#: Change it whenever the same draws give another case.
STRATEGY_VERSION = 1


@st.composite
def cases(draw: st.DrawFn, *, dtypes: Sequence[str] = ("float32",)) -> Case:
    """Draw a case in one of `dtypes`."""
    pick = drawn(draw)
    dtype = pick.choice(dtypes)
    scene = draw_scene(pick, dtype=dtype, boxes=shared.BOX_KINDS)
    return build(
        scene,
        dtype,
        shared.query_count(pick, scene),
        f"drawn:cardinality_error/{STRATEGY_VERSION}",
        extreme=pick.choice(shared.NOW_AND_THEN),
        rounded=pick.choice(shared.NOW_AND_THEN),
    )


def from_labels(
    images: Sequence[LabelImage], stage: str, seed: int, dtype: str = "float32", *, queries: int = 300
) -> Case:
    """The case of a batch of labelled `images` at training stage `stage`."""
    scene = scene_from_labels(images, stage, seed)
    return build(scene, dtype, queries, f"labels:{images[0].name}+{len(images) - 1}/{stage}/{seed}")


def allows(case: Case) -> bool:
    """Whether `cases` could have drawn `case`."""
    return True


def build(scene: Scene, dtype: str, queries: int, origin: str, *, extreme: bool = False, rounded: bool = False) -> Case:
    """The case of `scene`; logits that are `rounded` to whole numbers tie."""
    found = shared.predict(scene, dtype, queries, extreme=extreme)
    logits = found.logits
    # A detector in training answers no object nearly everywhere.
    logits[..., -1] += torch.where(torch.from_numpy(found.aims) < 0, 6, -1).to(logits.dtype)
    if rounded:
        logits = logits.round()
    tags = shared.tags(scene, dtype, queries)
    if shared.spoiled(scene, found, {"logits": logits}):
        tags.add("non-finite")
    for tag, holds in (("extreme", extreme), ("tied-logits", rounded)):
        if holds:
            tags.add(tag)
    tensors = {"logits": logits, "labels": shared.targets(scene, torch.float32)["labels"]}
    return Case("cardinality_error", tensors, {"sizes": scene.counts}, origin, frozenset(tags))


def pinned_cases() -> Iterator[tuple[str, Case]]:
    """The worked example A13, ties, NaN and extreme sizes, by name."""

    def case(tags: set[str], sizes: Sequence[int] = (2, 1), **changes: torch.Tensor) -> Case:
        given, _ = shared.example()
        tensors: dict[str, Any] = {"logits": given["logits"], "labels": given["labels"]} | changes
        tensors["labels"] = torch.zeros(sum(sizes), dtype=torch.int64)
        return Case("cardinality_error", tensors, {"sizes": list(sizes)}, "pinned", frozenset({"float32", *tags}))

    logits = shared.example()[0]["logits"]
    yield "worked-example", case({"worked-example"})
    yield "no-ground-truth", case({"no-ground-truth"}, (0, 0))
    yield "more-targets-than-queries", case({"more-targets-than-queries"}, (6, 1))
    # Equal logits go to the lower class, which no object never is.
    yield "all-equal", case({"tied-logits"}, logits=torch.zeros_like(logits))
    for name, column in (("class", 1), ("no-object", 3)):
        poisoned = logits.clone()
        poisoned[:, :2, column] = torch.nan
        yield f"nan-of-{name}", case({"non-finite"}, logits=poisoned)
    yield "nan-everywhere", case({"non-finite"}, logits=torch.full_like(logits, torch.nan))
    yield "infinite", case({"non-finite"}, logits=logits.sign() * torch.inf)
    yield "no-object-only", case({"no-class"}, logits=logits[..., :1])
    yield "no-query", case({"no-query"}, logits=logits[:, :0])
