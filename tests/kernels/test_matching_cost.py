"""Costs and matchings on the device against the torch costs and SciPy, and against faults planted in them."""

from itertools import accumulate, product
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch._subclasses.fake_tensor import FakeTensorMode

from cases import hungarian as hungarian_cases
from cleanroom.assign import _matching_checks
from cleanroom.assign._matching_checks import CURRENT_POLICY, POLICIES
from cleanroom.assign._matching_op import matched_layers
from cleanroom.assign.hungarian import HungarianMatcher, RTDETRHungarianMatcher, hungarian_match
from cleanroom.assign.matching_cost import CHECKED, CostTerms, packed_costs
from cleanroom.kernels import matching, matching_cost, runtime
from cleanroom.kernels.host_numbers import on_device
from cleanroom.losses.rtdetr import rtdetr_loss
from tests.kernels.conftest import DEVICE, programs_reordered

NAN, INF = float("nan"), float("inf")
TERMS = {
    "detr": CostTerms("detr", 1, 5, 2),
    "rtdetr": CostTerms("rtdetr", 2, 5, 2),
    "rtdetr, gamma 1.5": CostTerms("rtdetr", 2, 5, 2, alpha=0.4, gamma=1.5),
    "rtdetr, gamma 0": CostTerms("rtdetr", 2, 5, 2, gamma=0),
    "rtdetr, softmax": CostTerms("rtdetr", 2, 5, 2, use_fl=False),
}
EACH = pytest.mark.parametrize("terms", TERMS.values(), ids=TERMS)
BOTH = pytest.mark.parametrize("terms", [TERMS["detr"], TERMS["rtdetr"]], ids=["detr", "rtdetr"])
# The interpreter tells of what is infinite or undefined; costs are meant to be, where predictions are.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")


def batch(sizes=(3, 0, 6), queries=5, layers=2, classes=4, dtype=torch.float32, seed=0):
    """Arguments of `matched_layers`; predictions are layers of one stack."""
    draw = torch.Generator().manual_seed(seed)
    logits = (2 * torch.randn(layers, len(sizes), queries, classes + 1, generator=draw)).to(dtype)
    boxes, truths = (
        torch.cat([torch.rand(*shape, 2, generator=draw), 0.3 * torch.rand(*shape, 2, generator=draw) + 0.01], -1)
        for shape in ((layers, len(sizes), queries), (sum(sizes),))
    )
    labels = torch.randint(0, classes, (sum(sizes),), generator=draw)
    return list(logits.unbind()), list(boxes.to(dtype).unbind()), labels, truths.to(dtype), list(sizes)


def on(device, given):
    return [
        [tensor.to(device) for tensor in part] if isinstance(part, list) and isinstance(part[0], torch.Tensor) else
        part.to(device) if isinstance(part, torch.Tensor) else part
        for part in given
    ]  # fmt: skip


def torch_costs(logits, pred_boxes, labels, boxes, sizes, terms, policy):
    """(L, G, Q) and (3,) as `layer_costs` gives them, of the torch path."""
    image = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    found, wrong = [], torch.zeros(len(CHECKED), dtype=torch.int32)
    entries = len(labels) * pred_boxes[0].shape[1]
    for own_logits, own_boxes in zip(logits, pred_boxes, strict=True):
        packed = packed_costs(own_logits, own_boxes, labels, boxes, image, terms=terms, non_finite=policy)
        found.append(packed[:entries].view(len(labels), pred_boxes[0].shape[1]))
        wrong[: len(packed) - entries] |= (packed[entries:] == 0).int()
    return torch.stack(found), wrong


def compare_costs(given, terms, policy, module=matching_cost, **blocks):
    """Assert that a module's kernel prices as torch does."""
    logits, pred_boxes, labels, boxes, sizes = on(DEVICE, given)
    expected, expected_wrong = torch_costs(*given, terms, policy)
    problems = module.ragged(sizes, pred_boxes[0].shape[1], len(logits), DEVICE)
    settings = {"terms": terms, "non_finite": policy, **blocks}
    costs, wrong = module.layer_costs(logits, pred_boxes, labels, boxes, problems, **settings)
    assert torch.equal(wrong.cpu(), expected_wrong)
    if not wrong.any():
        # Logarithms and exponentials differ in the last places, and 1 - p repeats it where p is almost 1.
        torch.testing.assert_close(costs.cpu(), expected, rtol=1e-5, atol=2e-5, equal_nan=True)


