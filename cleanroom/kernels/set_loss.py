"""Class, box and cardinality terms of the set criterion under given pairs: specification set_prediction.md, A4 to A6.

For the logits z of a query, its class y (C, no object, where nothing is matched) and the weight u of that class; for
the boxes p and t of a pair, the overlap I, the union U and the hull H of both; a layer at a time:

    class         sum u (ln sum exp(z) - z_y) / sum u            sums over all queries
    L1            sum |p - t| / D                                sums over pairs; D is the number of targets
    GIoU          sum (1 - (I / U - (H - U) / H)) / D            0 / 0 counts as 0
    cardinality   mean over images of | queries whose largest logit is no object's minus all queries, less targets |

A pass over the queries finds the class of each in a table that the pairs were written into, and sums the logits as
they stream by, so any number of classes will do. Nothing of their size is kept: the backward pass reads them again and
writes the gradient of logits and boxes once, zeros included, scaled by what comes in. To store the gradient in the
forward pass would save a reading, and cost a reading and a writing wherever the factor is not 1.

Bytes moved for L layers of B images, Q queries and C + 1 columns of s bytes: `s L B Q (C + 1)` and a sixteenth for
boxes forward, three times that in all: 32 MB, 7 us at 4.8 TB/s, for 6 layers of 16 x 300 x 92 in float32. Launches:
4 + L forward, L backward.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cleanroom.kernels import runtime
from cleanroom.kernels.matching_cost import ragged
from cleanroom.kernels.numbers import cast, log1p

#: Logits and columns that a program works on at a time, and pairs.
ELEMENTS, COLUMNS, PAIRS = 1024, 128, 256
#: Images and tiles of queries that are added at a time.
FINISH_IMAGES, FINISH_TILES = 16, 32

_INFINITY = tl.constexpr(float("inf"))


@triton.jit
def _owners_kernel(
    images, images_layer, images_pair, queries, queries_layer, queries_pair, placed, placed_layer, placed_pair, pairs,
    labels, label_stride, targets, classes, firsts, owners, batch, total, local, status, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write each pair's target, counted from 1, at its query, and counted in its image into `local`.

    A label outside [0, C] leaves 1 in `status`.
    """
    layer = tl.program_id(1).to(tl.int64)
    pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = pair < pairs
    image = tl.load(images + layer * images_layer + pair * images_pair, mask=inside, other=0)
    query = tl.load(queries + layer * queries_layer + pair * queries_pair, mask=inside, other=0)
    target = tl.load(placed + layer * placed_layer + pair * placed_pair, mask=inside, other=0)
    sound = inside & (image >= 0) & (image < batch) & (query >= 0) & (query < total)
    sound = sound & (target >= 0) & (target < targets)
    tl.store(owners + (layer * batch + image) * total + query, (target + 1).to(tl.int32), mask=sound)
    tl.store(local + layer * pairs + pair, target - tl.load(firsts + image, mask=sound, other=0), mask=inside)
    label = tl.load(labels + target * label_stride, mask=sound, other=0)
    wrong = inside & (~sound | (label < 0) | (label > classes))
    if tl.max(wrong.to(tl.int32), 0) > 0:
        tl.atomic_or(status, 1)


@triton.jit
def _classes(owners, image, query, inside, queries, labels, label_stride, last):
    """Row of each query's target in the batch, from 1, or 0, and its class, `last` without one."""
    owner = tl.load(owners + image * queries + query, mask=inside, other=0)
    label = tl.load(labels + (owner - 1).to(tl.int64) * label_stride, mask=owner > 0, other=0).to(tl.int32)
    return owner, tl.where(owner > 0, tl.minimum(tl.maximum(label, 0), last), last)


@triton.jit
def _counted(ignore, ignore_image, ignore_query, image, query, inside):
    counted = inside
    if ignore is not None:
        ignored = tl.load(ignore + image * ignore_image + query * ignore_query, mask=inside, other=0)
        counted = inside & (ignored == 0)
    return counted


