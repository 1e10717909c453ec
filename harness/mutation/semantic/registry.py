"""Where the semantic operators are declared: a name, and a function from a file to edits of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from harness.mutation.semantic.source import Edit, Source

Operator = Callable[[Source], Iterator[Edit]]
OPERATORS: dict[str, Operator] = {}
"""Every operator by its name; its docstring says which real fault it stands for."""


def operator(name: str) -> Callable[[Operator], Operator]:
    """Declare an operator."""

    def declare(function: Operator) -> Operator:
        OPERATORS[name] = function
        return function

    return declare
