"""YOLOX's fused loss against the torch path: terms and gradients of a given assignment, and of the whole loss."""

import contextlib
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from cases.yolox_loss import cases
from cleanroom.assign.simota import simota_assign
from cleanroom.kernels import yolox_decode as yolox_decode_kernel
from cleanroom.kernels import yolox_loss as kernels
from cleanroom.losses import _yolox_total
from cleanroom.losses._yolox_terms import Rows, map_terms
from cleanroom.losses._yolox_total import Found, divide, gather
from cleanroom.losses.yolox import YOLOXLoss, yolox_decoded_loss, yolox_loss
from cleanroom.yolox_boxes import make_grid, raw_boxes, yolox_decode
from tests.cleanroom.test_yolox_loss import ERAS, LEVELS, VALUES, random_inputs
from tests.cleanroom.test_yolox_loss import inputs as worked_inputs
from tests.kernels.conftest import DEVICE, programs_reordered

ROOT = Path(__file__).parents[2]
STRIDES, SIDES = (8, 16), (6, 3)  # 45 anchors
ANCHORS = sum(side * side for side in SIDES)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = {"planes": torch.contiguous_format, "rows": torch.channels_last}
#: Gradients that come in through total, box, objectness, class and L1 term.
INCOMING = (0.75, -1.5, 0.5, 2.0, 1.25)


class Scene(NamedTuple):
    """Raw maps and what their anchors were assigned, in float64."""

    maps: list[Tensor]
    labels: Tensor
    matched_gt: Tensor
    ignore: Tensor | None = None

    @property
    def found(self) -> Found:
        fg_mask = self.matched_gt >= 0
        positive = fg_mask if self.ignore is None else fg_mask & ~self.ignore
        truths = (self.labels.sum(2) > 0).sum(1)
        return Found(fg_mask, self.matched_gt, positive, positive.sum(1), self.ignore, truths, self.labels)


def scene(seed=0, images=2, classes=3, share=0.3, masked=False):
    """Boxes near to their anchors; values that every dtype under test holds."""
    draw = torch.Generator().manual_seed(seed)
    maps = [torch.randn(images, 5 + classes, side, side, generator=draw).half().double() for side in SIDES]
    labels = torch.zeros(images, 4, 5, dtype=torch.float64)
    labels[:, :3, 0] = torch.randint(classes, (images, 3), generator=draw).double()
    labels[:, :3, 1:3] = (torch.rand(images, 3, 2, generator=draw) * 48).round()
    labels[:, :3, 3:] = (torch.rand(images, 3, 2, generator=draw) * 16 + 4).round()
    matched = torch.randint(3, (images, ANCHORS), generator=draw)
    matched = torch.where(torch.rand(images, ANCHORS, generator=draw) < share, matched, -1)
    matched[:, 0] = matched[:, 0].clamp(min=0) if share else -1
    ignore = torch.rand(images, ANCHORS, generator=draw) < 0.3 if masked else None
    return Scene([m.to(torch.bfloat16).double() for m in maps], labels, matched, ignore)


def weigh(losses, use_l1, incoming=INCOMING):
    pairs = zip(losses[: 5 if use_l1 else 4], incoming, strict=False)
    return sum((loss * weight).sum() for loss, weight in pairs if weight is not None)


def reference(given, use_l1=True, each_image=False, incoming=INCOMING):
    """The six losses and the gradients of the maps, on the static path in float64."""
    maps = [level.detach().double().requires_grad_() for level in given.maps]
    assigned = gather(given.found, maps[0].shape[1] - 5, sparse=True)
    some = assigned.targets.foreground
    classes = torch.cat([level.detach()[:, 5:].flatten(2) for level in maps], 2).mT
    objectness = torch.cat([level.detach()[:, 4].flatten(1) for level in maps], 1)
    cells = torch.stack(make_grid(maps, STRIDES))[:, some.anchor]
    rows = Rows(objectness, some.of(raw_boxes(maps).mT), some.of(classes), cells)
    losses = divide(map_terms(rows, assigned.targets, maps, use_l1=use_l1, each_image=each_image), assigned, use_l1)
    return losses, torch.autograd.grad(weigh(losses, use_l1, incoming), maps)


