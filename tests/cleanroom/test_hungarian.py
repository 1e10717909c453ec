"""The matchers against the worked examples and edge cases of set_prediction.md, and against exhaustive search."""

import itertools
import sys

import pytest
import torch
from torch import nan
from torch.utils._python_dispatch import TorchDispatchMode

from cleanroom.assign import hungarian, matching_cost
from cleanroom.assign.hungarian import HungarianMatcher, RTDETRHungarianMatcher, hungarian_match
from cleanroom.assign.matching_cost import CostTerms, packed_costs

INF = float("inf")
WEIGHTS = {"detr": (1, 5, 2), "rtdetr": (2, 5, 2)}
BOTH = pytest.mark.parametrize("variant", ["detr", "rtdetr"])


def sine(shape, a, b, amplitude, offset):
    """S of the specification: offset + amplitude sin(a i + b) over the row-major index."""
    index = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return (offset + amplitude * torch.sin(a * index + b)).float().view(shape)


def weights(variant, *values):
    return dict(zip(("class_cost", "bbox_cost", "giou_cost"), values or WEIGHTS[variant], strict=True))


def example(variant):
    """The inputs of A13 (four columns, no object included) or B9 (three columns)."""
    return {
        "logits": sine((2, 4, 4 if variant == "detr" else 3), 0.9, 0.3, 2, 0),
        "pred_boxes": sine((2, 4, 4), 1.1, 0.5, 0.15, 0.4),
        "labels": torch.tensor([0, 2, 1]),
        "boxes": torch.tensor([[0.3, 0.4, 0.2, 0.3], [0.6, 0.5, 0.4, 0.2], [0.5, 0.5, 0.3, 0.3]]),
        "sizes": [2, 1],
        "variant": variant,
        **weights(variant),
    }


def random_batch(variant, sizes, queries, classes=5, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)

    def boxes(*shape):
        centres = torch.rand(*shape, 2, generator=generator, dtype=torch.float64) * 0.8 + 0.1
        sides = torch.rand(*shape, 2, generator=generator, dtype=torch.float64) * 0.3 + 0.01
        return torch.cat([centres, sides], -1).to(dtype)

    count = sum(sizes)
    columns = classes + (variant == "detr")
    logits = torch.randn(len(sizes), queries, columns, generator=generator, dtype=torch.float64).to(dtype)
    return {
        "logits": logits,
        "pred_boxes": boxes(len(sizes), queries),
        "labels": torch.randint(0, classes, (count,), generator=generator),
        "boxes": boxes(count),
        "sizes": list(sizes),
        "variant": variant,
        **weights(variant),
    }


def changed(batch, name, where, value):
    """A copy of the batch with one entry of one tensor replaced."""
    tensor = batch[name].clone()
    tensor[where] = torch.as_tensor(value, dtype=tensor.dtype)
    return {**batch, name: tensor}


def pairs(batch, **settings):
    """Matched pairs, image by image, as two lists."""
    match = hungarian_match(**batch, **settings)
    sizes = [min(batch["pred_boxes"].shape[1], size) for size in batch["sizes"]]
    return [
        (queries.tolist(), targets.tolist())
        for queries, targets in zip(match.queries.split(sizes), match.targets.split(sizes), strict=True)
    ]


def costs(batch):
    """The (G, Q) costs, and the flags behind them."""
    inputs = [batch[name] for name in ("logits", "pred_boxes", "labels", "boxes")]
    sizes = torch.tensor(batch["sizes"], dtype=torch.int64)
    image = torch.arange(len(sizes)).repeat_interleave(sizes)
    terms = CostTerms(**{name: batch[name] for name in CostTerms._fields if name in batch})
    packed = packed_costs(*inputs, image, terms=terms, non_finite="raise")
    entries = len(image) * batch["pred_boxes"].shape[1]
    return packed[:entries].view(len(image), -1), packed[entries:].tolist()


def centre_form(corners):
    corners = torch.tensor(corners, dtype=torch.float32)
    return torch.cat([(corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]], -1)