def compare_matching(given, terms, policy=""):
    """Assert that pairs are in order, each target once, at SciPy's total cost."""
    sizes, queries = given[4], given[1][0].shape[1]
    found = matched_layers(*on(DEVICE, given), terms=terms, non_finite=policy, path="triton")
    expected = matched_layers(*given, terms=terms, non_finite=policy, path="scipy")
    found = [part.cpu() for part in found]
    assert torch.equal(found[0], expected.images)
    costs, _ = torch_costs(*given, terms, policy or CURRENT_POLICY[terms.variant])
    firsts = [0, *accumulate(sizes)]
    counts = [min(queries, size) for size in sizes] * len(given[0])
    for problem, (own_queries, own_targets, queries_there, targets_there) in enumerate(
        zip(*(part.split(counts) for part in (found[1], found[2], expected.queries, expected.targets)), strict=True)
    ):
        layer, image = divmod(problem, len(sizes))
        assert (own_queries.diff() > 0).all()
        assert len(set(own_targets.tolist())) == len(own_targets)
        assert all(firsts[image] <= target < firsts[image + 1] for target in own_targets.tolist())
        total, least = (
            costs[layer, targets, some].double().sum()
            for targets, some in ((own_targets, own_queries), (targets_there, queries_there))
        )
        assert total.item() == pytest.approx(least.item(), rel=1e-6, abs=1e-4)


# Against the torch path


def complaint(inputs, terms, path):
    """What a matching is rejected with, if it is; the device raises an error of its own kind, with the same words."""
    try:
        matched_layers(*inputs, terms=terms, path=path)
    except (ValueError, TypeError, RuntimeError) as error:
        return str(error)
    return None


def drawn(case):
    """Compare for a drawn case: costs under every policy, the matching, or the error."""
    tensors, given = case.tensors, dict(case.settings)
    sizes, variant = given.pop("sizes"), given["variant"]
    terms = CostTerms(**given)
    inputs = [[tensors["logits"]], [tensors["pred_boxes"]], tensors["labels"], tensors["boxes"], list(sizes)]
    expected = complaint(inputs, terms, "scipy")
    assert complaint(inputs, terms, "triton") == expected
    if expected:
        return
    if variant == "rtdetr" and not sum(sizes):
        assert not any(len(part) for part in matched_layers(*inputs, terms=terms, path="triton"))
        return
    for policy in POLICIES:
        compare_costs(inputs, terms, policy)
    compare_matching(inputs, terms)


DTYPES = ("float32", "float16", "bfloat16")
DRAWN = settings(
    max_examples=6, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)


@DRAWN
@given(hungarian_cases.cases(dtypes=DTYPES, variant="detr").filter(lambda case: "small" in case.tags))
def test_drawn_cases_of_detr(case):
    drawn(case)


@DRAWN
@given(hungarian_cases.cases(dtypes=DTYPES, variant="rtdetr").filter(lambda case: "small" in case.tags))
def test_drawn_cases_of_rtdetr(case):
    drawn(case)


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_layers(terms, dtype):
    given = batch(dtype=dtype)
    compare_costs(given, terms, CURRENT_POLICY[terms.variant])
    compare_matching(given, terms)


def edge(place=None, value=None, *, tensor="logits", sizes=(3, 2), queries=4, **given):
    """A batch with one value replaced."""
    parts = batch(sizes, queries, layers=1, **given)
    names = dict(zip(("logits", "pred_boxes", "labels", "boxes"), (parts[0][0], parts[1][0], *parts[2:4]), strict=True))
    if place is not None:
        names[tensor][place] = value
    return parts