def prepared(given, dtype=torch.float32, layout="planes"):
    """Leaves of that dtype and memory order."""
    return [level.to(DEVICE, dtype).contiguous(memory_format=LAYOUTS[layout]).requires_grad_() for level in given.maps]


def fused(given, maps, use_l1=True, each_image=False, module=kernels):
    found = given.found
    arguments = found.labels.float(), found.matched_gt, found.positives, found.num_gt
    arguments = (maps, *(part.to(DEVICE) for part in arguments), STRIDES)
    ignore = None if given.ignore is None else given.ignore.to(DEVICE)
    return module.fused_terms(*arguments, ignore=ignore, use_l1=use_l1, each_image=each_image)


def run(given, dtype=torch.float32, layout="planes", use_l1=True, each_image=False, incoming=INCOMING):
    maps = prepared(given, dtype, layout)
    losses = fused(given, maps, use_l1, each_image)
    return losses, torch.autograd.grad(weigh(losses, use_l1, incoming), maps)


def differences(got, want, rtol=1e-5):
    """What differs by more than rounding, in words: six losses, and gradients by their largest element."""
    (losses, grads), (true_losses, true_grads) = got, want
    names = ("total", "iou", "obj", "cls", "l1", "num_fg")
    found = [
        f"{name}: {a.tolist()} for {b.tolist()}"
        for name, a, b in zip(names, losses, true_losses, strict=True)
        if not torch.allclose(a.cpu().double(), b.double(), rtol=1e-5, atol=1e-7, equal_nan=True)
    ]
    for place, (grad, b) in enumerate(zip(grads, true_grads, strict=True)):
        a = grad.cpu().double()
        scale = b.nan_to_num(0, 0, 0).abs().max().item()
        close = torch.isclose(a, b, rtol=rtol, atol=rtol * scale + 1e-12, equal_nan=True)
        if not bool(close.all()):
            at = tuple((~close).nonzero()[0].tolist())
            found.append(f"gradient {place}: {int((~close).sum())} differ, at {at} {a[at]} for {b[at]}")
    return "; ".join(found)


#: Rounding of a gradient to the dtype of the maps.
ROUNDING = {torch.float32: 1e-5, torch.float16: 6e-4, torch.bfloat16: 2.1e-3}


# --- Against the torch path ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("use_l1", "each_image", "masked"), [(True, False, False), (False, True, True), (True, True, False)]
)
def test_terms_and_gradients(dtype, layout, use_l1, each_image, masked):
    some, how = scene(masked=masked), {"use_l1": use_l1, "each_image": each_image}
    got = run(some, dtype, layout, **how)
    assert not differences(got, reference(some, **how), ROUNDING[dtype])
    assert all(loss.dtype == torch.float32 for loss in got[0])
    assert [grad.dtype for grad in got[1]] == [dtype] * 2
    assert [grad.stride() for grad in got[1]] == [level.stride() for level in prepared(some, dtype, layout)]


def changed(seed=0, **how):
    """A scene, and its parts to be changed in place."""
    some = scene(seed, **how)
    return some, some.maps, some.labels


def no_positive():
    return scene(share=0)


def all_positive():
    return scene(share=2)


def empty_image():
    some = scene(images=3)
    some.labels[1], some.matched_gt[1] = 0, -1
    return some


def one_class():
    return scene(classes=1)


def many_classes():
    return scene(classes=20)


def extreme_logits():
    some, maps, _ = changed()
    for level in maps:
        level[:, 4:] *= 60
    return some


def thin_boxes():
    some, maps, labels = changed()
    labels[:, 0, 3], labels[:, 1, 4] = 2.0**-10, 0
    maps[0][:, 2] -= 8
    return some


def without_area():
    some, maps, labels = changed()
    labels[..., 3:] = 0
    for level in maps:
        level[:, 2:4] = -200
    return some


