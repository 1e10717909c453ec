"""Exact linear assignment of a batch on the device: shortest augmenting paths, one program a problem.

After Jonker and Volgenant (1987) in the form of Crouse, On implementing 2D rectangular assignment algorithms (2016).
In the kernels a *row* is an element of the shorter side of its problem and a *column* one of the longer side: where a
problem has more rows than columns, its strides are swapped as it is read, and results are swapped back as they are
written. A row searches the nearest free column over reduced costs `c - u - v`, and all matched on the way move on.

Everything that a search changes lies in registers, as vectors over the columns: the dual `v`, the matched row and that
row's dual `u` (rows need no vectors of their own), distances and predecessors. So no program reads what it wrote, and
the only memory traffic of a step is the row of costs it scans, from a cache after the first time.

Costs are read afresh in every step, and duals are float64 unless asked otherwise, for three reasons: a matching is
then optimal to 1e-15 of the costs, as SciPy's; the largest float32, which stands in for costs that are not finite, can
be added without overflow; and a step waits for reductions and loads, not for arithmetic.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from cleanroom.assign._matching_checks import INFEASIBLE, INVALID, LONGEST_SIDE
from cleanroom.kernels import runtime

_INFEASIBLE, _INVALID = tl.constexpr(INFEASIBLE), tl.constexpr(INVALID)
# A key of 64 bits: whether the column is taken, 15 bits of its rank, 16 of its number, 32 of its row.
_TAKEN = tl.constexpr(1 << 15)
_LAST_RANK = tl.constexpr((1 << 15) - 1)
_COLUMN_BITS = tl.constexpr(16)
_COLUMN_MASK = tl.constexpr((1 << 16) - 1)
_ROW_BITS = tl.constexpr(32)
_TYPES = {torch.float32: tl.float32, torch.float64: tl.float64}
_ENTRIES_A_PROGRAM = 4096
#: Numbers that change from batch to batch: a kernel compiled for one of them serves all.
_SHAPES = (
    "starts_stride", "rows_stride", "columns_stride", "row_stride", "column_stride", "most_rows", "most_columns"
)  # fmt: skip


class Problems(NamedTuple):
    """Where the problems of a batch lie in one tensor of costs.

    `starts`, `rows`, `columns`: (P,) int64 or int32 on the device, of any stride: the first element of each problem,
    counted from the first of the tensor, and its numbers of rows and columns. `most_rows` and `most_columns` are
    bounds that the host knows, also the widths of the outputs: larger numbers are cut to them, negative ones are 0.
    """

    starts: Tensor
    rows: Tensor
    columns: Tensor
    most_rows: int
    most_columns: int


class Solution(NamedTuple):
    """Optimal matchings of P problems, and what proves them.

    Over matched pairs `u + v` is the cost, over all others at most the cost (at least, when maximising), and the dual
    of what stays unmatched is 0. Padding, and problems whose status is not 0: columns -1, duals 0.
    """

    columns: Tensor
    """(P, most_rows) int64: column of each row, or -1."""
    u: Tensor
    """(P, most_rows) float64, or float32 if computed so: duals of the rows."""
    v: Tensor
    """(P, most_columns), the same of the columns."""
    status: Tensor
    """(P,) int32: `SOLVED`, `INFEASIBLE` or `INVALID` of `cleanroom.assign.linear_sum_assignment`."""


def solve(
    costs: Tensor,
    problems: Problems,
    row_stride: int,
    column_stride: int,
    *,
    maximize: bool = False,
    dtype: torch.dtype = torch.float64,
    order: str = "any",
    block: int = 0,
    warps: int = 0,
) -> Solution:
    """Solve every problem, without waiting for the device: two launches and a memset.

    Reads every cost once, by all programs at once, and then one row a step, step after step: 6 to 27 steps a problem
    of 300 queries and 6 to 100 targets of a detector in training, 33 for 300 x 100 random costs, 315 where all queries
    are alike, thousands where rows are as many as columns and alike. (Augmenting row reduction before the searches, as
    Jonker and Volgenant have it, saved at most 7% there and cost 14 to 37% elsewhere.)

    `row_stride` and `column_stride` are those of every problem, in elements. `dtype` is what distances and duals are
    computed in. `block` (a power of two, at least the longest side) and `warps` are chosen by size unless given.
    """
    count, device = problems.starts.shape[0], costs.device
    short, long = sorted((problems.most_rows, problems.most_columns))
    columns = runtime.empty((count, problems.most_rows), torch.int64, device)
    u = runtime.empty((count, problems.most_rows), dtype, device)
    v = runtime.empty((count, problems.most_columns), dtype, device)
    if not short:
        status = runtime.zeros((count,), torch.int32, device)
        return Solution(columns.fill_(-1), u.zero_(), v.zero_(), status)
    if long > LONGEST_SIDE:
        raise ValueError(f"a problem of the kernel has at most {LONGEST_SIDE} rows or columns, got {long}")
    block = block or max(32, triton.next_power_of_2(long))
    greedy = order == "any"
    rows_a_program = min(max(_ENTRIES_A_PROGRAM // block, 1), 16)

    # One memset for both: the status of every problem, then for every column the best claim that a row has to it.
    cleared = runtime.zeros((count * (1 + long * greedy),), torch.int32, device)
    status, claims = cleared[:count], cleared[count:]
    preferred = runtime.empty((count, short), torch.int32, device)
    least = runtime.empty((count, short), dtype, device)
    where = (
        *(value for part in problems[:3] for value in (part, part.stride(0))),
        row_stride,
        column_stride,
        problems.most_rows,
        problems.most_columns,
    )
    constants = {"NEGATE": maximize, "GREEDY": greedy, "TYPE": _TYPES[dtype], "BLOCK": block}
    runtime.launch(
        _row_minima,
        (count, triton.cdiv(short, rows_a_program)),
        costs,
        *where,
        least,
        preferred,
        claims,
        status,
        **constants,
        ROWS=rows_a_program,
        num_warps=4,
    )
    runtime.launch(
        _augment,
        (count,),
        costs,
        *where,
        least,
        preferred,
        claims,
        status,
        columns,
        u,
        v,
        **constants,
        # Four elements a thread: in float64 arithmetic then takes about as long as one more reduction over warps.
        num_warps=warps or min(max(block // 128, 1), 16),
    )
    return Solution(columns, u, v, status)


@triton.jit
def _orient(starts, starts_stride, rows, rows_stride, columns, columns_stride, row_stride, column_stride,
            most_rows, most_columns, problem):  # fmt: skip
    """First element, rows and columns of a problem, its strides, and whether its sides are swapped."""
    start = tl.load(starts + problem * starts_stride).to(tl.int64)
    given_rows = tl.load(rows + problem * rows_stride).to(tl.int32)
    given_columns = tl.load(columns + problem * columns_stride).to(tl.int32)
    given_rows = tl.minimum(given_rows, most_rows)
    given_columns = tl.minimum(given_columns, most_columns)
    swapped = given_rows > given_columns
    number = tl.minimum(given_rows, given_columns)
    width = tl.maximum(given_rows, given_columns)
    step = tl.where(swapped, column_stride, row_stride).to(tl.int64)
    across = tl.where(swapped, row_stride, column_stride).to(tl.int64)
    return start, number, width, step, across, swapped


@triton.jit(do_not_specialize=_SHAPES)
def _row_minima(costs, starts, starts_stride, rows, rows_stride, columns, columns_stride, row_stride, column_stride,
                most_rows, most_columns, least, preferred, claims, status,
                NEGATE: tl.constexpr, GREEDY: tl.constexpr, TYPE: tl.constexpr, BLOCK: tl.constexpr,
                ROWS: tl.constexpr):  # fmt: skip
    """Least cost of each row, its column, who claims a column first; and whether costs are valid.

    A row's least cost is a feasible dual (`v = 0`), and of the rows that want a column the first may have it: most of
    the matching is done before the first search. Reads every cost once, with as many programs as there are rows.
    """
    problem = tl.program_id(0).to(tl.int64)
    start, number, width, step, across, _ = _orient(
        starts, starts_stride, rows, rows_stride, columns, columns_stride, row_stride, column_stride,
        most_rows, most_columns, problem)  # fmt: skip
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    real_row = row < number
    real = real_row[:, None] & (column < width)[None, :]
    places = costs + start + row[:, None] * step + column[None, :] * across
    cost = tl.load(places, mask=real, other=float("-inf") if NEGATE else float("inf")).to(TYPE)
    cost = -cost if NEGATE else cost
    wrong = (cost != cost) | (cost == float("-inf"))
    cost = tl.where(wrong, float("inf"), cost)
    value = tl.min(cost, axis=1)
    at = tl.min(tl.where(cost == value[:, None], column[None, :], BLOCK), axis=1)
    verdict = tl.where(
        tl.max(wrong.to(tl.int32), axis=1) > 0, _INVALID, tl.where(value == float("inf"), _INFEASIBLE, 0)
    )
    tl.atomic_max(status + problem + row * 0, verdict, mask=real_row & (verdict > 0))
    if GREEDY:
        short = tl.minimum(most_rows, most_columns)
        long = tl.maximum(most_rows, most_columns)
        tl.store(least + problem * short + row, value, mask=real_row)
        tl.store(preferred + problem * short + row, at, mask=real_row)
        tl.atomic_max(claims + problem * long + at, number - row, mask=real_row & (at < width))


@triton.jit
def _nearest(distance, reachable, taken, rank, column, row_of):
    """Of the reachable columns at least distance a free one, else one taken, then the least rank: the distance, and
    that column's rank, itself and its row.

    All but the distance come out of one minimum of packed keys: a reduction over warps is most of what a step costs.
    """
    lowest = tl.min(tl.where(reachable, distance, float("inf")), axis=0)
    tie = (tl.where(taken, _TAKEN, 0) | rank).to(tl.uint64) << _COLUMN_BITS | column.to(tl.uint64)
    key = tie << _ROW_BITS | row_of.to(tl.uint32).to(tl.uint64)
    key = tl.min(tl.where(reachable & (distance == lowest), key, 0xFFFFFFFFFFFFFFFF), axis=0)
    found_column = (key >> _ROW_BITS).to(tl.int32) & _COLUMN_MASK
    return lowest, (key >> _ROW_BITS >> _COLUMN_BITS).to(tl.int32) & _LAST_RANK, found_column, key.to(tl.int32)


@triton.jit(do_not_specialize=_SHAPES)
def _augment(costs, starts, starts_stride, rows, rows_stride, columns, columns_stride, row_stride, column_stride,
             most_rows, most_columns, least, preferred, claims, status, found, found_u, found_v,
             NEGATE: tl.constexpr, GREEDY: tl.constexpr, TYPE: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Match the rows that are left, one search each; then write matching and duals.

    A step of a search: `distance = min(distance, lowest + c - u - v)` over one row of costs, then the nearest column
    that was not visited. A free one ends the search, a taken one continues with its row. Duals of what was visited
    change by `lowest - distance`. Steps are at most the rows matched before, plus one.

    SciPy's order: rows in turn without the claims above; columns in the order of a list which begins reversed, and
    whose last entry moves to where one is taken out; of equal distances the last free column, else the first taken.
    """
    problem = tl.program_id(0).to(tl.int64)
    start, number, width, step, across, swapped = _orient(
        starts, starts_stride, rows, rows_stride, columns, columns_stride, row_stride, column_stride,
        most_rows, most_columns, problem)  # fmt: skip
    column = tl.arange(0, BLOCK)
    failed = tl.load(status + problem)
    number, width = tl.where(failed > 0, 0, number), tl.where(failed > 0, 0, width)
    inside = column < width
    v = tl.zeros((BLOCK,), TYPE)
    row_of = tl.full((BLOCK,), -1, tl.int32)
    u_of = tl.zeros((BLOCK,), TYPE)
    waiting = column < number
    if GREEDY:
        short = tl.minimum(most_rows, most_columns)
        long = tl.maximum(most_rows, most_columns)
        claim = tl.load(claims + problem * long + column, mask=inside, other=0)
        row_of = tl.where(claim > 0, number - claim, -1)
        u_of = tl.load(least + problem * short + row_of, mask=claim > 0, other=0.0)
        wanted = tl.load(preferred + problem * short + column, mask=waiting, other=0)
        granted = tl.load(claims + problem * long + wanted, mask=waiting, other=0)
        waiting = waiting & (granted != number - column)
    left = tl.sum(waiting.to(tl.int32), axis=0)

    while left > 0:
        row = tl.min(tl.where(waiting, column, BLOCK), axis=0)
        waiting = waiting & (column != row)
        left -= 1
        distance = tl.full((BLOCK,), float("inf"), TYPE)
        previous = tl.full((BLOCK,), -1, tl.int32)
        unvisited = inside
        place = width - 1 - column
        listed = width
        taken = row_of >= 0
        lowest = tl.full((), 0.0, TYPE)
        u = tl.full((), 0.0, TYPE)
        from_row = row
        from_column = tl.full((), -1, tl.int32)
        sink = tl.full((), -1, tl.int32)
        while sink == -1:
            cost = tl.load(costs + start + from_row * step + column * across, mask=unvisited, other=0.0).to(TYPE)
            cost = -cost if NEGATE else cost
            reduced = lowest + cost - u - v
            nearer = unvisited & (reduced < distance)
            distance = tl.where(nearer, reduced, distance)
            previous = tl.where(nearer, from_column, previous)
            rank = column if GREEDY else tl.where(taken, place, _LAST_RANK - place)
            lowest, found_rank, from_column, from_row = _nearest(distance, unvisited, taken, rank, column, row_of)
            chosen = column == from_column
            unvisited = unvisited & ~chosen
            u = tl.sum(tl.where(chosen, u_of, 0.0), axis=0)
            if not GREEDY:
                # A column that was free ends the search: its place does not matter any more.
                listed -= 1
                place = tl.where(place == listed, found_rank, place)
            sink = tl.where(lowest == float("inf"), -2, tl.where(from_row < 0, from_column, -1))

        if sink == -2:
            failed = tl.full((), _INFEASIBLE, tl.int32)
            left = tl.full((), 0, tl.int32)
        change = tl.where(inside & ~unvisited & (sink >= 0), lowest - distance, 0.0)
        u_of += change
        v -= change
        while sink >= 0:
            here = column == sink
            sink = tl.sum(tl.where(here, previous, 0), axis=0)
            there = column == sink
            first = sink < 0
            moved = tl.where(first, row, tl.sum(tl.where(there, row_of, 0), axis=0))
            moved_u = tl.where(first, lowest, tl.sum(tl.where(there, u_of, 0.0), axis=0))
            row_of = tl.where(here, moved, row_of)
            u_of = tl.where(here, moved_u, u_of)

    # The elements written by row and those written by column, padding among them, are not the same ones.
    number, width = tl.where(failed > 0, 0, number), tl.where(failed > 0, 0, width)
    matched = (row_of >= 0) & (column < width)
    blank = column >= number
    v = tl.where(column < width, -v if NEGATE else v, 0.0)
    u_of = -u_of if NEGATE else u_of
    found += problem * most_rows
    found_u += problem * most_rows
    found_v += problem * most_columns
    tl.store(status + problem, failed)
    if swapped:
        tl.store(found + column, tl.where(matched, row_of, -1).to(tl.int64), mask=column < most_rows)
        tl.store(found_u + column, v, mask=column < most_rows)
        tl.store(found_v + row_of, u_of, mask=matched)
        tl.store(found_v + column, tl.zeros((BLOCK,), TYPE), mask=blank & (column < most_columns))
    else:
        tl.store(found + row_of, column.to(tl.int64), mask=matched)
        tl.store(found + column, tl.full((BLOCK,), -1, tl.int64), mask=blank & (column < most_rows))
        tl.store(found_u + row_of, u_of, mask=matched)
        tl.store(found_u + column, tl.zeros((BLOCK,), TYPE), mask=blank & (column < most_rows))
        tl.store(found_v + column, v, mask=column < most_columns)
