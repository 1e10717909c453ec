"""Box loss of matched pairs as YOLOX has it (specification: yolox_losses.md, section 2)."""

from collections.abc import Mapping
from functools import partial

from torch import Tensor

from reference.bound import Bound


def bind(tensors: Mapping[str, Tensor], settings: Mapping[str, object]) -> Bound:
    """Prepare the call of the module for pairs of boxes in centre form."""
    from yolox.models.losses import IOUloss

    module = IOUloss(reduction=settings["reduction"], loss_type=settings["loss_type"])
    return Bound(partial(module, tensors["pred"], tensors["target"]), _translate)


def _translate(raw: Tensor) -> dict[str, Tensor]:
    return {"loss": raw}
