"""The matching of every decoder layer as one operator, so that `torch.compile(fullgraph=True)` goes past SciPy.

How a loss uses it (part A of set_prediction.md: `detr`; part B: `rtdetr`):

    pairs = matched_layers(logits, pred_boxes, labels, boxes, sizes, terms=CostTerms("detr", 1, 5, 2))

`logits` and `pred_boxes` are lists, one tensor a layer (auxiliary layers too: all are matched in this one call). The
pairs have a length that the host knows, `L * sum(min(Q, sizes[b]))`, so nothing behind them has a data-dependent
shape. To keep `torch.compile` from compiling anew for every batch, take the image of a pair from `pairs.images`
and never loop over the values in `sizes`: they are symbols in the second graph that is compiled.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cleanroom.assign._matching_checks import choose_solver, fake_pairs
from cleanroom.assign.hungarian import match_layers
from cleanroom.assign.matching_cost import CostTerms
from cleanroom.kernels import runtime

if runtime.AVAILABLE:
    from cleanroom.kernels.matching import match_on_device


class LayerPairs(NamedTuple):
    """Matched pairs of L layers, all (L * P,) int64, P = sum_b min(Q, sizes[b]), on the device of the labels.

    Layer after layer, image after image, queries ascending within an image. The first P are those of the first
    layer: `queries.view(L, -1)` separates the layers.
    """

    images: Tensor
    """Image of the pair, in [0, B)."""
    queries: Tensor
    """Query of the pair, within its image."""
    targets: Tensor
    """Row of `labels` and `boxes`: counted through the batch, for both variants."""


def matched_layers(
    logits: Sequence[Tensor],
    pred_boxes: Sequence[Tensor],
    labels: Tensor,
    boxes: Tensor,
    sizes: Sequence[int],
    *,
    terms: CostTerms,
    non_finite: str = "",
    path: str = "auto",
) -> LayerPairs:
    """Matched pairs of every layer, each layer matched with the same targets, without gradient.

    On CUDA kernels price and solve on the device, and the host waits for nothing. SciPy's path is one host
    synchronisation for all layers together: the costs go to the host, and the pairs come back.

    Args:
        logits: L tensors (B, Q, C + 1) for `detr`, (B, Q, C) for `rtdetr`, at least one.
        pred_boxes: L tensors (B, Q, 4), (cx, cy, w, h) normalised to the image.
        labels: (G,) int64 or int32, image by image.
        boxes: (G, 4), (cx, cy, w, h) normalised.
        sizes: targets of each image, B host-side integers of sum G.
        terms: variant, weights and focal settings of the cost.
        non_finite: policy for costs that are NaN or infinite, see `hungarian_match`; "" is the variant's current one.
        path: "auto", "scipy" or "triton", see `hungarian_match`.

    Raises:
        ValueError, TypeError, ImportError: as `hungarian_match`, when the operator runs.
        RuntimeError: `path` is "triton" where kernels cannot run; and the device's own for values that are rejected.
    """
    if not logits:
        raise ValueError("logits holds no layer")
    if choose_solver(path, pred_boxes[0].shape[1], *logits, *pred_boxes, labels, boxes) == "triton":
        return LayerPairs(
            *match_on_device(logits, pred_boxes, labels, boxes, sizes, terms=terms, non_finite=non_finite)
        )
    variant, class_cost, bbox_cost, giou_cost, use_fl, alpha, gamma = terms
    return LayerPairs(
        *torch.ops.cleanroom.match_layers(
            list(logits),
            list(pred_boxes),
            labels,
            boxes,
            list(sizes),
            variant,
            class_cost,
            bbox_cost,
            giou_cost,
            use_fl,
            alpha,
            gamma,
            non_finite,
        )
    )


@torch.library.custom_op("cleanroom::match_layers", mutates_args=())
def _match_layers(
    logits: list[Tensor],
    pred_boxes: list[Tensor],
    labels: Tensor,
    boxes: Tensor,
    sizes: list[int],
    variant: str,
    class_cost: float,
    bbox_cost: float,
    giou_cost: float,
    use_fl: bool,
    alpha: float,
    gamma: float,
    non_finite: str,
) -> tuple[Tensor, Tensor, Tensor]:
    terms = CostTerms(variant, class_cost, bbox_cost, giou_cost, use_fl, alpha, gamma)
    pairs = match_layers(logits, pred_boxes, labels, boxes, sizes, terms=terms, non_finite=non_finite or None)
    # NumPy, because a dozen small tensor operations cost as much as a small matching.
    counts = [len(queries) for queries, _ in pairs]
    images = np.tile(np.arange(len(sizes)), len(logits)).repeat(counts)
    nothing = np.empty(0, dtype=np.int64)
    queries = np.concatenate([nothing, *(some.numpy() for some, _ in pairs)])
    targets = np.concatenate([nothing, *(some.numpy() for _, some in pairs)])
    targets += np.cumsum([0, *sizes[:-1]])[images]
    return tuple(torch.from_numpy(part).to(labels.device) for part in (images, queries, targets))


_match_layers.register_fake(fake_pairs)