EDGE_CASES = {
    "NaN logit": edge((0, 1, 0), NAN),
    "infinite logit": edge((0, 1, 0), INF),
    "logit of minus infinity": edge((0, 1, 3), -INF),
    "all NaN": edge(..., NAN),
    "large logits": edge((0, slice(None), 0), 200.0),
    "infinite width": edge((0, 1, 2), INF, tensor="pred_boxes"),
    "infinite centre": edge((0, 1, 0), INF, tensor="pred_boxes"),
    "points": edge((..., slice(2, 4)), 0.0, tensor="pred_boxes"),
    "points on points": edge((slice(None), slice(2, 4)), 0.0, tensor="boxes", seed=1),
    "equal targets": edge(slice(0, 2), 0.25, tensor="boxes"),
    "one class": edge(classes=1),
    "one query": edge(sizes=(3, 1), queries=1),
    "more targets than queries": edge(sizes=(9, 6), queries=4),
    "as many targets as queries": edge(sizes=(4, 4)),
    "empty image": edge(sizes=(0, 3, 0)),
    "many columns": edge(classes=70),
}


@BOTH
@pytest.mark.parametrize("name", EDGE_CASES)
def test_edge_cases(terms, name):
    for policy in POLICIES:
        compare_costs(EDGE_CASES[name], terms, policy)
    if "NaN" in name and terms.variant == "detr":
        # A forced pair of the largest cost swallows the others: compared are those that none is forced on.
        return
    compare_matching(EDGE_CASES[name], terms)


REJECTED = {
    "label": (edge(1, 7, tensor="labels"), ("detr", "rtdetr")),
    "negative label": (edge(1, -1, tensor="labels"), ("rtdetr",)),
    "inverted prediction": (edge((1, 3, 2), -0.1, tensor="pred_boxes"), ("detr",)),
    "NaN prediction": (edge((1, 3, 0), NAN, tensor="pred_boxes"), ("detr",)),
    "inverted target": (edge((4, 3), -0.1, tensor="boxes"), ("detr",)),
    "inverted prediction without targets": (edge((1, 3, 2), -0.1, tensor="pred_boxes", sizes=(0, 0)), ("detr",)),
}


@pytest.mark.parametrize("name", REJECTED)
def test_what_is_rejected(name):
    given, variants = REJECTED[name]
    for variant in TERMS.keys() & {"detr", "rtdetr"}:
        compare_costs(given, TERMS[variant], "raise")
        if DEVICE.type == "cuda":  # a failed assertion ends the process's use of the device
            continue
        if variant in variants:
            with pytest.raises(ValueError, match=r".") as expected:
                matched_layers(*given, terms=TERMS[variant], path="scipy")
            with pytest.raises(RuntimeError) as found:
                matched_layers(*given, terms=TERMS[variant], path="triton")
            assert str(found.value) == str(expected.value)
        elif name != "NaN prediction":
            compare_matching(given, TERMS[variant])


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a failed assertion ends the process's use of the device")
@BOTH
def test_costs_without_a_matching_are_an_error_under_raise(terms):
    given = edge((0, slice(None), slice(None)), NAN)
    with pytest.raises(RuntimeError, match="have no valid matching"):
        matched_layers(*given, terms=terms, non_finite="raise", path="triton")
    (logits, *_), (boxes, *_), *rest = given
    with pytest.raises(RuntimeError, match="have no valid matching"):
        hungarian_match(logits, boxes, *rest, **terms._asdict(), non_finite="raise", path="triton")
    pairs, _, status = matching.launch_matching(*given, terms=terms, policy="raise")
    assert status.tolist() == [2, 0]
    assert [part[:3].tolist() for part in pairs] == [[0, 0, 0], [0, 1, 2], [0, 1, 2]]


def test_negative_labels_count_from_the_end():
    compare_costs(edge(1, -2, tensor="labels"), TERMS["detr"], "largest")


def test_settings_and_shapes_are_checked():
    given = edge()
    for error, match, change in (
        (ValueError, "path must be", {"path": "sparse"}),
        (ValueError, "non_finite must be", {"non_finite": "ignore", "path": "triton"}),
        (ValueError, "are all 0", {"terms": CostTerms("detr", 0, 0, 0), "path": "triton"}),
    ):
        with pytest.raises(error, match=match):
            matched_layers(*given, **{"terms": TERMS["detr"]} | change)
    with pytest.raises(ValueError, match="sizes must be 2 counts"):
        matched_layers(*given[:4], [1, 1], terms=TERMS["detr"], path="triton")


@BOTH
def test_float64_takes_scipy(terms):
    given = batch(dtype=torch.float64)
    one, other = (matched_layers(*given, terms=terms, path=path) for path in ("triton", "scipy"))
    assert all(map(torch.equal, one, other))


