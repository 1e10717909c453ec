"""Batches of assignment problems on SciPy's path; `tests/kernels/test_assignment.py` holds the kernels against it."""

import pytest
import torch

from cleanroom.assign.linear_sum_assignment import INFEASIBLE, INVALID, SOLVED, linear_sum_assignment

COST = torch.tensor([[[4.0, 1, 3], [2, 0, 5], [3, 2, 2]], [[1.0, 2, 3], [3, 1, 2], [2, 3, 1]]])


def solved(cost, sizes=None, **settings):
    return linear_sum_assignment(cost, sizes, path="scipy", **settings)


def test_the_cheapest_and_the_dearest_assignment():
    assert solved(COST).columns.tolist() == [[1, 0, 2], [0, 1, 2]]
    assert solved(COST, maximize=True).columns.tolist() == [[0, 2, 1], [2, 0, 1]]


@pytest.mark.parametrize("sizes", [torch.tensor([1, 2]), [1, 2], torch.tensor([[1, 3], [2, 3]]), [(1, 3), (2, 3)]])
def test_rows_of_each_problem(sizes):
    """Rows alone leave each problem all columns."""
    assert solved(COST, sizes).columns.tolist() == [[1, -1, -1], [0, 1, -1]]


def test_sizes_are_cut_to_what_there_is():
    assert solved(COST, torch.tensor([[-1, 3], [9, 2]])).columns.tolist() == [[-1, -1, -1], [0, 1, -1]]


@pytest.mark.parametrize("maximize", [False, True])
def test_duals_of_wide_costs_are_exact(maximize):
    cost = torch.rand(3, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = solved(cost, maximize=maximize)
    slack = cost - found.u[:, :, None] - found.v[:, None]
    assert ((slack <= 1e-14) if maximize else (slack >= -1e-14)).all()
    assert slack.gather(2, found.columns[:, :, None]).abs().max() < 1e-14


def test_what_has_no_solution_says_so_and_leaves_the_others_alone():
    cost = COST.repeat(2, 1, 1)
    cost[0, 0] = torch.inf
    cost[1, 0, 0] = torch.nan
    cost[2, 0, 0] = -torch.inf
    found = solved(cost)
    assert found.status.tolist() == [INFEASIBLE, INVALID, INVALID, SOLVED]
    assert found.columns.tolist() == [[-1] * 3] * 3 + [[0, 1, 2]]


def test_what_may_not_be_taken_has_another_sign_for_the_dearest():
    cost = COST.repeat(2, 1, 1)
    cost[0, 0] = -torch.inf
    cost[1, 0, 0] = torch.nan
    cost[2, 0, 0] = torch.inf
    assert solved(cost, maximize=True).status.tolist() == [INFEASIBLE, INVALID, INVALID, SOLVED]
