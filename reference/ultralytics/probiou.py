"""Similarity of rotated boxes of ultralytics, paired and pairwise (specification: boxes.md, sections 11 and 12)."""

import inspect
from collections.abc import Mapping
from functools import partial

from torch import Tensor

from reference.bound import Bound
from reference.errors import RequestError
from reference.ultralytics.modules import public


def bind(tensors: Mapping[str, Tensor], settings: Mapping[str, object]) -> Bound:
    """Prepare the call. RequestError for a release before 8.0.235, and for a floor where there is none (to 8.4.83)."""
    boxes, eps = (tensors["obb1"], tensors["obb2"]), settings["eps"]
    if settings["pairwise"]:
        return Bound(partial(public("utils.metrics", "batch_probiou"), *boxes, eps=eps), translate)
    chosen = {"CIoU": settings["CIoU"], "eps": eps}
    probiou = public("utils.metrics", "probiou")
    if "floor" in inspect.signature(probiou).parameters:
        chosen["floor"] = settings["floor"]
    elif settings["floor"]:
        raise RequestError(f"probiou: this version of ultralytics has no floor, and the case has {settings['floor']}")
    return Bound(partial(probiou, *boxes, **chosen), translate)


def translate(raw: Tensor) -> dict[str, Tensor]:
    """Name upstream's result: (N, 1) of pairs, (N, M) pairwise."""
    return {"similarity": raw}
