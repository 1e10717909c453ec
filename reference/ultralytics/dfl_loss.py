"""Distribution focal loss of ultralytics (specification: yolo_losses.md, section 2.3)."""

import inspect
from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor

from reference.bound import Bound
from reference.errors import RequestError
from reference.ultralytics.modules import public

ARGUMENTS = ("pred_dist", "target")


def bind(tensors: Mapping[str, Tensor], settings: Mapping[str, object]) -> Bound:
    """Prepare the call.

    Until 8.2.39 the loss is a static method of BboxLoss that is handed clamped targets; here they are clamped before
    the call, as `bbox2dist` does.
    """
    pred_dist, target = (tensors[name] for name in ARGUMENTS)
    bins = pred_dist.shape[-1]
    try:
        loss = public("utils.loss", "DFLoss")(bins)
    except RequestError:
        loss = _method()
        target = target.clamp(0, bins - 1.01)
    return Bound(partial(loss, pred_dist, target), lambda raw: {"loss": raw})


def _method() -> Callable[[Tensor, Tensor], Tensor]:
    holder = public("utils.loss", "BboxLoss")
    for name, member in vars(holder).items():
        if isinstance(member, staticmethod) and tuple(inspect.signature(getattr(holder, name)).parameters) == ARGUMENTS:
            return getattr(holder, name)
    raise RequestError("this version of ultralytics has no distribution focal loss that can be called on its own")
