"""Cases of the focal loss: logits, and hard or soft targets of one shape."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from cases import elements, varifocal_loss
from cases.boxes import drawn
from cases.case import DTYPES, Case
from cases.elements import Elements
from cases.flaws import Flaw, perhaps
from cases.labels import LabelImage

#: Change it whenever the same draws give another case.
STRATEGY_VERSION = 1

#: Not 1: with alpha 0.25 and 0.75 the derivative by the label of a wholly wrong element is a sum of parts that is 0.
_GAMMAS = (1.5, 1.5, 2.0, 3.0, 0.0, 0.5)
_ALPHAS = (0.25, 0.25, 0.75, 1.0, 0.0, -1.0)


@st.composite
def cases(draw: st.DrawFn, *, dtypes: Sequence[str] = ("float32",), listed: bool = True) -> Case:
    """Draw a case in one of `dtypes`. Older releases take one alpha for all classes: `listed=False`."""
    pick = drawn(draw)
    dtype = pick.choice(dtypes)
    found = elements.draw_elements(pick)
    alpha: float | list[float] = pick.choice(_ALPHAS)
    if listed and pick.choice((True, False, False)):
        alpha = [pick.choice(_ALPHAS) for _ in range(found.logits.shape[2])]
    soft = pick.choice((True, False))
    mixed = dtype in ("float16", "bfloat16") and pick.choice((True, True, False))
    settings = {"gamma": pick.choice(_GAMMAS), "alpha": alpha}
    case = build(found, dtype, mixed, soft, settings, f"drawn:focal_loss/{STRATEGY_VERSION}")
    return perhaps(pick, FLAWS if listed else FLAWS[:-1], case)


def from_labels(images: Sequence[LabelImage], stage: str, seed: int, dtype: str = "float32", **_release: bool) -> Case:
    """The case of 300 queries an image at training stage `stage`; takes the options of `cases` too."""
    origin = f"labels:{images[0].name}+{len(images) - 1}/{stage}/{seed}"
    mixed = dtype in ("float16", "bfloat16")
    return build(elements.from_labels(images, stage, seed), dtype, mixed, False, {"gamma": 1.5, "alpha": 0.25}, origin)


def allows(case: Case, *, listed: bool = True) -> bool:
    """Whether `cases` with these options could have drawn `case`."""
    return listed or not isinstance(case.settings["alpha"], list)


def build(found: Elements, dtype: str, mixed: bool, soft: bool, settings: dict[str, Any], origin: str) -> Case:
    """The case of `found` with hard or `soft` targets; `mixed` keeps targets in float32."""
    wide = torch.float32 if mixed else DTYPES[dtype]
    label = found.value if soft else found.label
    tensors = {"pred": found.logits.to(DTYPES[dtype]), "label": label.to(wide)}
    alpha = settings["alpha"]
    tags = {*found.tags, dtype, "soft" if soft else "hard", "alpha-list" if isinstance(alpha, list) else "alpha"}
    return Case("focal_loss", tensors, settings, origin, frozenset(tags | ({"mixed-dtype"} if mixed else set())))


def _one_dim(tensors: dict[str, Tensor], settings: dict[str, Any]) -> bool:
    settings["alpha"] = 0.25
    tensors |= {name: tensor.flatten() for name, tensor in tensors.items()}
    return True


def _another_shape(tensors: dict[str, Tensor], _: dict[str, Any]) -> bool:
    tensors["label"] = tensors["label"][:, :-1]
    return tensors["pred"].shape[1] > 0


def _integer_label(tensors: dict[str, Tensor], _: dict[str, Any]) -> bool:
    tensors["label"] = tensors["label"].long()
    return True


def _alphas_of_another_length(tensors: dict[str, Tensor], settings: dict[str, Any]) -> bool:
    settings["alpha"] = [0.25] * (tensors["pred"].shape[2] + 1)
    # One alpha for all, and all of one class, would broadcast.
    return tensors["pred"].shape[2] > 0


FLAWS = (
    Flaw("one-dim", "the mean is taken over the second dim", _one_dim),
    Flaw("another-shape", "a target for each logit", _another_shape),
    Flaw("integer-label", "targets are floating", _integer_label),
    Flaw("alphas-of-another-length", "one alpha a class", _alphas_of_another_length),
)


def pinned_cases() -> Iterator[tuple[str, Case]]:
    """The worked examples of yolo_losses.md, section 2.2, and the edge cases of its list, by name."""
    given = varifocal_loss.example()
    tensors = {"pred": given["pred_score"], "label": given["label"]}

    def case(tags: set[str], changes: dict[str, Tensor] | None = None, **settings: Any) -> Case:
        chosen = {"gamma": 1.5, "alpha": 0.25} | settings
        return Case("focal_loss", tensors | (changes or {}), chosen, "pinned", frozenset({"float32", *tags}))

    yield "worked-example", case({"worked-example"})
    yield "no-alpha", case({"worked-example"}, alpha=0.0)
    yield "negative-alpha", case(set(), alpha=-1.0)
    yield "gamma-0", case({"worked-example"}, gamma=0.0)
    yield "gamma-below-one", case({"worked-example"}, gamma=0.5)
    yield "alpha-of-each-class", case({"worked-example", "alpha-list"}, alpha=[0.1, 0.5, 0.9])
    yield "soft-targets", case({"soft"}, {"label": tensors["label"] * 0.7 + 0.1})
    yield "no-row", case({"empty"}, {name: tensor[:, :0] for name, tensor in tensors.items()})
    yield "no-class", case({"empty"}, {name: tensor[..., :0] for name, tensor in tensors.items()})
    right = {"pred": (2 * tensors["label"] - 1) * 18}
    yield "saturated", case({"saturated"}, right)
    # The slope of a power below 1 is infinite where an element is wholly right; what it weighs is 0.
    yield "saturated-gamma-below-one", case({"saturated", "divergence:focal-saturated"}, right, gamma=0.5)
    for value in (1e4, -1e4, torch.inf, -torch.inf, torch.nan):
        spoiled = tensors["pred"].clone()
        spoiled[0, 1] = value
        yield f"logits-{value:g}", case({"extreme"} if abs(value) == 1e4 else {"non-finite"}, {"pred": spoiled})
