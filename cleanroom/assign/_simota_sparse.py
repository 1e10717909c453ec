"""SimOTA with data-dependent shapes: costs only where they can decide.

All images run together as lists: ground truths of all images one after the other, anchors as b * N + a.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from cleanroom.assign._simota_cost import (
    MAX_CLASS_COST,
    MAX_OVERLAP_COST,
    Corners,
    Grid,
    Rules,
    background_cost,
    corners,
    dynamic_k,
    lowest,
    overlap,
    pair_cost,
    regions,
    widen,
)
from cleanroom.assign._simota_levels import Levels, search, spread
from cleanroom.assign._simota_logits import class_logits

# Elements of the largest temporary: small enough for a core's own cache, and PyTorch's grain, beyond which it wakes
# threads whose barriers cost such short kernels more than they bring.
BLOCK = 1 << 15


def match_sparse(
    gt_boxes: Tensor,
    gt_classes: Tensor,
    labels: Tensor,
    real: Tensor,
    pred_boxes: Tensor,
    cls_logits: Tensor | Sequence[Tensor],
    obj_logits: Tensor,
    grid: Grid,
    levels: Levels,
    rules: Rules,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the ground truth, class and overlap of each anchor, (B, N) each, with -1, 0 and 0 for background.

    Takes what match_static takes, and the levels of the grid.
    """
    shape = pred_boxes.shape[:2]
    iou_dtype = torch.promote_types(gt_boxes.dtype, pred_boxes.dtype)
    image, row = real.nonzero(as_tuple=True)
    boxes, pred_boxes = widen(gt_boxes[image, row]), pred_boxes.flatten(0, 1)
    costs = _Costs(boxes, labels[image, row], pred_boxes, cls_logits, obj_logits, grid, rules)
    anchor, owner = _match(costs, image, shape, levels, iou_dtype)
    del costs  # a float64 an anchor, before the outputs are made

    matched_gt = torch.full((len(pred_boxes),), -1, device=pred_boxes.device)
    matched_gt[anchor] = row[owner]
    matched_classes = torch.zeros_like(matched_gt, dtype=gt_classes.dtype)
    matched_classes[anchor] = gt_classes[image, row][owner]
    matched_iou = torch.zeros_like(matched_gt, dtype=iou_dtype)
    matched_iou[anchor] = overlap(corners(boxes[owner]), corners(widen(pred_boxes[anchor]))).to(iou_dtype)
    return matched_gt.view(shape), matched_classes.view(shape), matched_iou.view(shape)


