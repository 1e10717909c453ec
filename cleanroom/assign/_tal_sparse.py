"""Task-aligned assignment that looks only at (ground truth, anchor) pairs with the anchor inside: for the CPU.

Valid ground-truth rows of all images stand in one list, sorted by image. Their pairs are taken in chunks, so that even
boxes that cover the whole image keep memory bounded.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cleanroom.assign._tal_terms import (
    Assignment,
    Rules,
    Scene,
    class_index,
    geometry,
    gt_terms,
    inside,
    probability,
    weigh,
)
from cleanroom.overlap import BoxTerms

# Pairs looked at together, give or take a row. With 8400 anchors fewer than 2**15 always, which fits the caches and
# is where PyTorch starts to split one operation over threads: hundreds of such hand-overs cost more than they bring,
# and orders of magnitude more where other processes want the cores too.
CHUNK_PAIRS = 24_000
# Entries of the tables (rows, distinct coordinates) that find those pairs.
CHUNK_TABLE = 1 << 19
LOW_HALF = (1 << 32) - 1


class Grid(NamedTuple):
    """Anchors sorted by line (equal y) and, within a line, by x: those inside a box are one stretch a line."""

    xs: Tensor  # (X,) ascending distinct coordinates
    ys: Tensor  # (Y,)
    order: Tensor  # (A,) anchors in that order
    place: Tensor  # (A,) of each in that order: line * X + rank of x, ascending

    @classmethod
    def of(cls, points: Tensor) -> "Grid":
        """Sort points (A, 2)."""
        xs, rank_x = points[:, 0].unique(return_inverse=True)
        ys, rank_y = points[:, 1].unique(return_inverse=True)
        place, order = (rank_y * len(xs) + rank_x).sort()
        return cls(xs, ys, order, place)


class GridMemory:
    """The grid of the last points: they are the same step after step, and sorting them is a third of a small call."""

    def __init__(self) -> None:
        self._last: tuple[Tensor, Grid] | None = None

    def __call__(self, points: Tensor) -> Grid:
        """Return `Grid.of(points)`."""
        last = self._last
        if last is None or last[0].dtype != points.dtype or not torch.equal(last[0], points):
            last = self._last = points.clone(), Grid.of(points)
        return last[1]


_grid = GridMemory()


class Rows(NamedTuple):
    """The valid ground truths, R of them; all tensors (R,). Where all pairs count, every row: padding has no region."""

    image: Tensor  # ascending
    index: Tensor  # within the image
    terms: BoxTerms
    region: Any  # of candidates; see `Geometry`
    label: Tensor  # as given
    column: Tensor  # of the scores
    bad_labels: bool  # some row's column does not exist


class Pairs(NamedTuple):
    """Candidate pairs with a usable metric; all (P,)."""

    row: Tensor  # position in Rows
    anchor: Tensor
    overlap: Tensor
    metric: Tensor

    def at(self, index: Tensor) -> "Pairs":
        """Pairs at the given positions."""
        return Pairs(*(part.index_select(0, index) for part in self))

    def where(self, mask: Tensor) -> "Pairs":
        """Pairs whose mask is true."""
        return self.at(_positions(mask))


def assign_sparse(scene: Scene, rules: Rules) -> Assignment:
    """Assign with shapes that depend on values; decides as `assign_static` does.

    Raises:
        IndexError: the label of a row that contains an anchor is not one of the C classes.
    """
    batch, anchors, _ = scene.scores.shape
    result = Assignment(
        torch.zeros(batch, anchors, dtype=torch.bool),
        torch.zeros(batch, anchors, dtype=torch.int64),
        torch.zeros(batch, anchors, dtype=torch.promote_types(scene.scores.dtype, scene.predictions[0].dtype)),
    )
    rows = _valid_rows(scene, rules)
    total = len(rows.image)
    if total == 0:
        return result

    grid = _grid(scene.points)
    # Three numbers a row and line of anchors: little beside the pairs.
    lines = list(_lines(grid, rows))
    if scene.decode:
        place = _covered(grid, rows, lines, batch)
        for buffer, term in zip(scene.predictions, scene.decode(place), strict=True):
            buffer.view(-1)[place] = term
    chunks = []
    for pair in _candidates(grid, lines):
        inner = pair if geometry(rules).exact_bounds else _contained(scene, rows, *pair)
        pairs = _weighed(scene, rows, *inner, rules)
        chunks.append(pairs.at(_largest(pairs, rules.topk, total)))
    if not chunks:
        return result
    owned = _resolved(scene, rows, _joined(chunks), rules)
    if rules.topk2 != rules.topk:
        owned = owned.at(owned.row.argsort())
        owned = owned.at(_largest(owned, rules.topk2, total))

    best_metric = owned.metric.new_zeros(total).scatter_reduce_(0, owned.row, owned.metric, "amax")
    best_overlap = owned.overlap.new_zeros(total).scatter_reduce_(0, owned.row, owned.overlap, "amax")
    place = _place(scene, rows, owned)
    score = owned.metric * best_overlap[owned.row] / (best_metric[owned.row] + rules.eps)
    result.foreground.view(-1)[place] = True
    result.gt_index.view(-1)[place] = rows.index[owned.row]
    result.score.view(-1)[place] = torch.where(owned.metric > 0, score, 0)
    return result


def _valid_rows(scene: Scene, rules: Rules) -> Rows:
    every = scene.valid.flatten()
    place = torch.arange(len(every)) if rules.all_pairs else _positions(every)
    region = geometry(rules).region(scene.boxes.flatten(0, 1).index_select(0, place), rules)
    if rules.all_pairs:
        region = region.map(lambda edge: edge.masked_fill(~every, torch.nan))
    label = scene.labels.flatten().index_select(0, place)
    column = class_index(label, scene.scores.shape[2])
    return Rows(
        place // scene.valid.shape[1],
        place % scene.valid.shape[1],
        gt_terms(scene, rules).map(lambda term: term.flatten().index_select(0, place)),
        region,
        label,
        column,
        bool(((column < 0) | (column >= scene.scores.shape[2])).any()),
    )


Lines = tuple[Tensor, Tensor, Tensor]


def _covered(grid: Grid, rows: Rows, lines: list[Lines], batch: int) -> Tensor:
    """Flat places (b A + a) of the anchors that some row contains, each once."""
    anchors = len(grid.order)
    # Steps up and down where stretches begin and end; their running sum counts the rows that contain an anchor.
    steps = torch.zeros(batch, anchors + 1, dtype=torch.int32)
    for row, low, length in lines:
        begin = (rows.image.index_select(0, row) * (anchors + 1)).add_(low)
        one = torch.ones(len(row), dtype=torch.int32)
        steps.view(-1).index_add_(0, begin, one).index_add_(0, begin + length, one.neg_())
    image, position = steps.cumsum(1)[:, :-1].nonzero(as_tuple=True)
    return grid.order.index_select(0, position).add_(image, alpha=anchors)


def _candidates(grid: Grid, lines: list[Lines]) -> Iterator[tuple[Tensor, Tensor]]:
    """Rows (ascending) and anchors of all pairs with the anchor inside, chunk by chunk, rows never divided."""
    for row, low, length in lines:
        for part in _row_groups(row, length):
            stretch, position = _stretches(low[part], length[part])
            yield row[part].index_select(0, stretch), grid.order.index_select(0, position)


def _lines(grid: Grid, rows: Rows) -> Iterator[Lines]:
    """Row (ascending), first place in the grid's order and length of every stretch of anchors inside, in chunks."""
    step = max(1, CHUNK_TABLE // (len(grid.xs) + len(grid.ys)))
    bounds = rows.region.bounds()
    for start in range(0, len(rows.image), step):
        left, top, right, bottom = (edge[start : start + step, None] for edge in bounds)
        columns = inside(grid.xs, left, right)
        width, first = columns.sum(1), columns.byte().argmax(1)
        row, line = (inside(grid.ys, top, bottom) & (width > 0)[:, None]).nonzero(as_tuple=True)
        begin = line * len(grid.xs) + first[row]
        low = torch.searchsorted(grid.place, begin)
        length = torch.searchsorted(grid.place, begin + width[row]).sub_(low)
        yield row + start, low, length


def _row_groups(row: Tensor, weight: Tensor) -> Iterator[slice]:
    """Slices of an ascending `row` that end where a row ends, and weigh about CHUNK_PAIRS."""
    row_ends = _positions(torch.cat((row[1:] != row[:-1], row.new_ones(min(1, len(row)), dtype=torch.bool)))) + 1
    group = weight.cumsum(0)[row_ends - 1] // CHUNK_PAIRS
    last = torch.cat((group[1:] != group[:-1], group.new_ones(min(1, len(group)), dtype=torch.bool)))
    start = 0
    for end in row_ends[last].tolist():
        yield slice(start, end)
        start = end


def _stretches(start: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    """The integers of the ranges start[i] ... start[i] + length[i] - 1 one after the other; first their i."""
    which = torch.repeat_interleave(length)
    shift = start - (length.cumsum(0) - length)
    return which, shift.index_select(0, which).add_(torch.arange(len(which)))


def _positions(mask: Tensor) -> Tensor:
    return mask.nonzero()[:, 0]


def _place(scene: Scene, rows: Rows, pairs: Pairs) -> Tensor:
    """Position of the pairs' anchors in a flat (B * A) tensor."""
    return rows.image.index_select(0, pairs.row) * scene.scores.shape[1] + pairs.anchor


def _contained(scene: Scene, rows: Rows, row: Tensor, anchor: Tensor) -> tuple[Tensor, Tensor]:
    """Those of the given pairs whose anchor is a candidate."""
    x, y = scene.points.index_select(0, anchor).unbind(1)
    found = _positions(rows.region.map(lambda edge: edge.index_select(0, row)).contains(x, y))
    return row.index_select(0, found), anchor.index_select(0, found)


def _weighed(scene: Scene, rows: Rows, row: Tensor, anchor: Tensor, rules: Rules) -> Pairs:
    """Overlap and metric of the given pairs, those without a usable metric left out."""
    _, anchors, classes = scene.scores.shape
    image, column = rows.image.index_select(0, row), rows.column.index_select(0, row)
    if rows.bad_labels and (bad := (column < 0) | (column >= classes)).any():
        label = int(rows.label[row[bad]][0])
        raise IndexError(f"gt_labels: {label} of a row that contains an anchor is outside [-{classes}, {classes})")
    place = image * anchors + anchor
    score = _scores_at(scene.scores, image, anchor, column)
    overlap, metric, usable = weigh(
        rows.terms.map(lambda term: term.index_select(0, row)),
        scene.predictions.map(lambda term: term.view(-1).index_select(0, place)),
        probability(score) if scene.logits else score,
        rules,
    )
    pairs = Pairs(row, anchor, overlap, metric)
    return pairs if usable.all() else pairs.where(usable)


def _scores_at(scores: Tensor, image: Tensor, anchor: Tensor, column: Tensor) -> Tensor:
    """Elements of (B, A, C) scores of any layout; as a flat selection, several times faster than by three indices."""
    per_image, per_anchor, per_class = scores.stride()
    span = 1 + sum((size - 1) * stride for size, stride in zip(scores.shape, scores.stride(), strict=True))
    flat = scores.as_strided((span,), (1,))
    return flat.index_select(0, image.mul_(per_image).add_(anchor * per_anchor).add_(column.mul_(per_class)))


def _joined(parts: list[Pairs]) -> Pairs:
    return parts[0] if len(parts) == 1 else Pairs(*map(torch.cat, zip(*parts, strict=True)))


def _largest(pairs: Pairs, count: int, rows: int) -> Tensor:
    """Positions of pairs among the `count` largest metrics of their row over all anchors, lowest anchor first.

    Pairs are sorted by row. Anchors without a pair count as zeros: they are ranked, but not returned.
    """
    positive = _positions(pairs.metric > 0)
    row = pairs.row.index_select(0, positive)
    tally = row.bincount(minlength=rows)
    chosen = [positive.index_select(0, _positions((tally <= count).index_select(0, row)))]
    crowded = _positions(tally > count)
    if len(crowded):
        keys = _keys(pairs.metric.index_select(0, positive), pairs.anchor.index_select(0, positive))
        begin = tally.cumsum(0) - tally
        for members in _similar(crowded, tally):
            lengths = tally[members, None]
            column = torch.arange(int(lengths.max()))
            slots = (begin[members, None] + column).clamp_(max=len(keys) - 1)
            rectangle = keys.index_select(0, slots.view(-1)).view_as(slots).masked_fill_(column >= lengths, -1)
            best = rectangle.topk(count, dim=1, sorted=False).indices
            chosen.append(positive.index_select(0, slots.gather(1, best).view(-1)))
    chosen.append(_filling(pairs, count, tally))
    return torch.cat(chosen)


def _similar(rows: Tensor, lengths: Tensor) -> list[Tensor]:
    """Group rows to pad to one length: all, if they are few, else those whose lengths have as many bits."""
    mine = lengths[rows]
    if len(rows) * int(mine.max()) <= CHUNK_PAIRS:
        return [rows]
    bits = mine.double().frexp().exponent
    return [rows[bits == size] for size in bits.unique()]


def _keys(metric: Tensor, anchor: Tensor) -> Tensor:
    """Integers in the order of metric, then of the lowest anchor; positive metrics."""
    # The bits of positive floats are ordered as they are; where 32 of them are not enough, ranks are.
    bits = metric.dtype == torch.float32
    order = metric.view(torch.int32).long() if bits else metric.unique(return_inverse=True)[1]
    return order.bitwise_left_shift_(32).add_(LOW_HALF).sub_(anchor)


def _filling(pairs: Pairs, count: int, positives: Tensor) -> Tensor:
    """Positions of the pairs of metric zero that fill up rows with fewer than `count` positive ones.

    All anchors of the image that are not positive tie at zero, and the lowest of them are taken: so only the first
    `count` anchors matter.
    """
    near = _positions(pairs.anchor < count)
    near = near[(positives < count)[pairs.row[near]]]
    zero = pairs.metric[near] == 0
    if not zero.any():
        return near[:0]
    needy, row = pairs.row[near].unique(return_inverse=True)
    anchor = pairs.anchor[near]
    zeros = torch.ones(len(needy), count, dtype=torch.int32)
    zeros[row[~zero], anchor[~zero]] = 0
    rank = zeros.cumsum(1)[row, anchor]
    return near[zero & (rank <= (count - positives)[needy][row])]


def _resolved(scene: Scene, rows: Rows, proposals: Pairs, rules: Rules) -> Pairs:
    """Give every anchor that several rows propose to the row containing it with the largest overlap, lowest first.

    Where all pairs count, to any row of its image.
    """
    batch, anchors, _ = scene.scores.shape
    place = _place(scene, rows, proposals)
    proposers = place.bincount(minlength=batch * anchors)
    contested = _positions(proposers > 1)
    if len(contested) == 0:
        return proposals
    settled = [proposals.where(proposers[place] == 1)]
    rivals = rows.image.bincount(minlength=batch)
    first = rivals.cumsum(0) - rivals
    best = scene.predictions[0].new_full((batch * anchors,), -1)
    winner = torch.full((batch * anchors,), len(rows.image))
    for part in contested.split(max(1, CHUNK_PAIRS // int(rivals.max()))):
        image = part // anchors
        which, row = _stretches(first[image], rivals[image])
        anchor = (part % anchors).index_select(0, which)
        if not rules.all_pairs:
            row, anchor = _contained(scene, rows, row, anchor)
        pairs = _weighed(scene, rows, row, anchor, rules)
        place = _place(scene, rows, pairs)
        best.scatter_reduce_(0, place, pairs.overlap, "amax")
        equals = _positions(pairs.overlap == best[place])
        pairs, place = pairs.at(equals), place[equals]
        winner.scatter_reduce_(0, place, pairs.row, "amin")
        settled.append(pairs.where(pairs.row == winner[place]))
    return _joined(settled)
