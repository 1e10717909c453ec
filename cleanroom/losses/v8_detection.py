"""Detection criterion of YOLOv8 and later: task-aligned assignment, class BCE, CIoU and distance terms.

Specification: yolo_losses.md, sections 0, 1 and 3. TOOD (Feng et al., 2021), generalised focal loss (Li et al., 2020),
distance IoU (Zheng et al., 2020).

Nothing of size B x A x C is made beside the gradient of the logits. On the CPU the sparse path decodes the boxes of
the anchors inside some ground truth, makes probabilities of the logits that the assigner looks at, and computes box
terms on foreground anchors alone. The static path, for accelerators and torch.compile, decodes every box, a few images
at a time, and has as many foreground places as the ground truths could ever propose. On CUDA, kernels pad the ground
truths, decode, assign, and make terms and gradients in one pass over the logits (see `kernels.detection_loss`).

Bytes moved for float32 logits on the sparse path: 4 B A (C + share of anchors inside ground truths x 4 R) forward,
4 B A (2 C + 4 R) backward.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cleanroom.assign._tal_terms import Assignment, Rules, Scene, at_least_float32
from cleanroom.assign.tal import assign, check_eras, make_rules
from cleanroom.kernels import runtime
from cleanroom.losses._yolo_foreground import ALPHA, BETA, EPS, box_losses, find_places, predict, target_scores
from cleanroom.losses._yolo_head import Decoder, Geometry, make_geometry
from cleanroom.losses._yolo_targets import Targets, pad_targets
from cleanroom.losses.bbox import REG1_DISTANCES
from cleanroom.losses.class_bce import class_bce
from cleanroom.paths import choose_path, data_dependent

if runtime.AVAILABLE:
    from cleanroom.kernels.decode import decode, rounding_dtype
    from cleanroom.kernels.detection_loss import detection_loss
    from cleanroom.kernels.tal import assigned as assigned_by_kernel
    from cleanroom.kernels.target_scores import target_scores as target_scores_by_kernel
    from cleanroom.kernels.targets import padded_targets

GAINS: Mapping[str, float] = MappingProxyType({"box": 7.5, "cls": 0.5, "dfl": 1.5})
REDUCTIONS = ("sum", "none")


class DetectionLoss(NamedTuple):
    """Loss and decisions. An anchor whose target score is 0 carries no loss and counts as background."""

    loss: Tensor  # (3,) float32: box, class and distance term, gains in, times B; "none": (B, 3)
    items: Tensor  # the same, detached, not times B
    fg_mask: Tensor  # (B, A) bool
    target_gt_idx: Tensor  # (B, A) int64: rank of the object in its image, 0 for background


def v8_detection_loss(
    boxes: Tensor,
    scores: Tensor,
    batch_idx: Tensor,
    cls: Tensor,
    bboxes: Tensor,
    *,
    levels: Sequence[Sequence[int]],
    strides: Sequence[float],
    num_classes: int,
    reg_max: int = 16,
    gains: Mapping[str, float] = GAINS,
    topk: int = 10,
    topk2: int | None = None,
    class_weights: Tensor | Sequence[float] | None = None,
    reduction: str = "sum",
    ignore_mask: Tensor | None = None,
    max_objects: int | None = None,
    anchor_dtype: torch.dtype | None = None,
    small_box: str = "min_side",
    edge_round_trip: bool = True,
    ciou_alpha: str = "stable",
    pair_domain: str = "candidates",
    reg1_distance: str = "l1",
    score_sum_floor: bool = True,
    path: str = "auto",
) -> DetectionLoss:
    """Loss of a batch of B images with A anchors, C classes and R bins a side; gradient to `boxes` and `scores`.

    With T the target scores, S = max(sum T, 1) over the batch: ``box sum T (1 - CIoU)/S``, ``cls sum bce/S`` over all
    anchors and classes, ``dfl sum T DFL/S``; where R = 1, instead of DFL, the mean distance of the sides as shares of
    the image. Half dtypes: decisions in them, everything after in float32.

    Args:
        boxes: (B, 4 R, A) logits of the distances left, top, right, bottom, side by side; R = 1: distances in cells.
        scores: (B, C, A) class logits.
        batch_idx: (n,) or (n, 1) image of each object, ascending; any real dtype.
        cls: (n,) or (n, 1) class of each object; any real dtype, truncated. -C ... -1 read the score of class C + label
            and are trained as class 0.
        bboxes: (n, 4) centre x, centre y, width, height as shares of the image. An object whose corner coordinates do
            not sum up to more than 0 is ignored. Labels may lie on the CPU beside predictions on an accelerator.
        levels: (rows, columns) of every level; the image is as large as the first, times its stride.
        strides: pixels a cell of every level.
        num_classes, reg_max: C and R.
        gains: factors "box", "cls" and "dfl".
        topk, topk2: see `task_aligned_assign`.
        class_weights: (C,) factor of each class in the class term, positives and negatives alike.
        reduction: "sum", or "none" for the contribution of each image; their sum is the usual value.
        ignore_mask: (B, A) bool; True: the anchor takes no part in any term, nor in S. It is assigned all the same.
        max_objects: rows of ground truths an image; default: what the fullest image has, or n on the static path where
            the labels lie on an accelerator too. Given, one compiled graph serves batches of different n.
        anchor_dtype: dtype of the anchor grid; default: that of `boxes`.
        small_box, edge_round_trip, ciou_alpha, pair_domain: eras of the assigner, see `task_aligned_assign`.
        reg1_distance: the third term where R = 1: "l1" (8.4.0 on) or "zero".
        score_sum_floor: S is at least 1 (8.0.11 on); False: S is sum T, and 1 only where that is 0. With it, as with
            `pair_domain` "all", kernels leave the work to the static path.
        path: "auto", "sparse", "static" or "triton", see `choose_path`; the last two have no shape that depends on
            values.

    Raises:
        ValueError: a shape or setting is wrong; what `pad_targets` says of `batch_idx`.
        TypeError: `boxes` or `scores` are not floating.
        IndexError: `cls` of an object that contains an anchor is outside [-C, C); on the static path and in kernels a
            RuntimeError.
        RuntimeError: `path` is "triton" where kernels cannot run.
    """
    _check(boxes, scores, batch_idx, cls, bboxes, levels, strides, num_classes, reg_max, ignore_mask)
    _check_settings(gains, reduction, reg1_distance)
    eras = check_eras(strides, small_box, edge_round_trip, ciou_alpha, pair_domain)
    chosen = choose_path(path, boxes, scores, has_kernel=eras.has_kernel and score_sum_floor)
    sparse = chosen == "sparse"
    images, _, anchors = scores.shape
    if class_weights is not None:
        class_weights = torch.as_tensor(class_weights, device=scores.device)
        if tuple(class_weights.shape) != (num_classes,):
            raise ValueError(f"class_weights must be (C,) = ({num_classes},), got {tuple(class_weights.shape)}")
    geometry = make_geometry(levels, strides, anchor_dtype or boxes.dtype, boxes.device)
    # Labels that the trainer left on the host are packed there: no device waits, and rows are no more than needed.
    on_host = sparse or (path == "auto" and data_dependent(batch_idx, cls, bboxes))
    if chosen == "triton" and not on_host and boxes.device == batch_idx.device == cls.device == bboxes.device:
        rows = len(bboxes) if max_objects is None else max_objects
        targets = Targets(*padded_targets(batch_idx, cls, bboxes, images, rows, geometry.size))
    else:
        targets = pad_targets(batch_idx, cls, bboxes, images, geometry.size, max_objects=max_objects, sparse=on_host)
        targets = Targets(*(value.to(boxes.device) for value in targets))
    objects = targets.labels.shape[1]
    try:
        rules = make_rules(topk, topk2, anchors, ALPHA, BETA, EPS, eras) if images and objects else None
    except ValueError as error:
        raise ValueError(f"{error}: so many have the levels") from None
    if chosen == "triton" and scores.numel():
        owner, score, target = _assign_by_kernel(boxes, scores, targets, geometry, reg_max, rules)
        found = detection_loss(
            scores,
            boxes,
            owner,
            score,
            *targets[:2],
            *geometry,
            target=target,
            gains=gains,
            reg_max=reg_max,
            class_weights=class_weights,
            ignore_mask=ignore_mask,
            ciou_alpha=ciou_alpha,
            reg1_distance=reg1_distance,
            reduction=reduction,
        )
        return DetectionLoss(*found)
    decoder = Decoder(boxes, geometry, reg_max)
    assigned = _assign(scores.detach(), targets, decoder, rules, sparse=sparse)
    index = assigned.gt_index
    slots = None if sparse else min(images * anchors, len(bboxes) * min(topk, topk2 or topk))
    places = find_places(assigned.foreground, index, objects, slots)
    predicted = predict(boxes, places, geometry, reg_max, sparse=sparse)
    values = target_scores(places, predicted, scores, targets, geometry, ciou_alpha)
    if ignore_mask is not None:
        values = values.masked_fill(ignore_mask[places.image, places.anchor], 0)
    normaliser = values.sum()
    normaliser = normaliser.clamp(min=1) if score_sum_floor else torch.where(normaliser > 0, normaliser, 1)

    dense = values.new_zeros(images * anchors).index_copy(0, places.image * anchors + places.anchor, values)
    class_term = class_bce(
        scores.transpose(1, 2),
        targets.labels.gather(1, index).clamp_(min=0) if objects else index,
        dense.view(images, anchors).to(scores.dtype),
        normaliser,
        class_weights=class_weights,
        ignore_mask=ignore_mask,
        reduction=reduction,
    )
    each = box_losses(places, predicted, targets, geometry, reg_max, ciou_alpha, reg1_distance)
    box_term, distance_term = (_reduced(values * term, places.image, images, reduction) / normaliser for term in each)
    terms = (box_term, gains["box"]), (class_term, gains["cls"]), (distance_term, gains["dfl"])
    items = torch.stack([term.float() * gain for term, gain in terms], -1)
    return DetectionLoss(items * images, items.detach(), assigned.foreground, index)


class v8DetectionLoss:  # noqa: N801 - upstream's name
    """Drop-in for ``ultralytics.utils.loss.v8DetectionLoss``: its constructor and call; see `v8_detection_loss`.

    `model` is what upstream asks for: `model.args` with the gains `box`, `cls` and `dfl`, read at each call; the head
    `model.model[-1]` with `stride`, `nc` and `reg_max`; optionally `model.class_weights`. `settings` are this
    library's: `max_objects`, the eras and `path`.
    """

    def __init__(self, model: Any, tal_topk: int = 10, tal_topk2: int | None = None, **settings: Any) -> None:
        head = model.model[-1]
        self.hyp = model.args
        self.settings = {
            "strides": [float(stride) for stride in head.stride],
            "num_classes": head.nc,
            "reg_max": head.reg_max,
            "topk": tal_topk,
            "topk2": tal_topk2,
            "class_weights": getattr(model, "class_weights", None),
            **settings,
        }

    @property
    def names(self) -> tuple[str, str, str]:
        """Names of the items."""
        return "box_loss", "cls_loss", "dfl_loss" if self.settings["reg_max"] > 1 else "l1_loss"

    def __call__(self, preds: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss (3,) times B, to be summed and differentiated, and the items by name, detached, not times B.

        Args:
            preds: dict with `boxes`, `scores` and `feats`, or a 2-tuple whose second element is that dict.
            batch: `batch_idx`, `cls` and `bboxes`.

        Raises:
            TypeError: `preds` is neither; else as `v8_detection_loss`.
        """
        result = self.evaluate(preds, batch)
        return result.loss, dict(zip(self.names, result.items.unbind(-1), strict=True))

    def evaluate(self, preds: Any, batch: Mapping[str, Tensor], **settings: Any) -> DetectionLoss:
        """The call's result with the decisions; `settings` are `reduction` and `ignore_mask`."""
        preds = preds[1] if isinstance(preds, tuple) else preds
        if not isinstance(preds, Mapping):
            raise TypeError(f"preds must be a dict, or a 2-tuple with a dict, got {type(preds).__name__}")
        gains = {"box": self.hyp.box, "cls": self.hyp.cls, "dfl": self.hyp.dfl}
        if isinstance(weights := self.settings["class_weights"], Tensor):  # moved once, not at each call
            self.settings["class_weights"] = weights.to(preds["scores"].device)
        return v8_detection_loss(
            preds["boxes"],
            preds["scores"],
            batch["batch_idx"],
            batch["cls"],
            batch["bboxes"],
            levels=[tuple(level.shape[-2:]) for level in preds["feats"]],
            gains=gains,
            anchor_dtype=preds["feats"][0].dtype,
            **self.settings,
            **settings,
        )


