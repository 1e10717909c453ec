"""The set criterion's fused terms against the torch path: terms and gradients under given pairs, and the whole loss."""

import contextlib
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import given as drawn
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from cases.set_loss import cases
from cleanroom.assign.hungarian import HungarianMatcher
from cleanroom.kernels import set_loss as kernels
from cleanroom.losses import set_criterion
from cleanroom.losses._set_layers import Criterion, Layer, Targets, loss_weights, weighted
from cleanroom.losses.set_criterion import ImageLoss, SetCriterion
from cleanroom.losses.set_prediction import set_loss
from cleanroom.losses.set_terms import Pairs, class_weights
from tests.cleanroom import test_set_loss as worked
from tests.kernels.conftest import DEVICE, programs_reordered

ROOT = Path(__file__).parents[2]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NAMES = ("loss_ce", "loss_bbox", "loss_giou", "cardinality_error")
#: Rounding of a gradient to its dtype.
ROUNDING = {torch.float32: 1e-5, torch.float16: 6e-4, torch.bfloat16: 2.1e-3}
TOTAL, BBOX, GIOU = 1.5, 5.0, 2.0


class Scene(NamedTuple):
    """Layers and what their queries are matched with, in float64."""

    logits: list[Tensor]
    boxes: list[Tensor]
    labels: Tensor
    targets: Tensor
    sizes: list[int]
    images: Tensor
    queries: Tensor
    local: Tensor
    ignore: Tensor | None = None

    @property
    def placed(self) -> Tensor:
        return self.local + torch.tensor([0, *self.sizes]).cumsum(0)[self.images]


def scene(seed=0, sizes=(3, 0, 5), queries=11, classes=4, layers=2, scale=2.0, masked=False):
    """Any pairs will do; values that every dtype under test holds."""
    draw = torch.Generator().manual_seed(seed)
    batch, count = len(sizes), sum(sizes)

    def exact(*shape):
        return torch.rand(*shape, generator=draw).bfloat16().double()

    logits = [(exact(batch, queries, classes + 1) - 0.5) * 4 * scale for _ in range(layers)]
    boxes = [exact(batch, queries, 4) * 0.5 + 0.0625 for _ in range(layers)]
    chosen = [torch.randperm(queries, generator=draw)[:size].sort()[0] for _ in range(layers) for size in sizes]
    local = [
        torch.randperm(size, generator=draw)[: len(some)]
        for some, size in zip(chosen, list(sizes) * layers, strict=True)
    ]
    images = [torch.full_like(some, place % batch) for place, some in enumerate(chosen)]
    return Scene(
        [some.bfloat16().double() for some in logits],
        [some.bfloat16().double() for some in boxes],
        torch.randint(classes, (count,), generator=draw),
        exact(count, 4) * 0.5 + 0.0625,
        list(sizes),
        *(torch.cat(parts).view(layers, -1) for parts in (images, chosen, local)),
        torch.rand(batch, queries, generator=draw) < 0.3 if masked else None,
    )


def incoming(shape):
    """Gradients that come in through the terms; the cardinality error has none."""
    weights = torch.linspace(-1, 2, shape.numel(), dtype=torch.float64).view(shape)
    weights[:, 3] = 0
    return weights


def reference(some, counted=2, each_image=False, eos=0.1, normaliser=None, weights=None):
    """Total, terms and gradients of logits and boxes, on the static path in float64."""
    logits, boxes = ([part.detach().double().requires_grad_() for part in every] for every in some[:2])
    weights = class_weights(logits[0].shape[2] - 1, eos) if weights is None else weights
    reduction = "none" if each_image else "sum"
    targets = Targets(some.labels, some.targets, some.sizes)
    criterion = Criterion(weights, eos, targets, normaliser, some.ignore, reduction, sparse=False)
    rows = some.images * logits[0].shape[1] + some.queries
    pairs = [Pairs(*both, logits[0].shape[1]) for both in zip(rows, some.placed, strict=True)]
    layers = [Layer(*both) for both in zip(logits, boxes, strict=True)]
    found = criterion.layers(("labels", "boxes", "cardinality"), layers, pairs)
    total = weighted(found, loss_weights(BBOX, GIOU, 0, 0, auxiliary=counted - 1, masks=False))
    terms = torch.stack(list(found.values())).unflatten(0, (len(layers), 4))
    return total, terms, gradients(total, terms, logits + boxes)


