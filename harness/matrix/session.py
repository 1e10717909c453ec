"""The matrix's worker: judges a candidate under settings of another era too, and compares two releases."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

from harness.worker import Session, WorkerSettings

UPSTREAM = "upstream"
"""Whom a release is called that is compared with another one, in the candidate's place."""


@dataclass(frozen=True)
class MatrixSettings(WorkerSettings):
    """`variants`: operation -> variant -> era settings; candidate `NAME/VARIANT` is NAME under them."""

    variants: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)

    def open(self, connection: Connection) -> MatrixSession:
        """A session of the matrix."""
        return MatrixSession(connection, self)


@dataclass(frozen=True)
class Under:
    """A candidate called with other era settings than those of the oracle at hand."""

    call: Callable[..., Any]
    replaced: tuple[str, ...]
    settings: Mapping[str, Any]

    def __call__(self, **given: Any) -> Any:
        """Called as every candidate is."""
        kept = {name: value for name, value in given.items() if name not in self.replaced}
        return self.call(**kept, **self.settings)


class MatrixSession(Session):
    """Requests of `harness matrix` beside `judge`."""

    _recorded: Callable[..., Any] | None = None

    def names(self, places: dict[str, dict[str, Any]]) -> dict[str, Any]:
        """Public names of the oracle."""
        from harness.matrix.names import public_names

        return public_names(places)

    def era(self, name: str) -> dict[str, Any]:
        """Settings under which a candidate must behave like this oracle."""
        from harness.operations import operation

        return self._era(operation(name))

    def answer(self, name: str, stored: bytes) -> dict[str, Any]:
        """What this release gives on a case: {"error": text} or {"outputs": safetensors}, gradients included."""
        from safetensors.torch import save

        from cases.case import Case
        from harness.execute import execute
        from harness.operation import AUTOCAST
        from harness.operations import operation as declaration

        operation, case = declaration(name), Case.from_bytes(stored)
        settings = {key: value for key, value in case.settings.items() if key != AUTOCAST}

        def call(given):
            bound = self._bind(name, given, settings)
            return bound.translate(bound())

        self._stage("oracle")
        result = execute(
            call,
            case.tensors,
            track=False,
            gradients=operation.carries_gradient(case.tensors),
            autocast=case.settings.get(AUTOCAST),
        )
        if result.error:
            return {"error": result.error.text}
        return {"outputs": save({key: value.contiguous().clone() for key, value in result.outputs.items()})}

    def compare(self, name: str, stored: bytes, outputs: bytes) -> dict[str, Any]:
        """The verdict on another release's outputs, in the candidate's place."""
        from safetensors.torch import load

        from harness.matrix.recording import Recording

        self._recorded = Recording(load(outputs))
        [row] = self.judge(name, stored, (UPSTREAM,))
        return row

    def _candidate(self, operation, name: str):
        if name == UPSTREAM:
            return self._recorded
        base, _, variant = name.rpartition("/")
        if not base:
            return super()._candidate(operation, name)
        return Under(
            super()._candidate(operation, base),
            tuple(self._era(operation)),
            self._settings.variants[operation.name][variant],
        )
