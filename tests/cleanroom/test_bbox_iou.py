"""Element-wise overlaps and their gradients against the table and the worked example of boxes.md, section 9."""

import pytest
import torch
from torch import nan

from cleanroom import box_iou
from cleanroom.boxes import bbox_iou
from cleanroom.overlap import Rule, aspect_weight, box_terms, complete_iou

KINDS = ("IoU", "GIoU", "DIoU", "CIoU")
each_kind = pytest.mark.parametrize("kind", KINDS)
each_form = pytest.mark.parametrize("xywh", [False, True], ids=["corners", "centres"])
INF = float("inf")
EXAMPLE = ([[0, 0, 10, 10]], [[5, 5, 15, 20]])


def overlap(first, second, kind="IoU", dtype=torch.float32, **settings):
    flags = {} if kind == "IoU" else {kind: True}
    boxes = (torch.as_tensor(box, dtype=dtype) for box in (first, second))
    return bbox_iou(*boxes, **{"xywh": False, **flags, **settings})


def gradients(first, second, kind="IoU", dtype=torch.float32, weights=None, **settings):
    boxes = [torch.as_tensor(box, dtype=dtype).clone().requires_grad_() for box in (first, second)]
    value = overlap(*boxes, kind, dtype, **settings)
    return torch.autograd.grad(value, boxes, torch.ones_like(value) if weights is None else weights)


def random_boxes(count, seed, dtype=torch.float64, whole=False):
    """Centre form, some pairs apart, some without area; `whole` makes edges meet."""
    generator = torch.Generator().manual_seed(seed)
    centres, sides = torch.rand(2, count, 2, generator=generator, dtype=torch.float64) * 20
    sides[::7, 0] = 0
    boxes = torch.cat([centres, sides], -1)
    return (boxes.div(4).round() * 4 if whole else boxes).to(dtype)


def corners(boxes):
    return torch.cat([boxes[..., :2] - boxes[..., 2:] / 2, boxes[..., :2] + boxes[..., 2:] / 2], -1)


def pairs(count, dtype, xywh, whole=False):
    found = (random_boxes(count, seed, torch.float64, whole) for seed in (1, 2))
    return [(boxes if xywh else corners(boxes)).to(dtype) for boxes in found]


def product(sides):
    """Not `prod`, which has a gradient of its own where a side is 0 or infinite."""
    return sides[..., 0] * sides[..., 1]


def formula(box1, box2, kind, xywh, eps=1e-7):
    """The definition, for autograd to differentiate."""
    low1, high1, low2, high2 = (
        part
        for box in (box1, box2)
        for part in ((corners(box) if xywh else box)[..., :2], (corners(box) if xywh else box)[..., 2:])
    )
    height_eps = torch.tensor([0.0, 0.0 if xywh else eps], dtype=box1.dtype)
    size1, size2 = (
        box[..., 2:] if xywh else high - low + height_eps
        for box, low, high in ((box1, low1, high1), (box2, low2, high2))
    )
    common = product((torch.minimum(high1, high2) - torch.maximum(low1, low2)).clamp(min=0))
    union = product(size1) + product(size2) - common + eps
    hull = torch.maximum(high1, high2) - torch.minimum(low1, low2)
    iou = common / union
    if kind == "GIoU":
        area = product(hull) + eps
        iou = iou - (area - union) / area
    elif kind != "IoU":
        distance = (low2 + high2 - low1 - high1).square().sum(-1) / 4 / (hull.square().sum(-1) + eps)
        penalty = distance
        if kind == "CIoU":
            angles = [torch.atan(size[..., 0] / size[..., 1]) for size in (size1, size2)]
            aspect = 4 / torch.pi**2 * (angles[1] - angles[0]).square()
            penalty = distance + aspect * (aspect / (1 - iou + aspect + eps)).detach()
        iou = iou - penalty
    return iou.unsqueeze(-1)


