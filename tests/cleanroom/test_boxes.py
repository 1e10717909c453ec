"""Anchor points, codecs and the expectation decode against boxes.md, sections 1, 2, 3 and 6."""

import pytest
import torch
from torch import nan

from cleanroom import dfl_decode as dfl_module
from cleanroom.boxes import bbox2dist, dfl_decode, dist2bbox, make_anchors

INF = float("inf")
HALVES = (torch.float16, torch.bfloat16)
DTYPES = (torch.float32, torch.float64, *HALVES)
POINT = torch.tensor([2.5, 3.5])
FORMS = pytest.mark.parametrize("xywh", [False, True], ids=["corners", "centres"])


def maps(*sizes, dtype=torch.float32, batch=1):
    return [torch.zeros(batch, 3, *size, dtype=dtype) for size in sizes]


def weights(tensor):
    """Different in every place, and exact in every dtype."""
    return ((torch.arange(tensor.numel()) * 7 % 11 + 5) / 8).view(tensor.shape).to(tensor.dtype)


def with_gradients(function, *inputs):
    leaves = [tensor.clone().requires_grad_() for tensor in inputs]
    value = function(*leaves)
    return value.detach(), torch.autograd.grad(value, leaves, weights(value))


# ------------------------------------------------------------------------------------------------------ make_anchors


def test_anchors_of_the_worked_example():
    points, strides = make_anchors(maps((2, 3), (1, 2)), [8, 16])
    rows = [[0.5, 0.5], [1.5, 0.5], [2.5, 0.5], [0.5, 1.5], [1.5, 1.5], [2.5, 1.5], [0.5, 0.5], [1.5, 0.5]]
    assert points.tolist() == rows
    assert strides.tolist() == [[8]] * 6 + [[16]] * 2
    assert not points.requires_grad


@pytest.mark.parametrize("strides", [torch.tensor([8, 16]), torch.tensor([8.0, 16, 32]), (8, 16.0)], ids=str)
def test_strides_may_be_a_tensor_and_too_many(strides):
    _, found = make_anchors(maps((2, 3), (1, 2)), strides)
    assert found.dtype == torch.float32
    assert found.flatten().tolist() == [8] * 6 + [16] * 2


def test_sizes_may_stand_for_maps():
    expected = make_anchors(maps((2, 3), (1, 2)), [8.5, 16])
    sizes = torch.tensor([[2.0, 3], [1, 2]])
    for found, wanted in zip(make_anchors(sizes, [8.5, 16]), expected, strict=True):
        assert torch.equal(found, wanted)
    points, strides = make_anchors(sizes.long(), [8.5, 16])
    assert torch.equal(points, expected[0])
    assert strides.dtype == torch.int64
    assert strides[0] == 8


def test_indices_round_before_the_offset():
    points, _ = make_anchors(maps((1, 260), dtype=torch.bfloat16), [8])
    assert points[255:258, 0].tolist() == [256, 256, 256]
    points, _ = make_anchors(maps((1030, 1), dtype=torch.float16), [8])
    assert points[1024:1026, 1].tolist() == [1024, 1026]


def test_dtype_is_that_of_the_first_map():
    points, strides = make_anchors([*maps((1, 2), dtype=torch.bfloat16), *maps((1, 1))], [8.3, 16])
    assert points.dtype == strides.dtype == torch.bfloat16
    assert strides[0] == torch.tensor(8.3, dtype=torch.bfloat16)


def test_strides_on_a_device_take_the_dtype_of_the_maps():
    feats = [torch.zeros(1, 3, 1, 2, dtype=torch.float16, device="meta")]
    points, strides = make_anchors(feats, torch.tensor([8.0], dtype=torch.float64, device="meta"))
    assert points.dtype == strides.dtype == torch.float16
    assert strides.shape == (2, 1)


