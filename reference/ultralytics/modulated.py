"""What the adapters of the focal losses share: where gamma and alpha go."""

import inspect
from collections.abc import Mapping, Sequence
from functools import partial

from torch import Tensor

from reference.bound import Bound


def bind_modulated(loss: type, arguments: Sequence[Tensor], settings: Mapping[str, object]) -> Bound:
    """Prepare the call; until 8.3.115 gamma and alpha are arguments of the call, not of the constructor."""
    focal = {"gamma": settings["gamma"], "alpha": settings["alpha"]}
    if "gamma" in inspect.signature(loss).parameters:
        return Bound(partial(loss(**focal), *arguments), lambda raw: {"loss": raw})
    return Bound(partial(loss(), *arguments, **focal), lambda raw: {"loss": raw})
