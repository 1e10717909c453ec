"""Task-aligned assigner (TOOD, Feng et al., 2021) as in YOLOv8 and later.

Every ground truth proposes the anchors inside it with the largest metric ``score ** alpha * CIoU ** beta``; an anchor
proposed more than once goes to the ground truth it overlaps most; scores are normalised per ground truth.
Specification: task_aligned.md, sections 1 to 8 and 12.

Three paths. "sparse" enumerates the anchors inside boxes and suits the CPU; "static" has shapes that do not depend on
values, and never makes the host wait for the device; these two decide alike, bit for bit. "triton" is the fused kernel
of `cleanroom.kernels.tal`, for CUDA: its arc tangents and exponentials may differ by a rounding.

Choices where the specification leaves one:

- Equal metrics: lowest anchor first, zeros included. Equal overlaps: the lowest row *that contains the anchor*.
- A pair whose overlap or metric is NaN, infinite or negative is never chosen; its image stays finite (known
  divergence: upstream's scores of the whole image become NaN).
- float16 and bfloat16 are computed with in float32, so that no image turns NaN (known divergence); only membership
  is decided in the dtype of the boxes, where the edges are.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from cleanroom.assign._tal_sparse import assign_sparse
from cleanroom.assign._tal_static import assign_static
from cleanroom.assign._tal_terms import Assignment, Rules, Scene, at_least_float32
from cleanroom.kernels import runtime
from cleanroom.overlap import CIOU_ALPHAS, box_terms
from cleanroom.paths import choose_path

if runtime.AVAILABLE:
    from cleanroom.kernels.tal import assign_triton, assigned
    from cleanroom.kernels.tal_targets import targets

SMALL_BOX_RULES = ("off", "first_stride", "min_side")
PAIR_DOMAINS = ("candidates", "all")
DEFAULT_STRIDE = (8, 16, 32)


class TaskAlignedResult(NamedTuple):
    """What every anchor learns. Background anchors carry label and box of row 0 of their image, index and score 0."""

    labels: Tensor  # (B, A) int64
    boxes: Tensor  # (B, A, 4) xyxy pixels, dtype of gt_bboxes
    scores: Tensor  # (B, A) target score of the anchor's label, promoted dtype of scores, boxes and ground truths
    foreground: Tensor  # (B, A) bool
    gt_index: Tensor  # (B, A) int64, row within the image


@torch.no_grad()
def task_aligned_assign(
    pd_scores: Tensor,
    pd_bboxes: Tensor,
    anc_points: Tensor,
    gt_labels: Tensor,
    gt_bboxes: Tensor,
    mask_gt: Tensor,
    *,
    topk: int = 13,
    topk2: int | None = None,
    alpha: float = 1.0,
    beta: float = 6.0,
    stride: Sequence[float] | None = None,
    eps: float = 1e-9,
    small_box: str = "min_side",
    edge_round_trip: bool = True,
    ciou_alpha: str = "stable",
    pair_domain: str = "candidates",
    path: str = "auto",
) -> TaskAlignedResult:
    """Assign ground truths to anchors; nothing of size B x A x C or B x n x A is built.

    Args:
        pd_scores: (B, A, C) class probabilities.
        pd_bboxes: (B, A, 4) predicted xyxy, pixels; a dtype at least as wide as that of `gt_bboxes`.
        anc_points: (A, 2) anchor centres, pixels.
        gt_labels: (B, n, 1) classes, any real dtype, truncated to integers; -C ... -1 read the score of class
            C + label and are written as class 0.
        gt_bboxes: (B, n, 4) xyxy, pixels.
        mask_gt: (B, n, 1) non-zero where the row is a ground truth.
        topk: anchors that each ground truth proposes, at most A.
        topk2: anchors that each ground truth keeps after conflicts, at most A; None or 0: `topk`, no second selection.
        alpha, beta: exponents of score and overlap.
        stride: strides of the levels, default (8, 16, 32); read by `small_box` only.
        eps: guards the division in the normalisation of scores.
        small_box: which sides are enlarged for membership: "min_side" those below the second stride (the first if
            single) to it (8.4.128 on), "first_stride" those below the first to the second (8.4.0 to 8.4.127), "off".
        edge_round_trip: corners take the way to centre form and back (8.4.0 on); needed by `small_box`.
        ciou_alpha: "stable" (8.4.144 on) or "legacy".
        pair_domain: who may win an anchor that several rows propose: "candidates" those that contain it (8.0.52 on),
            "all" any row of its image, padding included, the lowest among equals. Kernels know the first only.
        path: "auto", "sparse", "static" or "triton"; see `choose_path`.

    Raises:
        ValueError: a shape or setting is wrong, `topk` or `topk2` exceed A.
        TypeError: a dtype is wrong.
        IndexError: `stride` is empty; there are no anchors; the label of a row that contains an anchor is outside
            [-C, C). On the static path and in kernels the last is a RuntimeError, raised by the device itself.
        RuntimeError: `path` is "triton" where kernels cannot run.
    """
    check_inputs(pd_scores, pd_bboxes, anc_points, gt_labels, gt_bboxes, mask_gt)
    eras = check_eras(stride, small_box, edge_round_trip, ciou_alpha, pair_domain)
    tensors = pd_scores, pd_bboxes, anc_points, gt_labels, gt_bboxes, mask_gt
    path = choose_path(path, *tensors, has_kernel=eras.has_kernel)
    if gt_bboxes.shape[1] == 0:
        return without_ground_truths(pd_scores, pd_bboxes, gt_bboxes)

    rules = make_rules(topk, topk2, len(anc_points), alpha, beta, eps, eras)
    labels, valid = gt_labels[..., 0].long(), mask_gt[..., 0] != 0
    score_dtype = promoted(pd_scores, pd_bboxes)  # ground truths are no wider
    if path == "triton":
        owner, score = assigned(pd_scores, pd_bboxes, anc_points, labels, gt_bboxes, valid, rules)
        label, box, foreground, index = targets(owner, labels, gt_bboxes)
        return TaskAlignedResult(label, box, score.to(score_dtype), foreground, index)
    terms = box_terms(pd_bboxes.to(at_least_float32(pd_bboxes.dtype)))
    scene = Scene(pd_scores, terms, anc_points, labels, gt_bboxes, valid)
    return learned(scene, assign(scene, rules, path=path), score_dtype)


def learned(scene: Scene, assignment: Assignment, score_dtype: torch.dtype) -> TaskAlignedResult:
    """The result of an assignment in a scene with ground truths, scores cast to `score_dtype`."""
    batch, rows, numbers = scene.boxes.shape
    offset = torch.arange(0, batch * rows, rows, device=scene.labels.device)[:, None]
    place = (assignment.gt_index + offset).flatten()
    shape = assignment.gt_index.shape
    return TaskAlignedResult(
        scene.labels.clamp(min=0).flatten().index_select(0, place).view(shape),
        scene.boxes.flatten(0, 1).index_select(0, place).view(*shape, numbers),
        assignment.score.to(score_dtype),
        assignment.foreground,
        assignment.gt_index,
    )


class Eras(NamedTuple):
    """What differs between releases, checked: the fields of `Rules` of the same names."""

    small_below: float
    small_side: float
    edge_round_trip: bool
    ciou_alpha: str
    pair_domain: str

    @property
    def has_kernel(self) -> bool:
        """Whether the kernels know these rules."""
        return self.pair_domain == "candidates"


def check_eras(
    stride: Sequence[float] | None, small_box: str, edge_round_trip: bool, ciou_alpha: str, pair_domain: str
) -> Eras:
    """Settings as in `task_aligned_assign`; raises its errors."""
    small_below, small_side = small_box_sides(small_box, stride)
    if small_below and not edge_round_trip:
        raise ValueError(f"edge_round_trip must be True where small_box is not 'off', got small_box {small_box!r}")
    if ciou_alpha not in CIOU_ALPHAS:
        raise ValueError(f"ciou_alpha must be one of {CIOU_ALPHAS}, got {ciou_alpha!r}")
    if pair_domain not in PAIR_DOMAINS:
        raise ValueError(f"pair_domain must be one of {PAIR_DOMAINS}, got {pair_domain!r}")
    return Eras(small_below, small_side, edge_round_trip, ciou_alpha, pair_domain)


def make_rules(topk: int, topk2: int | None, anchors: int, alpha: float, beta: float, eps: float, eras: Eras) -> Rules:
    """Rules of a call with ground truths; settings and errors as in `task_aligned_assign`."""
    return Rules(_count("topk", topk, anchors), _count("topk2", topk2 or topk, anchors), alpha, beta, eps, *eras)


def assign(scene: Scene, rules: Rules, *, path: str) -> Assignment:
    """The assignment itself, without gradient: what a loss calls that has logits and undecoded boxes.

    `path` is "sparse", "static" or "triton": what `choose_path` gave.
    """
    with torch.no_grad():
        if path == "triton":
            return assign_triton(scene, rules)
        return (assign_sparse if path == "sparse" else assign_static)(scene, rules)


class TaskAlignedAssigner(nn.Module):
    """Drop-in for ``ultralytics.utils.tal.TaskAlignedAssigner``: its constructor, its call, its five outputs.

    The settings behind ``*`` are this library's: see `task_aligned_assign`, which is what a loss that needs no dense
    (B, A, num_classes) target calls.
    """

    assign = staticmethod(task_aligned_assign)

    def __init__(
        self,
        topk: int = 13,
        num_classes: int = 80,
        alpha: float = 1.0,
        beta: float = 6.0,
        stride: Sequence[float] | None = None,
        eps: float = 1e-9,
        topk2: int | None = None,
        *,
        small_box: str = "min_side",
        edge_round_trip: bool = True,
        ciou_alpha: str = "stable",
        pair_domain: str = "candidates",
        path: str = "auto",
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.settings = {
            "topk": topk,
            "topk2": topk2,
            "alpha": alpha,
            "beta": beta,
            "stride": stride,
            "eps": eps,
            "small_box": small_box,
            "edge_round_trip": edge_round_trip,
            "ciou_alpha": ciou_alpha,
            "pair_domain": pair_domain,
            "path": path,
        }
        small_box_sides(small_box, stride)

    @torch.no_grad()
    def forward(
        self,
        pd_scores: Tensor,
        pd_bboxes: Tensor,
        anc_points: Tensor,
        gt_labels: Tensor,
        gt_bboxes: Tensor,
        mask_gt: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Assign; arguments and errors as in `task_aligned_assign`.

        Returns:
            target_labels (B, A) int64, target_bboxes (B, A, 4), target_scores (B, A, num_classes) with at most one
            non-zero an anchor, fg_mask (B, A) bool, target_gt_idx (B, A) int64. With no ground truths at all (n = 0)
            labels are num_classes and labels and indices have the dtype of the scores, as upstream's.

        Raises:
            IndexError: also where a label that an anchor carries is not below num_classes (on the static path a
                RuntimeError).
        """
        result = self.assign(pd_scores, pd_bboxes, anc_points, gt_labels, gt_bboxes, mask_gt, **self.settings)
        if gt_bboxes.shape[1] == 0:
            labels = torch.full_like(result.scores, self.num_classes, dtype=pd_scores.dtype)
            boxes, scores = torch.zeros_like(pd_bboxes), torch.zeros_like(pd_scores)
            return labels, boxes, scores, result.foreground, torch.zeros_like(labels)
        if choose_path(self.settings["path"], result.labels) == "sparse" and (result.labels >= self.num_classes).any():
            raise IndexError(f"gt_labels: {int(result.labels.max())} is not below num_classes, {self.num_classes}")
        scores = result.scores.new_zeros(*result.labels.shape, self.num_classes)
        scores.scatter_(2, result.labels[..., None], result.scores[..., None])
        return result.labels, result.boxes, scores, result.foreground, result.gt_index