# The callers


@BOTH
def test_function_counts_targets_as_its_variant_does(terms):
    logits, boxes, *rest = on(DEVICE, batch((3, 4), layers=1, seed=2))
    one, other = (
        hungarian_match(logits[0], boxes[0], *rest, **terms._asdict(), path=path) for path in ("triton", "scipy")
    )
    assert all(torch.equal(part.cpu(), there) for part, there in zip(one, other, strict=True))


def test_matchers_return_pairs_on_the_host():
    (logits,), (boxes,), labels, truths, sizes = on(DEVICE, batch((3, 0, 4), layers=1, seed=2))
    targets = [
        {"class_labels": some, "boxes": others}
        for some, others in zip(labels.split(sizes), truths.split(sizes), strict=True)
    ]
    outputs = {"logits": logits, "pred_boxes": boxes}
    detr = [HungarianMatcher(1, 5, 2, path=path)(outputs, targets) for path in ("scipy", "triton")]
    given = boxes, logits, truths, labels, sizes
    rtdetr = [RTDETRHungarianMatcher(path=path)(*given) for path in ("scipy", "triton")]
    for (queries, some), (queries_there, others) in (*zip(*detr, strict=True), *zip(*rtdetr, strict=True)):
        assert queries.device.type == some.device.type == "cpu"
        assert torch.equal(queries, queries_there)
        assert torch.equal(some, others)


def test_loss_of_rtdetr_takes_the_matching():
    logits, boxes, labels, truths, sizes = batch((3, 0, 4), layers=3, seed=2)
    given = torch.stack(boxes), torch.stack(logits), labels, truths
    one, other = (rtdetr_loss(*given, gt_groups=sizes, num_classes=5, path=path) for path in ("triton", "static"))
    assert torch.equal(one.queries, other.queries)
    assert torch.equal(one.targets, other.targets)
    torch.testing.assert_close(one.terms, other.terms)


# Sizes and layouts


@pytest.mark.parametrize(("block_targets", "block_queries"), [(1, 2), (4, 8), (8, 4), (16, 16)])
@BOTH
def test_block_sizes(terms, block_targets, block_queries):
    given = batch((8, 3, 0), queries=8, layers=1)
    policy = CURRENT_POLICY[terms.variant]
    compare_costs(given, terms, policy, block_targets=block_targets, block_queries=block_queries)


@pytest.mark.parametrize("columns", [2, 5, 8])
def test_blocks_of_columns(monkeypatch, columns):
    monkeypatch.setattr(matching_cost, "_BLOCK_COLUMNS", columns if columns != 5 else 4)
    compare_costs(batch((3,), layers=1, classes=7), TERMS["detr"], "largest")


def within(tensor):
    """The same values as a slice out of a larger tensor of NaN, or of what is no class."""
    larger = torch.full(
        [size + 3 for size in tensor.shape], NAN if tensor.is_floating_point() else 99, dtype=tensor.dtype
    )
    return larger[tuple(slice(1, 1 + size) for size in tensor.shape)].copy_(tensor)


def crossed(tensor):
    return tensor.mT.contiguous().mT if tensor.ndim > 1 else tensor


@pytest.mark.parametrize("change", [within, crossed, lambda t: within(crossed(t))])
@BOTH
def test_layouts(terms, change):
    logits, boxes, labels, truths, sizes = batch()
    given = [change(t) for t in logits], [change(t) for t in boxes], change(labels), change(truths), sizes
    compare_costs(given, terms, "zero")


def launched(monkeypatch):
    """Names of the kernels that are launched from now on."""
    names, launch = [], runtime.launch
    monkeypatch.setattr(
        runtime, "launch", lambda kernel, *a, **k: names.append(kernel.__name__) or launch(kernel, *a, **k)
    )
    return names


@BOTH
def test_layers_of_a_stack_take_one_launch(terms, monkeypatch):
    given = batch(layers=3)
    names = launched(monkeypatch)
    one = matched_layers(*given, terms=terms, path="triton")
    assert names == ["_write", "_write_table", "_costs", "_row_minima", "_augment", "_pairs"]
    names.clear()
    apart = [[tensor.clone() for tensor in part] for part in given[:2]]
    other = matched_layers(*apart, *given[2:], terms=terms, path="triton")
    assert names.count("_costs") == 3
    assert all(map(torch.equal, one, other))
    # One of them is elsewhere, and one is another view of the stack.
    for changed in ([given[0][0], given[0][1].clone(), given[0][2]], [given[0][0], given[0][2], given[0][1]]):
        compare_costs((changed, *given[1:]), terms, "zero")