def box_batch(variant, queries, boxes, *values):
    """One image of equal logits, so that only the boxes tell pairs apart."""
    return {
        "logits": torch.zeros(1, len(queries), 2),
        "pred_boxes": torch.as_tensor(queries, dtype=torch.float32)[None],
        "labels": torch.zeros(len(boxes), dtype=torch.int64),
        "boxes": torch.as_tensor(boxes, dtype=torch.float32).view(-1, 4),
        "sizes": [len(boxes)],
        "variant": variant,
        **weights(variant, *values),
    }


class Watch(TorchDispatchMode):
    """Notes the name of every operator and the size of the largest tensor that one makes."""

    def __init__(self):
        super().__init__()
        self.names, self.largest = set(), 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        self.names.add(operator.name())
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


# ---------------------------------------------------------------------------------------------- worked examples

EXAMPLE_COSTS = {
    "detr": [
        [3.016343, 2.665566, 1.538672, 3.301879],
        [0.753076, 4.901795, 4.177118, -0.466100],
        [2.872406, 3.466325, -0.229176, 1.037099],
    ],
    "rtdetr": [
        [4.522075, 4.403656, 4.383512, 3.301977],
        [1.081222, 7.848480, 3.996050, 2.255961],
        [5.399442, 3.616870, 2.706745, 1.170300],
    ],
}
EXAMPLE_PAIRS = {"detr": [([2, 3], [0, 1]), ([2], [0])], "rtdetr": [([0, 3], [1, 0]), ([3], [2])]}


@BOTH
def test_worked_example(variant):
    found, flags = costs(example(variant))
    torch.testing.assert_close(found, torch.tensor(EXAMPLE_COSTS[variant]), rtol=0, atol=1e-6)
    assert all(flags)
    assert pairs(example(variant)) == EXAMPLE_PAIRS[variant]


def test_classes_match_as_upstream_calls_them():
    batch = example("detr")
    targets = [
        {"class_labels": labels, "boxes": boxes}
        for labels, boxes in zip(batch["labels"].split([2, 1]), batch["boxes"].split([2, 1]), strict=True)
    ]
    found = HungarianMatcher(1, 5, 2)({k: batch[k] for k in ("logits", "pred_boxes")}, targets)
    assert [(q.tolist(), t.tolist()) for q, t in found] == EXAMPLE_PAIRS["detr"]

    batch = example("rtdetr")
    arguments = [batch[k] for k in ("pred_boxes", "logits", "boxes", "labels", "sizes")]
    found = RTDETRHungarianMatcher({"class": 2, "bbox": 5, "giou": 2})(*arguments)
    assert [(q.tolist(), t.tolist()) for q, t in found] == EXAMPLE_PAIRS["rtdetr"]


def test_classes_pass_their_settings_on(monkeypatch):
    seen = []
    monkeypatch.setattr(hungarian, "packed_costs", lambda *_, terms, **__: seen.append(terms) or packed)
    packed = torch.ones(1 * 4 + 3)
    inputs = torch.zeros(1, 4, 3), torch.ones(1, 4, 4), torch.ones(1, 4), torch.zeros(1, dtype=torch.int64)
    logits, pred_boxes, boxes, labels = inputs
    outputs = {"logits": logits, "pred_boxes": pred_boxes}
    HungarianMatcher(class_cost=3, bbox_cost=4, giou_cost=6)(outputs, [{"class_labels": labels, "boxes": boxes}])
    HungarianMatcher()(outputs, [{"class_labels": labels, "boxes": boxes}])
    RTDETRHungarianMatcher()(pred_boxes, logits, boxes, labels, [1])
    gain = {"class": 3, "bbox": 4, "giou": 6}
    RTDETRHungarianMatcher(gain, use_fl=False, alpha=0.5, gamma=1.5)(pred_boxes, logits, boxes, labels, [1])
    assert seen == [
        CostTerms("detr", 3, 4, 6),
        CostTerms("detr", 1, 1, 1),
        CostTerms("rtdetr", 1, 5, 2, use_fl=True, alpha=0.25, gamma=2.0),
        CostTerms("rtdetr", 3, 4, 6, use_fl=False, alpha=0.5, gamma=1.5),
    ]


