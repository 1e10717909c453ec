"""What to do where a module is absent that upstream imports and no adapter's call reaches."""

import importlib.util
import sys
from collections.abc import Callable, Iterable
from types import ModuleType


def _parse_version(text: str) -> object:
    from packaging.version import parse  # few processes ask for it

    return parse(text)


#: What upstream calls of such a module while it is imported.
_CALLED: dict[str, dict[str, Callable]] = {"pkg_resources": {"parse_version": _parse_version}}


def stand_in_for_absent(names: Iterable[str]) -> None:
    """Make modules importable in this process: an almost empty one stands in where none is installed."""
    for name in names:
        if name not in sys.modules and importlib.util.find_spec(name) is None:
            module = ModuleType(name, "Stand-in for a module that is not installed.")
            vars(module).update(_CALLED.get(name, {}))
            sys.modules[name] = module
