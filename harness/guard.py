"""What a plugged-in candidate may not lay hands on: the functions that judge and time it, and upstream's code.

In one process nothing is out of reach. What is found here is what stays behind after a call (a function replaced by
another), and what runs during one (a line of upstream's). A candidate that puts everything back before it returns,
copies upstream's code under another name, or answers through native code that looks at the process, is not caught by
this; for those there is the audit of sources, and whoever reads the candidate.
"""

from __future__ import annotations

import importlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import torch

ROOMS = ("harness", "reference")
"""Packages whose functions and methods are all guarded, as far as they are imported."""
JUDGES = tuple(
    f"harness.{name}"
    for name in (
        *("accelerator", "directions", "disturbance", "divergences", "equality", "execute", "judge", "meter"),
        *("numeric", "operations", "total", "verdict", "watch"),
    )
)
"""Modules that a worker would import after a candidate has run."""
TENSOR = (
    *("__eq__", "__ne__", "abs", "all", "any", "clone", "contiguous", "copy_", "data_ptr", "detach", "double"),
    *("is_floating_point", "isfinite", "item", "numel", "requires_grad_", "sum", "to", "tolist", "untyped_storage"),
    *("view", "zero_"),
)
PLACES: tuple[tuple[Any, tuple[str, ...]], ...] = (
    (time, ("perf_counter", "perf_counter_ns", "monotonic", "monotonic_ns", "process_time", "time", "time_ns")),
    (torch, ("equal", "isclose", "get_rng_state", "empty", "enable_grad", "no_grad", "zeros_like", "where")),
    (torch.autograd, ("grad", "backward")),
    (torch.cuda, ("Event", "synchronize", "max_memory_allocated", "memory_stats")),
    (torch.Tensor, TENSOR),
    (threading, ("enumerate", "Thread")),
)
ABSENT = object()
"""In place of a function that its owner does not have itself."""


class Guard:
    """The functions as they were when it was made, and the folder of upstream's code."""

    def __init__(self, root: Path) -> None:
        self._root = str(root.resolve()) + "/"
        self._known: dict[tuple[Any, str], Any] = {}
        for name in JUDGES:
            importlib.import_module(name)
        self._learn()

    def replaced(self) -> tuple[str, ...]:
        """Say which functions are no longer what they were, and put them back: another's result must not change."""
        found = []
        for (owner, name), right in self._known.items():
            if vars(owner).get(name, ABSENT) is not right:
                if right is ABSENT:
                    delattr(owner, name)
                else:
                    setattr(owner, name, right)
                found.append(f"{owner.__name__}.{name} was replaced")
        self._learn()
        return tuple(found)

    def _learn(self) -> None:
        for owner, names in PLACES:
            for name in names:
                # A method that is inherited must not be overlaid either.
                self._known.setdefault((owner, name), vars(owner).get(name, ABSENT))
        for owner, names in _rooms():
            for name in names:
                value = vars(owner).get(name)
                # Functions only: what a module remembers may change.
                if callable(value) or isinstance(value, staticmethod | classmethod):
                    self._known.setdefault((owner, name), value)

    @contextmanager
    def watching(self) -> Iterator[list[str]]:
        """Fill the list with what upstream's code was run for, and with functions replaced, when the block ends."""
        found: list[str] = []
        ran: dict[str, None] = {}
        root = self._root

        def look(frame: FrameType, event: str, _: object) -> None:
            if event == "call" and frame.f_code.co_filename.startswith(root):
                ran[f"upstream's {frame.f_code.co_qualname} was called"] = None

        self._learn()
        before: Callable | None = sys.getprofile()
        threading.setprofile(look)
        sys.setprofile(look)
        try:
            yield found
        finally:
            kept = sys.getprofile() is look
            sys.setprofile(before)
            threading.setprofile(before)
            found += [*ran, *self.replaced()] + ([] if kept else ["the look at upstream's code was turned away"])


def _rooms() -> Iterator[tuple[Any, tuple[str, ...]]]:
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] in ROOMS and isinstance(module, ModuleType):
            yield module, tuple(vars(module))
            for value in list(vars(module).values()):
                if isinstance(value, type) and value.__module__ == name:
                    yield value, tuple(vars(value))