@triton.jit
def _exponentials(base, counted, columns, step, kind, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr):
    """Of rows of logits: the largest and the sum of exp(z - largest), with and without `kind`; z of `kind`; whether
    the last column is the largest, as an argmax would say that takes NaN for the largest and equal ones in order."""
    most = tl.full((BLOCK_ROWS,), -_INFINITY, tl.float32)
    most_class = tl.full((BLOCK_ROWS,), -_INFINITY, tl.float32)
    every, others = tl.zeros((BLOCK_ROWS,), tl.float32), tl.zeros((BLOCK_ROWS,), tl.float32)
    own, last = tl.zeros((BLOCK_ROWS,), tl.float32), tl.zeros((BLOCK_ROWS,), tl.float32)
    spoilt = tl.zeros((BLOCK_ROWS,), tl.int32)
    for first in range(0, columns, BLOCK_COLUMNS):
        column = first + tl.arange(0, BLOCK_COLUMNS)
        read = counted[:, None] & (column < columns)[None, :]
        z = tl.load(base[:, None] + column.to(tl.int64)[None, :] * step, mask=read, other=-_INFINITY).to(tl.float32)
        of_class, is_own = (column < columns - 1)[None, :], column[None, :] == kind[:, None]
        number = tl.abs(z) <= _INFINITY
        most_class = tl.maximum(most_class, tl.max(tl.where(of_class & number, z, -_INFINITY), 1))
        spoilt = tl.maximum(spoilt, tl.max((of_class & ~number).to(tl.int32), 1))
        last += tl.sum(tl.where((column == columns - 1)[None, :] & read, z, 0.0), 1)
        own += tl.sum(tl.where(is_own & read, z, 0.0), 1)
        now = tl.maximum(most, tl.max(tl.where(number, z, -_INFINITY), 1))
        shift = tl.where(now == -_INFINITY, 0.0, now)
        power, shrink = tl.where(read, tl.exp(z - shift[:, None]), 0.0), tl.exp(most - shift)
        every = every * shrink + tl.sum(power, 1)
        others = others * shrink + tl.sum(tl.where(is_own, 0.0, power), 1)
        most = now
    empty = (spoilt == 0) & (~(tl.abs(last) <= _INFINITY) | (last > most_class))
    return most, every, others, own, empty | (columns == 1)


@triton.jit
def _boxes(base, step, found):
    x = tl.load(base, mask=found, other=0.0).to(tl.float32)
    y = tl.load(base + step, mask=found, other=0.0).to(tl.float32)
    w = tl.load(base + 2 * step, mask=found, other=0.0).to(tl.float32)
    h = tl.load(base + 3 * step, mask=found, other=0.0).to(tl.float32)
    return x, y, w, h


@triton.jit
def _axis(distance, size, other):
    """Overlap and hull of two intervals, and which of them the upper and the lower end of the first bounds.

    1 for the overlap, 0 for the hull, a half for both where ends are equal. Measured from the centre of the second, so
    that no digit is lost to the place of small boxes.
    """
    upper, lower, half = distance + 0.5 * size, distance - 0.5 * size, 0.5 * other
    overlap = tl.minimum(upper, half) - tl.maximum(lower, -half)
    hull = tl.maximum(upper, half) - tl.minimum(lower, -half)
    by_upper = tl.where(upper < half, 1.0, tl.where(upper == half, 0.5, 0.0))
    by_lower = tl.where(lower > -half, 1.0, tl.where(lower == -half, 0.5, 0.0))
    # An interval that is no number anywhere has no overlap and no hull either.
    nothing = 0.0 * (distance + size + other)
    return overlap + nothing, hull + nothing, by_upper, by_lower


