"""Matching of queries and targets at least cost: DETR and YOLOS (transformers), RT-DETR (ultralytics).

Specification: set_prediction.md, A1 to A3 and B1, B2. The costs come from `matching_cost`, the optimum from
SciPy, image by image; on CUDA both come from `cleanroom.kernels.matching`. After Carion et al., End-to-End Object
Detection with Transformers, 2020.
"""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from cleanroom.assign._matching_checks import (
    COMPLAINTS,
    CURRENT_POLICY,
    check_inputs,
    check_settings,
    check_weights,
    choose_solver,
)
from cleanroom.assign.matching_cost import CHECKED, CostTerms, packed_costs
from cleanroom.kernels import runtime

if runtime.AVAILABLE:
    from cleanroom.kernels.matching import match_on_device

Pairs = tuple[Tensor, Tensor]
"""Query and target indices of one image."""

# Below this many entries of cost a thread, starting the thread costs more than it saves (measured on 2 cores,
# 300 queries: even at 2 x 64k entries, 1.5 times faster at twice that, 1.9 times on large problems).
_ENTRIES_A_THREAD = 1 << 16


class HungarianMatch(NamedTuple):
    """Matched pairs, image after image, `min(Q, sizes[b])` for image b, queries ascending within it.

    `queries` and `targets` are (P,) int64, on the CPU where SciPy solves, else on the device of the labels. `targets`
    are local to the image for `detr` and count through the batch for `rtdetr`.
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
    path: str = "auto",
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
        path: "scipy" solves on the host, "triton" on the device; "auto" takes the second on CUDA, where Triton is
            installed and no tensor is float64.

    More is accepted than upstream takes: half boxes (computed in float32) and mixed dtypes (promoted).
    SciPy's path returns, among matchings of equal cost, the one that SciPy finds on the (Q, G_b) block; on an
    accelerator it makes one transfer to the host, of G * Q costs. Kernels compute costs in float32 that may differ in
    the last places, take any of the matchings of least cost, and never make the host wait.

    Raises:
        ValueError: shapes or sizes that disagree; labels out of range; for `detr` also all weights zero, no
            query, inverted or NaN boxes anywhere in the batch; under `raise` costs without a valid matching.
        TypeError: dtypes other than the above.
        ImportError: SciPy, the extra `matchers`, is missing.
        RuntimeError: `path` is "triton" where kernels cannot run; and from the device itself, later, where a value is
            rejected on that path.
    """
    terms = CostTerms(variant, class_cost, bbox_cost, giou_cost, use_fl, alpha, gamma)
    if choose_solver(path, pred_boxes.shape[1], logits, pred_boxes, labels, boxes) == "triton":
        return _match_on_device(logits, pred_boxes, labels, boxes, sizes, terms=terms, non_finite=non_finite)
    settings = {"terms": terms, "non_finite": non_finite, "workers": workers, "path": "scipy"}
    pairs = _match_images(logits, pred_boxes, labels, boxes, sizes, **settings)
    queries, targets = zip(_no_pairs(), *pairs, strict=True)
    return HungarianMatch(torch.cat(queries), torch.cat(targets))


class HungarianMatcher(nn.Module):
    """DETR's and YOLOS' matcher with the constructor and the call of transformers 5.23.0.

    Args:
        class_cost, bbox_cost, giou_cost: weights of the class, L1 and GIoU terms; not all zero (ValueError).
        path: ours, see `hungarian_match`. Pairs come to the host on every path.
    """

    def __init__(
        self, class_cost: float = 1, bbox_cost: float = 1, giou_cost: float = 1, *, path: str = "auto"
    ) -> None:
        super().__init__()
        self.path = path
        check_weights(class_cost, bbox_cost, giou_cost)
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
            path=self.path,
        )


