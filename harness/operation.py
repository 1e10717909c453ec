"""What an operation is: one declaration drives drawing, running, judging, measuring and `harness show`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from harness.relations.declaration import Relations

if TYPE_CHECKING:
    from cases.case import Case
    from harness.judge import Evidence, Finding

Tensors = Mapping[str, Tensor]
Settings = Mapping[str, Any]
Implementation = Callable[..., Any]


def release(version: str) -> tuple[int, ...]:
    """(8, 4, 190) of "8.4.190"; a version that is not all numbers counts as newer than every release."""
    parts = version.split(".")
    return tuple(int(part) for part in parts) if all(part.isdigit() for part in parts) else (99,)


@dataclass(frozen=True)
class Input:
    """A named input tensor of an operation."""

    name: str
    shape: str
    dtype: str
    meaning: str


@dataclass(frozen=True)
class Setting:
    """A named setting (a JSON value) of an operation."""

    name: str
    default: Any
    meaning: str


@dataclass(frozen=True)
class Output:
    """A named output tensor; a `decision` is judged by its margin, a number by its error budget."""

    name: str
    shape: str
    dtype: str
    meaning: str
    decision: bool = False


@dataclass(frozen=True)
class Upstream:
    """How one upstream package serves as oracle of an operation.

    `options` narrows what the case strategy may draw for a version; `era` gives the keyword settings under
    which a candidate must behave like that version (`spec/eras.md`). `since` is the first release that has the
    operation, where the package is older than it.
    """

    options: Callable[[str], dict[str, Any]] = field(default=lambda version: {})
    era: Callable[[str], dict[str, Any]] = field(default=lambda version: {})
    since: tuple[int, ...] = ()

    def has(self, version: str) -> bool:
        """Whether that version has the operation."""
        return release(version) >= self.since


@dataclass(frozen=True)
class DropIn:
    """A built-in candidate that is timed as the oracle is: the native call, without what prepares and reads it.

    `bind(**tensors, **settings)` gives the native call and how to read its result as outputs by name.
    """

    bind: Callable[..., tuple[Callable[[], Any], Callable[[Any], Tensors]]]

    def __call__(self, **given: Any) -> Tensors:
        """Called as every candidate is."""
        call, read = self.bind(**given)
        return read(call())


def _nothing(case: Case, outputs: Tensors) -> None:
    """No invariant is known beyond what the comparator judges."""


def read_and_write_once(case: Case, outputs: Tensors) -> int:
    """Bytes of all inputs and all outputs."""
    return sum(tensor.nbytes for tensor in (*case.tensors.values(), *outputs.values()))


def _by_numbers(evidence: Evidence) -> Finding:
    from harness.numeric import compare  # imports this module

    return compare(evidence)


@dataclass(frozen=True)
class Operation:
    """One assigner, loss, codec or overlap, and all that the harness needs to know about it."""

    name: str
    summary: str
    source: str
    inputs: tuple[Input, ...]
    settings: tuple[Setting, ...]
    outputs: tuple[Output, ...]
    upstreams: Mapping[str, Upstream]
    candidates: Mapping[str, Implementation]
    predictions: tuple[str, ...]
    """Inputs that a network makes: where NaN and infinity come from in training."""
    workloads: tuple[str, ...]
    gradients: tuple[str, ...] = ()
    """Inputs that carry gradient; its gradients are outputs called `gradient of NAME` (`gradient_name`)."""
    moved: tuple[str, ...] = ()
    """Real-valued inputs moved by one unit in the last place for the truth's sensitivity; default: `gradients`."""
    precision: str = ""
    """Coarsest dtype through which upstream's own computation passes, whatever the inputs' dtype; "" for none."""
    float64: bool = True
    """Whether upstream runs in float64; where it cannot, results are held to a stated tolerance around its own."""
    compare: Callable[[Evidence], Finding] = _by_numbers
    invariants: Callable[[Case, Tensors], str | None] = _nothing
    """What must hold of any result, an oracle at hand or not: None, or what does not hold."""
    minimum_bytes: Callable[[Case, Tensors], int] = read_and_write_once
    """Bytes that must move at least: each input that matters read once, each output written once."""
    relations: Relations = field(default_factory=Relations)
    """Where images, rows, anchors and classes lie, for relations that need no oracle, and which there are not."""

    @property
    def rejectable(self) -> tuple[str, ...]:
        """Names that a rejection may name: inputs and settings."""
        return tuple(item.name for item in (*self.inputs, *self.settings))

    def carries_gradient(self, tensors: Tensors) -> tuple[str, ...]:
        """The inputs of a case that carry gradient: an optional one may be absent, or hold integers."""
        return tuple(name for name in self.gradients if name in tensors and tensors[name].is_floating_point())


AUTOCAST = "autocast"
"""Setting that is the harness's own: the dtype under whose autocast both sides run, or None."""


def gradient_name(name: str) -> str:
    """What the gradient of an input is called among the outputs."""
    return f"gradient of {name}"