def test_maps_without_cells_and_batches_without_images():
    points, strides = make_anchors(maps((0, 3), (1, 2)), [8, 16])
    assert points.tolist() == [[0.5, 0.5], [1.5, 0.5]]
    assert strides.flatten().tolist() == [16, 16]
    points, strides = make_anchors(maps((0, 3)), [8])
    assert points.shape == (0, 2)
    assert strides.shape == (0, 1)
    assert len(make_anchors(maps((2, 3), batch=0), [8])[0]) == 6


def test_offset():
    points, _ = make_anchors(maps((2, 2), dtype=torch.float64), [8], 0.3)
    assert points.tolist() == [[0.3, 0.3], [1.3, 0.3], [0.3, 1.3], [1.3, 1.3]]


@pytest.mark.parametrize(
    ("feats", "strides", "error", "message"),
    [
        (maps((2, 2), (1, 1)), [8], IndexError, "strides has 1 numbers for 2 maps"),
        ([torch.zeros(1, 2, 2)], [8], ValueError, r"feats\[0\]"),
        ([], [8], ValueError, "feats is empty"),
        (None, [8], TypeError, "feats"),
        (torch.zeros(2, 3), [8, 16], ValueError, "feats must be sizes"),
        (torch.tensor([[-1, 2]]), [8], ValueError, "feats must not hold negative"),
        (maps((2, 2)), 8, TypeError, "strides"),
        (maps((2, 2)), torch.tensor([[8.0]]), ValueError, "strides must be a vector"),
    ],
)
def test_wrong_maps_and_strides(feats, strides, error, message):
    with pytest.raises(error, match=message):
        make_anchors(feats, strides)


# ------------------------------------------------------------------------------------------------ dist2bbox, bbox2dist


def test_decoding_the_worked_examples():
    proper, inverted = torch.tensor([1, 2, 3, 4.5]), torch.tensor([-1, -2, 0.5, 1])
    assert dist2bbox(proper, POINT, xywh=False).tolist() == [1.5, 1.5, 5.5, 8]
    assert dist2bbox(proper, POINT).tolist() == [3.5, 4.75, 4, 6.5]
    assert dist2bbox(inverted, POINT, xywh=False).tolist() == [3.5, 5.5, 3, 4.5]


def test_gradients_of_decoding():
    _, (distance, point) = with_gradients(lambda d, a: dist2bbox(d, a).sum()[None], torch.ones(4), POINT)
    assert (distance / 0.625).tolist() == [0.5, 0.5, 1.5, 1.5]
    assert (point / 0.625).tolist() == [1, 1]


def test_encoding_the_worked_examples():
    box, flat = torch.tensor([1.5, 1.5, 5.5, 8]), torch.full((4,), 3.0)
    assert bbox2dist(POINT, box).tolist() == [1, 2, 3, 4.5]
    assert bbox2dist(POINT, box, 4).tolist() == torch.tensor([1, 2, 3, 3.99]).tolist()
    assert bbox2dist(POINT, flat).tolist() == [-0.5, 0.5, 0.5, -0.5]
    assert bbox2dist(POINT, flat, 15).tolist() == [0, 0.5, 0.5, 0]


@pytest.mark.parametrize(
    ("dtype", "bound"),
    [(torch.float64, 14.99), (torch.float32, 14.98999977), (torch.float16, 14.9921875), (torch.bfloat16, 15.0)],
)
def test_the_bound_is_rounded_to_the_dtype(dtype, bound):
    far = torch.tensor([-100.0, 0, 100, 100], dtype=dtype)
    found = bbox2dist(torch.zeros(2, dtype=dtype), far, 15)
    assert found.dtype == dtype
    assert found.tolist() == pytest.approx([bound, 0, bound, bound], abs=1e-8)