class RTDETRHungarianMatcher(nn.Module):
    """RT-DETR's matcher with the constructor and the call of ultralytics 8.4.190 (`HungarianMatcher` there).

    Args:
        cost_gain: weights under `class`, `bbox` and `giou`; default 1, 5, 2.
        use_fl: sigmoid focal class cost; otherwise minus the softmax.
        alpha, gamma: parameters of the focal cost.
        path: ours, see `hungarian_match`. Pairs come to the host on every path.
    """

    def __init__(
        self,
        cost_gain: Mapping[str, float] | None = None,
        use_fl: bool = True,
        alpha: float = 0.25,
        gamma: float = 2.0,
        *,
        path: str = "auto",
    ) -> None:
        super().__init__()
        self.path = path
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
        return _match_images(pred_scores, pred_bboxes, gt_cls, gt_bboxes, gt_groups, terms=terms, path=self.path)


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
    path: str = "auto",
) -> list[Pairs]:
    """See `hungarian_match`: its result image by image, on the CPU."""
    if choose_solver(path, pred_boxes.shape[1], logits, pred_boxes, labels, boxes) == "triton":
        match = _match_on_device(logits, pred_boxes, labels, boxes, sizes, terms=terms, non_finite=non_finite)
        counts = [min(pred_boxes.shape[1], size) for size in sizes]
        return list(zip(*(part.split(counts) for part in torch.stack(match).cpu()), strict=True))
    pairs = match_layers(
        [logits], [pred_boxes], labels, boxes, sizes, terms=terms, non_finite=non_finite, workers=workers
    )
    if terms.variant == "detr":
        return pairs
    firsts = accumulate(sizes, initial=0)
    return [(queries, targets + first) for (queries, targets), first in zip(pairs, firsts, strict=False)]


def _match_on_device(
    logits: Tensor,
    pred_boxes: Tensor,
    labels: Tensor,
    boxes: Tensor,
    sizes: Sequence[int],
    *,
    terms: CostTerms,
    non_finite: str | None,
) -> HungarianMatch:
    """See `hungarian_match`: the kernels' path."""
    _, queries, targets = match_on_device(
        [logits],
        [pred_boxes],
        labels,
        boxes,
        sizes,
        terms=terms,
        non_finite=non_finite or "",
        local=terms.variant == "detr",
    )
    return HungarianMatch(queries, targets)


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
    policy = CURRENT_POLICY.get(terms.variant) if non_finite is None else non_finite
    check_settings(terms, policy, workers)
    for own_logits, own_boxes in zip(logits, pred_boxes, strict=True):
        check_inputs(own_logits, own_boxes, labels, boxes, sizes, variant=terms.variant)
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
            raise ValueError(COMPLAINTS[name])
    costs = host[:, :entries].reshape(len(packed) * len(labels), pred_boxes[0].shape[1])
    return _solve(costs, list(sizes) * len(packed), workers)


def _solve(costs: np.ndarray, sizes: Sequence[int], workers: int | None) -> list[Pairs]:
    """Optimal pairs of the (G, Q) costs, image by image, threaded where it pays (SciPy releases the GIL)."""
    firsts = list(accumulate(sizes, initial=0))
    solved = [_no_pairs() for _ in sizes]

    def solve(b: int) -> None:
        queries, targets = _solve_image(costs, firsts, b)
        solved[b] = torch.from_numpy(queries), torch.from_numpy(targets)

    in_threads(solve, [b for b, size in enumerate(sizes) if size], costs.size, workers)
    return solved


def in_threads(solve: Callable[[int], None], problems: Sequence[int], entries: int, workers: int | None) -> None:
    """Solve problems of so many costs in all; in threads where it pays, or in `workers` of them."""
    if workers is None:
        workers = min(torch.get_num_threads(), entries // _ENTRIES_A_THREAD)
    workers = max(1, min(workers, len(problems)))

    def share(start: int) -> None:
        # A task is a share of the problems, not one: a small problem ends before a hand-over does.
        for problem in problems[start::workers]:
            solve(problem)

    if workers == 1:
        share(0)
    else:
        with ThreadPoolExecutor(workers - 1) as pool:
            others = [pool.submit(share, start) for start in range(1, workers)]
            share(0)
            for other in others:
                other.result()


def scipy_solver() -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """SciPy's `linear_sum_assignment`."""
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError("the Hungarian matchers need SciPy: pip install 'cleanroom[matchers]'") from error
    return linear_sum_assignment


def _solve_image(costs: np.ndarray, firsts: Sequence[int], image: int) -> tuple[np.ndarray, np.ndarray]:
    linear_sum_assignment = scipy_solver()
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
