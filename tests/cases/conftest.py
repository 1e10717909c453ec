"""A few hundred derandomized draws of every strategy, shared by the tests."""

from collections.abc import Callable
from functools import cache
from importlib import import_module

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from cases.case import DTYPES, Case

DRAWS = 300


@pytest.fixture(scope="session")
def draw() -> Callable[..., list[Case]]:
    @cache
    def drawn(operation: str, dtypes: tuple[str, ...] = tuple(DTYPES), examples: int = DRAWS, **options) -> list[Case]:
        strategy = import_module(f"cases.{operation}").cases
        found: list[Case] = []

        @settings(
            max_examples=examples,
            derandomize=True,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(strategy(dtypes=dtypes, **options))
        def collect(case: Case) -> None:
            found.append(case)

        collect()
        return found

    return drawn
