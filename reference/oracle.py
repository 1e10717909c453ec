"""Locate an oracle, make its modules importable in this process, and ask it.

One process holds one oracle: two versions of a package cannot be imported side by side.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from reference.absent import skip, stand_in_for_absent
from reference.bound import Bound
from reference.cache import cache_folder, oracle_folder
from reference.errors import OracleError, RequestError
from reference.packages import PACKAGES, package_at
from reference.pins import OracleSpec, find_pin
from reference.shells import install_shells
from reference.torchvision_stub import stand_in_for_torchvision

if TYPE_CHECKING:  # `python -m reference` need not wait for torch
    from torch import Tensor


@dataclass(frozen=True)
class Location:
    """Where an oracle's code is: `root` is the folder that holds the package.

    `source` is the archive's file name, the checkout's folder or "installed"; `sha256` the archive's or "".
    """

    name: str
    version: str
    source: str
    sha256: str
    root: Path


@dataclass(frozen=True)
class Oracle(Location):
    """Upstream's code for some operations, at one version, importable in this process."""

    @property
    def operations(self) -> tuple[str, ...]:
        """The operations it answers."""
        return tuple(PACKAGES[self.name].operations)

    def bind(
        self,
        operation: str,
        tensors: Mapping[str, Tensor],
        settings: Mapping[str, object],
        assignment: Mapping[str, Tensor] | None = None,
    ) -> Bound:
        """Prepare upstream's call of an operation on a case; with `assignment` its assigner answers that.

        Raises RequestError where this package lacks the operation, or this version a setting the case uses.
        """
        adapter = self._adapter(operation)
        with _beside(tensors):
            return adapter.bind(tensors, settings, *(() if assignment is None else (assignment,)))

    def assigner_inputs(self, operation: str, tensors: Mapping[str, Tensor], settings: Mapping[str, object]) -> Any:
        """Return what a total hands to its assigner: (tensors, settings, answer), one or a list of them."""
        with _beside(tensors):
            return self._adapter(operation).assigner_inputs(tensors, settings)

    def quantities(
        self, operation: str, tensors: Mapping[str, Tensor], settings: Mapping[str, object]
    ) -> dict[str, Tensor]:
        """Return the deciding quantities, by upstream's public functions, in the dtype of the tensors."""
        with _beside(tensors):
            return self._adapter(operation).quantities(tensors, settings)

    def era(self, operation: str) -> str:
        """Return the version by which upstream's meaning is known; "0.3.0+head" where one number has two meanings."""
        variant = getattr(self._adapter(operation), "variant", str)()
        return f"{self.version}+{variant}" if variant else self.version

    def _adapter(self, operation: str) -> ModuleType:
        modules = PACKAGES[self.name].operations
        if operation not in modules:
            raise RequestError(
                f"{self.name} {self.version} has no operation {operation!r}; it has {', '.join(modules)}"
            )
        return importlib.import_module(modules[operation])


def _beside(tensors: Mapping[str, Tensor]) -> AbstractContextManager[Any]:
    """New tensors on the device of a case: a criterion that is made for it has weights and strides of its own."""
    import torch

    return next((torch.device(value.device) for value in tensors.values()), nullcontext())


def locate(spec: OracleSpec, cache: Path | None = None) -> Location:
    """Find an oracle's code without importing it; OracleError says what is missing and how to bring it."""
    if spec.version:
        pin = find_pin(str(spec))
        folder = oracle_folder(cache or cache_folder(), pin)
        if not folder.is_dir():
            raise OracleError(f"{spec} is not fetched; run: python -m reference fetch {spec}")
        return Location(spec.name, spec.version, pin.archive, pin.sha256, _root(folder, spec))
    if spec.folder:
        root = _root(Path(spec.folder), spec)
        return Location(spec.name, _declared_version(root / spec.name), spec.folder, "", root)
    found = importlib.util.find_spec(spec.name)
    if found is None or found.origin is None:
        raise OracleError(f"{spec}: no {spec.name} is installed in this environment")
    package = Path(found.origin).parent
    return Location(spec.name, _declared_version(package), "installed", "", package.parent)


def _root(folder: Path, spec: OracleSpec) -> Path:
    for root in (folder, folder / "src"):
        if (root / spec.name / "__init__.py").is_file():
            return root
    raise OracleError(f"{spec}: {folder} holds no package {spec.name}")


def _declared_version(package: Path) -> str:
    for node in ast.parse((package / "__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__":
            return str(ast.literal_eval(node.value))
    return "unknown"


_loaded: dict[OracleSpec, Oracle] = {}  # at most one


def load(spec: OracleSpec, cache: Path | None = None) -> Oracle:
    """Make an oracle's modules importable in this process; each is imported when first asked for.

    Call it in a worker process: it changes `sys.modules` and `os.environ`. Raises OracleError where the code
    is missing or the process holds another oracle.
    """
    if not _loaded:
        oracle = Oracle(**asdict(locate(spec, cache)))
        package = package_at(oracle.name, oracle.root)
        _quieten((cache or cache_folder()) / "settings", oracle, package.at_home)
        stand_in_for_torchvision(package.torchvision)
        stand_in_for_absent(package.unused)
        skip(package.skipped)
        install_shells(oracle.root, oracle.version, package.shells)
        if not package.shells:  # small enough to be imported as it is
            sys.path.insert(0, str(oracle.root))
        _loaded[spec] = oracle
    if spec not in _loaded:
        raise OracleError(f"{spec}: this process already holds {', '.join(map(str, _loaded))}")
    return _loaded[spec]


def _quieten(settings: Path, oracle: Oracle, at_home: bool) -> None:
    """Keep upstream off the network, the terminal and the user's home; its settings files go to the cache."""
    warnings.filterwarnings("ignore", module=rf"{oracle.name}\.")
    own = settings / f"{oracle.name}-{oracle.version}"
    own.mkdir(parents=True, exist_ok=True)
    os.environ |= {
        "YOLO_CONFIG_DIR": str(own),
        "YOLO_OFFLINE": "true",
        "YOLO_VERBOSE": "false",
        "HF_HOME": str(own),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "MPLCONFIGDIR": str(settings / "matplotlib"),
    }
    if at_home:
        (own / ".config").mkdir(exist_ok=True)
        os.environ |= {"CLEANROOM_CACHE": str(settings.parent), "HOME": str(own)}