def gradients(total, terms, leaves):
    combined = (total * TOTAL).sum() + (terms * incoming(terms.shape).to(terms)).sum()
    return torch.autograd.grad(combined, leaves)


def prepared(some, dtype=torch.float32, box_dtype=torch.float32):
    return [
        [part.to(DEVICE, kind).requires_grad_() for part in every]
        for every, kind in zip(some[:2], (dtype, box_dtype), strict=True)
    ]


def fused(some, logits, boxes, module=kernels, counted=2, each_image=False, eos=0.1, normaliser=None, weights=None):
    """Total and terms."""
    weights = class_weights(logits[0].shape[2] - 1, eos) if weights is None else weights
    normaliser = None if normaliser is None else torch.tensor(float(normaliser), device=DEVICE)
    parts = some.labels, some.targets.float(), some.images, some.queries, some.placed
    total, terms, local = module.fused_terms(
        logits, boxes, *(part.to(DEVICE) for part in parts), some.sizes, weights.to(DEVICE), counted=counted, bbox=BBOX,
        giou=GIOU, ignore=None if some.ignore is None else some.ignore.to(DEVICE), normaliser=normaliser,
        each_image=each_image,
    )  # fmt: skip
    assert torch.equal(local.cpu(), some.local)
    return total, terms


def run(some, dtype=torch.float32, box_dtype=torch.float32, **how):
    logits, boxes = prepared(some, dtype, box_dtype)
    total, terms = fused(some, logits, boxes, **how)
    return total, terms, gradients(total, terms, logits + boxes)


