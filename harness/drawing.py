"""Hypothesis as a source of cases: the same seed draws the same cases, in every process and on every resumption."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import hypothesis
from hypothesis import HealthCheck, Phase, Verbosity, settings
from hypothesis.internal.conjecture import providers

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy


def _draw_no_constants_of_imported_modules() -> None:
    """Hypothesis seasons its draws with literals of whatever local modules happen to be imported by then.

    A resumed run imports them in another order, so the same seed drew other cases. There is no setting for
    it; versions without the feature need nothing.
    """
    if hasattr(providers, "_get_local_constants"):
        nothing = providers.Constants()
        providers._get_local_constants = lambda: nothing
        providers.CONSTANTS_CACHE = type(providers.CONSTANTS_CACHE)(providers.CONSTANTS_CACHE.max_size)


_draw_no_constants_of_imported_modules()


class Fails(Exception):  # noqa: N818 - tells Hypothesis that a case fails
    """Raised by a visitor of `explore` where it is to shrink."""


def explore(
    strategy: SearchStrategy[Any], visit: Callable[[Any], None], *, seed: int, examples: int, shrink: bool
) -> None:
    """Call `visit` on up to `examples` drawn values; with `shrink`, also on ever smaller ones that raise Fails."""
    test = settings(
        max_examples=examples,
        phases=(Phase.generate, Phase.shrink) if shrink else (Phase.generate,),
        database=None,
        deadline=None,
        derandomize=False,
        report_multiple_bugs=False,
        print_blob=False,
        verbosity=Verbosity.quiet,
        suppress_health_check=list(HealthCheck),
    )(hypothesis.given(strategy)(visit))
    with warnings.catch_warnings(), contextlib.suppress(Fails):
        # A failing case is printed by `replay`, not by Hypothesis, which warns that its text is long.
        warnings.simplefilter("ignore", hypothesis.errors.HypothesisWarning)
        hypothesis.seed(seed)(test)()
