"""What to do where torchvision is absent or cannot be loaded: the one place that touches it.

YOLOX's modules import torchvision always, those of transformers where they find it, those of ultralytics read its
version from its metadata; nothing that an adapter asks for calls it. An installed torchvision may fail to load, as
a build for CUDA does beside a CPU PyTorch ("operator torchvision::nms does not exist"). Where it loads it is left
alone.
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

    VERSION = "its version is read: metadata stand in where it is absent"
    IMPORTED = "imported unconditionally: a module with nothing but a version stands in"
    OPTIONAL = "imported if found: it is made impossible to find"


def stand_in_for_torchvision(need: Torchvision) -> None:
    """Change this process so that a package of that need can be imported, if torchvision is what would stop it."""
    if need is Torchvision.VERSION:
        sys.meta_path.append(_Metadata)  # asked last: what is installed goes first
    elif not _loads():
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]  # what the failed import left behind
        module = ModuleType("torchvision", "Stand-in: importable, and has a version.")
        module.__version__ = "0.0"
        module.__spec__ = ModuleSpec("torchvision", loader=None)
        sys.modules["torchvision"] = module if need is Torchvision.IMPORTED else None


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
