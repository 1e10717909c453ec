"""Matching of queries and targets at least cost: DETR and YOLOS (transformers), RT-DETR (ultralytics).

Specification: set_prediction.md, A1 to A3 and B1, B2. The costs come from `matching_cost`, the optimum from
SciPy, image by image. After Carion et al., End-to-End Object Detection with Transformers, 2020.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from cleanroom.assign.matching_cost import CHECKED, CostTerms, packed_costs

Pairs = tuple[Tensor, Tensor]
"""Query and target indices of one image."""

_POLICIES = ("largest", "zero", "raise")
_CURRENT_POLICY = {"detr": "largest", "rtdetr": "zero"}

# Below this many entries of cost a thread, starting the thread costs more than it saves (measured on 2 cores,
# 300 queries: even at 2 x 64k entries, 1.5 times faster at twice that, 1.9 times on large problems).
_ENTRIES_A_THREAD = 1 << 16

_COMPLAINTS = {
    "labels": "labels (class_labels, gt_cls) hold a class outside the columns of logits",
    "pred_boxes": "pred_boxes hold an inverted box or a NaN",
    "boxes": "boxes hold an inverted box or a NaN",
}


class HungarianMatch(NamedTuple):
    """Matched pairs, image after image, `min(Q, sizes[b])` for image b, queries ascending within it.

    `queries` and `targets` are (P,) int64 on the CPU. `targets` are local to the image for `detr` and count
    through the batch for `rtdetr`.
    """

    queries: Tensor
    targets: Tensor


def hungarian_match(
    logits: Tensor,
    pred_boxes: Tensor,
    labels: Tensor,
    boxes: Tensor,
    sizes: Sequence[int],
    *,
    variant: str,
    class_cost: float = 1,
    bbox_cost: float = 1,
    giou_cost: float = 1,
    use_fl: bool = True,
    alpha: float = 0.25,
    gamma: float = 2.0,
    non_finite: str | None = None,
    workers: int | None = None,
) -> HungarianMatch:
    """One-to-one matching of least total cost in every image, without gradient (set_prediction.md A2, B2).

    Args:
        logits: (B, Q, C + 1) for `detr`, (B, Q, C) for `rtdetr`, floating.
        pred_boxes: (B, Q, 4) floating, (cx, cy, w, h) normalised to the image.
        labels: (G,) int32 or int64, image by image, in [0, C - 1]. As upstream's indexing does, `detr` also
            takes C (no object) and counts negative labels from the last column.
        boxes: (G, 4) floating, (cx, cy, w, h) normalised.
        sizes: targets of each image, B numbers of sum G.
        variant: `detr`: `bbox * L1 - class * softmax - giou * GIoU`; `rtdetr`: `class * focal + bbox * L1 +
            giou * (1 - GIoU)`, predictions cast to float32.
        class_cost, bbox_cost, giou_cost: weights of the three terms.
        use_fl, alpha, gamma: `rtdetr` only: sigmoid focal class cost, else minus the softmax; its parameters.
        non_finite: what NaN and infinite costs become: `largest` (the largest finite number: matched last;
            transformers from 5.18.0, the default of `detr`), `zero` (they attract matches; ultralytics after
            8.0.181, the default of `rtdetr`), `raise` (the eras before: ValueError, but +inf forbids a pair).
        workers: threads that solve; default `torch.get_num_threads()` where the problems are large enough.

    More is accepted than upstream takes: half boxes (computed in float32) and mixed dtypes (promoted).
    Among matchings of equal cost the one that SciPy finds on the (Q, G_b) block is returned.
    On an accelerator one transfer to the host is made, of G * Q costs.

    Raises:
        ValueError: shapes or sizes that disagree; labels out of range; for `detr` also all weights zero, no
            query, inverted or NaN boxes anywhere in the batch; under `raise` costs without a valid matching.
        TypeError: dtypes other than the above.
        ImportError: SciPy, the extra `matchers`, is missing.
    """
    terms = CostTerms(variant, class_cost, bbox_cost, giou_cost, use_fl, alpha, gamma)
    pairs = _match_images(logits, pred_boxes, labels, boxes, sizes, terms=terms, non_finite=non_finite, workers=workers)
    queries, targets = zip(_no_pairs(), *pairs, strict=True)
    return HungarianMatch(torch.cat(queries), torch.cat(targets))


class HungarianMatcher(nn.Module):
    """DETR's and YOLOS' matcher with the constructor and the call of transformers 5.23.0.

    Args:
        class_cost, bbox_cost, giou_cost: weights of the class, L1 and GIoU terms; not all zero (ValueError).
    """

    def __init__(self, class_cost: float = 1, bbox_cost: float = 1, giou_cost: float = 1) -> None:
        super().__init__()
        _check_weights(class_cost, bbox_cost, giou_cost)
        self.class_cost, self.bbox_cost, self.giou_cost = class_cost, bbox_cost, giou_cost

    def forward(self, outputs: Mapping[str, Tensor], targets: Sequence[Mapping[str, Tensor]]) -> list[Pairs]:
        """Match a batch.

        Args:
            outputs: `logits` (B, Q, C + 1) and `pred_boxes` (B, Q, 4), see `hungarian_match`.
            targets: B dictionaries with `class_labels` (G_b,) and `boxes` (G_b, 4).

        Returns:
            For each image (query indices ascending, target indices of that image), int64 on the CPU.
        """
        sizes = [len(target["boxes"]) for target in targets]
        if sizes != [len(target["class_labels"]) for target in targets]:
            raise ValueError("targets: boxes and class_labels of an image differ in length")
        if not sizes:
            raise ValueError("targets is empty: one dictionary an image is needed")
        return _match_images(
            outputs["logits"],
            outputs["pred_boxes"],
            torch.cat([target["class_labels"] for target in targets]),
            torch.cat([target["boxes"] for target in targets]),
            sizes,
            terms=CostTerms("detr", self.class_cost, self.bbox_cost, self.giou_cost),
        )


class RTDETRHungarianMatcher(nn.Module):
    """RT-DETR's matcher with the constructor and the call of ultralytics 8.4.190 (`HungarianMatcher` there).

    Args:
        cost_gain: weights under `class`, `bbox` and `giou`; default 1, 5, 2.
        use_fl: sigmoid focal class cost; otherwise minus the softmax.
        alpha, gamma: parameters of the focal cost.
    """

    def __init__(
        self,
        cost_gain: Mapping[str, float] | None = None,
        use_fl: bool = True,
        alpha: float = 0.25,
        gamma: float = 2.0,
    ) -> None:
        super().__init__()
        self.cost_gain = {"class": 1, "bbox": 5, "giou": 2} if cost_gain is None else cost_gain
        self.use_fl, self.alpha, self.gamma = use_fl, alpha, gamma

    def forward(
        self,
        pred_bboxes: Tensor,
        pred_scores: Tensor,
        gt_bboxes: Tensor,
        gt_cls: Tensor,
        gt_groups: Sequence[int],
    ) -> list[Pairs]:
        """Match a batch.

        Args:
            pred_bboxes: (B, Q, 4) normalised centre form.
            pred_scores: (B, Q, C) logits.
            gt_bboxes: (M, 4) normalised centre form, image by image.
            gt_cls: (M,) int32 or int64.
            gt_groups: targets of each image, B numbers of sum M.

        Returns:
            For each image (query indices ascending, target indices counted through the batch), int64, CPU.
        """
        weights = (self.cost_gain[name] for name in ("class", "bbox", "giou"))
        terms = CostTerms("rtdetr", *weights, self.use_fl, self.alpha, self.gamma)
        return _match_images(pred_scores, pred_bboxes, gt_cls, gt_bboxes, gt_groups, terms=terms)


def _match_images(
    logits: Tensor,
    pred_boxes: Tensor,
    labels: Tensor,
    boxes: Tensor,
    sizes: Sequence[int],
    *,
    terms: CostTerms,
    non_finite: str | None = None,
    workers: int | None = None,
) -> list[Pairs]:
    """See `hungarian_match`: its result image by image."""
    pairs = match_layers(
        [logits], [pred_boxes], labels, boxes, sizes, terms=terms, non_finite=non_finite, workers=workers
    )
    if terms.variant == "detr":
        return pairs
    firsts = accumulate(sizes, initial=0)
    return [(queries, targets + first) for (queries, targets), first in zip(pairs, firsts, strict=False)]


@torch.no_grad()
def match_layers(
    logits: Sequence[Tensor],
    pred_boxes: Sequence[Tensor],
    labels: Tensor,
    boxes: Tensor,
    sizes: Sequence[int],
    *,
    terms: CostTerms,
    non_finite: str | None = None,
    workers: int | None = None,
) -> list[Pairs]:
    """Match the predictions of several decoder layers with the same targets, with one transfer to the host.

    Args:
        logits, pred_boxes: one tensor a layer, all of one shape and dtype; otherwise as in `hungarian_match`.
        labels, boxes, sizes, non_finite, workers: as in `hungarian_match`, which also says what is raised.
        terms: the terms of the cost and their weights.

    Returns:
        Pairs of every image, layer after layer, targets counted within the image, int64 on the CPU.
    """
    policy = _CURRENT_POLICY.get(terms.variant) if non_finite is None else non_finite
    _check_settings(terms, policy, workers)
    for own_logits, own_boxes in zip(logits, pred_boxes, strict=True):
        _check_inputs(own_logits, own_boxes, labels, boxes, sizes, variant=terms.variant)
    # Upstream's RT-DETR matcher looks at no prediction where nothing can be matched; DETR's checks every box.
    if not logits or (terms.variant == "rtdetr" and not labels.numel()):
        return [_no_pairs() for _ in range(len(logits) * len(sizes))]

    image_of_target = torch.from_numpy(np.arange(len(sizes)).repeat(sizes)).to(logits[0].device)
    packed = [
        packed_costs(*predictions, labels, boxes, image_of_target, terms=terms, non_finite=policy)
        for predictions in zip(logits, pred_boxes, strict=True)
    ]
    host = (torch.stack(packed) if len(packed) > 1 else packed[0].unsqueeze(0)).cpu().numpy()
    entries = len(labels) * pred_boxes[0].shape[1]
    for name, good in zip(CHECKED, host[:, entries:].all(0), strict=False):
        if not good:
            raise ValueError(_COMPLAINTS[name])
    costs = host[:, :entries].reshape(len(packed) * len(labels), pred_boxes[0].shape[1])
    return _solve(costs, list(sizes) * len(packed), workers)


def _solve(costs: np.ndarray, sizes: Sequence[int], workers: int | None) -> list[Pairs]:
    """Optimal pairs of the (G, Q) costs, image by image, threaded where it pays (SciPy releases the GIL)."""
    firsts = list(accumulate(sizes, initial=0))
    images = [b for b, size in enumerate(sizes) if size]
    solved = [_no_pairs() for _ in sizes]
    if workers is None:
        workers = min(torch.get_num_threads(), costs.size // _ENTRIES_A_THREAD)
    workers = max(1, min(workers, len(images)))

    def share(start: int) -> None:
        # A task is a share of the images, not one image: a small problem ends before a hand-over does.
        for b in images[start::workers]:
            queries, targets = _solve_image(costs, firsts, b)
            solved[b] = torch.from_numpy(queries), torch.from_numpy(targets)

    if workers == 1:
        share(0)
    else:
        with ThreadPoolExecutor(workers - 1) as pool:
            others = [pool.submit(share, start) for start in range(1, workers)]
            share(0)
            for other in others:
                other.result()
    return solved


def _solve_image(costs: np.ndarray, firsts: Sequence[int], image: int) -> tuple[np.ndarray, np.ndarray]:
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError("the Hungarian matchers need SciPy: pip install 'cleanroom[matchers]'") from error
    # Queries as rows, as upstream hands them over: with as many targets as queries SciPy's choice among equal
    # optima depends on it.
    block = costs[firsts[image] : firsts[image + 1]].T
    try:
        return linear_sum_assignment(block)
    except ValueError as error:
        message = f"costs of image {image} have no valid matching, look into logits and boxes ({error})"
        raise ValueError(message) from error


def _no_pairs() -> Pairs:
    return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)


def _check_settings(terms: CostTerms, non_finite: str | None, workers: int | None) -> None:
    if terms.variant not in _CURRENT_POLICY:
        raise ValueError(f"variant must be one of {tuple(_CURRENT_POLICY)}, got {terms.variant!r}")
    if terms.variant == "detr":
        _check_weights(terms.class_cost, terms.bbox_cost, terms.giou_cost)
    if non_finite not in _POLICIES:
        raise ValueError(f"non_finite must be one of {_POLICIES}, got {non_finite!r}")
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")


def _check_weights(class_cost: float, bbox_cost: float, giou_cost: float) -> None:
    if class_cost == 0 and bbox_cost == 0 and giou_cost == 0:
        raise ValueError("class_cost, bbox_cost and giou_cost are all 0")


def _check_inputs(
    logits: Tensor, pred_boxes: Tensor, labels: Tensor, boxes: Tensor, sizes: Sequence[int], *, variant: str
) -> None:
    for name, tensor in (("logits", logits), ("pred_boxes", pred_boxes), ("boxes", boxes)):
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating, got {tensor.dtype}")
    if labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"labels must be int64 or int32, got {labels.dtype}")
    if logits.ndim != 3:
        raise ValueError(f"logits must have shape (B, Q, classes), got {tuple(logits.shape)}")
    batch, queries, columns = logits.shape
    if pred_boxes.shape != (batch, queries, 4):
        raise ValueError(f"pred_boxes must have shape {(batch, queries, 4)}, got {tuple(pred_boxes.shape)}")
    if labels.ndim != 1:
        raise ValueError(f"labels must have shape (G,), got {tuple(labels.shape)}")
    if boxes.shape != (len(labels), 4):
        raise ValueError(f"boxes must have shape {(len(labels), 4)}, got {tuple(boxes.shape)}")
    if len(sizes) != batch or min(sizes, default=0) < 0 or sum(sizes) != len(labels):
        raise ValueError(f"sizes must be {batch} counts of sum {len(labels)}, got {list(sizes)}")
    if len(labels) and not columns:
        raise ValueError("logits have no class column")
    if variant == "detr" and not batch * queries:
        raise ValueError(f"logits hold no query, got shape {tuple(logits.shape)}")