@triton.jit
def _generalised(px, py, pw, ph, tx, ty, tw, th):
    """`1 - GIoU` of pairs of boxes, and its slopes by the first."""
    side_x, hull_x, upper_x, lower_x = _axis(px - tx, pw, tw)
    side_y, hull_y, upper_y, lower_y = _axis(py - ty, ph, th)
    across_x, across_y = tl.maximum(side_x, 0.0), tl.maximum(side_y, 0.0)
    shared, hull = across_x * across_y + 0.0 * (side_x + side_y), hull_x * hull_y
    union = pw * ph + tw * th - shared
    # 0 / 0 is 0.
    safe_union, safe_hull = tl.where(union == 0, 1.0, union), tl.where(hull == 0, 1.0, hull)
    ratio, filled = tl.div_rn(shared, safe_union), tl.div_rn(union, safe_hull)
    loss = 1.0 - (ratio - tl.div_rn(hull - union, safe_hull))
    per_union = tl.where(union == 0, 0.0, tl.div_rn(1.0, safe_union))
    per_hull = tl.where(hull == 0, 0.0, tl.div_rn(1.0, safe_hull))
    # The quotients I / U and U / H come first: they are exactly 1 for identical boxes, and the slopes cancel.
    by_area = per_hull - ratio * per_union
    by_shared, by_hull = per_union - by_area, -filled * per_hull
    inner_x, inner_y = tl.where(side_x < 0, 0.0, across_y * by_shared), tl.where(side_y < 0, 0.0, across_x * by_shared)
    outer_x, outer_y = hull_y * by_hull, hull_x * by_hull
    end_x, end_y = upper_x * inner_x + (1.0 - upper_x) * outer_x, upper_y * inner_y + (1.0 - upper_y) * outer_y
    start_x, start_y = lower_x * inner_x + (1.0 - lower_x) * outer_x, lower_y * inner_y + (1.0 - lower_y) * outer_y
    by_w, by_h = -0.5 * (start_x + end_x) - ph * by_area, -0.5 * (start_y + end_y) - pw * by_area
    return loss, start_x - end_x, start_y - end_y, by_w, by_h


