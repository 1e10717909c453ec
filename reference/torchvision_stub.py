"""What to do where torchvision is absent or cannot be loaded: the one place that touches it.

YOLOX's modules import torchvision always, those of transformers where they find it, those of ultralytics read its
version from its metadata, and until 8.1 import it too; nothing that an adapter asks for calls it. An installed
torchvision may fail to load, as a build for CUDA does beside a CPU PyTorch ("operator torchvision::nms does not
exist"). Where it loads it is left alone.
"""

import importlib
import importlib.metadata
import sys
from collections.abc import Iterator
from enum import Enum
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType


class Torchvision(Enum):
    """How a package meets torchvision, hence what stands in for one that cannot be loaded."""

    VERSION = "its version is read: metadata stand in where it is absent, and a module once it is asked for"
    IMPORTED = "imported unconditionally: a module with nothing but a version stands in"
    OPTIONAL = "imported if found: it is made impossible to find"


def stand_in_for_torchvision(need: Torchvision) -> None:
    """Change this process so that a package of that need can be imported, if torchvision is what would stop it."""
    if need is Torchvision.VERSION:
        sys.meta_path.append(_Metadata)  # asked last: what is installed goes first
        sys.meta_path.insert(0, _OnceAsked)
    elif not _loads():
        _forget()
        sys.modules["torchvision"] = _module() if need is Torchvision.IMPORTED else None


def _module() -> ModuleType:
    module = ModuleType("torchvision", "Stand-in: importable, and has a version.")
    module.__version__ = "0.0"
    module.__spec__ = ModuleSpec("torchvision", loader=None)
    return module


def _forget() -> None:
    """Remove what a failed import left behind."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]


class _OnceAsked:
    """Finds torchvision when it is imported: the installed one if that loads, else the stand-in."""

    @classmethod
    def find_spec(cls, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return ModuleSpec(name, loader=cls) if name == "torchvision" else None

    @classmethod
    def create_module(cls, spec: ModuleSpec) -> ModuleType:
        sys.meta_path.remove(cls)
        if _loads():
            return sys.modules["torchvision"]
        _forget()
        return _module()

    @staticmethod
    def exec_module(module: ModuleType) -> None:
        """Nothing is left to do."""


def _loads() -> bool:
    try:
        importlib.import_module("torchvision")
    except (ImportError, OSError, RuntimeError, AttributeError):  # absent; wrong libraries; wrong PyTorch
        return False
    return True


class _Metadata(importlib.metadata.Distribution):
    """A torchvision of version 0.0, of which there are only metadata."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> None:
        return None

    @classmethod
    def find_distributions(cls, context: importlib.metadata.DistributionFinder.Context) -> Iterator["_Metadata"]:
        if context.name == "torchvision":
            yield cls()

    def read_text(self, filename: str) -> str | None:
        return "Name: torchvision\nVersion: 0.0\n" if filename == "METADATA" else None

    def locate_file(self, path: str) -> Path:
        return Path(path)