def test_bounds_below_zero_win():
    box = torch.tensor([-1.0, -1, 1, 1])
    assert bbox2dist(torch.zeros(2), box, 0).tolist() == pytest.approx([-0.01] * 4)
    assert bbox2dist(torch.zeros(2), box, -5).tolist() == pytest.approx([-5.01] * 4)
    _, (_, slope) = with_gradients(lambda a, b: bbox2dist(a, b, -5), torch.zeros(2), torch.full((4,), -5.01))
    assert slope.tolist() == [0] * 4


def test_a_bound_of_zero_passes_the_gradient_of_what_is_zero():
    box = torch.tensor([0.0, 1, 0, -1])
    _, (_, slope) = with_gradients(lambda a, b: bbox2dist(a, b, 0.01), torch.zeros(2), box)
    assert torch.equal(slope, weights(box) * torch.tensor([-1.0, 0, 1, 0]))


def test_non_finite_distances():
    special = torch.tensor([nan, INF, -INF, 1])
    assert bbox2dist(torch.zeros(2), special, 15).nan_to_num(7).tolist() == [7, 0, 0, 1]
    assert bbox2dist(torch.zeros(2), special).nan_to_num(7, 8, 9).tolist() == [7, 9, 9, 1]
    assert dist2bbox(special, torch.zeros(2), xywh=False).nan_to_num(7, 8, 9).tolist() == [7, 9, 9, 1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_clamp_passes_the_gradient_on_its_bounds_and_not_outside(dtype):
    bound = torch.tensor(2.99, dtype=dtype).item()
    # From the origin far sides are the distances themselves.
    box = torch.tensor([[0, 0, bound, 0], [1, -1, -1, 4], [nan, 0, nan, 1]], dtype=dtype)
    _, (point, slope) = with_gradients(lambda a, b: bbox2dist(a, b, 3), torch.zeros(2, dtype=dtype), box)
    weight = weights(box)
    passes = torch.tensor([[1, 1, 1, 1], [0, 1, 0, 0], [0, 1, 0, 1]], dtype=dtype) * weight
    assert torch.equal(slope, passes * torch.tensor([-1, -1, 1, 1], dtype=dtype))
    assert torch.equal(point, (passes[:, :2] - passes[:, 2:]).sum(0))


@FORMS
def test_distances_come_back(xywh):
    generator = torch.Generator().manual_seed(0)
    distance, point = (
        torch.rand(2, 30, 4, generator=generator),
        torch.randint(0, 80, (30, 2), generator=generator) + 0.5,
    )
    boxes = dist2bbox(distance.double(), point.double(), xywh)
    if xywh:
        boxes = torch.cat([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], -1)
    torch.testing.assert_close(bbox2dist(point.double(), boxes), distance.double())


SHAPES = [
    ((2, 5, 4), (5, 2)),
    ((2, 5, 4), (2, 5, 2)),
    ((1, 4), (5, 2)),
    ((5, 4), (3, 5, 2)),
    ((4,), (2,)),
    ((0, 4), (2,)),
]


@FORMS
@pytest.mark.parametrize("shapes", SHAPES, ids=str)
def test_gradcheck_of_the_codecs(xywh, shapes):
    generator = torch.Generator().manual_seed(0)
    sides, points = (torch.randn(shape, generator=generator, dtype=torch.float64) * 3 for shape in shapes)
    sides, points = sides.requires_grad_(), points.requires_grad_()
    assert torch.autograd.gradcheck(lambda d, a: dist2bbox(d, a, xywh), (sides, points))
    assert torch.autograd.gradcheck(lambda d, a: bbox2dist(a, d, 3), (sides, points))
    assert torch.autograd.gradcheck(lambda d, a: bbox2dist(a, d), (sides, points))


@FORMS
def test_gradients_in_float64_have_its_digits(xywh):
    draw = torch.Generator().manual_seed(0)
    sides, points = (torch.rand(6, size, generator=draw, dtype=torch.float64) for size in (4, 2))

    def decoded(sides, points):
        low, high = points - sides[:, :2], points + sides[:, 2:]
        return torch.cat(((low + high) / 2, high - low) if xywh else (low, high), -1) / 3

    def encoded(points, boxes):
        return torch.cat((points - boxes[:, :2], boxes[:, 2:] - points), -1) / 3

    for found, plain, inputs in (
        (lambda *of: dist2bbox(*of, xywh=xywh) / 3, decoded, (sides, points)),
        (lambda *of: bbox2dist(*of) / 3, encoded, (points, sides)),
    ):
        for one, other in zip(*(with_gradients(call, *inputs)[1] for call in (found, plain)), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-14, atol=1e-15)


@FORMS
@pytest.mark.parametrize("dim", [1, -2])
def test_coordinates_may_lie_along_another_dim(xywh, dim):
    generator = torch.Generator().manual_seed(0)
    distance, point = torch.rand(3, 4, 6, generator=generator), torch.rand(2, 6, generator=generator)
    value, slopes = with_gradients(lambda d, a: dist2bbox(d, a, xywh, dim), distance, point)
    turned = with_gradients(lambda d, a: dist2bbox(d, a, xywh).mT, distance.mT, point.mT)
    assert torch.equal(value, turned[0])
    assert value.is_contiguous()
    for slope, expected in zip(slopes, turned[1], strict=True):
        torch.testing.assert_close(slope, expected.mT)


def test_dtypes_of_the_codecs():
    whole, points = torch.ones(3, 4, dtype=torch.int64), torch.ones(3, 2, dtype=torch.int64)
    assert dist2bbox(whole, points).dtype == torch.float32
    assert dist2bbox(whole, points, xywh=False).dtype == torch.int64
    assert bbox2dist(points, whole).dtype == torch.int64
    assert dist2bbox(whole.half(), points.float()).dtype == torch.float32
    assert dist2bbox(whole.half(), points.bfloat16()).dtype == torch.float32
    distance, point = whole.half().requires_grad_(), points.float().requires_grad_()
    slopes = torch.autograd.grad(dist2bbox(distance, point).sum(), (distance, point))
    assert [slope.dtype for slope in slopes] == [torch.float16, torch.float32]


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: dist2bbox(torch.ones(3, 5), torch.ones(3, 2)), ValueError, "distance must have size 4"),
        (lambda: dist2bbox(torch.ones(3, 4), torch.ones(3, 3)), ValueError, "anchor_points must have size 2"),
        (lambda: dist2bbox(torch.ones(3, 4), torch.ones(())), ValueError, "anchor_points must have size 2"),
        (lambda: dist2bbox(torch.ones(3, 4), torch.ones(5, 2)), ValueError, "anchor_points and distance"),
        (lambda: dist2bbox(torch.ones(3, 4), torch.ones(3, 2), dim=2), IndexError, "dim 2"),
        (lambda: bbox2dist(torch.ones(3, 2), torch.ones(3, 5)), ValueError, "bbox must have last size 4"),
        (lambda: bbox2dist(torch.ones(3, 2), torch.ones(5, 4)), ValueError, "anchor_points and bbox"),
        (lambda: bbox2dist(torch.ones(3, 2), torch.ones(3, 4), "15"), TypeError, "reg_max"),
        (lambda: bbox2dist(torch.ones(3, 2).int(), torch.ones(3, 4).int(), 15), TypeError, "reg_max"),
    ],
)
def test_wrong_codec_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