def test_numbers_of_the_host(poisoned):
    for numbers in ([], [3], list(range(16)), [-5, 2**40, *range(20)]):
        assert on_device(numbers, DEVICE).tolist() == numbers


def test_many_images():
    compare_matching(batch((1, 0, 2) * 6, queries=3, layers=1), TERMS["rtdetr"])


# Memory and order


@BOTH
def test_every_output_is_written(poisoned, terms):
    given = batch((3, 0, 6))
    compare_costs(given, terms, "zero")
    compare_matching(given, terms)


@BOTH
def test_order_of_programs_and_repeats(reordered, terms):
    given = batch((6, 2))
    expected, again = (matched_layers(*given, terms=terms, path="triton") for _ in range(2))
    assert all(map(torch.equal, expected, again))
    compare_matching(given, terms)


@BOTH
def test_no_block_between_images_is_allocated(allocations, terms):
    sizes, queries, layers = (4,) * 6, 7, 2
    matched_layers(*batch(sizes, queries, layers), terms=terms, path="triton")
    own = layers * sum(sizes) * queries
    assert max(map(torch.Size.numel, map(torch.Size, allocations))) == own


# What PyTorch makes of the operator


@BOTH
def test_compiles_as_one_graph(terms):
    graphs = []

    def backend(module, _):
        graphs.append(module)
        return module

    def total(logits, boxes, labels, truths, sizes):
        found = matched_layers(logits, boxes, labels, truths, sizes, terms=terms, path="triton")
        return found.queries * 2, found.targets + 1

    torch._dynamo.reset()
    compiled = torch.compile(total, fullgraph=True, backend=backend)
    for sizes in ((3, 2), (2, 4), (5, 1), (1, 7)):
        given = on(DEVICE, batch(sizes))
        assert all(map(torch.equal, total(*given), compiled(*given)))
    # Once with the numbers, once with symbols for sizes, once more for a symbol of G.
    assert len(graphs) <= 3
    aot = torch.compile(total, fullgraph=True, backend="aot_eager")
    assert all(map(torch.equal, total(*given), aot(*given)))


@BOTH
def test_operator_is_well_formed(terms):
    given = batch(layers=1)
    for tensor in (*given[0], *given[1]):
        tensor.requires_grad_()
    torch.library.opcheck(torch.ops.cleanroom.match_on_device.default, (*given, *terms, "", False))


@BOTH
def test_is_traced_without_a_device(terms):
    with FakeTensorMode(), torch.device("cuda"):
        logits, boxes = ([torch.empty(3, 5, width) for _ in range(2)] for width in (5, 4))
        labels, truths = torch.empty(9, dtype=torch.int64), torch.empty(9, 4)
        found = matched_layers(logits, boxes, labels, truths, [3, 0, 6], terms=terms)
    assert all(part.shape == (2 * 8,) and part.device.type == "cuda" for part in found)


# Planted faults

FAULTS = {
    "mask beyond the last target": [("real_target = place < size", "real_target = place <= size")],
    "mask short of the last target": [("real_target = place < size", "real_target = place < size - 1")],
    "mask short of the last query": [("real_query = query < queries", "real_query = query < queries - 1")],
    "mask short of the last column": [("(column < columns)[None, :]", "(column < columns - 1)[None, :]")],
    "lost tile of targets": [("range(0, size, BLOCK_TARGETS)", "range(0, size - BLOCK_TARGETS, BLOCK_TARGETS)")],
    "lost flag of predictions": [("mask=real_query & (ordered == 0)", "mask=query < 0")],
    "lost flag of targets": [("mask=(place < checked) & (upright == 0)", "mask=place < 0")],
    "lost flag of labels": [("mask=(place < checked) & beyond", "mask=place < 0")],
    "layers mistaken": [("layer * logit_layer", "0 * logit_layer")],
    "order of terms": [("(hull - union, hull)", "(union - hull, hull)")],
}