def test_pairwise_giou_of_detr():
    queries = centre_form([(0, 0, 2, 2), (1, 1, 3, 3), (5, 5, 6, 6)])
    targets = centre_form([(1, 1, 3, 3), (0, 0, 2, 2)])
    giou = -costs(box_batch("detr", queries, targets, 0, 0, 1))[0].T
    expected = torch.tensor([[-0.0794, 1.0], [1.0, -0.0794], [-0.8, -0.8611]])
    torch.testing.assert_close(giou, expected, rtol=0, atol=5e-5)


def test_overlap_of_rtdetr_is_finite_without_area():
    point, elsewhere, square = (0.5, 0.5, 0, 0), (0.9, 0.9, 0, 0), (0.3, 0.3, 0.2, 0.2)
    giou = 1 - costs(box_batch("rtdetr", [point, elsewhere, square], [point, square], 0, 0, 1))[0]
    assert giou[0, 0] == 0
    assert giou[0, 1].item() == pytest.approx(-1, abs=1e-5)
    assert giou[1, 2].item() == pytest.approx(0.9999975, abs=2e-7)


def test_softmax_costs_of_rtdetr():
    batch = {**example("rtdetr"), **weights("rtdetr", 1, 0, 0), "use_fl": False}
    probabilities = batch["logits"].softmax(-1)
    expected = -torch.stack([probabilities[0, :, 0], probabilities[0, :, 2], probabilities[1, :, 1]])
    torch.testing.assert_close(costs(batch)[0], expected)