def promoted(*tensors: Tensor) -> torch.dtype:
    """The dtype of scores: what those of the tensors promote to."""
    return functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors))


def without_ground_truths(pd_scores: Tensor, pd_bboxes: Tensor, gt_bboxes: Tensor) -> TaskAlignedResult:
    """The result where there is no row of ground truths: all background."""
    index = torch.zeros_like(pd_scores[..., 0], dtype=torch.int64)
    return TaskAlignedResult(
        labels=index,
        boxes=torch.zeros_like(pd_bboxes, dtype=gt_bboxes.dtype),
        scores=torch.zeros_like(index, dtype=promoted(pd_scores, pd_bboxes, gt_bboxes)),
        foreground=torch.zeros_like(index, dtype=torch.bool),
        gt_index=index.clone(),
    )


def small_box_sides(rule: str, stride: Sequence[float] | None) -> tuple[float, float]:
    """Sides strictly below the first number count as the second, pixels."""
    if rule not in SMALL_BOX_RULES:
        raise ValueError(f"small_box must be one of {SMALL_BOX_RULES}, got {rule!r}")
    if rule == "off":
        return 0.0, 0.0
    stride = DEFAULT_STRIDE if stride is None else stride
    if len(stride) == 0:
        raise IndexError("stride is empty")
    side = float(stride[1] if len(stride) > 1 else stride[0])
    return (float(stride[0]) if rule == "first_stride" else side), side