def prices(module):
    """A module's costs and flags are those of torch, with blocks smaller than the data."""
    blocks = {"block_targets": 2, "block_queries": 4}
    for terms in (TERMS["detr"], TERMS["rtdetr"]):
        compare_costs(batch((3, 0, 6)), terms, "raise", module, **blocks)
        with programs_reordered(lambda natural: natural[::-1]):
            compare_costs(batch((3, 0, 6)), terms, "raise", module, **blocks)
        for inputs, _ in REJECTED.values():
            compare_costs(inputs, terms, "raise", module, **blocks)


def test_without_faults(poisoned, planted):
    prices(planted(matching_cost))


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(poisoned, planted, fault):
    module = planted(matching_cost, *FAULTS[fault])
    with pytest.raises(AssertionError):
        prices(module)


PAIR_FAULTS = {
    "place of a pair": [("0) - 1\n", "0)\n")],
    "order of programs": [("tl.load(first_pairs + problem)", "problem * 3")],
    "targets of another image": [("tl.load(first_targets + problem)\n", "tl.load(first_targets)\n")],
    "unsolved": [("tl.load(status + problem) > 0, plain", "tl.load(status + problem) > 9, plain")],
}


def pairs_are_right(module):
    """Pairs of 5 queries: two images of 3 and 6 targets, one between them without; one problem is unsolved."""
    sizes = [3, 0, 6]
    columns = torch.tensor([[-1, 2, 0, -1, 1], [-1] * 5, [5, 1, 0, 2, 4]] + [[-1] * 5] * 3, device=DEVICE)
    status = torch.tensor([0, 0, 0, 0, 0, 1], dtype=torch.int32, device=DEVICE)
    columns[3, :3] = torch.tensor([1, 0, 2])
    problems = matching_cost.ragged(sizes, 5, 2, DEVICE)
    # Room on both sides: a fault writes there, not into the memory of others.
    room = torch.full((3, 48), -9, device=DEVICE)
    pairs = room[:, 16:32]
    module.write_pairs(columns, status, problems, pairs, 3, local=False)
    assert (room[:, :16] == -9).all()
    assert (room[:, 32:] == -9).all()
    assert pairs.tolist() == [
        [0, 0, 0, 2, 2, 2, 2, 2] * 2,
        [1, 2, 4, 0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3, 4],
        [2, 0, 1, 8, 4, 3, 5, 7, 1, 0, 2, 3, 4, 5, 6, 7],
    ]


def test_pairs(poisoned, planted):
    pairs_are_right(matching)
    with programs_reordered(lambda natural: natural[::-1]):
        pairs_are_right(matching)


@pytest.mark.parametrize("fault", PAIR_FAULTS)
def test_planted_faults_of_pairs_are_caught(poisoned, planted, fault):
    module = planted(matching, *PAIR_FAULTS[fault])
    with pytest.raises(AssertionError):
        pairs_are_right(module)


# The compiler


def launches():
    """Every form of the class term, with floats of each width, and every policy."""
    labels = torch.zeros(3, dtype=torch.int64)
    for dtype, name in product((torch.float32, torch.bfloat16), TERMS):
        logits, boxes = (torch.zeros(2, 2, 5, width, dtype=dtype) for width in (3, 4))
        truths = torch.zeros(3, 4, dtype=dtype)
        given = logits.unbind(), boxes.unbind(), labels, truths, [1, 2]
        matching.launch_matching(*given, terms=TERMS[name], policy="largest")
    for policy in POLICIES:
        matching.launch_matching(*given, terms=TERMS["detr"], policy=policy)


def test_more_queries_than_the_solver_takes_are_left_to_the_static_path():
    """Only where nobody asked for kernels by name."""
    few, many = (torch.zeros(1, device="meta") for _ in range(2))
    with mock.patch.object(_matching_checks, "choose_path", lambda path, *_: "triton" if path == "auto" else path):
        chosen = _matching_checks.choose_matched_path
        assert chosen("auto", _matching_checks.LONGEST_SIDE, few) == "triton"
        assert chosen("auto", _matching_checks.LONGEST_SIDE + 1, many) == "static"
        assert chosen("triton", _matching_checks.LONGEST_SIDE + 1, many) == "triton"
