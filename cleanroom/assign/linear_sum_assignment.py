"""Exact linear assignment of a batch of problems of different sizes, with the duals that prove it.

SciPy solves on the host, `cleanroom.kernels.assignment` on the device. After Crouse, On implementing 2D rectangular
assignment algorithms, 2016.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cleanroom.assign._matching_checks import INFEASIBLE, INVALID, LONGEST_SIDE, ORDERS, SOLVED, SOLVERS
from cleanroom.assign.hungarian import in_threads, scipy_solver
from cleanroom.kernels import runtime

if runtime.AVAILABLE:
    from cleanroom.kernels.assignment import Problems, solve
    from cleanroom.kernels.host_numbers import on_device


class LinearSumAssignment(NamedTuple):
    """Optimal assignments of P problems of at most (T, Q), on the device of the costs.

    Over assigned pairs `u + v` is the cost, over all others at most the cost (at least, when maximising), and the dual
    of a row or column that stays free is 0: so no other assignment is better. Padding, and problems whose status is
    not `SOLVED`, hold -1 in `columns` and 0 in `u` and `v`.
    """

    columns: Tensor
    """(P, T) int64: column of each row, -1 where it has none."""
    u: Tensor
    """(P, T): dual of each row."""
    v: Tensor
    """(P, Q): dual of each column."""
    status: Tensor
    """(P,) int32: `SOLVED`, `INFEASIBLE` or `INVALID`."""


def linear_sum_assignment(
    cost: Tensor,
    sizes: Tensor | Sequence[int] | Sequence[tuple[int, int]] | None = None,
    *,
    maximize: bool = False,
    dtype: torch.dtype = torch.float64,
    order: str = "any",
    duals: bool = True,
    workers: int | None = None,
    path: str = "auto",
) -> LinearSumAssignment:
    """Assign in every problem as many rows to columns of their own as there are of the fewer, at least total cost.

    Args:
        cost: (P, T, Q) floating, of any strides. +inf (when maximising -inf) forbids a pair.
        sizes: rows of each problem (P,), which then has all Q columns, or rows and columns (P, 2); integers on the
            host, or int32 or int64 on the device of the costs. What lies beyond is padding and never read; larger
            numbers than T and Q are cut to them. None: every problem is whole.
        maximize: the greatest total instead.
        dtype: float64, or float32, in which duals are returned and kernels add. Of a float32 sum of n costs the last
            bits are rounded n times, so that assignments that differ by as little are taken for equal.
        order: which of several optima is returned. "scipy": SciPy's, on every path where `dtype` is float64 (the
            same arithmetic in the same order; tested on problems full of ties). "any": on the device whichever is
            found in fewer steps.
        duals: False: `u` and `v` are left 0 on SciPy's path, which makes them after the solution and takes as long
            again; the kernels have them anyway.
        workers: threads of SciPy's path; default `torch.get_num_threads()` where the problems are large enough.
        path: "scipy"; "triton", at most 4096 rows and columns, without waiting for the device; "auto" takes the
            second on CUDA where Triton is installed.

    Nothing is raised for values: see `status`. No gradient.

    Raises:
        ValueError: shapes, sizes or settings other than the above.
        TypeError: dtypes other than the above.
        ImportError: SciPy, the extra `matchers`, is missing on its path.
        RuntimeError: `path` is "triton" where kernels cannot run.
    """
    _check(cost, sizes, dtype, order, workers)
    kernels = _takes_kernels(path, cost)
    if sizes is None or isinstance(sizes, Tensor):
        given, numbers = sizes, []
    else:
        given, numbers = None, [int(n) for size in sizes for n in (size if isinstance(size, Sequence) else (size,))]
    workers = 0 if workers is None else workers
    return LinearSumAssignment(
        *_assign(cost.detach(), given, numbers, maximize, dtype == torch.float64, order, duals, workers, kernels)
    )


def _check(cost: Tensor, sizes: object, dtype: torch.dtype, order: str, workers: int | None) -> None:
    if cost.ndim != 3:
        raise ValueError(f"cost must have shape (P, T, Q), got {tuple(cost.shape)}")
    if not cost.is_floating_point():
        raise TypeError(f"cost must be floating, got {cost.dtype}")
    if dtype not in (torch.float32, torch.float64):
        raise TypeError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
    if order not in ORDERS:
        raise ValueError(f"order must be one of {ORDERS}, got {order!r}")
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be at least 1, got {workers}")
    if isinstance(sizes, Tensor):
        if sizes.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"sizes must be int64 or int32, got {sizes.dtype}")
        if sizes.shape not in ((len(cost),), (len(cost), 2)):
            raise ValueError(f"sizes must have shape ({len(cost)},) or ({len(cost)}, 2), got {tuple(sizes.shape)}")
    elif sizes is not None and len(sizes) != len(cost):
        raise ValueError(f"sizes must be of {len(cost)} problems, got {len(sizes)}")


def _takes_kernels(path: str, cost: Tensor) -> bool:
    if path not in SOLVERS:
        raise ValueError(f"path must be one of {SOLVERS}, got {path!r}")
    able = runtime.AVAILABLE and (runtime.INTERPRETED or cost.device.type == "cuda")
    if path == "triton" and not able:
        raise RuntimeError(f"path 'triton' cannot run here: {runtime.why_not(cost)}")
    return path == "triton" or (
        path == "auto" and able and cost.device.type == "cuda" and max(cost.shape[1:]) <= LONGEST_SIDE
    )


def _fake(cost, sizes, numbers, maximize, double, *_):
    count, rows, columns = cost.shape
    dtype = torch.float64 if double else torch.float32
    return (
        cost.new_empty((count, rows), dtype=torch.int64),
        cost.new_empty((count, rows), dtype=dtype),
        cost.new_empty((count, columns), dtype=dtype),
        cost.new_empty((count,), dtype=torch.int32),
    )


@runtime.operator(
    "linear_sum_assignment(Tensor cost, Tensor? sizes, SymInt[] numbers, bool maximize, bool double, str order,"
    " bool duals, int workers, bool kernels) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake,
)
def _assign(
    cost: Tensor,
    sizes: Tensor | None,
    numbers: list[int],
    maximize: bool,
    double: bool,
    order: str,
    duals: bool,
    workers: int,
    kernels: bool,
) -> tuple[Tensor, ...]:
    dtype = torch.float64 if double else torch.float32
    count, rows, columns = cost.shape
    if not kernels:
        sizes = torch.tensor(numbers) if numbers else sizes
        sizes = torch.tensor([rows]).expand(count) if sizes is None else sizes.cpu()
        if sizes.ndim == 1 and len(sizes) == count:
            sizes = torch.stack([sizes, torch.full_like(sizes, columns)], 1)
        sizes = sizes.view(count, 2).clamp(min=0).minimum(torch.tensor([rows, columns]))
        how = {"maximize": maximize, "duals": duals, "dtype": dtype, "workers": workers or None}
        return _assign_on_host(cost, sizes.tolist(), **how)
    if numbers:
        sizes = on_device(numbers, cost.device).view(count, -1)
    whole = [runtime.empty((count,), torch.int64, cost.device).fill_(side) for side in (rows, columns)]
    some = [] if sizes is None else sizes.view(count, -1).unbind(1)
    starts = torch.arange(count, device=cost.device) * cost.stride(0)
    problems = Problems(starts, *some, *whole[len(some) :], rows, columns)
    return tuple(solve(cost, problems, *cost.stride()[1:], maximize=maximize, dtype=dtype, order=order))


def _assign_on_host(
    cost: Tensor,
    sizes: Sequence[Sequence[int]],
    *,
    maximize: bool,
    duals: bool,
    dtype: torch.dtype,
    workers: int | None,
) -> tuple[Tensor, ...]:
    solver = scipy_solver()
    # SciPy converts to float64, a problem at a time; NumPy has no bfloat16.
    costs = cost.cpu().to(torch.promote_types(cost.dtype, torch.float32)).numpy()
    count, rows, columns = costs.shape
    found = np.full((count, rows), -1)
    u, v = np.zeros((count, rows)), np.zeros((count, columns))
    status = np.full(count, SOLVED, dtype=np.int32)

    def solve_one(problem: int) -> None:
        height, width = sizes[problem]
        block = costs[problem, :height, :width]
        try:
            some, others = solver(block, maximize)
        except ValueError:
            forbidden = -np.inf if maximize else np.inf
            wrong = np.isnan(block).any() or (block == -forbidden).any()
            status[problem] = INVALID if wrong else INFEASIBLE
            return
        found[problem, some] = others
        if duals:
            sign = -1 if maximize else 1
            exact = sign * block.astype(np.float64)
            u[problem, :height], v[problem, :width] = (sign * dual for dual in _duals(exact, some, others))

    in_threads(solve_one, range(count), costs.size, workers)
    results = (torch.from_numpy(part) for part in (found, u, v, status))
    found, u, v, status = (part.to(cost.device) for part in results)
    return found, u.to(dtype), v.to(dtype), status


def _duals(costs: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Duals of an optimal assignment: shortest distances over the pairs that it could exchange (Bellman and Ford)."""
    if costs.shape[0] > costs.shape[1]:
        v, u = _duals(costs.T, columns, rows)
        return u, v
    v = np.zeros(costs.shape[1])
    assigned = costs[rows, columns]
    for _ in rows:
        nearer = v.copy()
        nearer[columns] = np.minimum(v, (costs - (assigned - v[columns])[:, None]).min(0))[columns]
        if np.array_equal(nearer, v):
            break
        v = nearer
    return assigned - v[columns], v
