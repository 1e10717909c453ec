"""Oracles by the names that a run uses: "ultralytics==8.4.190", "yolox=FOLDER", "ultralytics=installed"."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import reference

if TYPE_CHECKING:
    from harness.operation import Operation


def pins() -> list[str]:
    """The pins that a run uses unless told otherwise, in the order of the pin file.

    All but negative controls and those that are there for `harness matrix` alone.
    """
    return [key for key, pin in reference.read_pins().items() if not (pin.control or pin.matrix)]


def package(oracle: str) -> str:
    """The package an oracle belongs to."""
    return reference.OracleSpec.parse(oracle).name


def version(oracle: str) -> str:
    """The version of an oracle that is present; OracleError says how to bring one that is not."""
    return locate(oracle).version


def has(oracle: str, operation: Operation) -> bool:
    """Whether an oracle answers an operation; OracleError where that hangs on its version and it is not present."""
    upstream = operation.upstreams.get(package(oracle))
    return upstream is not None and (not upstream.since or upstream.has(version(oracle)))


def locate(oracle: str) -> reference.Location:
    """Where an oracle's code is; OracleError says how to bring one that is absent."""
    return reference.locate(reference.OracleSpec.parse(oracle))


def describe(oracle: str) -> dict[str, Any]:
    """Provenance of an oracle, without the folder it lies in."""
    found = asdict(locate(oracle))
    del found["root"]
    return {"oracle": oracle, **found}
