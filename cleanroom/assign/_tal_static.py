"""Task-aligned assignment with shapes that do not depend on values: for CUDA, torch.compile and graph capture.

Ground-truth rows are streamed in chunks; what is kept between chunks is per anchor (B, A) or per row (B, n).
"""

import torch
from torch import Tensor

from cleanroom.assign._tal_terms import (
    Assignment,
    Rules,
    Scene,
    class_index,
    geometry,
    gt_terms,
    probability,
    weigh,
)

# Pairs looked at together. Fewer rows than MIN_ROWS a chunk would make launches, not bytes, the cost.
CHUNK_PAIRS = 1 << 21
MIN_ROWS = 8


def assign_static(scene: Scene, rules: Rules) -> Assignment:
    """Assign with static shapes and no host synchronisation; scratch is at most about max(2**21, 8 B A) pairs."""
    batch, anchors, classes = scene.scores.shape
    rows = scene.labels.shape[1]
    as_probability = probability if scene.logits else lambda scores: scores
    step = max(MIN_ROWS, CHUNK_PAIRS // max(1, batch * anchors))
    chunks = [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
    gt = gt_terms(scene, rules)
    regions = geometry(rules).region(scene.boxes, rules)
    score_index = class_index(scene.labels, classes)
    in_range = (score_index >= 0) & (score_index < classes)
    score_index = score_index.clamp(0, classes - 1)
    row_index = torch.arange(rows, device=scene.labels.device)

    proposals = torch.zeros_like(scene.predictions[0], dtype=torch.int64)
    owner = torch.zeros_like(proposals)
    best_row = torch.zeros_like(proposals)
    best_overlap = torch.full_like(scene.predictions[0], -1)
    for chunk in chunks:
        region = regions.map(lambda edge: edge[:, chunk, None])  # noqa: B023 - called before the loop goes on
        contained = region.contains(scene.points[:, 0], scene.points[:, 1])
        contained &= scene.valid[:, chunk, None]
        # Without a host synchronisation a bad label can only be reported by the device.
        torch._assert_async(
            (in_range[:, chunk] | ~contained.any(2)).all(),
            f"gt_labels: the label of a row that contains an anchor is outside [-{classes}, {classes})",
        )
        columns = score_index[:, None, chunk].expand(-1, anchors, -1)
        overlap, metric, usable = weigh(
            gt.map(lambda term: term[:, chunk, None]),  # noqa: B023 - called before the loop goes on
            scene.predictions.map(lambda term: term[:, None]),
            as_probability(scene.scores.gather(2, columns)).mT,
            rules,
        )
        inside = usable & contained
        rival = usable if rules.all_pairs else inside
        proposed = largest(torch.where(inside, metric, 0), rules.topk) & inside
        numbers = row_index[chunk, None]
        proposals += proposed.sum(1)
        owner = torch.maximum(owner, torch.where(proposed, numbers, 0).amax(1))
        overlap = torch.where(rival, overlap, -1)
        chunk_best = overlap.amax(1)
        chunk_row = torch.where(overlap == chunk_best[:, None], numbers, rows).amin(1)
        best_row = torch.where(chunk_best > best_overlap, chunk_row, best_row)
        best_overlap = torch.maximum(chunk_best, best_overlap)

    foreground = proposals > 0
    owner = torch.where(proposals > 1, best_row, owner)
    own_score = as_probability(scene.scores.gather(2, score_index.gather(1, owner)[..., None])[..., 0])
    overlap, metric, _ = weigh(gt.map(lambda term: term.gather(1, owner)), scene.predictions, own_score, rules)
    if rules.topk2 != rules.topk:
        kept = torch.zeros_like(foreground)
        for chunk in chunks:
            owned = (owner[:, None] == row_index[chunk, None]) & foreground[:, None]
            kept |= (largest(torch.where(owned, metric[:, None], 0), rules.topk2) & owned).any(1)
        foreground = kept
    overlap = torch.where(foreground, overlap, 0)
    metric = torch.where(foreground, metric, 0)
    best_metric = metric.new_zeros(batch, rows).scatter_reduce(1, owner, metric, "amax").gather(1, owner)
    best_overlap = overlap.new_zeros(batch, rows).scatter_reduce(1, owner, overlap, "amax").gather(1, owner)
    score = metric * best_overlap / (best_metric + rules.eps)
    score = torch.where(metric > 0, score, 0)  # with eps = 0, background would be 0 / 0
    return Assignment(foreground, torch.where(foreground, owner, 0), score)


def largest(values: Tensor, count: int) -> Tensor:
    """Mark the `count` largest along the last axis, lowest index first among equals; bool of the same shape."""
    if count == 0:
        return torch.zeros_like(values, dtype=torch.bool)
    bound = values.topk(count, dim=-1).values[..., -1:]
    above, tied = values > bound, values == bound
    room = count - above.sum(-1, keepdim=True)
    return above | (tied & (tied.cumsum(-1, dtype=torch.int32) <= room))
