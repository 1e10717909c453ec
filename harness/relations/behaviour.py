"""What a call may not do: answer otherwise when asked again, change its inputs, or hand out gradient it must not."""

from __future__ import annotations

from torch import Tensor, are_deterministic_algorithms_enabled, use_deterministic_algorithms

from harness.execute import Result
from harness.relations.trial import Broken, Trial
from harness.watch import same


def repeat(trial: Trial) -> bool:
    """The same bits when asked again, and twice the same under deterministic algorithms, which must not stop it."""
    trial.own()
    first = trial._known[trial.case.digest]
    _equal(first, trial.ask(trial.case), "asked again")
    before = are_deterministic_algorithms_enabled()
    use_deterministic_algorithms(True)
    try:
        one, other = trial.ask(trial.case), trial.ask(trial.case)
    finally:
        use_deterministic_algorithms(before)
    if one.error:
        raise Broken(f"rejected under deterministic algorithms: {one.error.text}")
    _equal(one, other, "asked again under deterministic algorithms")
    trial.same(trial.dense(trial.case, first), trial.dense(trial.case, one))
    return True


def _equal(first: Result, second: Result, when: str) -> None:
    if second.error:
        raise Broken(f"{when}: rejected: {second.error.text}")
    for name, value in first.outputs.items():
        if isinstance(value, Tensor) and not same(value, second.outputs[name]):
            raise Broken(f"{name} is another when {when}")


def inputs(trial: Trial) -> bool:
    """Inputs stay as they are, and no output lies in their memory."""
    return _effects(trial, ("input", "shares memory"))


def leak(trial: Trial) -> bool:
    """No output of an assigner carries gradient."""
    return _effects(trial, ("carries gradient",))


def _effects(trial: Trial, words: tuple[str, ...]) -> bool:
    trial.own()
    effects = trial._known[trial.case.digest].side_effects
    found = [effect for effect in effects if any(word in effect for word in words)]
    if found:
        raise Broken("; ".join(found))
    return True
