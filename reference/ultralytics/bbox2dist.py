"""Boxes to distances, of ultralytics (specification: boxes.md, section 3)."""

import inspect
from collections.abc import Mapping
from functools import partial

from torch import Tensor

from reference.bound import Bound
from reference.errors import RequestError
from reference.ultralytics.modules import public


def bind(tensors: Mapping[str, Tensor], settings: Mapping[str, object]) -> Bound:
    """Prepare the call. Releases before 8.4.0 need a `reg_max`: RequestError where the case has none."""
    bbox2dist = public("utils.tal", "bbox2dist")
    reg_max = settings["reg_max"]
    required = inspect.signature(bbox2dist).parameters["reg_max"].default is inspect.Parameter.empty
    if reg_max is None and required:
        raise RequestError("bbox2dist: this version of ultralytics needs a reg_max, and the case has none")
    call = partial(bbox2dist, tensors["anchor_points"], tensors["bbox"], reg_max)
    return Bound(call, lambda raw: {"distance": raw})