@torch.no_grad()
def _assign(scores: Tensor, targets: Targets, decoder: Decoder, rules: Rules | None, *, sparse: bool) -> Assignment:
    """Assign; boxes are decoded, and probabilities made, of what the assigner looks at."""
    images, _, anchors = scores.shape
    if rules is None:
        none = scores.new_zeros((images, anchors), dtype=at_least_float32(scores.dtype))
        return Assignment(none.bool(), none.long(), none)
    scene = Scene(
        scores.transpose(1, 2),
        decoder.buffers() if sparse else decoder.all(),
        decoder.geometry.pixels,
        targets.labels,
        targets.boxes,
        targets.valid,
        logits=True,
        decode=decoder.at if sparse else None,
    )
    try:
        found = assign(scene, rules, path="sparse" if sparse else "static")
    except (IndexError, RuntimeError) as error:
        if "gt_labels" not in str(error):
            raise
        raise type(error)(f"cls: {error}") from None  # the argument has another name here
    foreground = found.score > 0
    return Assignment(foreground, torch.where(foreground, found.gt_index, 0), found.score)


@torch.no_grad()
def _assign_by_kernel(
    boxes: Tensor, scores: Tensor, targets: Targets, geometry: Geometry, reg_max: int, rules: Rules | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Row of the ground truth that each anchor learns (B, A) int32, its score, and its target score if that differs."""
    images, _, anchors = scores.shape
    if rules is None:
        owner = torch.full((images, anchors), -1, dtype=torch.int32, device=scores.device)
        return owner, torch.zeros_like(owner, dtype=torch.float32), None
    points, strides, _ = geometry
    predicted = decode(boxes, points, strides, reg_max)
    pixels = geometry.pixels.to(at_least_float32(points.dtype))
    owner, score = assigned_by_kernel(scores.transpose(1, 2), predicted, pixels, *targets, rules, logits=True)
    if scores.dtype == rounding_dtype(boxes, reg_max) == torch.float32:
        return owner, score, None
    given = scores, boxes, owner, score, targets.labels, targets.boxes, points, strides
    return owner, score, target_scores_by_kernel(*given, reg_max, rules.ciou_alpha)


def _reduced(terms: Tensor, image: Tensor, images: int, reduction: str) -> Tensor:
    """Sum of terms (N,), or of each image's."""
    return terms.sum() if reduction == "sum" else terms.new_zeros(images).index_add(0, image, terms)


def _check(boxes, scores, batch_idx, cls, bboxes, levels, strides, num_classes, reg_max, ignore_mask) -> None:
    for name, tensor in (("boxes", boxes), ("scores", scores)):
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating, got {tensor.dtype}")
        if tensor.dim() != 3:
            raise ValueError(f"{name} must be (B, channels, A), got {tuple(tensor.shape)}")
    if reg_max < 1:
        raise ValueError(f"reg_max must be at least 1, got {reg_max}")
    images, _, anchors = scores.shape
    if len(levels) == 0 or len(levels) > len(strides):
        raise ValueError(f"levels must be one or more, with a stride each: got {len(levels)}, {len(strides)} strides")
    if sum(rows * columns for rows, columns in levels) != anchors:
        raise ValueError(f"levels must have {anchors} cells, as scores have anchors, got {[tuple(x) for x in levels]}")
    objects = len(bboxes)
    for name, tensor, shapes in (
        ("scores", scores, [(images, num_classes, anchors)]),
        ("boxes", boxes, [(images, 4 * reg_max, anchors)]),
        ("bboxes", bboxes, [(objects, 4)]),
        ("batch_idx", batch_idx, [(objects,), (objects, 1)]),
        ("cls", cls, [(objects,), (objects, 1)]),
        *([] if ignore_mask is None else [("ignore_mask", ignore_mask, [(images, anchors)])]),
    ):
        if tuple(tensor.shape) not in shapes:
            raise ValueError(f"{name} must have shape {shapes[0]}, got {tuple(tensor.shape)}")
    if ignore_mask is not None and ignore_mask.dtype != torch.bool:
        raise TypeError(f"ignore_mask must be bool, got {ignore_mask.dtype}")


def _check_settings(gains: Mapping[str, float], reduction: str, reg1_distance: str) -> None:
    if missing := [name for name in GAINS if name not in gains]:
        raise ValueError(f"gains has no {', '.join(missing)}")
    for name, value, known in (("reduction", reduction, REDUCTIONS), ("reg1_distance", reg1_distance, REG1_DISTANCES)):
        if value not in known:
            raise ValueError(f"{name} must be one of {known}, got {value!r}")