# --------------------------------------------------------------------------------------------------------- dfl_decode

EXAMPLE = torch.tensor([[[0, 1, 0, 0, 2, 0, 0, 0, 0, 0, 0, 3, 0, 0, 0, 0.0]]])


def plain_decode(logits, points):
    bins = torch.arange(logits.shape[-1] // 4, dtype=logits.dtype)
    return dist2bbox(logits.unflatten(-1, (4, -1)).softmax(-1) @ bins, points, xywh=False)


def random_logits(bins, batch=2, count=7, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(batch, count, 4 * bins, generator=generator, dtype=torch.float64)
    return logits.to(dtype), (torch.arange(2 * count).view(count, 2) + 0.5).to(dtype)


def test_decoding_the_worked_example_of_distributions():
    found = dfl_decode(EXAMPLE, POINT[None])
    assert found.shape == (1, 1, 4)
    assert found[0, 0].tolist() == pytest.approx((1.15024447, 2.92246914, 5.24009705, 5), abs=2e-7)


def test_one_bin_is_the_distance():
    logits = torch.tensor([[[1, -2, 0.5, 30]]])
    assert dfl_decode(logits, POINT[None]).tolist() == [[[1.5, 5.5, 3, 33.5]]]


@pytest.mark.parametrize("bins", [2, 3, 16])
def test_gradcheck_of_the_decode(bins):
    logits, points = random_logits(bins, count=3)
    inputs = logits.requires_grad_(), points.requires_grad_()
    assert torch.autograd.gradcheck(dfl_decode, inputs)
    shared = points.detach()[None, :1].clone().requires_grad_()
    assert torch.autograd.gradcheck(dfl_decode, (logits, shared))


@pytest.mark.parametrize("few", [1 << 20, 0], ids=["kept", "computed-again"])
@pytest.mark.parametrize("layout", ["rows", "columns", "slice-of-columns", "strided"])
def test_layouts_and_blocks_agree_with_the_definition(monkeypatch, few, layout):
    monkeypatch.setattr(dfl_module, "_FEW", few)
    monkeypatch.setattr(dfl_module, "_BLOCK", 100)
    logits, points = random_logits(16)
    leaf = {
        "rows": logits,
        "columns": logits.mT.contiguous(),
        "slice-of-columns": torch.cat([logits.mT, logits.mT[:, :5]], 1).contiguous(),
        "strided": logits.repeat_interleave(2, -1),
    }[layout].requires_grad_()
    given = {"rows": leaf, "columns": leaf.mT, "slice-of-columns": leaf[:, :64].mT, "strided": leaf[..., ::2]}[layout]
    assert torch.equal(given, logits)
    found = dfl_decode(given, points)
    expected = plain_decode(given, points)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(dfl_decode(given.detach(), points), expected.detach())
    slopes = (torch.autograd.grad(value, leaf, weights(value))[0] for value in (found, expected))
    torch.testing.assert_close(*slopes)


def test_a_transposed_view_gets_a_gradient_laid_out_alike():
    logits, points = random_logits(16)
    turned = logits.mT.contiguous().mT.requires_grad_()
    (slope,) = torch.autograd.grad(dfl_decode(turned, points).sum(), turned)
    assert slope.stride() == turned.stride()


def test_probabilities_of_many_logits_are_not_kept(monkeypatch):
    monkeypatch.setattr(dfl_module, "_FEW", 0)
    logits, points = random_logits(16)
    logits.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        dfl_decode(logits, points)
    assert {tensor.data_ptr() for tensor in kept} == {logits.data_ptr()}


def test_special_logits():
    def decoded(bin_, value, side=0):
        logits = EXAMPLE.clone().view(4, 4)
        logits[side, bin_] = value
        return dfl_decode(logits.view(1, 1, 16), torch.zeros(1, 2))[0, 0]

    p = torch.tensor([0, 1.0, 0]).softmax(0)
    assert -decoded(2, -INF)[0].item() == pytest.approx((p[1] + 3 * p[2]).item())
    for value in (INF, nan):
        assert decoded(2, value).isnan().tolist() == [True, False, False, False]
    assert decoded(slice(None), -INF).isnan().tolist() == [True, False, False, False]
    assert decoded(2, 1e4)[0] == -2


@pytest.mark.parametrize("dtype", HALVES)
def test_half_logits(dtype):
    logits, points = random_logits(16, dtype=dtype)
    wide = dfl_decode(logits.float(), points.float())
    assert torch.equal(dfl_decode(logits, points), wide.to(dtype))
    assert torch.equal(dfl_decode(logits, points.float()), wide)
    _, (slope, _) = with_gradients(dfl_decode, logits, points.float())
    _, (expected, _) = with_gradients(dfl_decode, logits.float(), points.float())
    assert torch.equal(slope, expected.to(dtype))


def test_autocast_leaves_the_decode_alone():
    logits, points = random_logits(16, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        found = dfl_decode(logits, points)
    assert torch.equal(found, dfl_decode(logits, points))


@pytest.mark.parametrize("shape", [(2, 0, 64), (0, 5, 64), (2, 0, 4)])
def test_no_anchors(shape):
    logits, points = torch.zeros(shape), torch.zeros(shape[1], 2)
    value, slopes = with_gradients(dfl_decode, logits, points)
    assert value.shape == (*shape[:2], 4)
    assert slopes[0].shape == shape


@pytest.mark.parametrize(
    ("logits", "points", "error", "message"),
    [
        (torch.zeros(2, 5, 63), torch.zeros(5, 2), ValueError, "logits must be"),
        (torch.zeros(5, 64), torch.zeros(5, 2), ValueError, "logits must be"),
        (torch.zeros(2, 5, 64), torch.zeros(4, 2), ValueError, "anchor_points must broadcast"),
        (torch.zeros(1, 5, 64), torch.zeros(2, 5, 2), ValueError, "anchor_points must broadcast"),
        (torch.zeros(2, 5, 64, dtype=torch.int64), torch.zeros(5, 2), TypeError, "logits must be floating"),
    ],
)
def test_wrong_decode_arguments(logits, points, error, message):
    with pytest.raises(error, match=message):
        dfl_decode(logits, points)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_everything_compiles_in_one_graph(backend):
    torch._dynamo.reset()
    logits, points = random_logits(16, dtype=torch.float32)
    feats = maps((2, 2))

    def step(logits, points):
        anchors, strides = make_anchors(feats, torch.tensor([8.0]))
        boxes = dfl_decode(logits, points) * strides[0] + anchors[0, 0]
        return dist2bbox(bbox2dist(points, boxes, 15), points)

    value, slopes = with_gradients(step, logits, points)
    found, others = with_gradients(torch.compile(step, fullgraph=True, backend=backend), logits, points)
    torch.testing.assert_close(found, value)
    for slope, other in zip(slopes, others, strict=True):
        torch.testing.assert_close(other, slope)


@pytest.mark.parametrize("reg_max", [None, 3])
def test_what_compilers_see_of_the_encoding(monkeypatch, reg_max):
    box = torch.tensor([[-1.0, -2, 1, 2], [0.5, -9, 1.5, 9]])
    given = torch.tensor([0.25, 0.5]), box
    value, slopes = with_gradients(lambda a, b: bbox2dist(a, b, reg_max), *given)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    found, others = with_gradients(lambda a, b: bbox2dist(a, b, reg_max), *given)
    assert torch.equal(found, value)
    for slope, other in zip(slopes, others, strict=True):
        assert torch.equal(other, slope)


def test_the_compiled_decode_keeps_the_dtype():
    torch._dynamo.reset()
    logits, points = random_logits(16, dtype=torch.float16)
    points = points.to(torch.float16)
    compiled = torch.compile(dfl_decode, fullgraph=True, backend="eager")
    assert compiled(logits, points).dtype == dfl_decode(logits, points).dtype == torch.float16


def test_inputs_are_unchanged():
    logits, points = random_logits(16, dtype=torch.float32)
    boxes = torch.rand(2, 7, 4)
    copies = logits.clone(), points.clone(), boxes.clone()
    with_gradients(dfl_decode, logits, points)
    with_gradients(dist2bbox, boxes, points)
    with_gradients(lambda a, b: bbox2dist(a, b, 3), points, boxes)
    assert all(torch.equal(*both) for both in zip((logits, points, boxes), copies, strict=True))
