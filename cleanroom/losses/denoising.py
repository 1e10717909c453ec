"""Where the denoising queries of RT-DETR lie: which of them are positives, and of which ground truths.

Specification: set_prediction.md B6. After Zhang et al., DINO: contrastive denoising, 2023.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

LAYOUTS = ("grouped", "halves")


class DenoisingIndices(NamedTuple):
    """The indices among ultralytics' `dn_meta`, whose keys are these names.

    `dn_pos_idx`: for each image (dn_num_group * g_b,) int64, its positives among the R denoising queries;
    `dn_gt_idx`: for each image (g_b,) int64, their ground truths, counted through the batch; `dn_num_group`: groups;
    `dn_num_split`: [R, num_queries]. g_b is the number of ground truths of the image, at most the cap.
    """

    dn_pos_idx: tuple[Tensor, ...]
    dn_gt_idx: tuple[Tensor, ...]
    dn_num_group: int
    dn_num_split: list[int]


def denoising_indices(
    gt_groups: Sequence[int],
    num_queries: int,
    num_dn: int = 100,
    *,
    layout: str = "grouped",
    cap: bool = True,
    generator: torch.Generator | None = None,
) -> DenoisingIndices | None:
    """Indices of the denoising queries of a batch, `n = max_b g_b` of them for each sign and group.

    Args:
        gt_groups: ground truths of each image.
        num_queries: queries of the decoder that are no denoising queries.
        num_dn: denoising queries wanted for each sign; groups are repeated as often as they fit, once at least.
        layout: `grouped`: the 2 n queries of a group together, positives first (ultralytics from 8.4.175);
            `halves`: the positives of all groups, then all negatives (before).
        cap: an image with more than `num_dn` ground truths has a random subset of them, in ascending order
            (ultralytics from 8.4.125); False: all (before).
        generator: of the random subsets; default PyTorch's.

    Returns:
        None where there are no ground truths or `num_dn` is 0: no denoising.

    Raises:
        ValueError: an unknown `layout`, or a negative number in `gt_groups`.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {LAYOUTS}, got {layout!r}")
    if min(gt_groups, default=0) < 0:
        raise ValueError(f"gt_groups must not be negative, got {list(gt_groups)}")
    most = max(gt_groups, default=0)
    if num_dn <= 0 or most == 0:
        return None
    rows = min(most, num_dn) if cap else most
    groups = max(1, num_dn // rows)
    stride = 2 * rows if layout == "grouped" else rows
    starts = stride * torch.arange(groups).unsqueeze(1)
    positions, targets, first = [], [], 0
    for count in gt_groups:
        chosen = torch.arange(count)
        if count > rows:
            chosen = torch.randperm(count, generator=generator)[:rows].sort().values
        positions.append((starts + torch.arange(len(chosen))).flatten())
        targets.append(first + chosen)
        first += count
    return DenoisingIndices(tuple(positions), tuple(targets), groups, [2 * rows * groups, num_queries])