def specks():
    """Boxes around the origin with areas not far above what keeps a denominator from 0."""
    some, maps, labels = changed()
    labels[:, :3, 1:] = torch.tensor([0.0, 0, 2.0**-22, 2.0**-22], dtype=torch.float64)
    maps[0][:, :4, 0, 0] = torch.tensor([0.0, 0, -16.625, -16.625], dtype=torch.float64)  # about 2 ** -21 pixels
    return some


def met_exactly():
    """Boxes whose edges all, or some, are those of their ground truths: the shares are halves."""
    some, maps, labels = changed(share=2)
    labels[:, :3, 1:] = torch.tensor([[8.0, 8, 8, 8], [8, 8, 16, 8], [12, 8, 16, 8]], dtype=torch.float64)
    for level, stride in zip(maps, STRIDES, strict=True):
        side = level.shape[2]
        at = torch.arange(side, dtype=torch.float64)
        level[:, 0], level[:, 1] = 8 / stride - at[None, :], 8 / stride - at[:, None]
        level[:, 2:4] = 0
    return some


def infinite():
    """Certain objectness, and a class that is out of the question, on background and on foreground."""
    some, maps, _ = changed(share=0)
    maps[0][0, 4, 0, 1], maps[1][1, 4, 0, 0] = torch.inf, -torch.inf
    some.matched_gt[0, 2] = 0
    maps[0][0, 5, 0, 2] = -torch.inf
    maps[0][0, 4, 0, 2] = -torch.inf
    return some


def not_a_number():
    some, maps, _ = changed()
    some.matched_gt[0, 1], some.matched_gt[0, 3] = -1, 1
    maps[0][0, 5:, 0, 1] = torch.nan  # classes of background: nobody looks
    maps[0][0, 0, 0, 1] = torch.nan
    maps[0][0, 2, 0, 3] = torch.nan  # a box
    maps[1][0, 4, 0, 0] = torch.nan
    return some


def padding():
    some, _, labels = changed()
    labels[:, 3] = torch.nan
    return some


EDGES = [
    no_positive, all_positive, empty_image, one_class, many_classes, extreme_logits, thin_boxes, specks, without_area,
    met_exactly, infinite, not_a_number, padding,
]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("make", EDGES, ids=lambda make: make.__name__)
def test_edges(make, layout):
    # In float64 the target ln(w / s + 1e-8) of a box that is met exactly is not 0.
    some, use_l1 = make(), make is not met_exactly
    assert not differences(run(some, layout=layout, use_l1=use_l1), reference(some, use_l1))