def test_focal_costs_of_rtdetr():
    batch = {**example("rtdetr"), **weights("rtdetr", 1, 0, 0), "alpha": 0.4, "gamma": 1.5}
    p = batch["logits"].double().sigmoid()
    focal = 0.4 * (1 - p) ** 1.5 * -torch.log(p + 1e-8) - 0.6 * p**1.5 * -torch.log(1 - p + 1e-8)
    expected = torch.stack([focal[0, :, 0], focal[0, :, 2], focal[1, :, 1]]).float()
    torch.testing.assert_close(costs(batch)[0], expected, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------------------------------------- optimal matching


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_total_is_the_least_of_all_matchings(variant, dtype):
    for seed, (queries, sizes) in enumerate([(4, (3, 0, 1)), (3, (5, 3)), (1, (2,)), (5, (0, 5))]):
        batch = random_batch(variant, sizes, queries, seed=seed, dtype=dtype)
        matrix, first = costs(batch)[0].double(), 0
        for (matched, targets), size in zip(pairs(batch), sizes, strict=True):
            block = matrix[first : first + size].T
            few, many = sorted(block.shape)
            wide = block if block.shape[0] <= block.shape[1] else block.T
            least = min(
                (sum(wide[i, j] for i, j in enumerate(choice)) for choice in itertools.permutations(range(many), few)),
                default=0.0,
            )
            offset = first if variant == "rtdetr" else 0
            total = sum(block[q, t - offset] for q, t in zip(matched, targets, strict=True))
            assert matched == sorted(set(matched))
            assert len(set(targets)) == len(targets) == min(queries, size)
            assert float(total) == pytest.approx(float(least), abs=1e-9)
            first += size


@BOTH
def test_costs_are_those_of_the_formula(variant):
    batch = random_batch(variant, (6, 0, 9), 20, seed=3)
    image = [0] * 6 + [2] * 9
    pred = batch["pred_boxes"][image].double()
    target = batch["boxes"][:, None].double()
    low, high = (torch.cat([b[..., :2] - b[..., 2:] / 2, b[..., :2] + b[..., 2:] / 2], -1) for b in (pred, target))
    eps = 1e-7 if variant == "rtdetr" else 0
    shared = (torch.minimum(low[..., 2:], high[..., 2:]) - torch.maximum(low[..., :2], high[..., :2])).clamp(0)
    hull = torch.maximum(low[..., 2:], high[..., 2:]) - torch.minimum(low[..., :2], high[..., :2])
    shared, hull = shared.prod(-1), hull.prod(-1) + eps
    union = pred[..., 2:].prod(-1) + target[..., 2:].prod(-1) - shared + eps
    giou = shared / union - (hull - union) / hull
    distance = (pred - target).abs().sum(-1)
    columns = batch["labels"][:, None, None].expand(-1, 20, 1)
    if variant == "detr":
        p = batch["logits"].double().softmax(-1)[image].gather(-1, columns)[..., 0]
        expected = 5 * distance - p - 2 * giou
    else:
        p = batch["logits"].double().sigmoid()[image].gather(-1, columns)[..., 0]
        focal = 0.25 * (1 - p) ** 2 * -torch.log(p + 1e-8) - 0.75 * p**2 * -torch.log(1 - p + 1e-8)
        expected = 2 * focal + 5 * distance + 2 * (1 - giou)
    torch.testing.assert_close(costs(batch)[0], expected.float(), rtol=2e-6, atol=4e-6)


@BOTH
def test_terms_have_upstreams_defaults(variant):
    batch = random_batch(variant, (3,), 5)
    spelt_out = {"class_cost": 1, "bbox_cost": 1, "giou_cost": 1, "use_fl": True, "alpha": 0.25, "gamma": 2.0}
    plain = {name: value for name, value in batch.items() if name not in spelt_out}
    assert torch.equal(costs(plain)[0], costs(plain | spelt_out)[0])


@BOTH
@pytest.mark.parametrize("side", range(1, 9))
def test_equal_costs_give_query_i_target_i(variant, side):
    box = (0.5, 0.5, 0.2, 0.2)
    identity = list(range(side))
    assert pairs(box_batch(variant, [box] * side, [box] * side))[0] == (identity, identity)


@BOTH
def test_among_equal_optima_queries_are_rows(variant):
    """As many targets as queries: given the other way round, SciPy answers [0, 1, 2]."""
    near, far = (0.5, 0.5, 0.2, 0.2), (0.3, 0.3, 0.2, 0.2)
    assert pairs(box_batch(variant, [near] * 3, [near, far, near]))[0] == ([0, 1, 2], [0, 2, 1])


@BOTH
def test_identical_targets_get_different_queries(variant):
    batch = example(variant)
    batch["labels"][1], batch["boxes"][1] = batch["labels"][0], batch["boxes"][0]
    found = pairs(batch)
    assert len(set(found[0][0])) == 2
    if variant == "rtdetr":  # B7
        assert found[0] == ([2, 3], [1, 0])


@BOTH
def test_more_targets_than_queries(variant):
    batch = random_batch(variant, (6, 1), 4)
    found = pairs(batch)
    assert [len(queries) for queries, _ in found] == [4, 1]
    assert found[0][0] == [0, 1, 2, 3]
    assert found[1][1] == [0 if variant == "detr" else 6]


# ----------------------------------------------------------------------------------------------- empty and broken


@BOTH
def test_no_targets(variant):
    match = hungarian_match(**random_batch(variant, (0, 0), 4))
    assert match.queries.shape == match.targets.shape == (0,)
    assert match.queries.dtype == match.targets.dtype == torch.int64


@BOTH
@pytest.mark.parametrize("sizes", [(2, 0), (0, 2), (0, 2, 0)])
def test_empty_images_leave_the_others_alone(variant, sizes):
    batch = random_batch(variant, sizes, 4)
    full = sizes.index(2)
    alone = {**batch, "sizes": [2], **{k: batch[k][[full]] for k in ("logits", "pred_boxes")}}
    assert pairs(batch) == [pairs(alone)[0] if size else ([], []) for size in sizes]


def test_rtdetr_accepts_no_queries_and_looks_at_nothing_without_targets():
    assert pairs(random_batch("rtdetr", (2, 1), 0)) == [([], []), ([], [])]
    batch = random_batch("rtdetr", (0, 0), 4)
    assert pairs(changed(batch, "pred_boxes", ..., nan)) == [([], []), ([], [])]


def test_detr_looks_at_every_box_even_without_targets():
    with pytest.raises(ValueError, match="pred_boxes"):
        pairs(changed(random_batch("detr", (0, 0), 4), "pred_boxes", (1, 3, 2), -0.1))


NON_FINITE = {
    "nan logit": ("logits", (0, 1, 0), nan),
    "infinite logit": ("logits", (0, 1, 0), INF),
    "infinite width": ("pred_boxes", (0, 1, 2), INF),
    "infinite centre": ("pred_boxes", (0, 1, 0), INF),
}


@pytest.mark.parametrize("change", NON_FINITE.values(), ids=NON_FINITE)
def test_detr_matches_non_finite_costs_last(change):
    enough = changed(random_batch("detr", (3, 2), 4), *change)
    assert pairs(enough)[0][0] == [0, 2, 3]
    assert pairs(changed(random_batch("detr", (4, 2), 4), *change))[0][0] == [0, 1, 2, 3]
    assert pairs(enough, non_finite="largest") == pairs(enough)


def test_detr_minus_infinite_logit_of_one_class_is_harmless():
    batch = random_batch("detr", (2,), 4)
    assert costs(changed(batch, "logits", (0, 1, 3), -INF))[0].isfinite().all()


def test_detr_all_nan_logits_take_the_first_queries():
    batch = changed(random_batch("detr", (3,), 5), "logits", ..., nan)
    assert pairs(batch)[0] == ([0, 1, 2], [0, 1, 2])


def test_detr_points_cost_the_most():
    """A11: every query and one target without area: 0/0, so the largest cost, and forced all the same."""
    batch = example("detr")
    batch["pred_boxes"][..., 2:] = 0
    batch["boxes"][0, 2:] = 0
    assert costs(batch)[0].isnan().any(1).tolist() == [True, False, False]
    assert [len(queries) for queries, _ in pairs(batch)] == [2, 1]


@BOTH
def test_targets_outside_the_image_or_without_area(variant):
    batch = example(variant)
    batch["boxes"][0] = torch.tensor([1.7, -0.4, 0.2, 0.3])
    batch["boxes"][2, 2:] = 0
    matrix, flags = costs(batch)
    assert matrix.isfinite().all()
    assert all(flags)
    assert [len(queries) for queries, _ in pairs(batch)] == [2, 1]


def test_rtdetr_non_finite_costs_attract():
    batch = example("rtdetr")
    assert pairs(changed(batch, "pred_boxes", (0, 1), nan))[0] == ([0, 1], [1, 0])  # B2
    assert pairs(changed(batch, "logits", (0, 3), nan)) == EXAMPLE_PAIRS["rtdetr"]  # B7
    assert 1 in pairs(changed(batch, "pred_boxes", (0, 1, 2), INF))[0][0]  # B7
    assert 0 in pairs(changed(batch, "boxes", (0, 0), nan))[0][1]
    assert pairs(changed(batch, "pred_boxes", (0, 1, 2), -0.2))[0][0]


@BOTH
def test_policies_are_those_of_the_eras(variant):
    batch = changed(random_batch(variant, (2,), 3), "logits", (0, 1), nan)
    assert pairs(batch, non_finite="largest")[0][0] == [0, 2]
    assert 1 in pairs({**batch, **weights(variant, 1, 50, 0)}, non_finite="zero")[0][0]
    with pytest.raises(ValueError, match="image 0"):
        pairs(batch, non_finite="raise")


def test_positive_infinity_forbids_in_the_raising_era():
    near, far = (0.1, 0.1, 0.1, 0.1), (0.9, 0.9, 0.1, 0.1)
    batch = box_batch("detr", [far, near], [near], 1, 3e38, 1)
    assert costs(batch)[0].tolist()[0][0] == INF
    assert pairs(batch, non_finite="raise")[0] == ([1], [0])
    with pytest.raises(ValueError, match="image 0"):
        pairs(box_batch("detr", [far, far], [near], 1, 3e38, 1), non_finite="raise")


# ------------------------------------------------------------------------------------------------------ rejection

REJECTED = {
    "labels float": ({"labels": torch.zeros(3)}, TypeError, "labels"),
    "labels uint8": ({"labels": torch.zeros(3, dtype=torch.uint8)}, TypeError, "labels"),
    "labels too high": ({"labels": torch.tensor([0, 4, 1])}, ValueError, "labels"),
    "labels too low": ({"labels": torch.tensor([0, -5, 1])}, ValueError, "labels"),
    "labels (G, 1)": ({"labels": torch.zeros(3, 1, dtype=torch.int64)}, ValueError, "labels"),
    "boxes (G, 5)": ({"boxes": torch.zeros(3, 5)}, ValueError, "boxes"),
    "boxes fewer": ({"boxes": torch.ones(2, 4)}, ValueError, "boxes"),
    "boxes int": ({"boxes": torch.ones(3, 4, dtype=torch.int64)}, TypeError, "boxes"),
    "logits (Q, C)": ({"logits": torch.zeros(4, 4)}, ValueError, "logits"),
    "logits int": ({"logits": torch.zeros(2, 4, 4, dtype=torch.int64)}, TypeError, "logits"),
    "no columns": ({"logits": torch.zeros(2, 4, 0)}, ValueError, "logits"),
    "queries differ": ({"pred_boxes": torch.ones(2, 5, 4)}, ValueError, "pred_boxes"),
    "sizes sum": ({"sizes": [1, 1]}, ValueError, "sizes"),
    "sizes fewer": ({"sizes": [3]}, ValueError, "sizes"),
    "sizes more": ({"sizes": [1, 1, 1]}, ValueError, "sizes"),
    "sizes negative": ({"sizes": [4, -1]}, ValueError, "sizes"),
    "variant": ({"variant": "yolo"}, ValueError, "variant"),
    "non_finite": ({"non_finite": "nan"}, ValueError, "non_finite"),
    "workers": ({"workers": 0}, ValueError, "workers"),
}


@BOTH
@pytest.mark.parametrize(("change", "error", "name"), REJECTED.values(), ids=REJECTED)
def test_bad_input_is_named(variant, change, error, name):
    with pytest.raises(error, match=rf"^{name}\b"):
        hungarian_match(**{**example(variant), **change})


@pytest.mark.parametrize("value", [nan, -0.1])
@pytest.mark.parametrize(("name", "where"), [("pred_boxes", (1, 2, 3)), ("boxes", (2, 2))])
def test_detr_rejects_inverted_and_nan_boxes(name, where, value):
    with pytest.raises(ValueError, match=rf"^{name}\b"):
        pairs(changed(example("detr"), name, where, value))


def test_detr_rejects_what_leaves_nothing_to_match():
    with pytest.raises(ValueError, match="class_cost"):
        HungarianMatcher(0, 0, 0)
    with pytest.raises(ValueError, match="class_cost"):
        hungarian_match(**{**example("detr"), **weights("detr", 0, 0, 0)})
    with pytest.raises(ValueError, match="logits"):
        hungarian_match(**random_batch("detr", (2, 1), 0))
    with pytest.raises(ValueError, match="targets"):
        HungarianMatcher()({"logits": torch.zeros(0, 4, 3), "pred_boxes": torch.zeros(0, 4, 4)}, [])
    target = {"class_labels": torch.tensor([0, 1]), "boxes": torch.ones(1, 4)}
    with pytest.raises(ValueError, match="class_labels"):
        HungarianMatcher()({"logits": torch.zeros(1, 4, 3), "pred_boxes": torch.ones(1, 4, 4)}, [target])


def test_rtdetr_accepts_weights_of_zero_and_rejects_negative_labels():
    assert pairs({**example("rtdetr"), **weights("rtdetr", 0, 0, 0)}) == [([0, 1], [0, 1]), ([0], [2])]
    with pytest.raises(ValueError, match=r"^labels"):
        pairs(changed(example("rtdetr"), "labels", 0, -1))


def test_detr_labels_count_from_the_end_as_upstream_indexes():
    last = changed(example("detr"), "labels", 0, 3)
    assert torch.equal(costs(last)[0], costs(changed(last, "labels", 0, -1))[0])
    assert pairs(last) == pairs(changed(last, "labels", 0, -1))


def test_missing_scipy_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    assert pairs(random_batch("detr", (0,), 4)) == [([], [])]
    with pytest.raises(ImportError, match=r"cleanroom\[matchers\]"):
        pairs(random_batch("detr", (1,), 4))


# ------------------------------------------------------------------------------------------------------- relations


@BOTH
def test_indices_are_int64_on_the_cpu_without_gradient_and_inputs_stay(variant):
    batch = random_batch(variant, (3, 0, 5), 4)
    batch["logits"].requires_grad_()
    batch["pred_boxes"].requires_grad_()
    before = {name: value.clone() for name, value in batch.items() if isinstance(value, torch.Tensor)}
    match = hungarian_match(**batch)
    for output in match:
        assert output.dtype == torch.int64
        assert output.device.type == "cpu"
        assert not output.requires_grad
    assert all(torch.equal(batch[name], value) for name, value in before.items())
    assert batch["sizes"] == [3, 0, 5]


@BOTH
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_are_computed_in_float32(variant, dtype):
    batch = random_batch(variant, (5, 9), 12, dtype=dtype)
    full = {k: v.float() if k in ("logits", "pred_boxes", "boxes") else v for k, v in batch.items()}
    assert costs(batch)[0].dtype == torch.float32
    assert torch.equal(costs(batch)[0], costs(full)[0])
    mixed = {**batch, "boxes": full["boxes"]}
    assert pairs(batch) == pairs(mixed) == pairs(full)


@BOTH
def test_float64_and_int32(variant):
    batch = random_batch(variant, (5, 9), 12, dtype=torch.float64)
    assert costs(batch)[0].dtype == torch.float64
    assert pairs(batch) == pairs({**batch, "labels": batch["labels"].int()})


def test_rtdetr_casts_predictions_to_float32():
    batch = random_batch("rtdetr", (5,), 12, dtype=torch.float64)
    cast = {**batch, "logits": batch["logits"].float(), "pred_boxes": batch["pred_boxes"].float()}
    assert torch.equal(costs(batch)[0], costs(cast)[0])


@BOTH
def test_order_of_images_does_not_matter(variant):
    batch = random_batch(variant, (3, 5), 6)
    swapped = {
        **batch,
        "logits": batch["logits"].flip(0),
        "pred_boxes": batch["pred_boxes"].flip(0),
        "labels": batch["labels"].roll(5),
        "boxes": batch["boxes"].roll(5, 0),
        "sizes": [5, 3],
    }
    first, second = pairs(batch)
    if variant == "rtdetr":
        first, second = (first[0], [t + 5 for t in first[1]]), (second[0], [t - 3 for t in second[1]])
    assert pairs(swapped) == [second, first]


@BOTH
def test_chunks_do_not_change_the_costs(variant, monkeypatch):
    batch = random_batch(variant, (7, 0, 40), 30)
    whole = costs(batch)[0]
    # PyTorch's vectorised logarithm and its scalar tail differ in the last place, and chunks move the tail.
    tolerance = 0 if variant == "detr" else 2e-6
    for entries in (1, 100, 301):
        monkeypatch.setitem(matching_cost._CHUNK_ENTRIES, "cpu", entries)
        torch.testing.assert_close(costs(batch)[0], whole, rtol=0, atol=tolerance)


@BOTH
def test_threads_and_loop_agree(variant):
    batch = random_batch(variant, (30, 0, 7, 80, 60, 1), 60)
    loop = pairs(batch, workers=1)
    for workers in (2, 3, 50):
        assert pairs(batch, workers=workers) == loop


def test_threads_start_only_where_they_pay(monkeypatch):
    started = []
    executor = hungarian.ThreadPoolExecutor
    monkeypatch.setattr(hungarian, "ThreadPoolExecutor", lambda n: started.append(n) or executor(n))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    pairs(random_batch("detr", (7, 7), 300))
    assert not started
    pairs(random_batch("detr", (250, 250), 300))
    assert started == [1]


def test_an_error_in_a_thread_reaches_the_caller():
    batch = changed(random_batch("detr", (2, 2, 2), 3), "logits", (1, 1), nan)
    with pytest.raises(ValueError, match="image 1"):
        pairs(batch, non_finite="raise", workers=3)


@BOTH
def test_no_block_between_images_and_no_synchronisation(variant, monkeypatch):
    images, queries = 24, 50
    batch = random_batch(variant, (4,) * images, queries)
    monkeypatch.setitem(matching_cost._CHUNK_ENTRIES, "cpu", 200)
    with Watch() as watch:
        hungarian_match(**batch)
    ragged, predictions = images * 4 * queries, images * queries * 9
    assert watch.largest <= max(ragged + 3, predictions) < images * ragged
    assert not watch.names & {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select"}
