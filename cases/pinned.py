"""Counterexamples worth keeping: every file of `pinned/` is tried in every run, before anything is generated."""

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from cases.case import Case

FOLDER = Path(__file__).with_name("pinned")


def pinned(operation: str | None = None, **options: Any) -> list[Case]:
    """The pinned cases, sorted by name; with `operation` those of it that `options` allow.

    `options` are those of the operation's `cases`. Each case has the origin "pinned:NAME". Raises CaseError for a
    damaged file.
    """
    found = []
    for file in sorted(FOLDER.glob("*.safetensors"), key=lambda file: file.stem):
        case = Case.load(file)
        if operation is None or (
            case.operation == operation and importlib.import_module(f"cases.{operation}").allows(case, **options)
        ):
            found.append(replace(case, origin=f"pinned:{file.stem}"))
    return found
