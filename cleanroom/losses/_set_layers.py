"""The set criterion over layers: one matching for all of them, then the terms of each (set_prediction.md, A2 to A9)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cleanroom.assign._matching_op import LayerPairs, matched_layers
from cleanroom.assign.hungarian import match_layers
from cleanroom.assign.matching_cost import CostTerms
from cleanroom.kernels import runtime
from cleanroom.losses.masks import mask_terms
from cleanroom.losses.set_terms import (
    Pairs,
    box_terms,
    cardinality_term,
    class_term,
    place_pairs,
    result_dtype,
    target_classes,
)

if runtime.AVAILABLE:
    from cleanroom.kernels.set_loss import fused_terms

LOSSES = ("labels", "boxes", "cardinality", "masks")
"""Names of the losses; those of masks exist for the last layer only."""


class Layer(NamedTuple):
    """Predictions of one decoder layer: (B, Q, C + 1), (B, Q, 4), and of the last one maybe masks (B, Q, h, w)."""

    logits: Tensor
    boxes: Tensor
    masks: Tensor | None = None


class Targets(NamedTuple):
    """Targets of a batch one after the other: (G,), (G, 4), how many each image has, masks (some, H, W) in order."""

    labels: Tensor
    boxes: Tensor
    sizes: Sequence[int]
    masks: Sequence[Tensor] = ()


class Matching(NamedTuple):
    """Pairs of every layer; and all of them as (L * P,) int64, counted within the image."""

    layers: list[Pairs]
    queries: Tensor
    targets: Tensor


def match(
    layers: Sequence[Layer], targets: Targets, costs: CostTerms, *, sparse: bool, non_finite: str | None = None
) -> Matching:
    """Match all layers at once on the host: in one operator, or with `sparse` by what is in it.

    `non_finite` as in `hungarian_match`.
    """
    total, batch = layers[0].boxes.shape[1], len(targets.sizes)
    if not sparse:
        found = matched_layers(*_given(layers, targets), terms=costs, non_finite=non_finite or "", path="scipy")
        firsts = torch.tensor([0, *targets.sizes], device=found.images.device).cumsum(0)
        return Matching(pairs_of(found, len(layers), total), found.queries, found.targets - firsts[found.images])
    found = match_layers(*_given(layers, targets), terms=costs, non_finite=non_finite)
    queries, local = (np.concatenate([part[side].numpy() for part in found]) for side in (0, 1))
    counts = [len(some) for some, _ in found[:batch]]
    width = sum(counts)
    pairs = [
        place_pairs(queries[start : start + width], local[start : start + width], counts, targets.sizes, total)
        for start in range(0, width * len(layers), width or 1)
    ] or [place_pairs(queries, local, counts, targets.sizes, total)] * len(layers)
    return Matching(pairs, torch.from_numpy(queries), torch.from_numpy(local))


def match_on_device(
    layers: Sequence[Layer], targets: Targets, costs: CostTerms, *, non_finite: str | None = None
) -> LayerPairs:
    """Match all layers at once, in kernels; `non_finite` as in `hungarian_match`."""
    return matched_layers(*_given(layers, targets), terms=costs, non_finite=non_finite or "", path="triton")


def _given(layers: Sequence[Layer], targets: Targets) -> tuple:
    logits, boxes = [layer.logits.detach() for layer in layers], [layer.boxes.detach() for layer in layers]
    return logits, boxes, targets.labels, targets.boxes.detach(), targets.sizes


def pairs_of(found: LayerPairs, layers: int, total: int) -> list[Pairs]:
    """The pairs of each of so many layers, of `total` queries an image."""
    images, queries, placed = (part.view(layers, -1) for part in found)
    rows = torch.add(queries, images, alpha=total)
    return [Pairs(*both, total) for both in zip(rows.unbind(), placed.unbind(), strict=True)]


class Fused(NamedTuple):
    """What the kernels compute of all layers."""

    total: Tensor
    """Weighted sum, 0-dim or (B,), float32."""
    terms: Tensor
    """(L, 4) or (L, 4, B) float32: class, L1, GIoU and cardinality of each layer."""
    local: Tensor
    """(L, P) int64, targets of the pairs within their image."""


@dataclass(frozen=True)
class Criterion:
    """What all terms need beside predictions and pairs.

    `normaliser` is D (None: the targets that take part, at least 1), `ignore_mask` (B, Q) takes queries and their
    targets out, `sparse` allows looking at values.
    """

    weights: Tensor
    eos_coef: float
    targets: Targets
    normaliser: Tensor | float | None = None
    ignore_mask: Tensor | None = None
    reduction: str = "sum"
    sparse: bool = True

    def layer(self, losses: Sequence[str], layer: Layer, pairs: Pairs) -> dict[str, Tensor]:
        """Entries of one layer, in the order of `losses`."""
        common = {"ignore_mask": self.ignore_mask, "reduction": self.reduction}
        targets, ignored, found = self.targets, self._ignored(layer, pairs), {}
        for loss in losses:
            if loss == "labels":
                classes = target_classes(layer.logits, targets.labels, pairs, self.ignore_mask)
                found["loss_ce"] = class_term(layer.logits, classes, self.weights, eos_coef=self.eos_coef, **common)
            elif loss == "cardinality":
                counts = torch.tensor(targets.sizes, device=layer.logits.device)
                counts = counts if ignored is None else counts - ignored
                found["cardinality_error"] = cardinality_term(layer.logits, counts, **common)
            elif loss == "boxes":
                # The matcher has looked at every box already.
                normaliser = self._normaliser(ignored)
                found |= box_terms(layer.boxes, targets.boxes, pairs, normaliser, check=False, **common)._asdict()
            elif loss == "masks":
                normaliser = self._normaliser(ignored)
                terms = mask_terms(layer.masks, targets.masks, pairs, normaliser, sparse=self.sparse, **common)
                found |= terms._asdict()
            else:
                raise ValueError(f"losses must be among {LOSSES}, got {loss!r}")
        return found

    def layers(self, losses: Sequence[str], layers: Sequence[Layer], matched: Sequence[Pairs]) -> dict[str, Tensor]:
        """Entries of the last layer, which comes first, then of the others with the suffixes `_0`, `_1`, ..."""
        found = self.layer(losses, layers[0], matched[0])
        others = [loss for loss in losses if loss != "masks"]
        for index, (layer, pairs) in enumerate(zip(layers[1:], matched[1:], strict=True)):
            found |= {f"{name}_{index}": value for name, value in self.layer(others, layer, pairs).items()}
        return found

    def fused(
        self, layers: Sequence[Layer], found: LayerPairs, counted: int = 0, bbox: float = 0, giou: float = 0
    ) -> Fused:
        """All terms but masks in kernels; `counted` layers have a part in the total, with weights 1, `bbox`, `giou`."""
        logits, targets, normaliser = layers[0].logits, self.targets, self.normaliser
        if normaliser is not None and not isinstance(normaliser, Tensor):
            normaliser = torch.full((), float(normaliser), device=logits.device)
        return Fused(
            *fused_terms(
                [layer.logits for layer in layers],
                [layer.boxes for layer in layers],
                targets.labels,
                targets.boxes.detach(),
                *(part.view(len(layers), -1) for part in found),
                targets.sizes,
                self.weights,
                counted=counted,
                bbox=bbox,
                giou=giou,
                ignore=self.ignore_mask,
                normaliser=normaliser,
                each_image=self.reduction == "none",
            )
        )

    def named(self, losses: Sequence[str], layers: Sequence[Layer], found: LayerPairs, fused: Fused) -> dict:
        """Entries as `layers` gives them, from what the kernels computed; those of masks are computed here."""
        columns = iter(fused.terms.flatten(0, 1).unbind())
        entries = {}
        for index, layer in enumerate(layers):
            logits, boxes = layer.logits, layer.boxes
            dtype = result_dtype(torch.promote_types(boxes.dtype, self.targets.boxes.dtype), boxes.device)
            entropy, distance, overlap, cardinality = (next(columns) for _ in range(4))
            kinds = {
                "labels": {"loss_ce": entropy.to(result_dtype(logits.dtype, logits.device))},
                "boxes": {"loss_bbox": distance.to(dtype), "loss_giou": overlap},
                "cardinality": {"cardinality_error": cardinality.detach()},
            }
            suffix = "" if index == 0 else f"_{index - 1}"
            for loss in losses:
                if loss not in LOSSES:
                    raise ValueError(f"losses must be among {LOSSES}, got {loss!r}")
                if loss == "masks" and index == 0:
                    entries |= self.layer(("masks",), layer, pairs_of(found, len(layers), boxes.shape[1])[0])
                entries |= {f"{name}{suffix}": value for name, value in kinds.get(loss, {}).items()}
        return entries

    def _ignored(self, layer: Layer, pairs: Pairs) -> Tensor | None:
        """(B,) pairs of each image whose query the mask takes out."""
        if self.ignore_mask is None:
            return None
        out = self.ignore_mask.flatten()[pairs.rows].to(torch.int64)
        return out.new_zeros(len(layer.boxes)).index_add(0, pairs.images, out)

    def _normaliser(self, ignored: Tensor | None) -> Tensor | float:
        if self.normaliser is not None:
            return self.normaliser
        count = self.targets.labels.shape[0]
        return max(1, count) if ignored is None else (count - ignored.sum()).clamp(min=1)


def weighted(terms: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Sum of the terms that have a weight."""
    return sum(value * weights[name] for name, value in terms.items() if name in weights)


def loss_weights(
    bbox: float, giou: float, mask: float, dice: float, *, auxiliary: int, masks: bool
) -> dict[str, float]:
    """Weights by name, those of `auxiliary` layers with their suffixes."""
    own = {"loss_ce": 1, "loss_bbox": bbox, "loss_giou": giou}
    others = {f"{name}_{layer}": weight for layer in range(auxiliary) for name, weight in own.items()}
    return own | ({"loss_mask": mask, "loss_dice": dice} if masks else {}) | others
