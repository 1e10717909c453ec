"""Why operations do not have a relation: reasons that several of them share."""

from __future__ import annotations

NO_IMAGES = "it has no images; elements alone are tried by `alone`"
NO_ROWS = "no input holds ground truths as rows"
NO_LEVELS = "levels do not exist for it; anchors in another order include them"
CELLS = "its anchors are the cells of its levels; the order of levels is tried by `levels`"
NO_CLASSES = "it has no classes"
CLASSES_ALIKE = "all columns are elements: nothing tells which is a class"
RAGGED = "ground truths come without rows that mean nothing"
NO_PADDING = "no input has rows that mean nothing"
NORMALISED = "boxes are shares of the image, so there are no lengths"
CELL_UNITS = "lengths are in cells and bins, which have no other scale"
LOGITS = "there are no lengths"
NOTHING_MATCHED = "nothing is matched"
MATCHER = "its matcher is `hungarian`, which has the relation; parity shows that the total takes the same pairs"
NOTHING_GROWS = "no output grows with a setting or an input"
ASSIGNER = "an assigner has no gradient"
INTEGERS = "its decisions are integers, which carry no gradient; what targets must not carry is seen in gradients"
DIFFERENTIABLE = "every floating output is meant to carry gradient"
NO_GRADIENT = "its output is a count, or a grid, without gradient"
TARGETS_HELD = "targets depend on predictions and are held fixed, so gradients are not the slopes of the outputs"


def exempt(**reasons: str) -> dict[str, str]:
    """Reasons by relation; `ground_truths` stands for `ground truths`."""
    return {name.replace("_", " "): reason for name, reason in reasons.items()}
