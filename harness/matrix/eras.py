"""Era settings of operations: what those of a version change of the newest one's, and every known combination."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import Any

import reference
from harness.operation import release
from harness.operations import operation as declaration

Settings = dict[str, Any]
NEWEST = "newest"
"""The variant of a candidate under the settings of the newest era."""
MOST = 512
"""Combinations tried at most; those that change fewer settings of the newest era come first."""


def releases(package: str) -> list[str]:
    """The pinned versions of a package, controls left out, the newest first."""
    pins = [pin for pin in reference.read_pins().values() if pin.name == package and not pin.control]
    return sorted((pin.version for pin in pins), key=release, reverse=True)


def newest(operation: str, package: str) -> Settings:
    """Era settings of the newest pinned version."""
    return declaration(operation).upstreams[package].era(releases(package)[0])


def changed(own: Mapping[str, Any], default: Mapping[str, Any]) -> Settings:
    """The settings of an era that differ from those of another one."""
    return {name: value for name, value in own.items() if name not in default or default[name] != value}


def spelled(settings: Mapping[str, Any]) -> str:
    """`name=value, name=value`."""
    return ", ".join(f"{name}={value}" for name, value in settings.items())


def combinations(operation: str, package: str) -> dict[str, Settings]:
    """Every combination of values that some pinned version's era gives a setting, but the newest era's own.

    By their difference from the newest era; those of a version whole come first, then those that change least.
    """
    default = newest(operation, package)
    known = [declaration(operation).upstreams[package].era(version) for version in releases(package)]
    values: dict[str, list[Any]] = {name: [] for era in known for name in era}
    for name, found in values.items():
        for era in known:
            value = era.get(name, _LEFT_OUT)
            if value not in found:
                found.append(value)
    every = [dict(zip(values, chosen, strict=True)) for chosen in product(*values.values())]
    every = [{name: value for name, value in chosen.items() if value is not _LEFT_OUT} for chosen in every]
    every.sort(key=lambda settings: (settings not in known, len(difference(settings, default))))
    named = {difference(settings, default): settings for settings in every if settings != default}
    return dict(list(named.items())[:MOST])


def difference(settings: Mapping[str, Any], default: Mapping[str, Any]) -> str:
    """What a combination changes of the newest era, spelled; a setting that it leaves out is said so."""
    left = [f"{name} left out" for name in default if name not in settings]
    return ", ".join([*filter(None, [spelled(changed(settings, default))]), *left])


_LEFT_OUT = object()
