"""The adapter of torch-linear-assignment: known optima, problems of different sizes, and what it makes of padding."""

import pytest
import torch

SPEC = "torch_linear_assignment==0.1.0"
COST = torch.tensor([[8.0, 4, 7], [5, 2, 3], [9, 6, 7], [9, 4, 8]])

pytestmark = pytest.mark.oracle


def totals(columns, cost):
    """Total of the chosen costs of each problem."""
    return [sum(cost[p, t, q].item() for t, q in enumerate(row) if q >= 0) for p, row in enumerate(columns.tolist())]


@pytest.mark.parametrize(("rows", "best"), [(1, 4), (2, 7), (3, 16), (4, 15)])
def test_known_optima(oracle, rows, best):
    cost = COST[None, :rows]
    answer = oracle(SPEC).bind("linear_sum_assignment", {"cost": cost}, {"sizes": [[rows, 3]]})
    assert totals(answer["outputs"]["columns"], cost) == [best]


def test_problems_of_their_own_size(oracle):
    cost = torch.stack((COST, COST, COST))
    cost[1, 1:], cost[2, :, 2:] = torch.nan, torch.nan
    sizes = [[4, 3], [1, 3], [4, 2]]
    columns = oracle(SPEC).bind("linear_sum_assignment", {"cost": cost}, {"sizes": sizes})["outputs"]["columns"]
    assert totals(columns, cost) == [15, 4, 9]
    assert (columns >= 0).sum(1).tolist() == [3, 1, 2]


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0)])
def test_nothing_to_assign(oracle, shape):
    sizes = [list(shape[1:])] * shape[0]
    answer = oracle(SPEC).bind("linear_sum_assignment", {"cost": torch.zeros(shape)}, {"sizes": sizes})
    assert answer["outputs"]["columns"].tolist() == [[-1] * shape[1]] * shape[0]
