"""What the adapters of the set losses share: targets and pairs image by image, and a criterion of a given dtype."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

Tensors = Mapping[str, Tensor]
Settings = Mapping[str, object]


def targets(tensors: Tensors, settings: Settings, **names: str) -> list[dict[str, Tensor]]:
    """Return a dictionary an image; `names` maps its keys to tensors of all images, one after the other.

    Masks are cut to the size that the image's own have.
    """
    sizes = list(settings["sizes"])
    parts = {key: tensors[name].split(sizes) for key, name in names.items()}
    if "masks" in parts:
        places = zip(parts["masks"], settings["mask_sizes"], strict=True)
        parts["masks"] = [masks[:, :height, :width].contiguous() for masks, (height, width) in places]
    return [{key: some[image] for key, some in parts.items()} for image in range(len(sizes))]


def indices(tensors: Tensors, settings: Settings) -> list[tuple[Tensor, Tensor]]:
    """Return the given pairs, (queries, targets) an image."""
    counts = list(settings["pairs"])
    return list(zip(tensors["queries"].split(counts), tensors["targets"].split(counts), strict=True))


def criterion(dtype: torch.dtype, num_classes: int = 1, eos_coef: float = 0.1) -> nn.Module:
    """Return upstream's criterion, its weights in `dtype`: it takes logits of no other.

    Its matcher is upstream's too, and no adapter of a single term asks for it.
    """
    from transformers.loss.loss_for_object_detection import HungarianMatcher, ImageLoss

    return ImageLoss(HungarianMatcher(), num_classes, eos_coef, ["labels"]).to(dtype)
