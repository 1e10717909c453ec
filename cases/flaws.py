"""Flaws: ways to turn a valid case into one that upstream rejects."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from cases.boxes import Picker
from cases.case import Case

#: One case in this many is given a flaw.
_ONE_IN = 24


@dataclass(frozen=True)
class Flaw:
    """A named flaw with the reason why upstream rejects it.

    `make` changes fresh copies of a case's tensors and settings, and returns False where it does not apply.
    """

    name: str
    reason: str
    make: Callable[[dict[str, Tensor], dict[str, Any]], bool]

    def applied(self, case: Case) -> Case:
        """The flawed case, tagged "invalid" and with the flaw's name; the case itself where it can't be."""
        tensors = {name: tensor.clone() for name, tensor in case.tensors.items()}
        settings = dict(case.settings)
        if not self.make(tensors, settings):
            return case
        return Case(case.operation, tensors, settings, case.origin, case.tags | {"invalid", self.name})


def perhaps(pick: Picker, flaws: Sequence[Flaw], case: Case) -> Case:
    """Draw the case itself mostly, else the case with one of `flaws`."""
    flaw = pick.choice((None,) * (len(flaws) * (_ONE_IN - 1)) + tuple(flaws))
    return case if flaw is None else flaw.applied(case)
