"""Packages whose `__init__` is not run: what an operation needs is imported from them, and nothing else.

Upstream's `__init__` files import trainers, data loaders and their dependencies. A shell is a package object
that knows only its folder, so that `import package.part.module` finds the module there.
"""

import importlib
import sys
from collections.abc import Mapping, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType


class Shell(ModuleType):
    """An empty package over a folder; names asked of it are looked for in `exposed`, submodules, in order."""

    def __init__(self, name: str, folder: Path, exposed: Sequence[str] = ()) -> None:
        super().__init__(name)
        self.__path__ = [str(folder)]
        self.__spec__ = ModuleSpec(name, loader=None, is_package=True)
        self._exposed = tuple(exposed)

    def __getattr__(self, name: str) -> object:
        if not name.startswith("_"):
            for submodule in self._exposed:
                module = importlib.import_module(f"{self.__name__}.{submodule}")
                if hasattr(module, name):
                    return getattr(module, name)
        raise AttributeError(f"{self.__name__} has no {name!r} among {', '.join(self._exposed) or 'no'} modules")


def install_shells(root: Path, version: str, exposed: Mapping[str, Sequence[str]]) -> None:
    """Put a shell of each package into `sys.modules` (parents come first); the top one gets `__version__`."""
    for name, submodules in exposed.items():
        shell = Shell(name, root.joinpath(*name.split(".")), submodules)
        sys.modules[name] = shell
        parent, _, child = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], child, shell)
        else:
            shell.__version__ = version