def _count(name: str, value: int, anchors: int) -> int:
    if not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if anchors == 0:
        raise IndexError("anc_points is empty: there is nothing to assign to")
    if not 0 <= value <= anchors:
        raise ValueError(f"{name} must be between 0 and the number of anchors, {anchors}, got {value}")
    return value


def check_inputs(pd_scores, pd_bboxes, anc_points, gt_labels, gt_bboxes, mask_gt, *, numbers: int = 4) -> None:
    """Shapes and dtypes, which need no look at values; a box has so many `numbers`."""
    if pd_scores.dim() != 3:
        raise ValueError(f"pd_scores must be (B, A, C), got {tuple(pd_scores.shape)}")
    batch, anchors, _ = pd_scores.shape
    if gt_bboxes.dim() != 3:
        raise ValueError(f"gt_bboxes must be (B, n, {numbers}), got {tuple(gt_bboxes.shape)}")
    rows = gt_bboxes.shape[1]
    for name, tensor, shape in (
        ("pd_bboxes", pd_bboxes, (batch, anchors, numbers)),
        ("anc_points", anc_points, (anchors, 2)),
        ("gt_labels", gt_labels, (batch, rows, 1)),
        ("gt_bboxes", gt_bboxes, (batch, rows, numbers)),
        ("mask_gt", mask_gt, (batch, rows, 1)),
    ):
        if tensor.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")
    for name, tensor in (
        ("pd_scores", pd_scores),
        ("pd_bboxes", pd_bboxes),
        ("gt_bboxes", gt_bboxes),
    ):
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be floating, got {tensor.dtype}")
    if rows and torch.promote_types(pd_bboxes.dtype, gt_bboxes.dtype) != pd_bboxes.dtype:
        raise TypeError(f"pd_bboxes ({pd_bboxes.dtype}) must be as wide as gt_bboxes ({gt_bboxes.dtype})")
