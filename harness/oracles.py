"""Oracles by the names that a run uses: "ultralytics==8.4.190", "yolox=FOLDER", "ultralytics=installed"."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import reference
from harness.operation import CHECKOUT


def pins() -> list[str]:
    """Every pin, in the order of the pin file."""
    return list(reference.read_pins())


def package(oracle: str) -> str:
    """The package an oracle belongs to."""
    return reference.OracleSpec.parse(oracle).name


def version(oracle: str) -> str:
    """The version by which eras are chosen; that of a local checkout ends in "+checkout"."""
    checkout = bool(reference.OracleSpec.parse(oracle).folder)
    return locate(oracle).version + (CHECKOUT if checkout else "")


def locate(oracle: str) -> reference.Location:
    """Where an oracle's code is; OracleError says how to bring one that is absent."""
    return reference.locate(reference.OracleSpec.parse(oracle))


def describe(oracle: str) -> dict[str, Any]:
    """Provenance of an oracle, without the folder it lies in."""
    found = asdict(locate(oracle))
    del found["root"]
    return {"oracle": oracle, **found}
