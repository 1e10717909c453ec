"""Images, ground truths, anchors and classes in another order: the same answers, in that order."""

from __future__ import annotations

from harness.relations import moving
from harness.relations.declaration import Axis, Rows
from harness.relations.trial import Broken, Trial


def images(trial: Trial) -> bool:
    """Images in another order."""
    declared = trial.declared.images
    count = moving.number(declared, trial.case)
    if count < 2:
        return False
    order = moving.shuffled(count, trial.generator()).tolist()
    own = trial.own()
    got = trial.of(moving.with_images(declared, trial.case, order))
    trial.same(moving.of_images(declared, own, order), got)
    trial.same(_without(own, moving.named(declared.along), declared.unsummed), got)
    return True


def truths(trial: Trial) -> bool:
    """Ground truths of each image in another order."""
    return _untied(trial, trial.declared.truths)


def anchors(trial: Trial) -> bool:
    """Anchors, queries or elements in another order."""
    return _untied(trial, trial.declared.anchors)


def classes(trial: Trial) -> bool:
    """Classes under other numbers."""
    declared = trial.declared
    for name in declared.whole:
        value = trial.case.tensors[name]
        if value.is_floating_point() and not bool((value == value.trunc()).all() & (value >= 0).all()):
            return False
    return _untied(trial, declared.classes)


def _untied(trial: Trial, axis: Axis | Rows) -> bool:
    """On the case as it is; where something differs there, by the margins of what decides.

    A loss has its assigner inside, whose margins cannot be seen: it is asked about the case with its ties removed, and
    may decide otherwise there only at the same cost.
    """
    try:
        return _moved(trial, axis)
    except Broken:
        if trial.declared.margins:
            # Margins are those of the inputs' rounding; what half arithmetic rounds on the way is more.
            half = trial.case.dtype in ("float16", "bfloat16")
            return _moved(trial.stirred() if half else trial, axis, by_margins=True)
        if not trial.declared.free:
            raise
    return _moved(trial.stirred(), axis, by_cost=True)


def _moved(trial: Trial, axis: Axis | Rows, *, by_margins: bool = False, by_cost: bool = False) -> bool:
    case, generator = trial.case, trial.generator()
    certain = trial.declared.dense_only if by_margins else trial.declared.certain
    if isinstance(axis, Axis):
        count = moving.length(axis, case.tensors)
        if count < 2:
            return False
        order = moving.shuffled(count, generator)
        following = moving.with_axis(axis, case, order)
        expected = moving.take(axis, certain(case, trial.own()), order, count)
    else:
        new = moving.orders(axis, case, generator)
        if max(map(len, new), default=0) < 2:
            return False
        following = moving.with_rows(axis, case, new)
        expected = moving.moved_rows(axis, certain(case, trial.own()), new)
    got = certain(following, trial.of(following))
    if by_margins:
        trial.by_margins(following, expected, got)
    elif by_cost:
        trial.by_cost(expected, got)
    else:
        trial.same(expected, got)
    return True


def _without(outputs, names, unsummed):
    return {name: value for name, value in outputs.items() if name not in names and name not in unsummed}