# ------------------------------------------------------------------------------------------------- worked example


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float32, (0.11111111, -0.13888890, -0.01888888, -0.01916454)),
        (torch.float64, (0.11111111007, -0.13888888318, -0.01888888991, -0.01916455042)),
    ],
)
def test_worked_example(dtype, expected):
    digits = 5e-9 if dtype == torch.float32 else 5e-12
    found = [overlap(*EXAMPLE, kind, dtype).item() for kind in KINDS]
    assert found == pytest.approx(expected, abs=digits)


def test_gradient_of_the_worked_example():
    first, second = gradients(*EXAMPLE, "CIoU")
    assert first[0].tolist() == pytest.approx((0.00683792, 0.00847862, 0.02761344, 0.03189274), abs=1e-8)
    assert second[0].tolist() == pytest.approx((-0.02541286, -0.03166715, -0.00903850, -0.00870421), abs=1e-8)


# ---------------------------------------------------------------------------------------------- the table of section 9

TABLE = {
    "identical": ((0, 0, 10, 10), (0, 0, 10, 10), (1, 1, 1, 1), None),
    "equal points": ((3, 3, 3, 3), (3, 3, 3, 3), (0, 0, 0, 0), None),
    "all zeros": ((0, 0, 0, 0), (0, 0, 0, 0), (0, 0, 0, 0), (0, 0, 0, nan)),
    "point and box": ((0, 0, 0, 0), (1, 1, 2, 2), (0, -0.74999994, -0.5625, -0.61249995), None),
    "no width": ((0, 0, 0, 10), (0, 0, 0, 10), (0, 0, 0, 0), None),
    "no height": ((0, 0, 10, 0), (0, 0, 10, 0), (0, 20, 0, 0), (0, 0, 0, 0)),
    "touching": ((0, 0, 10, 10), (10, 0, 20, 10), (0, 0, -0.2, -0.2), None),
    "contained": ((0, 0, 10, 10), (2, 2, 4, 4), (0.04, 0.04, 0, 0), None),
    "inverted": ((5, 5, 2, 2), (1, 1, 2, 2), (0, 9, -4, -4), None),
    "far apart": ((1, 1, 2, 2), (1e6, 1e6, 1e6 + 1, 1e6 + 1), (0, -1, -0.99999803, -0.99999803), None),
    "infinite corner": ((0, 0, INF, 10), (1, 1, 2, 2), (0, nan, nan, nan), None),
    "nan": ((0, nan, 5, 10), (1, 1, 2, 2), (nan, nan, nan, nan), (nan, nan, nan, nan)),
    "huge": ((0, 0, 1e19, 1e19), (0, 0, 1e19, 1e19), (1, 1, 1, 1), None),
}


@pytest.mark.parametrize("row", TABLE.values(), ids=TABLE)
@each_form
def test_table(row, xywh):
    first, second, expected, in_centres = row
    if xywh and in_centres is None:
        first, second = _centres(first), _centres(second)
        if 0 in (first[3], second[3]):
            expected = (*expected[:3], nan)  # CIoU of a point: 0/0 in width over height
        if INF in first:
            expected = (nan,) * 4
    elif xywh:
        expected = in_centres
    found = [overlap(first, second, kind, xywh=xywh).item() for kind in KINDS]
    tolerance = 1e-5 if xywh else 2e-7
    assert found == pytest.approx(expected, abs=tolerance, rel=tolerance, nan_ok=True)


def _centres(box):
    left, top, right, bottom = box
    return [(left + right) / 2, (top + bottom) / 2, right - left, bottom - top]


@pytest.mark.parametrize("box", [(0, 0, 10, 10), (3, 3, 3, 3)], ids=["identical", "equal-points"])
def test_the_gradient_of_complete_iou_vanishes_where_boxes_coincide(box):
    for slope in gradients(box, box, "CIoU"):
        assert slope.tolist() == pytest.approx([0] * 4, abs=1e-6)