@triton.jit
def _sums_kernel(
    logits, by_image, by_query, by_column, columns, boxes, box_image, box_query, box_value,
    queries, owners, labels, label_stride, targets, target_row, target_value, weights, ignore, ignore_image,
    ignore_query, partials, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sums over a tile of queries of one image, into `partials` (B, tiles, 8)."""
    tile, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    query = (tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    inside = query < queries
    counted = _counted(ignore, ignore_image, ignore_query, image, query, inside)
    owner, kind = _classes(owners, image, query, inside, queries, labels, label_stride, columns - 1)
    base = logits + image * by_image + query * by_query
    most, every, others, own, empty = _exponentials(
        base, counted, columns, by_column, kind, BLOCK_ROWS, BLOCK_COLUMNS
    )  # fmt: skip
    # 1 - p of a sure query is all rounding: there the sum of the others says more.
    entropy = tl.where(own >= most, log1p(others), (most - own) + tl.log(every))
    entropy += tl.where(most == -_INFINITY, float("nan"), every - every)
    weight = tl.load(weights + kind, mask=counted, other=0.0).to(tl.float32)
    found = counted & (owner > 0)
    px, py, pw, ph = _boxes(boxes + image * box_image + query * box_query, box_value, found)
    tx, ty, tw, th = _boxes(targets + (owner - 1).to(tl.int64) * target_row, target_value, found)
    distance = tl.abs(px - tx) + tl.abs(py - ty) + tl.abs(pw - tw) + tl.abs(ph - th)
    loss, _, _, _, _ = _generalised(px, py, pw, ph, tx, ty, tw, th)
    target = partials + (image * tl.num_programs(0) + tile) * 8
    tl.store(target, tl.sum(tl.where(counted, weight * entropy, 0.0), 0))
    tl.store(target + 1, tl.sum(weight, 0))
    tl.store(target + 2, tl.sum(tl.where(found, distance, 0.0), 0))
    tl.store(target + 3, tl.sum(tl.where(found, loss, 0.0), 0))
    tl.store(target + 4, tl.sum(tl.where(counted & ~empty, 1.0, 0.0), 0))
    tl.store(target + 5, tl.sum(tl.where(inside & ~counted & (owner > 0), 1.0, 0.0), 0))


@triton.jit
def _of(sums, number):
    """One of the eight columns of sums (rows, 8)."""
    return tl.sum(tl.where((tl.arange(0, 8) == number)[None, :], sums, 0.0), 1)


@triton.jit
def _finish_kernel(
    partials, layers, counted_layers, images, tiles, sizes, targets, normaliser, box_weight, overlap_weight,
    total, terms, norms, EACH: tl.constexpr, BLOCK_IMAGES: tl.constexpr, BLOCK_TILES: tl.constexpr,
):  # fmt: skip
    """Terms and total of all images, or of one with EACH, from partial sums (layers, images, tiles, 8)."""
    group, groups = tl.program_id(0), tl.num_programs(0)
    part = tl.arange(0, 8)[None, None, :]
    weighted = tl.full((), 0, tl.float32)
    for layer in range(0, layers):
        whole, own = tl.zeros((1, 8), tl.float32), tl.zeros((1, 8), tl.float32)
        error = tl.full((), 0, tl.float32)
        for first_image in range(0, images, BLOCK_IMAGES):
            image = first_image + tl.arange(0, BLOCK_IMAGES)
            valid = image < images
            sums = tl.zeros((BLOCK_IMAGES, 8), tl.float32)
            for first in range(0, tiles, BLOCK_TILES):
                tile = first + tl.arange(0, BLOCK_TILES)
                read = valid[:, None, None] & (tile < tiles)[None, :, None] & (part < 6)
                row = (layer * images + image)[:, None, None] * tiles + tile[None, :, None]
                sums += tl.sum(tl.load(partials + row * 8 + part, mask=read, other=0.0), 1)
            whole += tl.sum(sums, 0)[None, :]
            chosen = valid & (image == group) if EACH else valid
            own += tl.sum(tl.where(chosen[:, None], sums, 0.0), 0)[None, :]
            size = tl.load(sizes + image, mask=valid, other=0).to(tl.float32)
            off = tl.abs(_of(sums, 4) - (size - _of(sums, 5)))
            error += tl.sum(tl.where(chosen, off, 0.0), 0)
        weight = tl.sum(_of(whole, 1), 0)
        weight = tl.where(weight == 0, 1.0, weight)
        if normaliser is None:
            boxes = tl.maximum(targets - tl.sum(_of(whole, 5), 0), 1.0)
        else:
            boxes = tl.load(normaliser).to(tl.float32)
        entropy = tl.div_rn(tl.sum(_of(own, 0), 0), weight)
        distance = tl.div_rn(tl.sum(_of(own, 2), 0), boxes)
        overlap = tl.div_rn(tl.sum(_of(own, 3), 0), boxes)
        place = terms + layer * 4 * groups + group
        tl.store(place, entropy)
        tl.store(place + groups, distance)
        tl.store(place + 2 * groups, overlap)
        tl.store(place + 3 * groups, error / images)
        if group == 0:
            tl.store(norms + layer * 2, weight)
            tl.store(norms + layer * 2 + 1, boxes)
        if layer < counted_layers:
            weighted += entropy + box_weight * distance + overlap_weight * overlap
    tl.store(total + group, weighted)


@triton.jit
def _factor(total, total_image, weight, terms, terms_term, terms_image, image, number, norm):
    """What a term's slopes are multiplied with: what comes in through the total and through the term, over `norm`."""
    found = tl.full((), 0, tl.float32)
    if total is not None:
        found += weight * tl.load(total + image * total_image)
    if terms is not None:
        found += tl.load(terms + number * terms_term + image * terms_image)
    return tl.div_rn(found, norm)


@triton.jit
def _slopes_kernel(
    logits, by_image, by_query, by_column, columns, boxes, box_image, box_query, box_value,
    queries, owners, labels, label_stride, targets, target_row, target_value, weights, ignore, ignore_image,
    ignore_query, norms, total, total_image, class_weight, box_weight, overlap_weight, terms, terms_term, terms_image,
    grad_logits, grad_boxes, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """The gradient of the logits and boxes of a tile of queries of one image, zeros included."""
    tile, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    query = (tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    inside = query < queries
    counted = _counted(ignore, ignore_image, ignore_query, image, query, inside)
    owner, kind = _classes(owners, image, query, inside, queries, labels, label_stride, columns - 1)
    base = logits + image * by_image + query * by_query
    most, every, others, _, _ = _exponentials(
        base, counted, columns, by_column, kind, BLOCK_ROWS, BLOCK_COLUMNS
    )  # fmt: skip
    weight = tl.load(weights + kind, mask=counted, other=0.0).to(tl.float32)
    factor = _factor(total, total_image, class_weight, terms, terms_term, terms_image, image, 0, tl.load(norms))
    scale, shift = tl.div_rn(weight * factor, every), tl.where(most == -_INFINITY, 0.0, most)
    row = image * queries + query
    for first in range(0, columns, BLOCK_COLUMNS):
        column = first + tl.arange(0, BLOCK_COLUMNS)
        read = counted[:, None] & (column < columns)[None, :]
        step = column.to(tl.int64)[None, :]
        z = tl.load(base[:, None] + step * by_column, mask=read, other=0.0).to(tl.float32)
        power = tl.where(column[None, :] == kind[:, None], -others[:, None], tl.exp(z - shift[:, None]))
        found = cast(tl.where(read, scale[:, None] * power, 0.0), grad_logits.dtype.element_ty)
        tl.store(grad_logits + row[:, None] * columns + step, found, mask=inside[:, None] & (column < columns)[None, :])
    pair = counted & (owner > 0)
    px, py, pw, ph = _boxes(boxes + image * box_image + query * box_query, box_value, pair)
    tx, ty, tw, th = _boxes(targets + (owner - 1).to(tl.int64) * target_row, target_value, pair)
    _, gx, gy, gw, gh = _generalised(px, py, pw, ph, tx, ty, tw, th)
    norm = tl.load(norms + 1)
    near = _factor(total, total_image, box_weight, terms, terms_term, terms_image, image, 1, norm)
    over = _factor(total, total_image, overlap_weight, terms, terms_term, terms_image, image, 2, norm)
    there = grad_boxes + row * 4
    _store(there, near * _sign(px - tx) + over * gx, pair, inside)
    _store(there + 1, near * _sign(py - ty) + over * gy, pair, inside)
    _store(there + 2, near * _sign(pw - tw) + over * gw, pair, inside)
    _store(there + 3, near * _sign(ph - th) + over * gh, pair, inside)


@triton.jit
def _sign(value):
    return tl.where(value > 0, 1.0, tl.where(value < 0, -1.0, 0.0))


@triton.jit
def _store(place, value, pair, inside):
    tl.store(place, cast(tl.where(pair, value, 0.0), place.dtype.element_ty), mask=inside)


def _blocks(columns: int) -> dict[str, int]:
    block = min(COLUMNS, triton.next_power_of_2(columns))
    return {"BLOCK_ROWS": min(64, max(1, ELEMENTS // block)), "BLOCK_COLUMNS": block}


def _shared(
    logits: Tensor, boxes: Tensor, labels: Tensor, targets: Tensor, owners: Tensor, layer: int, weights: Tensor,
    ignore: Tensor | None,
) -> tuple[tuple[int, int], list[Any]]:  # fmt: skip
    """Grid, and the arguments that both kernels of a layer begin with."""
    images, queries, columns = logits.shape
    grid = triton.cdiv(queries, _blocks(columns)["BLOCK_ROWS"]), images
    owners = owners[layer * images * queries :]
    return grid, [
        logits, *logits.stride(), columns, boxes, *boxes.stride(), queries, owners, labels, *labels.stride(),
        targets, *targets.stride(), weights, ignore, *((0, 0) if ignore is None else ignore.stride()),
    ]  # fmt: skip


def _fake(logits, boxes, labels, targets, images, queries, placed, sizes, weights, ignore, normaliser, *rest):
    batch, total, _ = logits[0].shape
    group, layers = ((batch,) if rest[-1] else ()), len(logits)
    new = logits[0].new_empty
    return (
        new(group, dtype=torch.float32),
        new((layers, 4, *group), dtype=torch.float32),
        new(placed.shape, dtype=torch.int64),
        new((layers * batch * total + 1,), dtype=torch.int32),
        new((layers, 2), dtype=torch.float32),
    )


@runtime.operator(
    "set_loss(Tensor[] logits, Tensor[] boxes, Tensor labels, Tensor targets, Tensor images, Tensor queries, "
    "Tensor placed, SymInt[] sizes, Tensor weights, Tensor? ignore, Tensor? normaliser, int counted, float bbox, "
    "float giou, bool each_image) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake,
)
def _set_loss(
    logits: list[Tensor],
    boxes: list[Tensor],
    labels: Tensor,
    targets: Tensor,
    images: Tensor,
    queries: Tensor,
    placed: Tensor,
    sizes: list[int],
    weights: Tensor,
    ignore: Tensor | None,
    normaliser: Tensor | None,
    counted: int,
    bbox: float,
    giou: float,
    each_image: bool,
) -> tuple[Tensor, ...]:
    (batch, total_queries, columns), device = logits[0].shape, logits[0].device
    layers, pairs = placed.shape
    table = ragged(sizes, total_queries, 1, device)
    # One word more for the status.
    owners = runtime.zeros((layers * batch * total_queries + 1,), torch.int32, device)
    local = runtime.empty((layers, pairs), torch.int64, device)
    runtime.launch(
        _owners_kernel, (triton.cdiv(pairs, PAIRS), layers), images, *images.stride(), queries, *queries.stride(),
        placed, *placed.stride(), pairs, labels, *labels.stride(), len(labels), columns - 1, table.first_targets,
        owners, batch, total_queries, local, owners[-1:], BLOCK=PAIRS,
    )  # fmt: skip
    tiles = triton.cdiv(total_queries, _blocks(columns)["BLOCK_ROWS"])
    partials = runtime.empty((layers, batch, tiles, 8), torch.float32, device)
    for layer in range(layers):
        grid, shared = _shared(logits[layer], boxes[layer], labels, targets, owners, layer, weights, ignore)
        runtime.launch(_sums_kernel, grid, *shared, partials[layer], **_blocks(columns))
    group = (batch,) if each_image else ()
    total, norms = runtime.empty(group, torch.float32, device), runtime.empty((layers, 2), torch.float32, device)
    terms = runtime.empty((layers, 4, *group), torch.float32, device)
    runtime.launch(
        _finish_kernel, group or (1,), partials, layers, counted, batch, tiles, table.sizes, float(len(labels)),
        normaliser, bbox, giou, total, terms, norms, EACH=each_image, BLOCK_IMAGES=FINISH_IMAGES,
        BLOCK_TILES=FINISH_TILES, num_warps=8,
    )  # fmt: skip
    return total, terms, local, owners, norms


def _fake_slopes(total, terms, logits, boxes, *_):
    return [some.new_empty(some.shape) for some in logits], [some.new_empty(some.shape) for some in boxes]


@runtime.operator(
    "set_loss_backward(Tensor? total, Tensor? terms, Tensor[] logits, Tensor[] boxes, Tensor labels, Tensor targets, "
    "Tensor owners, Tensor norms, Tensor weights, Tensor? ignore, int counted, float bbox, float giou) "
    "-> (Tensor[], Tensor[])",
    _fake_slopes,
)
def _set_loss_backward(
    total: Tensor | None,
    terms: Tensor | None,
    logits: list[Tensor],
    boxes: list[Tensor],
    labels: Tensor,
    targets: Tensor,
    owners: Tensor,
    norms: Tensor,
    weights: Tensor,
    ignore: Tensor | None,
    counted: int,
    bbox: float,
    giou: float,
) -> tuple[list[Tensor], list[Tensor]]:
    grad_logits, grad_boxes = (
        [runtime.empty(some.shape, some.dtype, some.device) for some in every] for every in (logits, boxes)
    )
    of_total = 0 if total is None or total.ndim == 0 else total.stride(0)
    for layer, scores in enumerate(logits):
        grid, shared = _shared(scores, boxes[layer], labels, targets, owners, layer, weights, ignore)
        own, steps = (None, (0, 0)) if terms is None else (terms[layer], (*terms.stride()[1:], 0)[:2])
        coefficients = (1.0, bbox, giou) if layer < counted else (0.0, 0.0, 0.0)
        runtime.launch(
            _slopes_kernel, grid, *shared, norms[layer], total, of_total, *coefficients, own, *steps,
            grad_logits[layer], grad_boxes[layer], **_blocks(scores.shape[2]),
        )  # fmt: skip
    return grad_logits, grad_boxes


def _set_up(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, boxes, labels, targets, _, _, _, _, weights, ignore, _, *ctx.settings, _ = inputs
    _, _, local, owners, norms = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(local, owners, norms)
    ctx.save_for_backward(labels, targets, owners, norms, weights, ignore, *logits, *boxes)


def _backward(ctx: Any, total: Tensor | None, terms: Tensor | None, *_: None) -> tuple[Any, ...]:
    labels, targets, owners, norms, weights, ignore, *both = ctx.saved_tensors
    layers = len(both) // 2
    given = both[:layers], both[layers:], labels, targets, owners, norms, weights, ignore, *ctx.settings
    return *_set_loss_backward(total, terms, *given), *(None,) * 13


if runtime.REGISTERED:
    torch.library.register_autograd("cleanroom::set_loss", _backward, setup_context=_set_up)


def fused_terms(
    logits: Sequence[Tensor],
    boxes: Sequence[Tensor],
    labels: Tensor,
    targets: Tensor,
    images: Tensor,
    queries: Tensor,
    placed: Tensor,
    sizes: Sequence[int],
    weights: Tensor,
    *,
    counted: int,
    bbox: float,
    giou: float,
    ignore: Tensor | None = None,
    normaliser: Tensor | None = None,
    each_image: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The terms of every layer under given pairs, and their weighted sum; gradient to logits and boxes.

    Args:
        logits: L tensors (B, Q, C + 1), float32, float16 or bfloat16, in any memory order; no object last.
        boxes: L tensors (B, Q, 4), (cx, cy, w, h).
        labels: (G,) integer in [0, C].
        targets: (G, 4) floating, as boxes.
        images: (L, P) int64, image of each pair.
        queries: (L, P) int64, its query, in a layer and image at most once.
        placed: (L, P) int64, its row of labels and targets.
        sizes: targets of each image, B numbers of sum G.
        weights: (C + 1,) weights of the classes.
        counted: layers that have a part in the total.
        bbox, giou: weights of L1 and GIoU in it, beside 1 of the class term.
        ignore: (B, Q) bool: these queries take no part, nor do their targets in D and in the cardinality error.
        normaliser: 0-dim D; default: the targets that take part, at least 1.
        each_image: shares of the images in a last dimension B rather than their sums.

    Returns:
        Total, 0-dim; terms (L, 4): class, L1, GIoU and cardinality; float32. And (L, P) int64, the target of each pair
        within its image. A label outside [0, C] makes an assertion fail when the device comes to it.
    """
    total, terms, local, owners, _ = _set_loss(
        list(logits), list(boxes), labels, targets, images, queries, placed, list(sizes), weights, ignore, normaliser,
        counted, float(bbox), float(giou), each_image,
    )  # fmt: skip
    torch._assert_async(owners[-1] == 0, f"labels must be in [0, {logits[0].shape[2] - 1}]")
    return total, terms, local
