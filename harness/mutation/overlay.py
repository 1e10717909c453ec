"""Importing `cleanroom` from a private copy, one of its modules from another file: the mutant."""

from __future__ import annotations

import importlib.util
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, SourceFileLoader
from pathlib import Path

from harness.mutation.sources import SUBJECT


class _Uncached(SourceFileLoader):
    """Compiles what stands in the file: bytecode is never read nor written, so no mutant can be another's."""

    def get_code(self, fullname: str):
        return self.source_to_code(self.get_data(self.path), self.path)


class _Overlay(MetaPathFinder):
    def __init__(self, module: str, file: Path) -> None:
        self._module, self._file = module, file

    def find_spec(self, fullname: str, path=None, target=None) -> ModuleSpec | None:
        if fullname != self._module:
            return None
        file = str(self._file)
        package = [str(self._file.parent)] if self._file.name == "__init__.py" else None
        return importlib.util.spec_from_file_location(
            fullname, file, loader=_Uncached(fullname, file), submodule_search_locations=package
        )


def lay(folder: Path, module: str = "", file: Path | None = None) -> None:
    """Import `cleanroom` from `folder` from now on, and `module` of it from `file`, which must exist while it is used:
    Triton's interpreter reads the source of kernels."""
    held = [name for name in sys.modules if name.partition(".")[0] == SUBJECT]
    if held:
        raise RuntimeError(f"{held[0]} is already imported; a mutant of it would not be loaded")
    sys.path.insert(0, str(folder))
    if module:
        sys.meta_path.insert(0, _Overlay(module, file))
