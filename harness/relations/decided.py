"""Optimality of matchings and monotony of positives: each operation says how its own is shown."""

from __future__ import annotations

from harness.relations.trial import Trial


def optimality(trial: Trial) -> bool:
    """The matching is the best there is, by a certificate that does not come from the subject."""
    return trial.declared.optimality(trial)


def monotony(trial: Trial) -> bool:
    """A larger k, or whatever an operation grows by, takes nothing away."""
    return trial.declared.monotony(trial)