class _Costs:
    """Costs of pairs; an anchor's sum over classes is made when it is first asked for."""

    def __init__(
        self,
        gt_boxes: Tensor,
        labels: Tensor,
        pred_boxes: Tensor,
        cls_logits: Tensor | Sequence[Tensor],
        obj_logits: Tensor,
        grid: Grid,
        rules: Rules,
    ) -> None:
        self.gt_boxes, self.labels, self.pred_boxes = gt_boxes, labels, pred_boxes
        self.cls_logits, self.obj_logits = class_logits(cls_logits), obj_logits.flatten(0, 1)
        self.grid, self.rules = grid, rules
        self._background = pred_boxes.new_empty(len(pred_boxes), dtype=torch.float64)
        self._known = torch.zeros_like(self._background, dtype=torch.bool)

    @property
    def penalty_decides(self) -> bool:
        """Whether every free pair costs less than any other pair."""
        return MAX_CLASS_COST * self.cls_logits.classes + MAX_OVERLAP_COST < self.rules.penalty

    def __call__(self, gt: Tensor, anchor: Tensor) -> Tensor:
        """Return the costs of pairs of ground truths and anchors, (P,) each."""
        self._learn(anchor)
        boxes = self.gt_boxes[gt]
        iou = overlap(corners(boxes), corners(widen(self.pred_boxes[anchor])))
        _, free = regions(boxes, self.grid.at(anchor % len(self.grid.x)), self.rules)
        label_logits = self.cls_logits.entries(anchor, self.labels[gt])
        objectness = self.obj_logits[anchor, 0]
        return pair_cost(self._background[anchor], label_logits, objectness, iou, free, self.rules.penalty)

    def _learn(self, anchor: Tensor) -> None:
        wanted = torch.zeros_like(self._known)
        wanted[anchor] = True
        new = (wanted & ~self._known).nonzero().squeeze(1)
        for part in new.split(max(1, BLOCK // self.cls_logits.classes)):
            self._background[part] = background_cost(self.cls_logits.rows(part), self.obj_logits.index_select(0, part))
        self._known[new] = True


def _match(
    costs: _Costs, image: Tensor, shape: tuple[int, int], levels: Levels, iou_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the foreground anchors and the ground truth of each."""
    candidate, gt, anchor = search(costs.gt_boxes, image, shape, levels, costs.rules)
    candidate = candidate.view(shape)
    k = _count(costs.gt_boxes, costs.pred_boxes, image, candidate, iou_dtype)
    gt, anchor, short = _choose_free(costs, gt, anchor, k)
    if len(short):
        more_gt, more_anchor = _choose_any(costs, short, image, candidate, k)
        gt, anchor = torch.cat([gt, more_gt]), torch.cat([anchor, more_anchor])
    anchor, place, claims = anchor.unique(return_inverse=True, return_counts=True)
    owner = torch.empty_like(anchor)
    owner[place] = gt
    contested = claims > 1
    if contested.any():
        owner[contested] = _cheapest(costs, anchor[contested], image, shape)
    return anchor, owner


def _count(gt_boxes: Tensor, pred_boxes: Tensor, image: Tensor, candidate: Tensor, iou_dtype: torch.dtype) -> Tensor:
    """Return k of each ground truth (T,) from its overlaps with the candidates (B, N) of its image."""
    boxes_here = image.bincount(minlength=len(candidate)).tolist()
    candidates_here = candidate.sum(1).tolist()
    rows = corners(gt_boxes[:, None])
    columns = corners(widen(pred_boxes[candidate.flatten()]))
    k = [image[:0]]  # what remains where no image has a ground truth
    for gt, predicted in zip(_split(rows, boxes_here), _split(columns, candidates_here), strict=True):
        size = max(1, BLOCK // max(1, len(predicted.area)))
        for start in range(0, len(gt.area), size):
            block = Corners(*(side[start : start + size] for side in gt))
            k.append(dynamic_k(overlap(block, predicted), iou_dtype))
    return torch.cat(k)


def _split(sides: Corners, sizes: list[int]) -> Iterator[Corners]:
    return map(Corners, *(side.split(sizes) for side in sides))


def _choose_free(costs: _Costs, gt: Tensor, anchor: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Choose among the free pairs (gt, anchor) for each ground truth that has k of them.

    Where the penalty decides, such a ground truth takes no other pair. Returns the chosen pairs and the remaining
    ground truths.
    """
    if not costs.penalty_decides or len(gt) == 0:
        return gt[:0], anchor[:0], torch.arange(len(k), device=k.device)
    _, column = spread(gt.bincount(minlength=len(k)))
    table = _table(costs(gt, anchor), gt, column, len(k))
    enough = (table < torch.inf).sum(1) >= k
    chosen = (lowest(table, k) & enough[:, None])[gt, column]
    return gt[chosen], anchor[chosen], (~enough).nonzero().squeeze(1)


def _choose_any(costs: _Costs, rows: Tensor, image: Tensor, candidate: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Choose among all candidates (B, N) of the image for some ground truths; return the pairs."""
    candidates = candidate.flatten().nonzero().squeeze(1)
    number = candidate.sum(1)
    first = number.cumsum(0) - number
    pairs = []
    for part in rows.split(max(1, BLOCK // max(1, int(number.max())))):
        home = image[part]
        item, position = spread(number[home])
        if len(item):
            gt, anchor = part[item], candidates[first[home][item] + position]
            chosen = lowest(_table(costs(gt, anchor), item, position, len(part)), k[part])[item, position]
            pairs.append(torch.stack([gt[chosen], anchor[chosen]]))
    gt, anchor = torch.cat(pairs, 1) if pairs else rows.new_empty(2, 0)
    return gt, anchor


def _cheapest(costs: _Costs, anchor: Tensor, image: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return the ground truth of lowest cost of each anchor, over all ground truths of its image."""
    number = image.bincount(minlength=shape[0])
    first = number.cumsum(0) - number
    owners = []
    for part in anchor.split(max(1, BLOCK // int(number.max()))):
        home = part // shape[1]
        item, position = spread(number[home])
        cost = costs(first[home][item] + position, part[item])
        owners.append(first[home] + _table(cost, item, position, len(part)).argmin(1))
    return torch.cat(owners)


def _table(cost: Tensor, row: Tensor, column: Tensor, rows: int) -> Tensor:
    """Return ragged rows as a matrix, padded with infinity."""
    table = cost.new_full((rows, int(column.max()) + 1), torch.inf)
    table[row, column] = cost
    return table
