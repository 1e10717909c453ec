"""Where the element losses of ultralytics are, whatever the release."""

from importlib import import_module
from types import ModuleType

from reference.errors import RequestError

_MODULES = ("ultralytics.utils.loss", "ultralytics.yolo.utils.loss")  # the second one until 8.0.x


def loss_class(name: str) -> type:
    """The public class of that name; raises RequestError where this version has none."""
    found = getattr(_module(), name, None)
    if found is None:
        raise RequestError(f"this version of ultralytics has no {name}")
    return found


def _module() -> ModuleType:
    for name in _MODULES:
        try:
            return import_module(name)
        except ModuleNotFoundError as error:
            if not (error.name and name.startswith(error.name)):
                raise
    raise RequestError(f"this version of ultralytics has none of {', '.join(_MODULES)}")
