"""Cases of the varifocal loss: logits, soft targets and labels of one shape."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from cases import elements
from cases.boxes import drawn
from cases.case import DTYPES, Case
from cases.elements import Elements
from cases.flaws import Flaw, perhaps
from cases.labels import LabelImage
from cases.patterns import pattern

#: Change it whenever the same draws give another case.
STRATEGY_VERSION = 1

_GAMMAS = (2.0, 2.0, 1.5, 1.0, 0.0, 0.5)
_ALPHAS = (0.75, 0.75, 0.25, 1.0, 0.0)
#: Labels as the criteria make them, now and then one for all classes.
_LABELS = ("own", "own", "own", "own", "shared")


@st.composite
def cases(draw: st.DrawFn, *, dtypes: Sequence[str] = ("float32",)) -> Case:
    """Draw a case in one of `dtypes`; half logits stand beside float32 targets, as in training, mostly."""
    pick = drawn(draw)
    dtype = pick.choice(dtypes)
    settings = {"gamma": pick.choice(_GAMMAS), "alpha": pick.choice(_ALPHAS)}
    labels = pick.choice(_LABELS)
    mixed = dtype in ("float16", "bfloat16") and pick.choice((True, True, False))
    case = build(
        elements.draw_elements(pick), dtype, mixed, labels, settings, f"drawn:varifocal_loss/{STRATEGY_VERSION}"
    )
    return perhaps(pick, FLAWS, case)


def from_labels(images: Sequence[LabelImage], stage: str, seed: int, dtype: str = "float32") -> Case:
    """The case of 300 queries an image at training stage `stage`, each ground truth followed by its queries."""
    found = elements.from_labels(images, stage, seed)
    origin = f"labels:{images[0].name}+{len(images) - 1}/{stage}/{seed}"
    mixed = dtype in ("float16", "bfloat16")
    return build(found, dtype, mixed, "own", {"gamma": 2.0, "alpha": 0.75}, origin)


def allows(case: Case) -> bool:
    """Whether `cases` could have drawn `case`."""
    return True


def build(found: Elements, dtype: str, mixed: bool, labels: str, settings: dict[str, Any], origin: str) -> Case:
    """The case of `found`; `mixed` keeps targets in float32."""
    wide = torch.float32 if mixed else DTYPES[dtype]
    label = found.label
    if labels == "shared" and label.shape[2]:
        label = label[..., :1]
    tensors = {
        "pred_score": found.logits.to(DTYPES[dtype]),
        "gt_score": (found.value * found.label).to(wide),
        "label": label.to(wide),
    }
    tags = {*found.tags, dtype, f"label-{labels}"} | ({"mixed-dtype"} if mixed else set())
    return Case("varifocal_loss", tensors, settings, origin, frozenset(tags))


def _one_dim(tensors: dict[str, Tensor], _: dict[str, Any]) -> bool:
    if tensors["label"].shape != tensors["pred_score"].shape:
        return False
    tensors |= {name: tensor.flatten() for name, tensor in tensors.items()}
    return True


def _another_shape(tensors: dict[str, Tensor], _: dict[str, Any]) -> bool:
    tensors["gt_score"] = tensors["gt_score"][:, :-1]
    return tensors["pred_score"].shape[1] > 0


def _bool_label(tensors: dict[str, Tensor], _: dict[str, Any]) -> bool:
    tensors["label"] = tensors["label"].bool()
    return True


FLAWS = (
    Flaw("one-dim", "the mean is taken over the second dim", _one_dim),
    Flaw("another-shape", "a target for each logit", _another_shape),
    Flaw("bool-label", "labels are subtracted from 1", _bool_label),
)


def pinned_cases() -> Iterator[tuple[str, Case]]:
    """The worked example of yolo_losses.md, section 2.1, and the edge cases of its list, by name."""
    tensors = example()

    def case(tags: set[str], changes: dict[str, Tensor] | None = None, **settings: float) -> Case:
        chosen = {"gamma": 2.0, "alpha": 0.75} | settings
        return Case("varifocal_loss", tensors | (changes or {}), chosen, "pinned", frozenset({"float32", *tags}))

    yield "worked-example", case({"worked-example"})
    yield "no-row", case({"empty"}, {name: tensor[:, :0] for name, tensor in tensors.items()})
    yield "no-class", case({"empty"}, {name: tensor[..., :0] for name, tensor in tensors.items()})
    yield "two-dims", case(set(), {name: tensor[0] for name, tensor in tensors.items()})
    for value in (1e4, -1e4, torch.inf, -torch.inf, torch.nan):
        spoiled = tensors["pred_score"].clone()
        spoiled[0, 1] = value
        yield f"logits-{value:g}", case({"extreme"} if abs(value) == 1e4 else {"non-finite"}, {"pred_score": spoiled})
    # A power below 1 of a probability of 0 has an infinite slope; what it weighs is 0.
    saturated = {"pred_score": tensors["pred_score"] - 200, "gt_score": tensors["gt_score"] * 0}
    yield "saturated-gamma-below-one", case({"divergence:varifocal-saturated"}, saturated, gamma=0.5)


def example() -> dict[str, Tensor]:
    """Tensors of the example of yolo_losses.md, section 2.1."""
    label = (pattern((2, 4, 3), 1, 1.3, 0.2) > 0.4).float()
    return {
        "pred_score": pattern((2, 4, 3), 2, 0.9, 0.1),
        "gt_score": (pattern((2, 4, 3), 0.5, 0.6, 0.9) + 0.5) * label,
        "label": label,
    }