@settings(max_examples=4, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(cases(dtypes=("float32", "float16", "bfloat16")).filter(lambda case: "small" in case.tags))
def test_drawn_scenes(case):
    """Under the torch assigner: its kernels have tests of their own, and take their time here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_yolox_total, "simota_assign", lambda *a, **k: simota_assign(*a, **k | {"path": "static"}))
        check_drawn_scene(case)


def check_drawn_scene(case):
    asked = {name: value for name, value in case.settings.items() if name != "autocast"}
    labels = case.tensors["labels"].to(DEVICE)
    kind = case.settings["autocast"]

    def whole(path):
        maps = [case.tensors[name].to(DEVICE).clone().requires_grad_() for name in case.tensors if name != "labels"]
        context = torch.autocast(DEVICE.type, getattr(torch, kind)) if kind else contextlib.nullcontext()
        with context:
            found = yolox_loss(labels, maps, **asked, path=path)
        return found, torch.autograd.grad(found.total_loss, maps)

    try:
        want, true_grads = whole("static")
    except (IndexError, ValueError) as error:
        with pytest.raises(type(error)):
            whole("triton")
        return
    got, grads = whole("triton")
    assert torch.equal(got.matched_gt, want.matched_gt)
    for name, a, b in zip(got._fields[:6], got[:6], want[:6], strict=True):
        assert a.dtype == b.dtype, name
        rtol = max(1e-5, 2 * torch.finfo(a.dtype).eps)
        assert torch.allclose(a.double(), b.double(), rtol=rtol, atol=1e-6, equal_nan=True), (name, a, b)
    for a, b in zip(grads, true_grads, strict=True):
        scale = b.nan_to_num(0, 0, 0).abs().max().item()
        rtol = max(2e-5, 2 * torch.finfo(a.dtype).eps)
        assert torch.allclose(a.double(), b.double(), rtol=rtol, atol=rtol * scale, equal_nan=True)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_the_assigner_is_given(monkeypatch, dtype, layout):
    monkeypatch.setattr(yolox_decode_kernel, "BLOCK", 16)
    maps = prepared(scene(), dtype, layout)
    maps[0].data[0, 2, 0, :3] = torch.tensor([200.0, -200.0, torch.nan])
    boxes, objectness, grid = found = yolox_decode_kernel.decoded(maps, STRIDES)
    assert not any(part.requires_grad for part in found)
    want = yolox_decode([level.detach() for level in maps], STRIDES)
    assert torch.equal(grid, torch.cat([want.x_shifts, want.y_shifts, want.strides]))
    assert torch.equal(objectness, want.outputs[..., 4])
    assert torch.equal(boxes[..., :2], want.outputs[..., :2])
    # Exponentials are within a unit in the last place of each other.
    close = {"rtol": 2 * torch.finfo(dtype).eps, "atol": 0.0, "equal_nan": True}
    assert torch.allclose(boxes, want.outputs[..., :4], **close)


# --- The whole loss ------------------------------------------------------------------------------------------------


def inputs(seed=3, dtype=torch.float32):
    labels, maps, how = random_inputs(seed, side=32, dtype=dtype)
    return labels.to(DEVICE), [level.detach().to(DEVICE).requires_grad_() for level in maps], how


@pytest.mark.parametrize("variant", VALUES)
def test_worked_example(variant):
    labels, maps = worked_inputs()
    maps = [level.detach().to(DEVICE).requires_grad_() for level in maps]
    how = {"strides": (8, 16), "num_classes": 2, "path": "triton", **ERAS[variant]}
    found = yolox_loss(labels.to(DEVICE), maps, use_l1=True, **how)
    _, iou, obj, cls, l1, total = VALUES[variant]
    assert [value.item() for value in found[:5]] == pytest.approx([total, iou, obj, cls, l1], abs=2e-6)
    slopes = torch.autograd.grad(found.total_loss, maps)
    assert [grad.norm().item() for grad in slopes] == pytest.approx(LEVELS[variant], rel=1e-6)


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_decoded_rows(reduction):
    labels, maps, how = inputs()
    decoded = yolox_decode([level.detach() for level in maps], how["strides"])
    raw = torch.cat([level.detach()[:, :4].flatten(2).mT for level in maps], 1)
    ignore = torch.rand(raw.shape[:2], generator=torch.Generator().manual_seed(0)).to(DEVICE) < 0.2

    def whole(path, **more):
        rows, values = decoded.outputs.clone().requires_grad_(), raw.clone().requires_grad_()
        found = yolox_decoded_loss(
            labels, rows, *decoded[1:], values, num_classes=3, reduction=reduction, path=path, **more
        )
        return found, torch.autograd.grad(weigh(found, True), (rows, values))

    for more in ({}, {"ignore_mask": ignore}):
        (got, grads), (want, true_grads) = whole("triton", **more), whole("static", **more)
        assert torch.equal(got.matched_gt, want.matched_gt)
        assert got.fg_mask.any()
        for a, b in zip([*got[:6], *grads], [*want[:6], *true_grads], strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def test_head():
    labels, maps, how = inputs()
    decoded = yolox_decode([level.detach() for level in maps], how["strides"])
    found = []
    for path in ("triton", "static"):
        rows = decoded.outputs.clone().requires_grad_()
        of_head = YOLOXLoss(3, path=path)(None, *([part] for part in decoded[1:]), labels, rows, [], torch.float32)
        assert of_head[4] == 0.0
        found.append([*of_head[:4], torch.autograd.grad(of_head[0], rows)[0], torch.tensor(float(of_head[5]))])
    for a, b in zip(*found, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


def test_without_l1_that_term_is_0_and_has_no_gradient():
    labels, maps, how = inputs()
    found = yolox_loss(labels, maps, **how, path="triton")
    assert (found.l1_loss.item(), found.l1_loss.requires_grad) == (0, False)
    assert not found.num_fg.requires_grad


def test_traces_without_values():
    labels, maps, how = inputs()
    device = "cuda" if torch.backends.cuda.is_built() else "cpu"  # fake CUDA tensors need the real build
    with FakeTensorMode():
        fake = [torch.empty(level.shape, device=device, requires_grad=True) for level in maps]
        found = yolox_loss(torch.empty(labels.shape, device=device), fake, **how, use_l1=True, path="triton")
        grads = torch.autograd.grad(found.total_loss, fake)
    assert found.total_loss.device.type == device
    assert [grad.shape for grad in grads] == [level.shape for level in maps]


# --- Gradients that come in ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("term", range(5))
def test_each_term_alone(term):
    incoming = [None] * 5
    incoming[term] = 1.5
    assert not differences(run(scene(), incoming=incoming), reference(scene(), incoming=incoming))


def test_each_image_by_its_own_factor():
    factors = torch.tensor([1.0, -2.0, 0.5, 4.0], device=DEVICE)[: len(scene().maps[0])]
    incoming = [factors * weight for weight in INCOMING]
    found = run(scene(), each_image=True, incoming=incoming)
    assert not differences(found, reference(scene(), each_image=True, incoming=[part.cpu() for part in incoming]))


def test_backward_again_with_other_factors():
    some = scene()
    maps = prepared(some)
    losses = fused(some, maps)
    first = torch.autograd.grad(losses[0], maps, retain_graph=True)
    kept = [grad.clone() for grad in first]
    third = torch.autograd.grad(losses[0] * 3, maps, retain_graph=True)
    again = torch.autograd.grad(losses[0], maps)
    for a, b, c, d in zip(first, kept, third, again, strict=True):
        assert torch.equal(a, b)  # what was given out is not written to again
        assert torch.equal(a, d)
        assert torch.allclose(c, 3 * a, rtol=1e-6)


def test_small_gradients_survive_in_half_under_a_scaler():
    some = scene()
    for level in some.maps:
        level[:, 4:] = (level[:, 4:] - 12).half()  # probabilities of 6e-6, gradients of 1e-7
    maps = prepared(some, torch.float16)
    grads = torch.autograd.grad(fused(some, maps, use_l1=False)[0] * 2.0**14, maps)
    _, want = reference(some, use_l1=False, incoming=(2.0**14,))
    for a, b in zip(grads, want, strict=True):
        assert torch.allclose(a.cpu().double()[:, 4], b[:, 4], rtol=1e-3)
        assert a[:, 4].all()


# --- Blocks, layouts, memory ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("block", [(8, 2), (16, 8), (64, 64)])  # 36 and 9 anchors, 8 channels
def test_block_sizes(monkeypatch, block, layout):
    monkeypatch.setattr(kernels, "PLANES", block)
    monkeypatch.setattr(kernels, "ROWS", block)
    monkeypatch.setattr(kernels, "FINISH_BLOCK", block[0])
    some = scene(masked=True)
    assert not differences(run(some, layout=layout), reference(some))


def test_more_images_than_are_counted_at_a_time():
    some = scene(images=70, classes=1)
    assert not differences(run(some), reference(some))


def framed(tensor, dtype=torch.float32):
    """The same values inside of a larger tensor of NaN, dimensions reversed in memory."""
    outer = torch.full([size + 3 for size in tensor.shape[::-1]], torch.nan, dtype=dtype, device=DEVICE)
    inner = outer[tuple(slice(1, -2) for _ in tensor.shape)].permute(*range(tensor.ndim)[::-1])
    return inner.copy_(tensor)


def test_inputs_of_any_layout():
    some = scene(masked=True)
    found = some.found
    maps = [framed(level).requires_grad_() for level in some.maps]
    matched = torch.stack([found.matched_gt, found.matched_gt], -1)[..., 0].mT.contiguous().mT.to(DEVICE)
    ignore = torch.stack([some.ignore, ~some.ignore], -1)[..., 0].to(DEVICE)
    counts = found.positives.to(DEVICE), found.num_gt.to(DEVICE)
    losses = kernels.fused_terms(maps, framed(found.labels), matched, *counts, STRIDES, ignore=ignore, use_l1=True)
    grads = torch.autograd.grad(weigh(losses, True), maps)
    assert not differences((losses, grads), reference(some))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("make", [scene, no_positive, empty_image], ids=lambda make: make.__name__)
def test_all_that_is_given_out_is_written(make):
    some = make()
    assert not differences(run(some), reference(some))
    assert not differences(run(some, layout="rows", each_image=True), reference(some, each_image=True))
    labels, maps, how = inputs()
    decoded = yolox_decode([level.detach() for level in maps], how["strides"])
    raw = torch.cat([level.detach()[:, :4].flatten(2).mT for level in maps], 1).requires_grad_()
    rows = decoded.outputs.requires_grad_()
    found = yolox_decoded_loss(labels, rows, *decoded[1:], raw, num_classes=3, path="triton")
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(found.total_loss, (rows, raw)))


def bits(got):
    return [tensor.flatten().view(torch.uint8) for tensor in (*got[0], *got[1])]


def test_bitwise_equal_on_repeat():
    assert all(map(torch.equal, bits(run(scene())), bits(run(scene()))))


def test_order_of_programs_does_not_matter():
    natural = bits(run(scene(share=0.8)))
    for permute in (lambda order: order[::-1], lambda order: order[1::2] + order[::2]):
        with programs_reordered(permute):
            assert all(map(torch.equal, natural, bits(run(scene(share=0.8)))))


def test_nothing_but_the_gradient_is_as_large_as_the_maps(allocations):
    some = scene()
    maps = prepared(some)
    losses = fused(some, maps)
    assert max(map(torch.Size.numel, map(torch.Size, allocations))) <= 2 * 2 * 4  # images, tiles, terms
    del allocations[:]
    torch.autograd.grad(losses[0], maps)
    assert [shape for shape in allocations if len(shape) == 4] == [tuple(level.shape) for level in maps]
    assert len(allocations) == 3  # and what stands for the gradient of raw values: nothing
    del allocations[:]
    fused(some, [level.detach() for level in maps])
    assert not [shape for shape in allocations if len(shape) == 4]


# --- Compilers -----------------------------------------------------------------------------------------------------


def test_one_graph():
    labels, maps, how = inputs()
    eager = yolox_loss(labels, maps, **how, use_l1=True, path="triton")
    compiled = torch.compile(
        lambda *maps: yolox_loss(labels, maps, **how, use_l1=True, path="triton")[:6],
        fullgraph=True,
        backend="aot_eager",
    )(*maps)
    assert all(map(torch.equal, compiled, eager[:6]))
    slopes = [torch.autograd.grad(found[0] + found[4], maps) for found in (compiled, eager)]
    assert all(map(torch.equal, *slopes))


@pytest.mark.parametrize("module_case", ["values", "gradients"])
def test_operator_is_sound(module_case):
    some, found = scene(), scene().found
    arguments = (
        prepared(some), None, None, found.labels.float(), found.matched_gt, found.positives, found.num_gt, None,
        [8.0, 16.0], True, False,
    )  # fmt: skip
    utilities = {"values": ("test_schema", "test_faketensor"), "gradients": ("test_autograd_registration",)}
    torch.library.opcheck(torch.ops.cleanroom.yolox_loss.default, arguments, test_utils=utilities[module_case])


# --- Planted faults ------------------------------------------------------------------------------------------------

CHANNELS = "for first in range(0, classes + 5, BLOCK_CHANNELS)"
FAULTS = {
    "a tile's mask one short": ("inside = anchor < anchors", "inside = anchor < anchors - 1"),
    "the last class unread": ("read = (channel < classes)", "read = (channel < classes - 1)"),
    "equal ends are the target's": ("tl.where(end == other_end, 0.5, 0.0)", "0.0"),
    "zeros not written": (CHANNELS, "for first in range(0, 4, BLOCK_CHANNELS)"),
    "a tile's sum lost": ("tl.store(target + 1, ", "tl.store(target + 2, "),
    "the last tile is the only one": ("sums += tl.load", "sums = tl.load"),
    "ignored anchors count": ("counted = inside & (ignored == 0)", "counted = inside"),
    "incoming gradient of the total lost": ("found += tl.load(term", "found = tl.load(term"),
    "not divided": ("return tl.div_rn(found, count)", "return found"),
}


def of_all_kinds(module, monkeypatch):
    """What differs over scenes of every kind, with blocks that are smaller than the data."""
    monkeypatch.setattr(module, "PLANES", (16, 4))
    monkeypatch.setattr(module, "FINISH_BLOCK", 4)
    found = []
    for some, use_l1 in ((scene(masked=True), True), (met_exactly(), False)):
        terms = some.found
        maps = prepared(some)
        ignore = None if some.ignore is None else some.ignore.to(DEVICE)
        arguments = [
            part.to(DEVICE) for part in (terms.labels.float(), terms.matched_gt, terms.positives, terms.num_gt)
        ]
        losses = module._yolox_loss(maps, None, None, *arguments, ignore, list(STRIDES), use_l1, False)
        incoming = [torch.tensor(value, device=DEVICE) for value in INCOMING]
        how = list(STRIDES), use_l1
        grads, _ = module._yolox_loss_backward(incoming, maps, None, None, *arguments[:3], ignore, *how)
        found.append(differences((losses, grads), reference(some, use_l1)))
    return "; ".join(filter(None, found))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(planted, monkeypatch, fault):
    assert of_all_kinds(planted(kernels, FAULTS[fault]), monkeypatch)


@pytest.mark.usefixtures("poisoned")
def test_nothing_planted_nothing_caught(planted, monkeypatch):
    assert not of_all_kinds(planted(kernels), monkeypatch)


# --- The real compiler ---------------------------------------------------------------------------------------------


def launches():
    """Every kernel variant once; see `compiling`."""
    for dtype, layout, use_l1, each_image, masked in (
        (torch.float32, torch.contiguous_format, True, False, False),
        (torch.bfloat16, torch.contiguous_format, False, False, True),
        (torch.float16, torch.channels_last, True, True, True),
    ):
        maps = [torch.zeros(2, 8, 4, 4, dtype=dtype).contiguous(memory_format=layout).requires_grad_() for _ in STRIDES]
        yolox_decode_kernel.decoded(maps, STRIDES)
        anchors = torch.zeros(2, 32, dtype=torch.int64)
        ignore = anchors > 0 if masked else None
        given = torch.zeros(2, 3, 5), anchors, anchors[:, 0], anchors[:, 0]
        found = kernels.fused_terms(maps, *given, STRIDES, ignore=ignore, use_l1=use_l1, each_image=each_image)
        torch.autograd.grad(found[0].sum(), maps, retain_graph=True)
        torch.autograd.grad(sum(term.sum() for term in found[1:5]), maps)
        if not use_l1:
            continue
        rows = torch.zeros(2, 32, 8, dtype=dtype, requires_grad=True)
        raw = None if masked else torch.zeros(2, 32, 4, dtype=dtype, requires_grad=True)
        more = {"cells": torch.zeros(3, 32), "raw": raw, "use_l1": raw is not None}
        found = kernels.fused_terms([rows.mT.unsqueeze(2)], *given, (1.0,), **more)
        torch.autograd.grad(found[0], rows)