def test_gradients_of_degenerate_boxes():
    first, _ = gradients((0, 0, 0, 10), (0, 0, 0, 10), "CIoU")
    assert first[[0, 2]].tolist() == pytest.approx([-5e7, 5e7], rel=1e-6)
    first, _ = gradients((0, 0, 10, 0), (0, 0, 10, 0), "CIoU", xywh=True)
    assert first.isnan().tolist() == [False, False, True, True]
    first, second = gradients((3, 3, 0, 0), (3, 3, 0, 0), "CIoU", xywh=True)
    assert first[2:].isnan().all()
    assert second[2:].isnan().all()


def test_gradient_flows_through_touching_boxes():
    first, second = gradients((0, 0, 10, 10), (10, 0, 20, 10), dtype=torch.float64)
    assert first.tolist() == pytest.approx([0, 0, 0.05, 0], abs=1e-9)
    assert second.tolist() == pytest.approx([-0.05, 0, 0, 0], abs=1e-9)
    apart, _ = gradients((0, 0, 10, 10), (10.001, 0, 20, 10), dtype=torch.float64)
    assert apart.tolist() == [0, 0, 0, 0]


def test_in_a_tie_each_box_gets_half():
    """They share the left edge: moving either one to the right narrows the intersection or does not."""
    first, second = gradients((0, 0, 10, 10), (0, 0, 20, 10), dtype=torch.float64)
    # I = w h of the first box, U = 200: through I half of -10/200 (1 + IoU/2 ...), through U all of the own area.
    by_inner, by_union = 1 / 200 + 100 / 200**2, -100 / 200**2
    assert first[0].item() == pytest.approx(-10 * by_inner / 2 - 10 * by_union, rel=1e-6)
    assert second[0].item() == pytest.approx(-10 * by_inner / 2 - 10 * by_union, rel=1e-6)


# --------------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("kind", KINDS[:3])
@each_form
def test_gradcheck(kind, xywh):
    boxes = [box[1:6].clone().requires_grad_() for box in pairs(8, torch.float64, xywh)]
    assert torch.autograd.gradcheck(lambda one, two: overlap(one, two, kind, torch.float64, xywh=xywh), boxes)


@each_form
def test_the_gradient_of_complete_iou_holds_alpha(xywh):
    """Against differences of ``DIoU - alpha v`` with alpha of the point where they are taken."""
    one, two = (box[1:6] for box in pairs(8, torch.float64, xywh))
    slope = gradients(one, two, "CIoU", torch.float64, xywh=xywh)[0]
    alpha = None

    def held(first):
        nonlocal alpha
        iou, distance = (formula(first, two, kind, xywh) for kind in ("IoU", "DIoU"))
        sides = [box[:, 2:] if xywh else box[:, 2:] - box[:, :2] for box in (first, two)]
        eps = torch.tensor([0, 0 if xywh else 1e-7])
        angles = [torch.atan2(*(side + eps).unbind(-1)) for side in sides]
        aspect = (4 / torch.pi**2 * (angles[1] - angles[0]).square())[:, None]
        alpha = aspect / (1 - iou + aspect + 1e-7) if alpha is None else alpha
        return distance - alpha * aspect

    torch.testing.assert_close(held(one), overlap(one, two, "CIoU", torch.float64, xywh=xywh))
    for coordinate in range(4):
        step = torch.zeros(4, dtype=torch.float64)
        step[coordinate] = 1e-6
        difference = (held(one + step) - held(one - step))[:, 0] / 2e-6
        torch.testing.assert_close(slope[:, coordinate], difference, rtol=1e-6, atol=1e-8)