def differences(got, want, rounding=(1e-5, 1e-5)):
    """What differs by more than rounding, in words: total, terms, and gradients by their largest element."""
    found = [
        f"{name}: {a.tolist()} for {b.tolist()}"
        for name, a, b in zip(("total", "terms"), got, want, strict=False)
        if not torch.allclose(a.cpu().double(), b.double(), rtol=1e-5, atol=1e-7, equal_nan=True)
    ]
    layers = len(got[2]) // 2
    for place, (grad, b) in enumerate(zip(got[2], want[2], strict=True)):
        a, rtol = grad.cpu().double(), rounding[place // layers]
        scale = b.nan_to_num(0, 0, 0).abs().max().item()
        close = torch.isclose(a, b, rtol=rtol, atol=rtol * scale + 1e-12, equal_nan=True)
        if not bool(close.all()):
            at = tuple((~close).nonzero()[0].tolist())
            found.append(f"gradient {place}: {int((~close).sum())} differ, at {at} {a[at]} for {b[at]}")
    return "; ".join(found)


# --- Against the torch path ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "box_dtype"), [*zip(DTYPES, DTYPES, strict=True), (torch.float16, torch.float32)])
@pytest.mark.parametrize(("each_image", "masked"), [(False, False), (True, False), (False, True), (True, True)])
def test_terms_and_gradients(dtype, box_dtype, each_image, masked):
    some = scene(masked=masked)
    got = run(some, dtype, box_dtype, each_image=each_image)
    want = reference(some, each_image=each_image)
    assert not differences(got, want, (ROUNDING[dtype], ROUNDING[box_dtype]))
    assert [grad.dtype for grad in got[2]] == [dtype] * 2 + [box_dtype] * 2


@pytest.mark.parametrize("how", [{"counted": 1}, {"normaliser": 7.5}, {"eos": 0.0}, {"eos": 1.0}], ids=str)
def test_settings(how):
    assert not differences(run(scene(masked=True), **how), reference(scene(masked=True), **how))


def test_weights_of_a_buffer_that_was_changed():
    weights = torch.tensor([0.5, 2, 1, 3, 0.25])
    assert not differences(run(scene(), weights=weights), reference(scene(), weights=weights))


def nothing_matched():
    return scene(sizes=(0, 0))


def one_image():
    return scene(sizes=(4,))


def all_matched():
    return scene(sizes=(5, 5), queries=5)


def more_targets_than_queries():
    return scene(sizes=(5, 2), queries=3)


def one_class():
    return scene(classes=1)


def no_object_only():
    """Every label is no object: it counts with that weight."""
    some = scene(classes=3)
    some.labels.fill_(3)
    return some


def sure_of_itself():
    """Logits so far apart that 1 - p is nothing beside p."""
    return scene(scale=20.0)


def extreme():
    return scene(scale=2000.0)


def spoilt():
    some = scene()
    some.logits[0][0, 3, 1] = torch.nan
    some.logits[0][1, 2, 4] = torch.nan
    some.logits[1][0, 4, 0] = torch.inf
    some.logits[1][2, 5, 2] = -torch.inf
    some.logits[1][1, 1, :] = -torch.inf
    return some


def spoilt_but_ignored():
    some = spoilt()
    masked = scene(masked=True).ignore
    for layer in some.logits:
        masked |= ~layer.isfinite().all(2)
    return some._replace(ignore=masked)


def out_of_the_question():
    some = scene()
    some.logits[0][:, :, 0] = -torch.inf
    return some


def equal_logits():
    some = scene()
    for layer in some.logits:
        layer.fill_(0.5)
        layer[:, ::2, -1] = 0.75
    return some


def met_exactly():
    """Boxes whose edges all, or some, are those of their targets: the shares are halves."""
    some = scene(sizes=(4, 4), queries=6)
    kinds = [[0.5, 0.5, 0.25, 0.25], [0.5, 0.5, 0.5, 0.25], [0.625, 0.5, 0.25, 0.25], [0.75, 0.5, 0.25, 0.5]]
    kinds = torch.tensor(kinds, dtype=torch.float64)
    some.targets.copy_(kinds.repeat(2, 1))
    for layer in some.boxes:
        layer[:] = kinds[torch.arange(6) % 2]
    return some


def thin():
    some = scene()
    some.targets[:3, 2] = 2.0**-10
    for layer in some.boxes:
        layer[:, ::2, 3] = 2.0**-9
    return some


def without_area():
    some = scene()
    some.targets[:, 2:] = 0
    some.targets[0] = 0.5
    some.targets[0, 3] = 0
    for layer in some.boxes:
        layer[:, :, 2:] = 0
        layer[0, ::2, :2] = 0.5
    return some


def far_apart():
    some = scene()
    some.targets[:, :2] += 8
    return some


EDGES = [
    nothing_matched, one_image, all_matched, more_targets_than_queries, one_class, no_object_only, sure_of_itself,
    extreme, spoilt, spoilt_but_ignored, out_of_the_question, equal_logits, met_exactly, thin, without_area, far_apart,
]  # fmt: skip


@pytest.mark.parametrize("make", EDGES, ids=lambda make: make.__name__)
def test_edges(make):
    some = make()
    assert not differences(run(some), reference(some))


def test_without_any_weight_the_class_loss_is_0():
    some = nothing_matched()
    total, terms, grads = run(some, eos=0.0)
    assert not terms[:, 0].any()
    assert total == 0
    assert not any(grad.any() for grad in grads)


def test_a_label_that_is_no_class_is_told():
    for label in (-1, 5):
        some = scene(classes=4)
        some.labels[1] = label
        with pytest.raises(RuntimeError, match=r"labels must be in \[0, 4\]"):
            fused(some, *prepared(some))


@settings(max_examples=6, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@drawn(cases(dtypes=("float32", "float16", "bfloat16")).filter(lambda case: "small" in case.tags))
def test_drawn_scenes(case):
    """Under SciPy's pairs: the kernels of the assignment have tests of their own, and break ties in another way."""
    names = ("logits", "pred_boxes", "aux_logits", "aux_boxes", "pred_masks")
    asked = {name: value for name, value in case.settings.items() if name not in ("autocast", "mask_sizes")}
    asked |= {name: value.to(DEVICE) for name, value in case.tensors.items() if name not in names}
    kind = case.settings["autocast"]

    def whole(path):
        leaves = {n: case.tensors[n].to(DEVICE).clone().requires_grad_() for n in names if n in case.tensors}
        with torch.autocast(DEVICE.type, getattr(torch, kind)) if kind else contextlib.nullcontext():
            found = set_loss(**leaves, **asked, path=path)
        return found, torch.autograd.grad(found.total, list(leaves.values()), allow_unused=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cleanroom.losses._set_layers.matched_layers", on_the_host)
        try:
            want, true_grads = whole("static")
        except (IndexError, ValueError, TypeError, RuntimeError) as error:
            with pytest.raises((type(error), RuntimeError)):
                whole("triton")
            return
        got, grads = whole("triton")
    assert torch.equal(got.queries, want.queries)
    assert torch.equal(got.targets, want.targets)
    # The torch path rounds the class loss to the dtype of the logits before it is added.
    rtol = max(1e-5, torch.finfo(case.tensors["logits"].dtype).eps)
    assert torch.allclose(got.total.double(), want.total.double(), rtol=rtol, atol=1e-6, equal_nan=True)
    assert torch.allclose(got.terms.double(), want.terms.double(), rtol=rtol, atol=1e-6, equal_nan=True)
    for a, b in zip(grads, true_grads, strict=True):
        if b is None:  # a layer that is not in the total
            assert a is None or not a.any()
            continue
        scale = b.nan_to_num(0, 0, 0).abs().max().item() if b.numel() else 0
        close = max(2e-5, 2 * torch.finfo(a.dtype).eps)
        # The torch path takes p - 1 for the own class, of which a confident logit leaves a few units of 1.
        slack = max(close * scale, 1e-7)
        assert torch.allclose(a.double(), b.double(), rtol=close, atol=slack, equal_nan=True)


def on_the_host(*given, path, **how):
    from cleanroom.assign._matching_op import matched_layers

    return matched_layers(*given, **how, path="scipy")


# --- The whole loss ------------------------------------------------------------------------------------------------


def inputs(layers=3, sizes=(3, 0, 2)):
    some = scene(sizes=sizes, layers=layers)
    logits, boxes = ([part.to(DEVICE, torch.float32).requires_grad_() for part in every] for every in some[:2])
    given = logits[0], boxes[0], some.labels.to(DEVICE), some.targets.to(DEVICE, torch.float32), some.sizes
    return given, {"aux_logits": logits[1:], "aux_boxes": boxes[1:]}, logits + boxes


def test_worked_example():
    z, p = (leaf.detach().to(DEVICE).requires_grad_() for leaf in (worked.logits(), worked.predicted()))
    found = set_loss(z, p, worked.LABELS.to(DEVICE), worked.BOXES.to(DEVICE), worked.SIZES, path="triton")
    assert found.total.item() == pytest.approx(4.0986333, rel=1e-6)
    assert found.terms.tolist() == pytest.approx([1.5455137, 0.2469046, 0.6592982, 1.5], rel=1e-6)
    norms = [slope.norm().item() for slope in torch.autograd.grad(found.total, (z, p))]
    assert norms == pytest.approx([0.4818837, 10.0685085], rel=1e-6)


@pytest.mark.parametrize("decoder_layers", [None, 2, 0])
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_whole_loss(reduction, decoder_layers):
    given, aux, leaves = inputs()
    found = []
    for path in ("triton", "static"):
        result = set_loss(*given, **aux, reduction=reduction, decoder_layers=decoder_layers, path=path)
        found.append([*result, *gradients(result.total, result.terms.unflatten(0, (3, 4)), leaves)])
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
        assert a.dtype == b.dtype


def test_masks_stay_with_torch():
    given, aux, leaves = inputs()
    draw = torch.Generator().manual_seed(1)
    pred_masks = torch.randn(3, 11, 4, 4, generator=draw).to(DEVICE).requires_grad_()
    masks = (torch.rand(5, 8, 8, generator=draw) < 0.5).to(DEVICE)
    found = []
    for path in ("triton", "static"):
        result = set_loss(*given, **aux, pred_masks=pred_masks, masks=masks, path=path)
        found.append([*result, *torch.autograd.grad(result.total, [*leaves, pred_masks])])
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", [ImageLoss, SetCriterion])
def test_criteria(monkeypatch, kind):
    (logits, boxes, labels, targets, sizes), aux, leaves = inputs()
    others = zip(aux["aux_logits"], aux["aux_boxes"], strict=True)
    outputs = {
        kind.logits_key: logits,
        "pred_boxes": boxes,
        kind.auxiliary_key: [{kind.logits_key: z, "pred_boxes": p} for z, p in others],
    }
    parts = zip(labels.split(sizes), targets.split(sizes), strict=True)
    given = [{kind.labels_key: own, "boxes": box} for own, box in parts]
    draw = torch.Generator().manual_seed(0)
    outputs["pred_masks"] = torch.randn(*logits.shape[:2], 4, 4, generator=draw).to(DEVICE)
    for one in given:
        one["masks"] = (torch.rand(len(one["boxes"]), 8, 8, generator=draw) < 0.5).to(DEVICE)
    matcher, losses = HungarianMatcher(1, 5, 2), ["boxes", "labels", "cardinality", "masks"]
    criterion = ImageLoss(matcher, 4, 0.1, losses) if kind is ImageLoss else SetCriterion(4, matcher, {}, 0.1, losses)
    criterion.to(DEVICE)
    want = criterion(outputs, given)
    monkeypatch.setattr(set_criterion, "choose_matched_path", lambda *_: "triton")
    got = criterion(outputs, given)
    assert list(got) == list(want)
    for name, value in want.items():
        assert torch.allclose(got[name], value, rtol=1e-5, atol=1e-6), name
        assert got[name].requires_grad == value.requires_grad, name
    slopes = [
        torch.autograd.grad(sum(found[name] for name in found if "loss" in name), leaves) for found in (got, want)
    ]
    for a, b in zip(*slopes, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def test_entries_of_half_boxes_are_half(monkeypatch):
    (logits, boxes, labels, targets, sizes), _, _ = inputs()
    outputs = {"logits": logits, "pred_boxes": boxes.bfloat16()}
    parts = zip(labels.split(sizes), targets.bfloat16().split(sizes), strict=True)
    given = [{ImageLoss.labels_key: own, "boxes": box} for own, box in parts]
    criterion = ImageLoss(HungarianMatcher(1, 5, 2), 4, 0.1, ["boxes", "labels"]).to(DEVICE)
    want = criterion(outputs, given)
    monkeypatch.setattr(set_criterion, "choose_matched_path", lambda *_: "triton")
    got = criterion(outputs, given)
    assert {name: value.dtype for name, value in got.items()} == {name: value.dtype for name, value in want.items()}
    assert got["loss_bbox"].dtype == torch.bfloat16


# --- Gradients that come in ----------------------------------------------------------------------------------------


def test_backward_again_with_other_factors():
    some = scene()
    logits, boxes = prepared(some)
    total, terms = fused(some, logits, boxes)
    leaves = logits + boxes
    first = torch.autograd.grad(total, leaves, retain_graph=True)
    kept = [grad.clone() for grad in first]
    third = torch.autograd.grad(total * 3, leaves, retain_graph=True)
    own = torch.autograd.grad(terms[1, 2], leaves, retain_graph=True)
    again = torch.autograd.grad(total, leaves)
    for a, b, c, d in zip(first, kept, third, again, strict=True):
        assert torch.equal(a, b)  # what was given out is not written to again
        assert torch.equal(a, d)
        assert torch.allclose(c, 3 * a, rtol=1e-6)
    assert [bool(grad.any()) for grad in own] == [False, False, False, True]


def test_small_gradients_survive_in_half_under_a_scaler():
    some = scene(classes=1)
    for layer in some.logits:
        layer[..., 0] = -16
        layer[..., 1] = 0
    some = some._replace(
        sizes=[0, 0, 0], images=some.images[:, :0], queries=some.queries[:, :0], local=some.local[:, :0]
    )
    logits, boxes = prepared(some, torch.float16)
    grads = torch.autograd.grad(fused(some, logits, boxes)[0] * 2.0**18, logits)
    assert all(grad.all() for grad in grads)  # 1e-7 / 33, times the scale


# --- Blocks, layouts, memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("elements", "columns"), [(8, 2), (16, 8), (128, 8), (128, 64)])
def test_block_sizes(monkeypatch, elements, columns):
    monkeypatch.setattr(kernels, "ELEMENTS", elements)
    monkeypatch.setattr(kernels, "COLUMNS", columns)
    monkeypatch.setattr(kernels, "PAIRS", columns)
    monkeypatch.setattr(kernels, "FINISH_IMAGES", 2)
    monkeypatch.setattr(kernels, "FINISH_TILES", 2)
    some = scene(classes=7, masked=True)
    assert not differences(run(some), reference(some))
    assert not differences(run(some, each_image=True), reference(some, each_image=True))


def framed(tensor, dtype=torch.float32):
    """The same values inside of a larger tensor of NaN, dimensions reversed in memory."""
    outer = torch.full([size + 3 for size in tensor.shape[::-1]], torch.nan, dtype=dtype, device=DEVICE)
    inner = outer[tuple(slice(1, -2) for _ in tensor.shape)].permute(*range(tensor.ndim)[::-1])
    return inner.copy_(tensor)


def apart(tensor):
    """The same integers with others between them."""
    return torch.stack([tensor, tensor - 1000], -1)[..., 0].to(DEVICE)


def test_inputs_of_any_layout():
    some = scene(masked=True)
    logits, boxes = ([framed(part).requires_grad_() for part in every] for every in some[:2])
    parts = [apart(part) for part in (some.images, some.queries, some.placed)]
    total, terms, _ = kernels.fused_terms(
        logits, boxes, apart(some.labels), framed(some.targets), *parts, some.sizes, class_weights(4, 0.1).to(DEVICE),
        counted=2, bbox=BBOX, giou=GIOU, ignore=torch.stack([some.ignore, ~some.ignore], -1)[..., 0].to(DEVICE),
    )  # fmt: skip
    assert not differences((total, terms, gradients(total, terms, logits + boxes)), reference(some))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("make", [scene, nothing_matched, all_matched], ids=lambda make: make.__name__)
def test_all_that_is_given_out_is_written(make):
    some = make()
    for each_image in (False, True):
        assert not differences(run(some, each_image=each_image), reference(some, each_image=each_image))


def bits(got):
    return [tensor.flatten().view(torch.uint8) for tensor in (*got[:2], *got[2])]


def test_bitwise_equal_on_repeat_and_in_another_order():
    natural = bits(run(scene()))
    assert all(map(torch.equal, natural, bits(run(scene()))))
    for permute in (lambda order: order[::-1], lambda order: order[1::2] + order[::2]):
        with programs_reordered(permute):
            assert all(map(torch.equal, natural, bits(run(scene()))))


def test_nothing_but_the_gradient_is_as_large_as_the_logits(allocations):
    some = scene(queries=20, classes=9)
    logits, boxes = prepared(some)
    total, _ = fused(some, logits, boxes)
    assert max(torch.Size(shape).numel() for shape in allocations) <= 2 * 3 * 20 + 1  # the owner of every query
    del allocations[:]
    torch.autograd.grad(total, logits + boxes)
    assert allocations == [tuple(part.shape) for part in logits + boxes]


# --- Compilers -----------------------------------------------------------------------------------------------------


def test_one_graph():
    given, _, leaves = inputs(sizes=(2, 1))

    def loss(*leaves):
        return set_loss(leaves[0], leaves[3], *given[2:], aux_logits=leaves[1:3], aux_boxes=leaves[4:], path="triton")[
            :2
        ]

    eager, compiled = loss(*leaves), torch.compile(loss, fullgraph=True, backend="aot_eager")(*leaves)
    assert all(map(torch.equal, eager, compiled))
    slopes = [torch.autograd.grad(found[0], leaves) for found in (eager, compiled)]
    assert all(map(torch.equal, *slopes))


def test_traces_without_values():
    given, _, _ = inputs()
    device = "cuda" if torch.backends.cuda.is_built() else "cpu"  # fake CUDA tensors need the real build
    with FakeTensorMode():
        z, p, labels, targets = (torch.empty(v.shape, dtype=v.dtype, device=device) for v in given[:4])
        found = set_loss(z.requires_grad_(), p.requires_grad_(), labels, targets, given[4], path="triton")
        grads = torch.autograd.grad(found.total, (z, p))
    assert found.terms.shape == (4,)
    assert [grad.shape for grad in grads] == [z.shape, p.shape]


def test_operator_is_what_it_says():
    some = scene()
    logits, boxes = prepared(some)
    parts = some.labels, some.targets.float(), some.images, some.queries, some.placed
    given = logits, boxes, *parts, some.sizes, class_weights(4, 0.1), None, None, 2, 5.0, 2.0, False
    utilities = "test_schema", "test_faketensor", "test_autograd_registration"
    torch.library.opcheck(torch.ops.cleanroom.set_loss.default, given, test_utils=utilities)


# --- Planted faults ------------------------------------------------------------------------------------------------

STORE = "tl.where(pair, value, 0.0), place.dtype.element_ty), mask=inside"
FAULTS = {
    "a tile's mask one short": ("inside = query < queries", "inside = query < queries - 1"),
    "the last column unread": ("counted[:, None] & (column < columns)", "counted[:, None] & (column < columns - 1)"),
    "the largest of the last block only": ("now = tl.maximum(most, ", "now = tl.maximum(-_INFINITY, "),
    "sums not carried along": ("every = every * shrink +", "every = every +"),
    "equal ends are the hull's": ("tl.where(upper == half, 0.5, 0.0)", "0.0"),
    "equal logits are no object": ("(last > most_class)", "(last >= most_class)"),
    "ignored queries count": ("counted = inside & (ignored == 0)", "counted = inside"),
    "background not zeroed": (STORE, "value, place.dtype.element_ty), mask=pair"),
    "the last tile is the only one": ("sums += tl.sum(tl.load", "sums = tl.sum(tl.load"),
    "pairs of a block lost": ("inside = pair < pairs", "inside = pair < pairs - 1"),
    "not divided": ("return tl.div_rn(found, norm)", "return found"),
}


def of_all_kinds(module, monkeypatch):
    """What differs in the first of scenes of every kind that has it, with blocks that are smaller than the data."""
    for name, value in (("ELEMENTS", 16), ("COLUMNS", 4), ("FINISH_TILES", 2)):
        monkeypatch.setattr(module, name, value)
    for some in (met_exactly(), equal_logits(), scene(masked=True)):
        logits, boxes = prepared(some)
        parts = some.labels, some.targets.float(), some.images, some.queries, some.placed
        labels, targets, *_ = given = [part.to(DEVICE) for part in parts]
        weights, ignore = class_weights(4, 0.1).to(DEVICE), None if some.ignore is None else some.ignore.to(DEVICE)
        total, terms, _, owners, norms = module._set_loss(
            logits, boxes, *given, some.sizes, weights, ignore, None, 2, BBOX, GIOU, False
        )  # fmt: skip
        coming = torch.tensor(TOTAL, device=DEVICE), incoming(terms.shape).to(terms)
        grads = module._set_loss_backward(
            *coming, logits, boxes, labels, targets, owners, norms, weights, ignore, 2, BBOX, GIOU
        )  # fmt: skip
        found = differences((total, terms, grads[0] + grads[1]), reference(some))
        if found:
            return found
    return ""


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(planted, monkeypatch, fault):
    assert of_all_kinds(planted(kernels, FAULTS[fault]), monkeypatch)


@pytest.mark.usefixtures("poisoned")
def test_nothing_planted_nothing_caught(planted, monkeypatch):
    assert not of_all_kinds(planted(kernels), monkeypatch)


# --- The real compiler ---------------------------------------------------------------------------------------------


def launches():
    """Every kernel variant once; see `compiling`. Calls below the check of labels, as nothing runs."""
    for dtype, columns, masked, given, each_image in (
        (torch.float32, 4, False, False, False),
        (torch.bfloat16, 92, True, False, True),
        (torch.float16, 366, False, True, False),
    ):
        logits = [torch.zeros(2, 5, columns, dtype=dtype, requires_grad=True)]
        boxes = [torch.zeros(2, 5, 4, dtype=dtype, requires_grad=True)]
        pairs, labels = torch.zeros(1, 3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
        ignore = torch.zeros(2, 5, dtype=torch.bool) if masked else None
        normaliser = torch.ones(()) if given else None
        total, terms, *_ = kernels._set_loss(
            logits, boxes, labels, torch.zeros(3, 4), pairs, pairs, pairs, [1, 2], torch.ones(columns), ignore,
            normaliser, 1, BBOX, GIOU, each_image,
        )  # fmt: skip
        torch.autograd.grad(total.sum(), logits + boxes, retain_graph=True)
        torch.autograd.grad(terms.sum(), logits + boxes)
