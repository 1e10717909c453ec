"""What the matchers reject, which of their two solvers takes the tensors at hand, and what compilers see of them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cleanroom.assign.matching_cost import CostTerms
from cleanroom.kernels import runtime
from cleanroom.paths import choose_path

SOLVERS = ("auto", "scipy", "triton")
"""Names of the `path` of a matching: SciPy on the host, kernels on the device, or what suits the tensors."""
LONGEST_SIDE = 4096
"""Most queries, or targets of an image, that the kernels take: what the registers of 16 warps hold."""
ORDERS = ("any", "scipy")
"""Which of several optima is found: whichever is nearest at hand, or the one that SciPy finds."""
SOLVED, INFEASIBLE, INVALID = 0, 1, 2
"""Status of a problem: optimal; +inf leaves no full assignment; a cost is NaN or -inf."""

POLICIES = ("largest", "zero", "raise")
CURRENT_POLICY = {"detr": "largest", "rtdetr": "zero"}

COMPLAINTS = {
    "labels": "labels (class_labels, gt_cls) hold a class outside the columns of logits",
    "pred_boxes": "pred_boxes hold an inverted box or a NaN",
    "boxes": "boxes hold an inverted box or a NaN",
}


def choose_solver(path: str, queries: int, *tensors: Tensor) -> str:
    """Resolve the `path` keyword of a matching to "scipy" or "triton".

    "auto" takes the kernels on CUDA where Triton is installed. They compute costs in float32: where a tensor is
    float64, or queries are more than `LONGEST_SIDE`, "auto" is SciPy; "triton" is SciPy for float64.

    Raises:
        ValueError: `path` is none of `SOLVERS`.
        RuntimeError: `path` is "triton", and kernels cannot run on these tensors; the text says why.
    """
    if path not in SOLVERS:
        raise ValueError(f"path must be one of {SOLVERS}, got {path!r}")
    if path == "auto":
        on_device = all(tensor.device.type == "cuda" for tensor in tensors)
        return "triton" if on_device and queries <= LONGEST_SIDE and runtime.runs_on(*tensors) else "scipy"
    return "triton" if path == "triton" and choose_path("triton", *tensors) == "triton" else "scipy"


def fake_pairs(
    logits: Sequence[Tensor], pred_boxes: Sequence[Tensor], labels: Tensor, boxes: Tensor, sizes: Sequence[int], *_: Any
) -> tuple[Tensor, ...]:
    """Images, queries and targets of a matching of layers as compilers see them: of a length that the host knows."""
    queries = pred_boxes[0].shape[1]
    # `min` would ask for the value of a symbol, and so for another graph.
    count = len(logits) * sum(torch.sym_min(queries, size) for size in sizes)
    return tuple(labels.new_empty(count, dtype=torch.int64) for _ in range(3))


def choose_matched_path(path: str, queries: int, *tensors: Tensor) -> str:
    """`choose_path` of a loss that matches first: more queries than the kernel solves for are "static" to "auto"."""
    chosen = choose_path(path, *tensors)
    return "static" if path == "auto" and chosen == "triton" and queries > LONGEST_SIDE else chosen


def check_settings(terms: CostTerms, non_finite: str | None, workers: int | None = None) -> None:
    """Reject settings of a matching; `non_finite` is the policy in force."""
    if terms.variant not in CURRENT_POLICY:
        raise ValueError(f"variant must be one of {tuple(CURRENT_POLICY)}, got {terms.variant!r}")
    if terms.variant == "detr":
        check_weights(terms.class_cost, terms.bbox_cost, terms.giou_cost)
    if non_finite not in POLICIES:
        raise ValueError(f"non_finite must be one of {POLICIES}, got {non_finite!r}")
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")


def check_weights(class_cost: float, bbox_cost: float, giou_cost: float) -> None:
    """Reject costs that are nothing."""
    if class_cost == 0 and bbox_cost == 0 and giou_cost == 0:
        raise ValueError("class_cost, bbox_cost and giou_cost are all 0")


def check_inputs(
    logits: Tensor, pred_boxes: Tensor, labels: Tensor, boxes: Tensor, sizes: Sequence[int], *, variant: str
) -> None:
    """Reject predictions of a layer and targets that do not fit together."""
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
