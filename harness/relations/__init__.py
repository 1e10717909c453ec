"""Relations that need no oracle: a case is turned into another, and the answers to both must fit each other.

`check(operation, case, call)` tries them in this process. Which relations an operation has stands in its declaration
(`Operation.relations`), with a reason for each that it does not have.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from harness.relations.declaration import NAMES

if TYPE_CHECKING:
    from cases.case import Case
    from harness.operation import Operation

Call = Callable[[Mapping[str, Any], Mapping[str, Any]], Mapping[str, Any]]
"""`call(tensors, settings)` gives the outputs of an implementation by name."""

HOLDS, BROKEN, REJECTED, FINDING = "holds", "broken", "rejected", "finding"
"""Verdicts; a relation that upstream itself breaks is a finding."""
TRIED = (HOLDS, BROKEN, FINDING)
"""Verdicts of cases that the subject took."""
UPSTREAM = "upstream"
"""The subject that is no candidate."""


def check(
    operation: Operation,
    case: Case,
    call: Call,
    names: tuple[str, ...] = NAMES,
    era: Mapping[str, Any] | None = None,
    told: Callable[[str], None] = str,
) -> list[dict[str, str]]:
    """Rows (relation, verdict, detail) of the relations that the operation has and that speak of this case.

    `era` holds the settings of the subject's era, where the operation has some that decide; `told` hears the name of
    each relation before it is tried. The verdict is `holds`, `broken`, or `rejected` where the subject does not take
    the case itself.
    """
    from dataclasses import replace

    import torch

    from harness.execute import Result, execute
    from harness.operation import AUTOCAST
    from harness.relations.trial import Broken, Rejected, Trial
    from harness.watch import same

    def ask(some: Case) -> Result:
        settings = {key: value for key, value in some.settings.items() if key != AUTOCAST}
        gradients = operation.carries_gradient(some.tensors)
        # Weights alike for all elements: in another order they must have the same gradients.
        how = {"gradients": gradients, "autocast": some.settings.get(AUTOCAST), "weigh": torch.ones_like}
        result = execute(lambda tensors: call(tensors, settings), some.tensors, track=True, **how)
        if result.error is None or gradients:
            return result
        # An assigner may refuse inputs that carry gradient: then it leaks none, and is watched without.
        changed: list[str] = []

        def watched(tensors: Mapping[str, Any]) -> Mapping[str, Any]:
            outputs = call(tensors, settings)
            changed.extend(
                f"input {name} was changed" for name, value in tensors.items() if not same(value, some.tensors[name])
            )
            return outputs

        result = execute(watched, some.tensors, track=False, **how)
        return replace(result, side_effects=(*result.side_effects, *changed))

    trial, rows = Trial(operation, case, ask, era or {}), []
    if not operation.relations.fits(case):
        return rows
    for name in operation.relations.declared():
        if name not in names:
            continue
        told(name)
        try:
            if not relation(name)(trial):
                continue
            verdict, detail = HOLDS, ""
        except Broken as broken:
            verdict, detail = BROKEN, str(broken)
        except Rejected as rejected:
            verdict, detail = REJECTED, str(rejected)
        rows.append({"relation": name, "verdict": verdict, "detail": detail})
    return rows


def relation(name: str) -> Callable[[Any], bool]:
    """The function that tries a relation: whether it speaks of the case; Broken and Rejected are raised."""
    from harness.relations import alone, behaviour, decided, gradcheck, levels, padding, permutation, scale

    return {
        "images": permutation.images,
        "alone": alone.alone,
        "ground truths": permutation.truths,
        "anchors": permutation.anchors,
        "levels": levels.levels,
        "classes": permutation.classes,
        "padding": padding.padding,
        "scale": scale.scale,
        "repeat": behaviour.repeat,
        "inputs": behaviour.inputs,
        "leak": behaviour.leak,
        "gradcheck": gradcheck.gradcheck,
        "optimality": decided.optimality,
        "monotony": decided.monotony,
    }[name]
