"""Cases of the end-to-end detection criteria: two heads over one scene, in the three forms there are."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from hypothesis import strategies as st

from cases import detection
from cases import v8_detection_loss as v8
from cases.boxes import drawn
from cases.case import Case
from cases.detection import Rows
from cases.flaws import Flaw, perhaps
from cases.labels import LabelImage
from cases.predictions import spoil
from cases.scenes import Scene, common_tags, draw_scene, scene_from_labels

#: Change it whenever the same draws give another case.
STRATEGY_VERSION = 1

FORMS = ("ultralytics", "original", "e2e")
#: The branches are trained together: one scene, other noise.
_BRANCHES = {"o2m": 0, "o2o": 1}
#: What every ground truth proposes in the one-to-many branch.
_TOPK = 10
#: Epochs that are over and all, in and around the schedule.
_EPOCHS = ((0, 100), (1, 10), (49, 100), (1, 1), (3, 2), (12, 10))


@st.composite
def cases(
    draw: st.DrawFn,
    *,
    dtypes: Sequence[str] = ("float32",),
    forms: Sequence[str] = FORMS,
    class_weights: bool = True,
    row_order: bool = True,
    **_of_one_branch: bool,
) -> Case:
    """Draw a case in one of `dtypes` and `forms`; the other options are those of `v8_detection_loss.cases`."""
    pick = drawn(draw)
    dtype = pick.choice(dtypes)
    scene = draw_scene(pick, dtype=dtype)
    if scene.frame.anchors < _TOPK:
        # Once more: one in ten would be rejected.
        scene = draw_scene(pick, dtype=dtype)
    weighted = class_weights and pick.choice((False, False, True))
    updates, epochs = pick.choice(_EPOCHS)
    settings = detection.settings(
        scene,
        pick.choice(detection.REG_MAX),
        pick.choice(detection.GAINS),
        form=pick.choice(forms),
        updates=updates,
        epochs=epochs,
        class_weights=detection.class_weights(pick, scene.num_classes) if weighted else None,
        autocast=detection.autocast(pick, dtype),
    )
    case = build(scene, dtype, Rows.drawn(pick), settings, f"drawn:v10_detection_loss/{STRATEGY_VERSION}")
    return perhaps(pick, FLAWS if row_order else FLAWS_OF_ANY_ORDER, case)


def from_labels(
    images: Sequence[LabelImage], stage: str, seed: int, dtype: str = "float32", form: str = "", **options: Any
) -> Case:
    """The case of a batch of labelled `images` at training stage `stage`, with the trainers' settings.

    The form is the first of the option `forms` unless given. Takes the options of `cases` too: what else they keep from
    older releases does not occur in labelled batches.
    """
    scene = scene_from_labels(images, stage, seed)
    form = form or options.get("forms", FORMS)[0]
    settings = detection.settings(
        scene, 16, detection.GAINS[0], form=form, updates=0, epochs=100, class_weights=None, autocast=None
    )
    origin = f"labels:{images[0].name}+{len(images) - 1}/{stage}/{seed}"
    return build(scene, dtype, Rows(), settings, origin)


def allows(
    case: Case,
    *,
    forms: Sequence[str] = FORMS,
    class_weights: bool = True,
    row_order: bool = True,
    **_of_one_branch: bool,
) -> bool:
    """Whether `cases` with these options could have drawn `case`."""
    return (
        case.settings["form"] in forms
        and (class_weights or case.settings["class_weights"] is None)
        and (row_order or "unsorted-rows" not in case.tags)
    )


def build(scene: Scene, dtype: str, rows: Rows, settings: dict[str, Any], origin: str) -> Case:
    """The case of `scene` in `dtype`; targets are never half."""
    tensors, tags = {}, common_tags(scene, dtype) | v8.settings_tags(settings) | {f"form-{settings['form']}"}
    for name, offset in _BRANCHES.items():
        head = detection.head(scene, scene.seed + offset, settings["reg_max"], dtype)
        branch = {f"{name}_boxes": head.boxes, f"{name}_scores": head.scores}
        # One branch in two is spoiled where the scene is.
        if scene.seed % 2 == offset and spoil(
            scene.prediction, scene.seed, head.aims, {key: value.mT for key, value in branch.items()}
        ):
            tags.add("non-finite")
        tensors |= branch
    if scene.frame.anchors < _TOPK and any(scene.counts):
        tags |= {"invalid", "fewer-anchors-than-topk"}
    return Case("v10_detection_loss", tensors | detection.batch(scene, dtype, rows), settings, origin, frozenset(tags))


# They look at the labels and settings, which both operations share.
FLAWS_OF_ANY_ORDER: tuple[Flaw, ...] = tuple(f for f in v8.FLAWS_OF_ANY_ORDER if f.name == "label-beyond-classes")
FLAWS: tuple[Flaw, ...] = tuple(f for f in v8.FLAWS if f.name not in ("topk-above-anchors", "image-beyond-batch"))


def example(form: str, **changes: Any) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and settings of the example of yolo_losses.md, section 4."""
    tensors, settings = v8.example()
    del settings["topk"], settings["topk2"]
    branches = {
        "o2m_boxes": tensors.pop("boxes"),
        "o2m_scores": tensors.pop("scores"),
        "o2o_boxes": v8.pattern((2, 64, 126), 1, 0.5, 1.3),
        "o2o_scores": v8.pattern((2, 3, 126), 2, 0.8, 0.9) - 2,
    }
    return branches | tensors, settings | {"form": form, "updates": 0, "epochs": 100} | changes


def pinned_cases() -> Iterator[tuple[str, Case]]:
    """The worked examples of yolo_losses.md, section 4, and batches without ground truths, by name."""

    def case(form: str, *tags: str, objects: int = 3, **changes: Any) -> Case:
        tensors, settings = example(form, **changes)
        labels = {name: tensors[name][:objects] for name in ("batch_idx", "cls", "bboxes")}
        return Case(
            "v10_detection_loss", tensors | labels, settings, "pinned", frozenset({"float32", f"form-{form}", *tags})
        )

    for form in FORMS:
        yield f"{form}-worked-example", case(form, "worked-example")
        yield f"{form}-no-ground-truth", case(form, "no-ground-truth", objects=0)
    yield "e2e-second-epoch-of-ten", case("e2e", "worked-example", updates=1, epochs=10)
    yield "e2e-after-the-last-epoch", case("e2e", updates=120, epochs=100)
    yield "e2e-one-epoch", case("e2e", updates=1, epochs=1)
