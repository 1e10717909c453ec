"""DETR's and YOLOS' criteria with upstream's constructors, calls and dictionary keys.

`ImageLoss`, `ForObjectDetectionLoss` and `ForSegmentationLoss` stand in for those of transformers 5.23.0,
`SetCriterion` for that of the DETR and YOLOS repositories. Specification: set_prediction.md, part A; what is
computed, and where it differs from upstream, is said in `set_prediction.py`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, distributed, nn

from cleanroom.assign._matching_checks import choose_matched_path
from cleanroom.assign.hungarian import HungarianMatcher
from cleanroom.assign.matching_cost import CostTerms
from cleanroom.losses._set_layers import (
    LOSSES,
    Criterion,
    Layer,
    Targets,
    loss_weights,
    match,
    match_on_device,
    pairs_of,
    weighted,
)
from cleanroom.losses.masks import mask_terms
from cleanroom.losses.set_terms import (
    Pairs,
    box_terms,
    cardinality_term,
    class_error,
    class_term,
    class_weights,
    join_pairs,
    target_classes,
)
from cleanroom.paths import data_dependent

ImagePairs = Sequence[tuple[Tensor, Tensor]]
"""For each image (query indices, target indices of that image)."""
Outputs = Mapping[str, Any]
T = TypeVar("T")
ImageTargets = Sequence[Mapping[str, Tensor]]


class _SetCriterion(nn.Module):
    """What both criteria share; they differ in the names of their keys."""

    logits_key: ClassVar[str]
    labels_key: ClassVar[str]
    auxiliary_key: ClassVar[str]
    with_class_error: ClassVar[bool] = False
    empty_weight: Tensor

    def __init__(
        self,
        num_classes: int,
        matcher: Callable[[Outputs, ImageTargets], ImagePairs],
        eos_coef: float,
        losses: Sequence[str],
    ) -> None:
        super().__init__()
        self.num_classes, self.matcher, self.eos_coef, self.losses = num_classes, matcher, eos_coef, losses
        self.register_buffer("empty_weight", class_weights(num_classes, eos_coef))

    def forward(self, outputs: Outputs, targets: ImageTargets) -> dict[str, Tensor]:
        """Match every layer and compute the losses.

        The single-term methods are not called. A `cleanroom` matcher matches all layers in one operator; another one is
        called layer by layer.

        Args:
            outputs: logits (B, Q, C + 1), `pred_boxes` (B, Q, 4), for masks `pred_masks` (B, Q, h, w), and the
                auxiliary layers, a list of the same.
            targets: B dictionaries with the labels (G_b,), `boxes` (G_b, 4) and for masks `masks` (G_b, H_b, W_b).

        Returns:
            Entries of the last layer in the order of `losses`, then of each auxiliary layer with the suffix `_i`.

        Raises:
            KeyError: a missing output.
            ValueError: an unknown name among `losses`, and as `set_loss`.
        """
        return self._losses(outputs, targets)[0]

    def _losses(
        self, outputs: Outputs, targets: ImageTargets, counted: int = 0, bbox: float = 0, giou: float = 0
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """The entries; and, where kernels compute them, the weighted sum of those of `counted` layers but masks."""
        batch = self._batch(targets, "masks" in self.losses)
        every = [outputs, *(outputs.get(self.auxiliary_key) or ())]
        layers = [
            Layer(self._output(some, self.logits_key), self._output(some, "pred_boxes"), some.get("pred_masks"))
            for some in every
        ]
        _check(layers[0].logits, self.empty_weight)
        if "masks" in self.losses:
            self._output(outputs, "pred_masks")
        normaliser = self._normaliser(len(batch.labels), layers[0].logits.device)
        given = layers[0].logits, layers[0].boxes, batch.labels, batch.boxes
        path, matcher = choose_matched_path("auto", layers[0].logits.shape[1], *given), self.matcher
        criterion = Criterion(self.empty_weight, self.eos_coef, batch, normaliser, sparse=path == "sparse")
        if path == "triton" and isinstance(matcher, HungarianMatcher):
            found = match_on_device(layers, batch, _costs(matcher))
            fused = criterion.fused(layers, found, counted, bbox, giou)
            entries, total = criterion.named(self.losses, layers, found, fused), fused.total
            matched = pairs_of(found, len(layers), given[0].shape[1]) if self.with_class_error else []
        else:
            matched, total = self._match(every, layers, targets, batch), None
            entries = criterion.layers(self.losses, layers, matched)
        if self.with_class_error and "loss_ce" in entries:
            error = {"class_error": class_error(layers[0].logits, batch.labels, matched[0])}
            place = list(entries).index("loss_ce") + 1
            entries = dict([*list(entries.items())[:place], *error.items(), *list(entries.items())[place:]])
        return entries, total

    def loss_labels(
        self, outputs: Outputs, targets: ImageTargets, indices: ImagePairs, num_boxes: Tensor | float
    ) -> dict[str, Tensor]:
        """`loss_ce`: weighted mean of the cross entropy under the pairs `indices` (A4)."""
        logits = self._output(outputs, self.logits_key)
        weights = self.empty_weight
        _check(logits, weights)
        labels = [target[self.labels_key] for target in targets]
        every = _joined(labels, logits)
        classes = _under_pairs(indices, labels, logits, lambda pairs: target_classes(logits, every, pairs))
        return {"loss_ce": class_term(logits, classes, weights, eos_coef=self.eos_coef)}

    def loss_cardinality(
        self, outputs: Outputs, targets: ImageTargets, indices: ImagePairs, num_boxes: Tensor | float
    ) -> dict[str, Tensor]:
        """`cardinality_error`: how far the number of predicted objects is off, without gradient (A5)."""
        logits = self._output(outputs, self.logits_key)
        counts = torch.tensor([len(target[self.labels_key]) for target in targets], device=logits.device)
        return {"cardinality_error": cardinality_term(logits, counts)}

    def loss_boxes(
        self, outputs: Outputs, targets: ImageTargets, indices: ImagePairs, num_boxes: Tensor | float
    ) -> dict[str, Tensor]:
        """`loss_bbox` and `loss_giou` of the pairs `indices`, divided by `num_boxes` (A6)."""
        pred_boxes = self._output(outputs, "pred_boxes")
        boxes = [target["boxes"] for target in targets]
        every = _joined(boxes, pred_boxes)
        return _under_pairs(
            indices, boxes, pred_boxes, lambda pairs: box_terms(pred_boxes, every, pairs, num_boxes)
        )._asdict()

    def loss_masks(
        self, outputs: Outputs, targets: ImageTargets, indices: ImagePairs, num_boxes: Tensor | float
    ) -> dict[str, Tensor]:
        """`loss_mask` and `loss_dice` of the pairs `indices`, divided by `num_boxes` (A7)."""
        pred_masks = self._output(outputs, "pred_masks")
        masks = [target["masks"] for target in targets]
        every = [some.to(pred_masks.device) for some in masks]
        pairs = join_pairs(indices, [len(some) for some in masks], pred_masks.shape[1], pred_masks.device)
        return mask_terms(pred_masks, every, pairs, num_boxes)._asdict()

    def get_loss(
        self, loss: str, outputs: Outputs, targets: ImageTargets, indices: ImagePairs, num_boxes: Tensor | float
    ) -> dict[str, Tensor]:
        """The entries of one of `labels`, `boxes`, `cardinality` and `masks`; ValueError for another name."""
        if loss not in LOSSES:
            raise ValueError(f"losses must be among {LOSSES}, got {loss!r}")
        return getattr(self, f"loss_{loss}")(outputs, targets, indices, num_boxes)

    def _output(self, outputs: Outputs, name: str) -> Tensor:
        if outputs.get(name) is None:
            raise KeyError(f"outputs have no {name!r}")
        return outputs[name]

    def _batch(self, targets: ImageTargets, masks: bool) -> Targets:
        if not targets:
            raise ValueError("targets is empty: one dictionary an image is needed")
        labels, boxes = ([target[name] for target in targets] for name in (self.labels_key, "boxes"))
        sizes = [len(some) for some in boxes]
        if sizes != [len(some) for some in labels]:
            raise ValueError(f"targets: boxes and {self.labels_key} of an image differ in length")
        return Targets(
            torch.cat(labels), torch.cat(boxes), sizes, [target["masks"] for target in targets] if masks else ()
        )

    def _match(
        self, every: Sequence[Outputs], layers: Sequence[Layer], targets: ImageTargets, batch: Targets
    ) -> list[Pairs]:
        matcher = self.matcher
        if isinstance(matcher, HungarianMatcher):
            return match(layers, batch, _costs(matcher), sparse=data_dependent(layers[0].logits, batch.labels)).layers
        queries, device = layers[0].logits.shape[1], layers[0].logits.device
        return [
            join_pairs(
                matcher({name: some[name] for name in (self.logits_key, "pred_boxes")}, targets),
                batch.sizes,
                queries,
                device,
            )
            for some in every
        ]

    @staticmethod
    def _normaliser(count: int, device: torch.device) -> Tensor | float:
        """D: targets a process, at least 1."""
        if not (distributed.is_available() and distributed.is_initialized()):
            return max(1, count)
        total = torch.tensor([float(count)], device=device)
        distributed.all_reduce(total)
        return (total[0] / distributed.get_world_size()).clamp(min=1)


class ImageLoss(_SetCriterion):
    """Criterion of transformers: keys `logits`, `pred_boxes`, `pred_masks`, `auxiliary_outputs`, `class_labels`.

    Logits of any dtype are taken, whatever the dtype of `empty_weight` (upstream: of that dtype only).

    Args:
        matcher: answers (query, target) indices of every image; not called but read where it is `cleanroom`'s own.
        num_classes: C.
        eos_coef: weight of no object in the class loss.
        losses: any of `labels`, `boxes`, `cardinality`, `masks`.
    """

    logits_key, labels_key, auxiliary_key = "logits", "class_labels", "auxiliary_outputs"

    def __init__(self, matcher: Callable, num_classes: int, eos_coef: float, losses: Sequence[str]) -> None:
        super().__init__(num_classes, matcher, eos_coef, losses)


class SetCriterion(_SetCriterion):
    """Criterion of the DETR and YOLOS repositories: keys `pred_logits`, `aux_outputs`, `labels`; and `class_error`.

    Args:
        num_classes: C.
        matcher: as for `ImageLoss`; another one is called with `pred_logits` and `labels`.
        weight_dict: kept as the training loops read it; entries are returned unweighted.
        eos_coef: weight of no object in the class loss.
        losses: any of `labels`, `boxes`, `cardinality`, `masks`.
    """

    logits_key, labels_key, auxiliary_key = "pred_logits", "labels", "aux_outputs"
    with_class_error = True

    def __init__(
        self,
        num_classes: int,
        matcher: Callable,
        weight_dict: Mapping[str, float],
        eos_coef: float,
        losses: Sequence[str],
    ) -> None:
        super().__init__(num_classes, matcher, eos_coef, losses)
        self.weight_dict = weight_dict

    def loss_labels(
        self,
        outputs: Outputs,
        targets: ImageTargets,
        indices: ImagePairs,
        num_boxes: Tensor | float,
        log: bool = True,
    ) -> dict[str, Tensor]:
        """`loss_ce` (A4), and with `log` `class_error`, the percentage of matched queries of another class (A8)."""
        found = super().loss_labels(outputs, targets, indices, num_boxes)
        if log:
            logits, labels = outputs[self.logits_key], [target[self.labels_key] for target in targets]
            pairs = join_pairs(indices, [len(some) for some in labels], logits.shape[1], logits.device)
            found["class_error"] = class_error(logits, _joined(labels, logits), pairs)
        return found


def ForObjectDetectionLoss(  # noqa: N802 - transformers calls it by this name
    logits: Tensor,
    labels: ImageTargets,
    device: torch.device | str | None,
    pred_boxes: Tensor,
    config: Any,
    outputs_class: Tensor | None = None,
    outputs_coord: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, dict[str, Tensor], list[dict[str, Tensor]] | None]:
    """Total loss of transformers' detection models (A9).

    Args:
        logits: (B, Q, C + 1).
        labels: B dictionaries with `class_labels` (G_b,) and `boxes` (G_b, 4).
        device: not used; everything stays on the device of `logits`.
        pred_boxes: (B, Q, 4).
        config: its `class_cost`, `bbox_cost`, `giou_cost`, `num_labels`, `eos_coefficient`, `auxiliary_loss`,
            `bbox_loss_coefficient`, `giou_loss_coefficient` are read, and `decoder_layers` with auxiliary layers.
        outputs_class: (L, B, Q, C + 1) of all decoder layers; the last one is left out.
        outputs_coord: (L, B, Q, 4) likewise.
        kwargs: not used.

    Returns:
        (total, entries unweighted, outputs of the auxiliary layers or None).
    """
    outputs = {"logits": logits, "pred_boxes": pred_boxes}
    return _total(outputs, labels, config, outputs_class, outputs_coord)


def ForSegmentationLoss(  # noqa: N802 - transformers calls it by this name
    logits: Tensor,
    labels: ImageTargets,
    device: torch.device | str | None,
    pred_boxes: Tensor,
    pred_masks: Tensor,
    config: Any,
    outputs_class: Tensor | None = None,
    outputs_coord: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, dict[str, Tensor], list[dict[str, Tensor]] | None]:
    """Total loss of transformers' segmentation models: `ForObjectDetectionLoss` with masks (A7, A9).

    Args:
        logits, device, pred_boxes, outputs_class, outputs_coord, kwargs: as there.
        labels: dictionaries with `masks` (G_b, H_b, W_b) too.
        pred_masks: (B, Q, h, w) mask logits.
        config: `mask_loss_coefficient` and `dice_loss_coefficient` are read too.

    Returns:
        As there.
    """
    outputs = {"logits": logits, "pred_boxes": pred_boxes, "pred_masks": pred_masks}
    return _total(outputs, labels, config, outputs_class, outputs_coord)


def _total(
    outputs: dict[str, Any], labels: ImageTargets, config: Any, outputs_class: Any, outputs_coord: Any
) -> tuple[Tensor, dict[str, Tensor], list[dict[str, Tensor]] | None]:
    masks = "pred_masks" in outputs
    losses = ["labels", "boxes", "cardinality", *(["masks"] if masks else [])]
    matcher = HungarianMatcher(config.class_cost, config.bbox_cost, config.giou_cost)
    criterion = ImageLoss(matcher, config.num_labels, config.eos_coefficient, losses).to(outputs["logits"].device)
    auxiliary, counted = None, 0
    if config.auxiliary_loss:
        if outputs_class is None or outputs_coord is None:
            raise ValueError("outputs_class and outputs_coord are needed for auxiliary_loss")
        pairs = zip(outputs_class[:-1], outputs_coord[:-1], strict=True)
        auxiliary = [{"logits": some, "pred_boxes": boxes} for some, boxes in pairs]
        outputs["auxiliary_outputs"], counted = auxiliary, config.decoder_layers - 1
    coefficients = config.bbox_loss_coefficient, config.giou_loss_coefficient
    entries, total = criterion._losses(outputs, labels, max(counted, 0) + 1, *coefficients)
    of_masks = (config.mask_loss_coefficient, config.dice_loss_coefficient) if masks else (0, 0)
    if total is None:
        weights = loss_weights(*coefficients, *of_masks, auxiliary=counted, masks=masks)
        return weighted(entries, weights), entries, auxiliary
    if masks:
        total = total + weighted(entries, dict(zip(("loss_mask", "loss_dice"), of_masks, strict=True)))
    return total, entries, auxiliary


def _costs(matcher: HungarianMatcher) -> CostTerms:
    return CostTerms("detr", matcher.class_cost, matcher.bbox_cost, matcher.giou_cost)


def _check(logits: Tensor, weights: Tensor) -> None:
    if logits.ndim != 3 or logits.shape[2] != weights.shape[0]:
        columns = weights.shape[0]
        raise ValueError(f"logits must have shape (B, Q, {columns}) for num_classes, got {tuple(logits.shape)}")


def _under_pairs(indices: ImagePairs, parts: Sequence[Tensor], predictions: Tensor, compute: Callable[[Pairs], T]) -> T:
    """What is computed from pairs of predictions (B, Q, ...) and the targets' `parts`.

    Indices out of range are noticed where they are used, and then looked at: they may count from the end.
    """
    sizes, queries, device = [len(some) for some in parts], predictions.shape[1], predictions.device
    try:
        return compute(join_pairs(indices, sizes, queries, device, check=False))
    except IndexError:
        return compute(join_pairs(indices, sizes, queries, device))


def _joined(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    if not parts:
        raise ValueError("targets is empty: one dictionary an image is needed")
    return (torch.cat(list(parts)) if len(parts) > 1 else parts[0]).to(like.device)
