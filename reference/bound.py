"""What an adapter hands back: upstream's call on one case, ready to be made, and how to read its result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # `python -m reference` need not wait for torch
    from torch import Tensor


@dataclass(frozen=True)
class Bound:
    """`bound()` runs upstream's call and nothing else, so that it can be timed; `translate` reads its result.

    `translate(raw)` returns the operation's outputs by name. It names and gathers, no more: values, order and
    dtypes are upstream's. `losses(raw)` reads only what carries gradient, where translating costs more.
    """

    call: Callable[[], Any]
    translate: Callable[[Any], dict[str, Tensor]]
    losses: Callable[[Any], dict[str, Tensor]] | None = None

    def __call__(self) -> Any:
        """Return upstream's raw result."""
        return self.call()