@each_kind
@each_form
@pytest.mark.parametrize("whole", [False, True], ids=["any", "meeting-edges"])
@pytest.mark.parametrize("finite", [True, False], ids=["finite", "careful"])
def test_gradient_is_that_of_the_definition(monkeypatch, kind, xywh, whole, finite):
    if not finite:
        monkeypatch.setattr(box_iou, "_finite", lambda *_: False)
    boxes = pairs(300, torch.float64, xywh, whole)
    boxes = [box[(boxes[0][:, 2:] != 0).all(1)] for box in boxes]
    weights = torch.linspace(-1, 2, len(boxes[0]), dtype=torch.float64)[:, None]
    leaves = [box.clone().requires_grad_() for box in boxes]
    expected = torch.autograd.grad(formula(*leaves, kind, xywh), leaves, weights)
    for found, wanted in zip(gradients(*boxes, kind, torch.float64, weights, xywh=xywh), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9, equal_nan=True)


@each_kind
@each_form
def test_broadcast_gradients_are_sums_over_the_pairs(kind, xywh):
    one, two = pairs(5, torch.float64, xywh)
    for first, second in ((one[:, None], two), (one[:1], two), (one[0], two), (one, two.expand(3, 5, 4))):
        shape = torch.broadcast_shapes(first.shape, second.shape)
        value = overlap(first, second, kind, torch.float64, xywh=xywh)
        assert value.shape == (*shape[:-1], 1)
        weights = torch.linspace(-1, 2, value.numel(), dtype=torch.float64).view(value.shape)
        whole = gradients(first.expand(shape), second.expand(shape), kind, torch.float64, weights, xywh=xywh)
        found = gradients(first, second, kind, torch.float64, weights, xywh=xywh)
        for given, gradient, expanded in zip((first, second), found, whole, strict=True):
            torch.testing.assert_close(gradient, expanded.sum_to_size(given.shape), equal_nan=True)


@each_kind
def test_blocks_and_gradient_tracking_change_no_bit(monkeypatch, kind):
    one, two = pairs(300, torch.float32, xywh=False)
    values, slopes = overlap(one, two, kind), gradients(one, two, kind)
    assert torch.equal(values, overlap(one.clone().requires_grad_(), two, kind).detach())
    monkeypatch.setattr(box_iou, "_PAIRS_A_THREAD", 16)
    for slope, small in zip(slopes, gradients(one, two, kind), strict=True):
        assert torch.equal(slope, small)


def test_huge_slopes_of_one_pair_cancel_before_the_other_pairs_count():
    """As upstream sums: a hull without height has slopes of 1e9 through either corner."""
    first = torch.tensor([[[5.0, 5, 4, 0]]])
    second = torch.tensor([[5.0, 5, -2, -2], [6, 9, 3, 3]])
    slope = gradients(first, second, "GIoU", xywh=True)[0]
    alone = gradients(first[0], second[1:], "GIoU", xywh=True)[0]
    assert alone[0, 1].abs() > 1e-3
    assert slope[0, 0, 1] == 0


@each_kind
@each_form
def test_a_nan_stays_in_its_pair(kind, xywh):
    one, two = pairs(6, torch.float32, xywh)
    clean = gradients(one[1:], two[1:], kind, xywh=xywh)
    one[0, 1] = nan
    values = overlap(one, two, kind, xywh=xywh)
    assert values[0].isnan()
    assert not values[1:].isnan().any()
    for found, expected in zip(gradients(one, two, kind, xywh=xywh), clean, strict=True):
        assert torch.equal(found[1:], expected)
        assert found[0].isnan().any()


@each_kind
@each_form
@pytest.mark.parametrize("special", [nan, INF, -INF])
def test_gradients_of_what_is_not_finite_are_those_of_autograd(kind, xywh, special):
    """A NaN goes through no clamp, and through both sides of a minimum: other coordinates may have a gradient."""
    for place in range(4):
        one, two = pairs(6, torch.float64, xywh)
        one[:, place] = special
        leaves = [box.clone().requires_grad_() for box in (one, two)]
        value = formula(*leaves, kind, xywh)
        expected = torch.autograd.grad(value, leaves, torch.ones_like(value))
        for found, wanted in zip(gradients(one, two, kind, torch.float64, xywh=xywh), expected, strict=True):
            torch.testing.assert_close(found, wanted, equal_nan=True)


