"""The assignment kernels against SciPy, by their own certificate, and against faults planted in them."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment as scipy_assignment
from torch._subclasses.fake_tensor import FakeTensorMode

from cleanroom.assign.linear_sum_assignment import INFEASIBLE, INVALID, ORDERS, SOLVED, linear_sum_assignment
from cleanroom.assign.linear_sum_assignment import _takes_kernels as takes_kernels
from cleanroom.kernels import assignment
from tests.kernels.conftest import DEVICE, programs_reordered

NAN, INF = float("nan"), float("inf")
# An unsolvable problem subtracts infinities in elements that are then masked out; NumPy tells of it.
pytestmark = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
EITHER = pytest.mark.parametrize("order", ORDERS)
PRECISIONS = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])


def judge(cost, sizes, found, *, maximize=False, scipy_order=False):
    """Assert of every problem: SciPy's total, proof by duals, blank padding; in SciPy's order its very assignment."""
    tolerance = 1e-4 if found.u.dtype == torch.float32 else 1e-9
    for problem, (rows, columns) in enumerate(sizes):
        block = cost[problem, :rows, :columns].double().numpy()
        block = -block if maximize else block
        taken, u, v = (part[problem].cpu().double().numpy() for part in found[:3])
        assert (taken[rows:] == -1).all()
        assert (u[rows:] == 0).all()
        assert (v[columns:] == 0).all()
        try:
            some, others = scipy_assignment(block)
            expected = SOLVED
        except ValueError as error:
            expected = INFEASIBLE if "infeasible" in str(error) else INVALID
        assert found.status[problem] == expected
        if expected != SOLVED:
            assert (taken == -1).all()
            assert not u.any()
            assert not v.any()
            continue
        own_rows = np.flatnonzero(taken >= 0)
        own_columns = taken[own_rows].astype(int)
        assert len(own_rows) == len(set(own_columns)) == min(rows, columns)
        assert block[own_rows, own_columns].sum() == pytest.approx(block[some, others].sum(), abs=tolerance)
        u, v = (-u, -v) if maximize else (u, v)
        slack = block - u[:rows, None] - v[None, :columns]
        assert (slack >= -tolerance).all()
        assert np.abs(slack[own_rows, own_columns]).max(initial=0) <= tolerance
        assert u.sum() + v.sum() == pytest.approx(block[some, others].sum(), abs=10 * tolerance)
        if scipy_order:
            assert np.array_equal(own_rows, some)
            assert np.array_equal(own_columns, others)


def check(cost, sizes=None, **given):
    """Solve on the device, judge, and give what was found."""
    sizes = [cost.shape[1:]] * len(cost) if sizes is None else sizes
    found = linear_sum_assignment(cost.to(DEVICE), sizes, path="triton", **given)
    judge(cost, sizes, found, maximize=given.get("maximize", False), scipy_order=given.get("order") == "scipy")
    return found


def padded(blocks, shape):
    """Problems in a tensor of NaN, and their sizes."""
    cost = torch.full((len(blocks), *shape), NAN)
    for place, block in enumerate(blocks):
        cost[place, : block.shape[0], : block.shape[1]] = block
    return cost, [tuple(block.shape) for block in blocks]


def random(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def like_detr(rows, columns, seed=0):
    """Few columns are near to many rows, as in a detector on its way."""
    draw = torch.Generator().manual_seed(seed)
    some, others = torch.rand(rows, 1, 2, generator=draw), torch.rand(1, columns, 2, generator=draw) * 0.3
    return 5 * (some - others).abs().sum(-1) - torch.rand(rows, columns, generator=draw)


def ties(rows, columns, kinds=2, seed=0):
    return torch.randint(0, kinds, (rows, columns), generator=torch.Generator().manual_seed(seed)).float()


@st.composite
def batches(draw):
    """Ragged batches of random, tied and partly forbidden costs, NaN around them."""
    shape = draw(st.tuples(st.integers(1, 7), st.integers(1, 7)))
    blocks = []
    for _ in range(draw(st.integers(1, 3))):
        rows, columns = (draw(st.integers(0, most)) for most in shape)
        seed, kind = draw(st.integers(0, 2**16)), draw(st.sampled_from([random, like_detr, ties, ties, "inf"]))
        block = ties(rows, columns, 6, seed) if kind == "inf" else kind(rows, columns, seed=seed)
        blocks.append(block.masked_fill(block > 3, INF) if kind == "inf" else block)
    return padded(blocks, shape)


# Against SciPy


@settings(max_examples=25, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(batches(), st.sampled_from(ORDERS), st.booleans(), st.booleans())
def test_drawn_batches(batch, order, maximize, double):
    cost, sizes = batch
    cost = -cost if maximize else cost
    check(cost, sizes, order=order, maximize=maximize, dtype=torch.float64 if double else torch.float32)


FORBIDDEN = random(3, 4).masked_fill(torch.eye(3, 4) > 0, INF)
EDGE_CASES = {
    "one target": random(1, 9),
    "one query": random(9, 1),
    "one of each": random(1, 1),
    "fewer queries than targets": random(8, 3),
    "as many": like_detr(7, 7),
    "all equal": torch.full((5, 6), 0.1),
    "zeros of both signs": torch.tensor([[0.0, -0.0, 0.0], [-0.0, 0.0, -0.0]]),
    "ties": ties(7, 8),
    "ties, more rows": ties(8, 7),
    "no rows": random(0, 4),
    "no columns": random(4, 0),
    "forbidden pairs": FORBIDDEN,
    "a row is forbidden": random(3, 4).masked_fill(torch.arange(3)[:, None] == 1, INF),
    "a column is forbidden": random(4, 3).masked_fill(torch.arange(3) == 1, INF),
    "two rows, one column": torch.tensor([[1.0, INF, INF], [2.0, INF, INF], [0.0, 1.0, 2.0]]),
    "NaN": random(3, 4).masked_fill(torch.eye(3, 4) > 0, NAN),
    "minus infinity": random(3, 4).masked_fill(torch.eye(3, 4) > 0, -INF),
    "NaN and a row that is forbidden": torch.tensor([[INF, INF], [NAN, 0.0]]),
    "subnormal": torch.tensor([[1e-42, 2e-42], [1e-42, 3e-42]]),
}


@EITHER
@PRECISIONS
def test_edge_cases(order, dtype):
    """All in one batch: what is wrong with one does not touch another."""
    cost, sizes = padded(list(EDGE_CASES.values()), (9, 9))
    found = check(cost, sizes, order=order, dtype=dtype)
    status = dict(zip(EDGE_CASES, found.status.tolist(), strict=True))
    assert {name for name, state in status.items() if state == INVALID} == {
        "NaN", "minus infinity", "NaN and a row that is forbidden"
    }  # fmt: skip
    assert {name for name, state in status.items() if state == INFEASIBLE} == {
        "a row is forbidden", "a column is forbidden", "two rows, one column"
    }  # fmt: skip


def test_scipy_finds_the_same_among_many_optima():
    blocks = [ties(rows, columns, kinds, rows) for rows, columns, kinds in ((9, 9, 2), (6, 9, 2), (9, 5, 3), (8, 8, 1))]
    cost, sizes = padded(blocks, (9, 9))
    check(cost / 3, sizes, order="scipy")
    check(cost / 3, sizes, order="scipy", maximize=True)


def test_largest_floats_do_not_overflow():
    """What stands in for costs that are not finite is matched last; where it must be, sums with it stay finite."""
    cost = random(3, 4)[None]
    cost[0, :, 1] = torch.finfo(torch.float32).max
    assert 1 not in check(cost).columns
    cost[0, :, 2] = torch.finfo(torch.float32).max
    found = linear_sum_assignment(cost, path="triton")
    assert found.status == SOLVED
    assert len(set(found.columns[0].tolist()) & {0, 1, 2, 3}) == 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_of_costs(dtype):
    check(torch.stack([random(4, 6), like_detr(4, 6)]).to(dtype))


def test_sizes():
    cost = torch.stack([random(4, 6, seed) for seed in range(3)])
    both = torch.tensor([[2, 6], [4, 3], [0, 5]])
    for sizes, pairs in (
        (None, [(4, 6)] * 3),
        ([2, 4, 0], [(2, 6), (4, 6), (0, 6)]),
        (torch.tensor([2, 4, 0], dtype=torch.int32), [(2, 6), (4, 6), (0, 6)]),
        (both, both.tolist()),
        (both.tolist(), both.tolist()),
        ([99, -1, 4], [(4, 6), (0, 6), (4, 6)]),
    ):
        for path in ("triton", "scipy"):
            judge(cost, pairs, linear_sum_assignment(cost, sizes, path=path))


def test_host_gives_the_same_certificate():
    cost, sizes = padded(list(EDGE_CASES.values()), (9, 9))
    for maximize in (False, True):
        given = -cost if maximize else cost
        judge(given, sizes, linear_sum_assignment(given, sizes, maximize=maximize), maximize=maximize, scipy_order=True)
    judge(cost, sizes, linear_sum_assignment(cost, sizes, dtype=torch.float32, workers=3), scipy_order=True)


def test_nothing_to_do():
    for shape in ((0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0, 0)):
        cost = torch.empty(shape)
        for path in ("triton", "scipy"):
            found = linear_sum_assignment(cost, path=path)
            assert [tuple(part.shape) for part in found] == [shape[:2], shape[:2], (shape[0], shape[2]), shape[:1]]
            assert (found.columns == -1).all()
            assert not any(part.any() for part in found[1:])


def test_what_is_rejected():
    cost = torch.zeros(2, 3, 4)
    for error, match, change in (
        (ValueError, "cost must have shape", {"cost": cost[0]}),
        (TypeError, "cost must be floating", {"cost": cost.int()}),
        (ValueError, "sizes must be of 2", {"sizes": [1]}),
        (ValueError, "sizes must have shape", {"sizes": torch.ones(3, dtype=torch.int64)}),
        (TypeError, "sizes must be int64", {"sizes": torch.ones(2)}),
        (TypeError, "dtype must be", {"dtype": torch.float16}),
        (ValueError, "order must be", {"order": "first"}),
        (ValueError, "workers must be", {"workers": 0}),
        (ValueError, "path must be", {"path": "static"}),
    ):
        with pytest.raises(error, match=match):
            linear_sum_assignment(**{"cost": cost} | change)
    with pytest.raises(ValueError, match="at most 4096"):
        linear_sum_assignment(torch.zeros(1, 1, 4097), path="triton")


# Sizes and layouts


def given_problems(cost, sizes):
    """The inputs of `solve` for a padded batch."""
    count, rows, columns = cost.shape
    heights, widths = torch.tensor(sizes, device=DEVICE).unbind(1)
    starts = torch.arange(count, device=DEVICE) * cost.stride(0)
    return cost, assignment.Problems(starts, heights, widths, rows, columns), *cost.stride()[1:]


BATCH = padded([ties(8, 8), random(5, 8), random(7, 3), like_detr(6, 7), ties(6, 8, 3)], (8, 8))


@EITHER
def test_negative_numbers_are_none(order):
    """Numbers lie on the device, so that nobody else sees them."""
    cost, sizes = BATCH
    sizes = [(-1, 8), sizes[1], (7, -2), (-3, -1), sizes[4]]
    found = assignment.solve(*given_problems(cost.to(DEVICE), sizes), order=order)
    judge(cost, [(max(rows, 0), max(columns, 0)) for rows, columns in sizes], found, scipy_order=order == "scipy")


@EITHER
@pytest.mark.parametrize(("block", "entries"), [(8, 8), (16, 64), (64, 4096)])
def test_block_sizes(monkeypatch, order, block, entries):
    """8 rows and columns: vectors as wide and wider; one row a program, some, and more than there are."""
    monkeypatch.setattr(assignment, "_ENTRIES_A_PROGRAM", entries)
    cost, sizes = BATCH
    found = assignment.solve(*given_problems(cost.to(DEVICE), sizes), order=order, block=block)
    judge(cost, sizes, found, scipy_order=order == "scipy")


def within(tensor):
    """The same values as a slice out of a larger tensor of NaN."""
    larger = torch.full([size + 3 for size in tensor.shape], NAN, dtype=tensor.dtype)
    return larger[tuple(slice(1, 1 + size) for size in tensor.shape)].copy_(tensor)


@pytest.mark.parametrize("change", [within, lambda t: t.mT.contiguous().mT, lambda t: within(t.mT).mT])
def test_layouts(change):
    cost, sizes = BATCH
    check(change(cost), sizes)


def test_expanded_costs():
    check(random(1, 5).expand(2, 4, 5))


# Memory and order


@EITHER
def test_every_output_is_written(poisoned, order):
    cost, sizes = BATCH
    check(cost, [*sizes[:2], (0, 5), *sizes[3:]], order=order)


@EITHER
def test_order_of_programs_and_repeats(monkeypatch, order):
    monkeypatch.setattr(assignment, "_ENTRIES_A_PROGRAM", 32)
    cost, sizes = BATCH
    first, again = (linear_sum_assignment(cost, sizes, order=order, path="triton") for _ in range(2))
    with programs_reordered(lambda natural: natural[::-1]):
        backwards = linear_sum_assignment(cost, sizes, order=order, path="triton")
    for other in (again, backwards):
        assert all(map(torch.equal, first, other))


def test_nothing_of_rows_times_columns_is_allocated(allocations):
    linear_sum_assignment(torch.rand(2, 9, 11), path="triton")
    assert allocations
    assert max(map(torch.Size.numel, map(torch.Size, allocations))) <= 2 * (11 + 1)


def test_the_longest_searches():
    """Costs i * j make every search pass all rows that were matched before."""
    side = torch.arange(1, 9).float()
    check((side[:, None] * side)[None], order="scipy")
    check((side[:, None] * side)[None])


# What PyTorch makes of the operator


@pytest.mark.parametrize("sizes", [None, [2, 3], torch.tensor([[2, 4], [3, 1]])])
def test_compiles_as_one_graph(sizes):
    def total(cost):
        found = linear_sum_assignment(cost, sizes, path="triton")
        return found.columns + 1, found.u * 2

    cost = torch.stack([random(3, 4), ties(3, 4)])
    compiled = torch.compile(total, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, total(cost), compiled(cost)))


def test_operator_is_well_formed():
    cost = random(3, 4)[None].requires_grad_()
    for kernels in (False, True):
        given = cost.detach(), None, [2], False, True, "any", True, 0, kernels
        torch.library.opcheck(torch.ops.cleanroom.linear_sum_assignment.default, given)
    assert not linear_sum_assignment(cost, path="triton").u.requires_grad


def test_duals_on_the_host_are_made_when_asked_for():
    cost = random(3, 4)[None]
    with_proof, without = (linear_sum_assignment(cost, duals=duals, path="scipy") for duals in (True, False))
    assert torch.equal(with_proof.columns, without.columns)
    assert with_proof.u.any()
    assert not without.u.any()
    assert not without.v.any()


def test_is_traced_without_a_device():
    """And takes kernels there, up to the size that they solve."""
    with FakeTensorMode(), torch.device("cuda"):
        assert takes_kernels("auto", torch.empty(2, 3, 4096, dtype=torch.float64))
        assert not takes_kernels("auto", torch.empty(2, 3, 4097))
        found = linear_sum_assignment(torch.empty(2, 3, 4), [3, 1])
    assert found.columns.device.type == "cuda"
    assert [tuple(part.shape) for part in found] == [(2, 3), (2, 3), (2, 4), (2,)]


# Planted faults

FAULTS = {
    "mask beyond the last column": [("inside = column < width", "inside = column <= width")],
    "mask short of the last column": [("inside = column < width", "inside = column < width - 1")],
    "mask beyond the last column of minima": [("(column < width)[None, :]", "(column <= width)[None, :]")],
    "wrong direction of ties": [("_LAST_RANK - place", "place")],
    "wrong first of equals": [("tl.where(taken, _TAKEN, 0)", "tl.where(taken, 0, _TAKEN)")],
    "unwritten columns": [("-1, tl.int64), mask=blank & (column < most_rows)", "-1, tl.int64), mask=column < 0")],
    "lost status": [("mask=real_row & (verdict > 0)", "mask=real_row & (verdict > 9)")],
    "lost comparison of claims": [("tl.atomic_max(claims", "tl.store(claims")],
    "duals stay": [("        v -= change\n", "")],
    "sign of maximum": [("-v if NEGATE else v", "v")],
}  # fmt: skip


def answers(module, monkeypatch, order):
    """What a module finds with one row a program, uninitialised memory poisoned; forwards and backwards."""
    monkeypatch.setattr(module, "_ENTRIES_A_PROGRAM", 8)
    cost, sizes = BATCH
    cost, sizes = torch.cat([cost, padded([EDGE_CASES["NaN"]], (8, 8))[0]]), [*sizes, (3, 4)]
    found = []
    for maximize in (False, True):
        given = given_problems(cost.to(DEVICE), sizes)
        found.append(module.solve(*given, order=order, maximize=maximize))
        judge(cost, sizes, found[-1], maximize=maximize, scipy_order=order == "scipy")
        with programs_reordered(lambda natural: natural[::-1]):
            again = module.solve(*given, order=order, maximize=maximize)
        assert all(map(torch.equal, found[-1], again))
    return found


@EITHER
def test_without_faults(poisoned, planted, monkeypatch, order):
    answers(planted(assignment), monkeypatch, order)


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(poisoned, planted, monkeypatch, fault):
    module = planted(assignment, *FAULTS[fault])

    def both_orders():
        for order in ORDERS:
            answers(module, monkeypatch, order)

    with pytest.raises((AssertionError, IndexError)):
        both_orders()


# The compiler


def launches():
    """Every variant, at a size of each kind: fewer columns than a warp has lanes, and what workloads have."""
    cost = torch.zeros(1, 2, 3)
    sizes = torch.tensor([[2, 3]])
    problems = assignment.Problems(torch.zeros(1, dtype=torch.int64), *sizes.unbind(1), 2, 3)
    for order in ORDERS:
        for dtype in (torch.float32, torch.float64):
            for block in (32, 512, 1024):
                assignment.solve(cost, problems, 3, 1, dtype=dtype, order=order, maximize=block == 32, block=block)
