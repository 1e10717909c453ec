"""What to do about modules that upstream imports and no adapter's call reaches: absent ones, and trainers."""

import importlib.util
import sys
from collections.abc import Iterable
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any


def _parse_version(text: str) -> object:
    from packaging.version import parse  # few processes ask for it

    return parse(text)


def _no_repository(*given: Any, **named: Any) -> None:
    raise OSError("a release is no repository")


def _no_shell() -> None:
    """As IPython answers where none is running."""


#: What upstream, or a package that it imports, asks of such a module while it is imported.
_ASKED: dict[str, dict[str, Any]] = {
    "pkg_resources": {"parse_version": _parse_version},
    "IPython": {"get_ipython": _no_shell},
    "git": {"Repo": _no_repository, "exc": SimpleNamespace(InvalidGitRepositoryError=OSError)},
}


class StandIn(ModuleType):
    """A package that isn't run: whatever name is asked of it is `Unused`."""

    def __init__(self, name: str) -> None:
        super().__init__(name, "Stand-in for a module that no call reaches.")
        self.__path__ = []
        self.__spec__ = ModuleSpec(name, loader=None, is_package=True)
        vars(self).update(_ASKED.get(name, {}))

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return Unused


class Unused:
    """What a class or a decorator of such a module is taken for while others are defined."""

    def __init__(self, *given: Any, **named: Any) -> None:
        """Take anything, keep nothing."""

    def __call__(self, decorated: Any) -> Any:
        """As a decorator: what is decorated, as it is."""
        return decorated


def stand_in_for_absent(names: Iterable[str]) -> None:
    """Make modules importable in this process: one stands in where none is installed."""
    skip(name for name in names if name not in sys.modules and importlib.util.find_spec(name) is None)


def skip(names: Iterable[str]) -> None:
    """Put a stand-in for each module into `sys.modules`, whether there is one or not: it will not be run."""
    for name in names:
        sys.modules[name] = StandIn(name)