def test_complete_iou_of_terms_has_the_same_bits():
    one, two = pairs(300, torch.float32, xywh=False)
    terms = complete_iou(box_terms(one), box_terms(two))
    assert torch.equal(terms, overlap(one, two, "CIoU")[:, 0])


def test_nothing_but_the_boxes_is_kept():
    kept = []
    one, two = (box.requires_grad_() for box in pairs(50, torch.float32, xywh=False))
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        overlap(one, two, "CIoU")
    assert {tensor.data_ptr() for tensor in kept} == {one.data_ptr(), two.data_ptr()}


def test_a_second_derivative_is_refused():
    one, two = pairs(4, torch.float32, xywh=False)
    one.requires_grad_()
    (slope,) = torch.autograd.grad(overlap(one, two, "CIoU").sum(), one, create_graph=True)
    assert not slope.requires_grad
    weight = torch.ones(4, 1, requires_grad=True)
    (slope,) = torch.autograd.grad(overlap(one, two, "CIoU"), one, weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


@each_kind
def test_boxes_may_lie_in_memory_anyhow(kind):
    one, two = pairs(12, torch.float32, xywh=False)
    expected = gradients(one, two, kind)
    turned, spread = one.T.contiguous().T.requires_grad_(), two.repeat(1, 2)[:, :4].requires_grad_()
    value = overlap(turned, spread, kind)
    for slope, wanted in zip(torch.autograd.grad(value.sum(), (turned, spread)), expected, strict=True):
        assert torch.equal(slope, wanted)


def test_inputs_are_unchanged():
    boxes = pairs(20, torch.float32, xywh=True)
    copies = [box.clone() for box in boxes]
    gradients(*boxes, "CIoU", xywh=True)
    assert all(torch.equal(box, copy) for box, copy in zip(boxes, copies, strict=True))


# ------------------------------------------------------------------------------------------------ settings and dtypes


def test_centre_form_is_the_default_and_the_complete_iou_goes_first():
    one, two = pairs(9, torch.float32, xywh=True)
    assert torch.equal(bbox_iou(one, two), overlap(one, two, xywh=True))
    every = bbox_iou(one, two, True, True, True, True)
    assert torch.equal(every.nan_to_num(), overlap(one, two, "CIoU", xywh=True).nan_to_num())
    assert torch.equal(bbox_iou(one, two, GIoU=True, DIoU=True), overlap(one, two, "DIoU", xywh=True))


def test_the_height_of_corners_carries_the_epsilon():
    thin = (0, 0, 10, 1e-6), (0, 0, 10, 2e-6)
    assert overlap(*thin).item() == pytest.approx(0.45248866, abs=1e-7)
    assert overlap((5, 0.5e-6, 10, 1e-6), (5, 1e-6, 10, 2e-6), xywh=True).item() == pytest.approx(0.49751243, abs=1e-6)
    assert overlap(*EXAMPLE, eps=1.0).item() == pytest.approx(25 / (10 * 11 + 10 * 16 - 25 + 1))


def test_former_alpha():
    one, two = pairs(200, torch.float64, xywh=False)
    now, former = (overlap(one, two, "CIoU", torch.float64, ciou_alpha=alpha) for alpha in ("stable", "legacy"))
    torch.testing.assert_close(now, former)
    one, two = one.float(), two.float()
    assert not torch.equal(overlap(one, two, "CIoU"), overlap(one, two, "CIoU", ciou_alpha="legacy"))


def test_alpha_is_rounded_in_the_order_of_its_era():
    """Of nearly equal boxes the former order keeps few digits; as a constant of the gradient they count."""
    aspect, iou = torch.full((1,), 3e-6), torch.full((1,), 1 - 2e-6)
    stable, legacy = (aspect_weight(aspect, iou, Rule(alpha=alpha)) for alpha in ("stable", "legacy"))
    assert torch.equal(stable, aspect / ((1 - iou) + aspect + 1e-7))
    assert torch.equal(legacy, aspect / ((aspect - iou) + (1 + 1e-7)))
    exact = aspect.double() / (1 - iou.double() + aspect.double() + 1e-7)
    assert (stable - exact).abs() < 1e-6 < (legacy - exact).abs()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@each_kind
def test_half_is_computed_in_float32(dtype, kind):
    one, two = pairs(20, dtype, xywh=False)
    wide = overlap(one.float(), two.float(), kind)
    assert torch.equal(overlap(one, two, kind, dtype), wide.to(dtype))
    slopes = gradients(one, two, kind, dtype)
    assert [slope.dtype for slope in slopes] == [dtype, dtype]
    torch.testing.assert_close(slopes[0], gradients(one.float(), two.float(), kind)[0].to(dtype))
    assert overlap((0, 0, 300, 300), (0, 0, 300, 300), kind, dtype).item() == 1


def test_dtypes_promote():
    one, two = pairs(4, torch.float32, xywh=False)
    assert bbox_iou(one.half(), two, xywh=False).dtype == torch.float32
    assert bbox_iou(one.half(), two.bfloat16(), xywh=False).dtype == torch.float32
    assert bbox_iou(one.double(), two, xywh=False).dtype == torch.float64
    whole = torch.tensor([[5, 5, 7, 9]]), torch.tensor([[4, 4, 9, 8]])
    assert bbox_iou(*whole, xywh=False, CIoU=True).item() == pytest.approx(0.24057653546333313)
    one = one.half().requires_grad_()
    assert torch.autograd.grad(bbox_iou(one, two.double(), xywh=False).sum(), one)[0].dtype == torch.float16


@pytest.mark.parametrize("shapes", [((0, 4), (0, 4)), ((0, 1, 4), (5, 4)), ((3, 1, 4), (0, 4)), ((4,), (4,))])
def test_empty_and_single(shapes):
    value = overlap(*(torch.ones(shape) for shape in shapes), "CIoU")
    assert value.shape == (*torch.broadcast_shapes(*shapes)[:-1], 1)
    slopes = gradients(*(torch.ones(shape) for shape in shapes), "CIoU")
    assert [slope.shape for slope in slopes] == [torch.Size(shape) for shape in shapes]


@pytest.mark.parametrize(
    ("boxes", "settings", "message"),
    [
        ((torch.zeros(2, 5), torch.zeros(2, 4)), {}, "box1 must have last size 4"),
        ((torch.zeros(2, 4), torch.zeros(())), {}, "box2 must have last size 4"),
        ((torch.zeros(2, 4), torch.zeros(3, 4)), {}, "box1 and box2 do not broadcast"),
        ((torch.zeros(2, 4), torch.zeros(2, 4)), {"ciou_alpha": "former"}, "ciou_alpha"),
    ],
)
def test_wrong_arguments(boxes, settings, message):
    with pytest.raises(ValueError, match=message):
        bbox_iou(*boxes, **settings)


def test_bool_boxes_are_refused():
    with pytest.raises(TypeError, match="box2"):
        bbox_iou(torch.zeros(1, 4), torch.zeros(1, 4, dtype=torch.bool))


@each_kind
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_in_one_graph(kind, backend):
    torch._dynamo.reset()
    one, two = pairs(12, torch.float32, xywh=False)
    flags = {} if kind == "IoU" else {kind: True}
    compiled = torch.compile(lambda a, b: bbox_iou(a, b, xywh=False, **flags), fullgraph=True, backend=backend)
    leaves = [one.clone().requires_grad_(), two.clone().requires_grad_()]
    value = compiled(*leaves)
    assert torch.equal(value.detach(), overlap(one, two, kind))
    found = torch.autograd.grad(value, leaves, torch.ones_like(value))
    for slope, expected in zip(found, gradients(one, two, kind), strict=True):
        torch.testing.assert_close(slope, expected)
