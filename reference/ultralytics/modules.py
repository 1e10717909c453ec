"""Where the public things of ultralytics are, whatever the release.

Until 8.0.133 all of it lay beneath `ultralytics.yolo`, the set losses beneath `ultralytics.vit`; and until 8.0.100 the
detection criterion lay beside its trainer.
"""

from importlib import import_module
from typing import Any

from reference.errors import RequestError

#: Folders of a release, the present one first.
_FOLDERS = {
    "utils": ("ultralytics.utils", "ultralytics.yolo.utils"),
    "models.utils": ("ultralytics.models.utils", "ultralytics.vit.utils"),
}
#: The module and the name that a class had before.
_FORMER = {"v8DetectionLoss": ("ultralytics.yolo.v8.detect.train", "Loss")}


def public(module: str, name: str) -> Any:
    """The public class or function `name` of "utils.tal", "models.utils.ops" and the like.

    Raises RequestError where this version has no such thing.
    """
    folder, _, file = module.rpartition(".")
    there = filter(None, (_imported(f"{parent}.{file}") for parent in _FOLDERS[folder]))
    found = getattr(next(there, None), name, None)
    if found is None and name in _FORMER:
        place, called = _FORMER[name]
        found = getattr(_imported(place), called, None)
    if found is not None:
        return found
    raise RequestError(f"this version of ultralytics has no public {name} in {module}")


def _imported(place: str) -> Any:
    """The module, or None where this version has none of that name."""
    try:
        return import_module(place)
    except ModuleNotFoundError as error:
        if error.name and (place == error.name or place.startswith(f"{error.name}.")):
            return None
        raise
