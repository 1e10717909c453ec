"""Public names of upstream, listed by a worker that holds it: what its modules define, never their sources."""

from __future__ import annotations

import inspect
import pkgutil
from importlib import import_module
from types import ModuleType
from typing import Any


def public_names(places: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The names of classes and functions in the modules that `places` lists (`harness/coverage.toml`).

    `{"names": [MODULE.NAME, ...], "unread": {MODULE: reason}}`; a module that this version lacks gives nothing. A name
    has one spelling whichever folder its module lay in then: the first one of its place.
    """
    names: set[str] = set()
    unread: dict[str, str] = {}
    for module, place in places.items():
        for own in (module, *place.get("formerly", ())):
            _read(own, module, place, names, unread)
    return {"names": sorted(names), "unread": unread}


def _read(own: str, module: str, place: dict[str, Any], names: set[str], unread: dict[str, str]) -> None:
    try:
        found = import_module(own)
    except ModuleNotFoundError as error:
        if not (error.name and (own == error.name or own.startswith(f"{error.name}."))):
            unread[own] = f"no module {error.name}"
        return
    except Exception as error:  # whatever importing upstream raises; its message may quote paths or source
        unread[own] = type(error).__name__
        return
    if "class" in place:
        held = vars(getattr(found, place["class"], object))
        names |= {f"{module}.{name}" for name, value in held.items() if _is_public(name) and inspect.isroutine(value)}
        return
    names |= {f"{module}.{place.get('renamed', {}).get(name, name)}" for name in _defined(found)}
    if hasattr(found, "__path__"):
        for part in pkgutil.iter_modules(found.__path__):
            if _is_public(part.name):
                _read(f"{own}.{part.name}", f"{module}.{part.name}", {}, names, unread)


def _defined(module: ModuleType) -> list[str]:
    """What the module itself defines: what it imports is listed where it lives."""
    return [
        name
        for name, value in vars(module).items()
        if _is_public(name)
        and (inspect.isclass(value) or inspect.isroutine(value))
        and getattr(value, "__module__", "") == module.__name__
    ]


def _is_public(name: str) -> bool:
    return not name.startswith("_")
