"""The fused terms of the YOLO criterion against float64, all of it against the static path, and planted faults."""

import inspect
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch._subclasses.fake_tensor import FakeTensorMode

from cases import v8_detection_loss as drawn
from cleanroom.kernels import complete_iou, decode, detection_loss, detection_terms, target_scores, targets
from cleanroom.losses._yolo_head import Decoder, make_geometry
from cleanroom.losses._yolo_targets import pad_targets
from cleanroom.losses.bbox import bbox_loss
from cleanroom.losses.class_bce import class_bce
from cleanroom.losses.v8_detection import v8_detection_loss
from cleanroom.losses.v10_detection import v10_detection_loss
from tests.cleanroom.yolo_examples import example, first_rows
from tests.kernels.conftest import DEVICE

GAINS = {"box": 7.5, "cls": 0.5, "dfl": 1.5}
SIZE = (64.0, 48.0)
HALF = (torch.float16, torch.bfloat16)


# Terms under given decisions


def problem(seed=0, *, images=2, anchors=70, classes=5, rows=4, reg_max=16, dtype=torch.float32, share=0.4, scale=2.0):
    """Random logits and decisions: truths around the anchors, some of them beyond the last bin or not around at all.

    A stretch without foreground as long as a program's tile is in it, and what must not be read is NaN or far outside.
    """
    draw = torch.Generator().manual_seed(seed)
    rand, normal = (partial(make, generator=draw) for make in (torch.rand, torch.randn))
    points, strides = (rand(anchors, 2) * 8).floor() + 0.5, torch.tensor([8.0, 16.0]).repeat(anchors)[:anchors, None]
    learns = rand(images, anchors) < share
    learns[:, 32:64] &= share == 1
    gt_boxes = torch.cat(((rand(images, rows, 2) * 6 - 2) * 8, (rand(images, rows, 2) * 22 + 3) * 8), -1)
    boxes = normal(images, 4 * reg_max, anchors) * scale + (1.5 if reg_max == 1 else 0)
    score = torch.where(learns, rand(images, anchors) + 1e-3, 0)
    owner = torch.where(learns, torch.randint(rows, learns.shape, generator=draw), -1)
    return SimpleNamespace(
        scores=(normal(images, classes, anchors) * scale - 1).to(dtype),
        boxes=boxes.to(dtype),
        owner=owner.int(),
        score=score,
        labels=torch.randint(-1, classes, (images, rows), generator=draw),
        gt_boxes=gt_boxes,
        points=points.to(dtype),
        strides=strides.to(dtype),
    )


def evaluate(made, factor=None, **changes):
    """What the kernels find, and its gradients by scores and boxes, given the factors of the loss; by default 1."""
    tensors = {name: value.to(DEVICE) for name, value in vars(made).items()}
    leaves = [tensors[name].detach().requires_grad_() for name in ("scores", "boxes")]
    tensors |= dict(zip(("scores", "boxes"), leaves, strict=True))
    reg_max = tensors["boxes"].shape[1] // 4
    found = detection_loss.detection_loss(**tensors, size=SIZE, **{"gains": GAINS, "reg_max": reg_max} | changes)
    total = found.loss.sum() if factor is None else (found.loss * factor.to(DEVICE)).sum()
    return found, torch.autograd.grad(total, leaves, retain_graph=True)


def truth(made, factor=None, **changes):
    """The same in float64 from the terms' own functions, image by image."""
    settings = {"gains": GAINS, "reg_max": made.boxes.shape[1] // 4, "class_weights": None, "ignore_mask": None}
    settings |= {"reduction": "sum", "ciou_alpha": "stable", "reg1_distance": "l1"} | changes
    read = torch.where(made.score[:, None] > 0, made.boxes, 0)
    scores, boxes = (tensor.double().requires_grad_() for tensor in (made.scores, read))
    ignored = torch.zeros_like(made.score, dtype=torch.bool)
    ignored = ignored if settings["ignore_mask"] is None else settings["ignore_mask"]
    value = torch.where(ignored, 0, made.score.double())
    total, reg_max = value.sum().clamp(min=1), settings["reg_max"]
    points, strides, weights = made.points.double(), made.strides.double(), settings["class_weights"]
    # A row of zeros more, for what learns nothing.
    gt_boxes, labels = (
        torch.nn.functional.pad(made.gt_boxes, (0, 0, 0, 1)),
        torch.nn.functional.pad(made.labels, (0, 1)),
    )
    items = []
    for image in range(len(scores)):
        rows = torch.where(made.score[image] > 0, made.owner[image], -1).long()
        channels = boxes[image].mT
        bins = torch.arange(reg_max, dtype=torch.float64)
        sides = channels if reg_max == 1 else channels.unflatten(1, (4, reg_max)).softmax(2) @ bins
        each = bbox_loss(
            channels[None],
            torch.cat((points - sides[:, :2], points + sides[:, 2:]), 1)[None],
            points,
            (gt_boxes[image, rows].double() / strides)[None],
            value[image, :, None][None],
            total,
            (value[image] > 0)[None],
            strides,
            reg_max=reg_max,
            imgsz=SIZE[::-1],
            ciou_alpha=settings["ciou_alpha"],
            reg1_distance=settings["reg1_distance"],
            path="sparse",
        )
        class_term = class_bce(
            scores[image].mT[None],
            labels[image].clamp(min=0)[rows][None],
            value[image].to(made.scores.dtype).double()[None],
            total,
            class_weights=None if weights is None else weights.double(),
            ignore_mask=ignored[image][None],
        )
        items.append(torch.stack([each.loss_iou, class_term, each.loss_dfl]))
    items = torch.stack(items) * torch.tensor([settings["gains"][name] for name in ("box", "cls", "dfl")]).double()
    items = items if settings["reduction"] == "none" else items.sum(0)
    loss = items * len(scores) * (1 if factor is None else factor.double())
    return items, torch.autograd.grad(loss.sum(), (scores, boxes), materialize_grads=True)


def near(found, expected, rtol, share):
    """Close, or by a share of the largest value: slopes of bins are what is left of a cancellation."""
    found, expected = found.detach().double().cpu(), expected.detach()
    finite = expected[expected.isfinite()].abs()
    atol = share * (finite.max().item() if finite.numel() else 0)
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol, equal_nan=True)


def compare(made, factor=None, **changes):
    """Assert that values and gradients are those of float64, and that decisions are told."""
    found, slopes = evaluate(made, factor, **changes)
    items, expected = truth(made, factor, **changes)
    near(found.items, items, 1e-5, 1e-7)
    torch.testing.assert_close(found.loss.detach(), found.items * len(made.scores), equal_nan=True)
    for ours, theirs, logits in zip(slopes, expected, (made.scores, made.boxes), strict=True):
        assert ours.dtype == logits.dtype
        near(ours, theirs, max(1e-4, torch.finfo(ours.dtype).eps), 3e-6)
    assert torch.equal(found.foreground.cpu(), made.score > 0)
    assert torch.equal(found.gt_index.cpu(), torch.where(made.score > 0, made.owner, 0).long())
    return found, slopes


WEIGHTS = torch.tensor([0.5, 1, 2, 0, 1.5])
IGNORED = torch.rand(2, 70, generator=torch.Generator().manual_seed(1)) < 0.4


@pytest.mark.parametrize(
    ("shape", "changes"),
    [
        ({}, {}),
        ({"reg_max": 1}, {}),
        ({"reg_max": 1}, {"reg1_distance": "zero", "reduction": "none"}),
        ({"reg_max": 2}, {"ciou_alpha": "legacy"}),
        ({"reg_max": 5}, {"reduction": "none"}),
        ({"reg_max": 32}, {}),
        ({}, {"class_weights": WEIGHTS, "ignore_mask": IGNORED}),
        ({"reg_max": 1}, {"ignore_mask": IGNORED, "reduction": "none"}),
        ({"share": 1.0}, {"gains": {"box": 1.0, "cls": 0.0, "dfl": 3.0}}),
        ({"share": 0.0, "rows": 1}, {}),
        ({"share": 0.0, "rows": 0}, {}),
        ({"classes": 1, "images": 1, "anchors": 3, "share": 1.0}, {}),
    ],
)
def test_terms(shape, changes):
    made = problem(**{"rows": 4} | shape) if shape.get("rows") != 0 else without_rows(problem(share=0.0))
    compare(made, **changes)


def without_rows(made):
    made.labels, made.gt_boxes = made.labels[:, :0], made.gt_boxes[:, :0]
    return made


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("reg_max", [16, 1])
def test_half_logits(dtype, reg_max):
    compare(problem(3, dtype=dtype, reg_max=reg_max), reduction="none")


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_incoming_gradients(dtype):
    """Whether made early, rescaled or made late: a term alone, images apart, a scaler's factor, infinity, zero."""
    made = problem(4, dtype=dtype)
    for factor in (torch.eye(3)[0], torch.eye(3)[1], torch.tensor([1.0, 0.8, 1.0]), torch.full((3,), 65536.0)):
        scaled = factor if dtype != torch.float16 else factor.clamp(max=64)
        compare(made, scaled)
    each = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    each[0] = 1
    compare(made, each, reduction="none")


def test_a_scalers_factor_saves_gradients_of_float16():
    """Times 65536 they are subnormal no more: made before, most of them would be 0."""
    made = problem(5, anchors=100, dtype=torch.float16, share=0.9)
    made.scores -= 12
    plain, scaled = (evaluate(made, torch.full((3,), factor))[1][0] for factor in (1.0, 65536.0))
    expected = truth(made, torch.full((3,), 65536.0))[1][0]
    near(scaled, expected, 1e-3, 1e-6)
    background = expected.abs() < 1
    assert (plain.cpu()[background] == 0).any()
    assert (scaled.cpu()[background] != 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_graphs_may_be_kept(dtype):
    """Gradients that were handed out stay as they are, whatever is asked next."""
    made = problem(6, dtype=dtype)
    leaves = [tensor.to(DEVICE).requires_grad_() for tensor in (made.scores, made.boxes)]
    tensors = vars(made) | dict(zip(("scores", "boxes"), leaves, strict=True))
    loss = detection_loss.detection_loss(**tensors, size=SIZE, gains=GAINS, reg_max=16).loss

    def ask(factor):
        return torch.autograd.grad(loss.sum() * factor, leaves, retain_graph=True)

    first, doubled, again = ask(1), ask(2), ask(1)
    for one, two, three in zip(first, doubled, again, strict=True):
        assert torch.equal(one, three)
        torch.testing.assert_close(one * 2, two, rtol=0, atol=1e-7 if dtype == torch.float16 else 0)  # subnormal
    (boxes,) = torch.autograd.grad(loss[0], leaves[1], retain_graph=True)
    assert not torch.equal(boxes, first[1])
    assert all(map(torch.equal, ask(1), first))


def test_differentiable_once():
    leaves = problem().scores.requires_grad_(), problem().boxes.requires_grad_()
    made = vars(problem()) | dict(zip(("scores", "boxes"), leaves, strict=True))
    loss = detection_loss.detection_loss(**made, size=SIZE, gains=GAINS, reg_max=16).loss
    slopes = torch.autograd.grad(loss.sum(), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match=r"twice|does not require grad"):
        slopes[0].sum().backward()


def test_only_what_is_asked_for():
    """One leaf alone, and no graph at all: nothing of the size of the logits is made without need."""
    made = problem()
    expected = truth(made)[1]
    for name, slope in zip(("scores", "boxes"), expected, strict=True):
        leaf = getattr(made, name).clone().requires_grad_()
        found = detection_loss.detection_loss(**vars(made) | {name: leaf}, size=SIZE, gains=GAINS, reg_max=16)
        near(torch.autograd.grad(found.loss.sum(), leaf)[0], slope, 1e-4, 3e-6)


def test_sizes_of_what_is_allocated(allocations):
    made = problem(rows=9)

    def sizes():
        return sorted(torch.Size(shape).numel() for shape in allocations)

    detection_loss.detection_loss(**vars(made), size=SIZE, gains=GAINS, reg_max=16)
    assert sizes()[-1] == 2 * 70
    allocations.clear()
    evaluate(made)
    assert sizes()[-2:] == [2 * 5 * 70, 2 * 64 * 70]
    assert sizes()[-3] == 2 * 70


def test_extreme_logits():
    made = problem(7)
    made.scores[:, :, ::3], made.scores[:, :, 1::7] = 80.0, -80.0
    made.boxes[:, ::5], made.boxes[:, 1::7] = 80.0, -80.0
    made.boxes[0, 3:9, 5] = -torch.inf
    background = (made.score == 0).nonzero()
    for (image, anchor), value in zip(background[::9].tolist(), (torch.inf, -torch.inf, torch.nan), strict=False):
        made.scores[image, 2, anchor] = value
        made.boxes[image, 2, anchor] = value
    found, (_, slopes) = compare(made)
    assert found.loss.isnan().tolist() == [False, True, False]
    assert slopes.isfinite().all()


def test_boxes_that_end_at_the_truths_sides():
    """Where both boxes end at one line, autograd gives each half; and a thin box has a slope."""
    made = problem(8, reg_max=1, anchors=33, share=1.0)
    made.gt_boxes, made.boxes = made.gt_boxes.round(), (made.boxes * 8).round() / 8  # exact in both precisions
    rows = made.owner.long()[..., None].expand(-1, -1, 4)
    cells = made.gt_boxes.gather(1, rows) / made.strides
    sides = torch.cat((made.points - cells[..., :2], cells[..., 2:] - made.points), -1).mT
    made.boxes[:, :2], made.boxes[:, 2:, ::2] = sides[:, :2], sides[:, 2:, ::2]
    made.boxes[0, 2, 4], made.boxes[1, 3, 9] = -made.boxes[0, 0, 4] + 1e-3, -made.boxes[1, 1, 9]
    compare(made)


@pytest.mark.parametrize(("box", "category", "classes"), [(16, 16, 2), (64, 64, 4), (128, 128, 16)])
def test_block_sizes(monkeypatch, box, category, classes):
    """70 anchors and 5 classes, 64 anchors and 4 classes: blocks smaller than these, as large, and larger."""
    monkeypatch.setattr(detection_loss, "BOX_BLOCK", box)
    monkeypatch.setattr(detection_loss, "CLASS_BLOCK", category)
    monkeypatch.setattr(detection_loss, "CLASSES", classes)
    monkeypatch.setattr(detection_loss, "PLACES", box)
    monkeypatch.setattr(detection_loss, "PARTS", 2)
    monkeypatch.setattr(detection_loss, "SUMS", 2)
    compare(problem(9), torch.tensor([2.0, 2.0, 2.0]), reduction="none")
    compare(problem(9, anchors=64, classes=4, share=1.0))


def within(tensor):
    """The same values as a slice out of a larger tensor of NaN, or of what is no row."""
    shape = [size + 3 for size in tensor.shape]
    larger = torch.full(shape, torch.nan if tensor.is_floating_point() else 99).to(tensor.dtype)
    view = larger[tuple(slice(1, 1 + size) for size in tensor.shape)]
    return view.copy_(tensor)


@pytest.mark.parametrize("change", [within, lambda t: t.mT.contiguous().mT, lambda t: within(t.mT).mT])
def test_layouts(change):
    made = problem(10)
    compare(SimpleNamespace(**{name: change(value) for name, value in vars(made).items()}))


def test_outputs_are_written_and_padding_is_not_read(poisoned):
    made = problem(11)
    made.gt_boxes[:, 3], made.labels[:, 3] = torch.nan, 99
    made.owner[made.owner == 3] = 0
    made.owner[made.owner == -1] = 2**31 - 1
    made.boxes.mT[made.score == 0] = torch.nan
    compare(made)
    compare(made, torch.tensor([1.0, 3.0, 2.0]), reduction="none")


def test_order_of_programs_and_repeats(reordered):
    made = problem(12)
    (found, slopes), (other, others) = evaluate(made), evaluate(made)
    assert torch.equal(found.loss, other.loss)
    assert all(map(torch.equal, slopes, others))
    compare(made)


# What leads to them


@pytest.mark.parametrize("block", [2, 8, 256])
@pytest.mark.parametrize("most", [None, 5])
def test_padded_targets(monkeypatch, poisoned, block, most):
    """Those of the torch path to the bit; centres on the image's corner are near the edge of what is valid."""
    monkeypatch.setattr(targets, "BLOCK", block)
    draw = torch.Generator().manual_seed(0)
    batch_idx = torch.tensor([0.0, 0, 0, 2, 2, 2, 2, 2, 3])
    bboxes = torch.rand(4, 9, generator=draw).T
    bboxes[1, :2], bboxes[3, 0], bboxes[4, 2], bboxes[5, 2:] = 0, -1, torch.nan, 0
    cls = torch.randint(-3, 7, (9, 1), generator=draw).half()
    for count, dtype in ((9, torch.float32), (8, torch.int64), (0, torch.float64)):
        given = batch_idx[:count].to(dtype), cls[:count], bboxes[:count]
        given = [value.to(DEVICE) for value in given]
        expected = pad_targets(*given, 5, SIZE, max_objects=most, sparse=False)
        found = targets.padded_targets(*given, 5, count if most is None else most, SIZE)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def test_padded_targets_carry_no_gradient():
    given = [torch.tensor(value, device=DEVICE, requires_grad=True) for value in ([0.0], [1.0], [[0.5, 0.5, 0.1, 0.1]])]
    assert not any(found.requires_grad for found in targets.padded_targets(*given, 1, 1, SIZE))


@pytest.mark.parametrize(
    ("index", "rows", "message"),
    [
        ([0, 1, 0], 3, "descend"),
        ([0, 1, 2], 3, "descend"),
        ([-1, 0, 1], 3, "descend"),
        ([0, 1, 1, 1], 2, "max_objects"),
        ([0, 0, 0, 1], 2, "max_objects"),
    ],
)
def test_targets_that_are_refused(index, rows, message):
    if DEVICE.type == "cuda":
        pytest.skip("a failed assertion ends the process's use of the device")
    given = torch.tensor(index), torch.zeros(len(index)), torch.rand(len(index), 4)
    with pytest.raises(RuntimeError, match=message):
        targets.padded_targets(*given, 2, rows, SIZE)


@pytest.mark.parametrize("reg_max", [16, 5, 1])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("low", [None, torch.bfloat16])
def test_decoded_boxes(low, dtype, reg_max, poisoned):
    """Those of the torch path, in half dtypes to the last bit."""
    geometry = make_geometry([[7, 6], [4, 3]], [8, 16], dtype, DEVICE)
    channels = torch.randn(2, 4 * reg_max, 54, generator=torch.Generator().manual_seed(0)).mul(2).to(DEVICE, dtype)
    channels[0, 0, 3], channels[0, 1, 4] = torch.nan, torch.inf
    with torch.autocast(DEVICE.type, low) if low and dtype != torch.float16 else nullcontext():
        expected = torch.stack(Decoder(channels, geometry, reg_max).all()[:4], -1)
        found = decode.decode(channels, geometry.points, geometry.strides, reg_max)
    exact = dtype != torch.float32 or (low and reg_max > 1)
    torch.testing.assert_close(found, expected, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-4, equal_nan=True)


def run(batch, path, factor=1.0, autocast=None, **changes):
    """The criterion, and the gradients of its sum."""
    tensors = {name: value.to(DEVICE) for name, value in batch[0].items()}
    leaves = [tensors[name].detach().requires_grad_() for name in ("boxes", "scores")]
    tensors |= dict(zip(("boxes", "scores"), leaves, strict=True))
    with torch.autocast(DEVICE.type, autocast) if autocast else nullcontext():
        found = v8_detection_loss(**tensors, **batch[1] | changes, path=path)
    return found, torch.autograd.grad(found.loss.sum() * factor, leaves)


def both(batch, **changes):
    """Assert that kernels say what the static path says."""
    expected, theirs = run(batch, "static", **changes)
    found, ours = run(batch, "triton", **changes)
    assert torch.equal(found.fg_mask, expected.fg_mask)
    assert torch.equal(found.target_gt_idx, expected.target_gt_idx)
    torch.testing.assert_close(found.items, expected.items, rtol=2e-5, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(found.loss, expected.loss, rtol=2e-5, atol=1e-6, equal_nan=True)
    for one, other in zip(ours, theirs, strict=True):
        near(one, other.double().cpu(), max(2e-4, 2 * torch.finfo(one.dtype).eps), 3e-5)
    return found


def in_dtype(batch, dtype):
    return batch[0] | {name: batch[0][name].to(dtype) for name in ("boxes", "scores")}, batch[1]


@pytest.mark.parametrize(
    ("batch", "changes"),
    [
        (example(), {}),
        (example(1), {"reduction": "none"}),
        (first_rows(0), {}),
        (first_rows(2), {"class_weights": [0.5, 1, 2]}),
        (example(classes=1), {}),
        (in_dtype(example(), torch.bfloat16), {}),
        (in_dtype(example(), torch.float16), {"factor": 65536.0 / 64}),
        (example(), {"autocast": torch.bfloat16, "reduction": "none"}),
        (in_dtype(example(1), torch.bfloat16), {"autocast": torch.bfloat16}),
        (example(), {"ciou_alpha": "legacy", "topk": 7, "topk2": 1, "max_objects": 5}),
        (example(), {"ignore_mask": torch.arange(252).view(2, 126) % 3 == 0}),
    ],
)
def test_criterion(batch, changes):
    both(batch, **changes)


@settings(max_examples=4, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(drawn.cases(dtypes=("float32", "float16", "bfloat16")))
@pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")
def test_drawn_cases(case):
    options = dict(case.settings)
    autocast = options.pop("autocast")
    low = getattr(torch, autocast) if autocast else None
    batch = case.tensors, options
    try:
        run(batch, "static", autocast=low)
    except (ValueError, TypeError, RuntimeError) as refused:
        with pytest.raises(type(refused)):
            run(batch, "triton", autocast=low)
    else:
        both(batch, autocast=low)


def test_no_images_or_anchors():
    batch = example()
    empty = batch[0] | {name: batch[0][name][:0] for name in batch[0]}
    found, slopes = run((empty, batch[1]), "triton")
    assert found.loss.tolist() == [0, 0, 0]
    assert [slope.numel() for slope in slopes] == [0, 0]


def test_both_heads():
    (boxes, batch), other = example(), example(boxes=torch.randn(2, 64, 126), scores=torch.randn(2, 3, 126) - 1)[0]
    heads = {"o2m_boxes": boxes.pop("boxes"), "o2m_scores": boxes.pop("scores")}
    heads |= {"o2o_boxes": other["boxes"], "o2o_scores": other["scores"]}
    results = []
    for path in ("static", "triton"):
        leaves = {name: value.clone().requires_grad_() for name, value in heads.items()}
        found = v10_detection_loss(**leaves, **boxes, **batch, form="e2e", path=path)
        results.append((found, torch.autograd.grad(found.loss.sum(), list(leaves.values()))))
    (expected, theirs), (found, ours) = results
    assert torch.equal(found.fg_mask, expected.fg_mask)
    torch.testing.assert_close(found.loss, expected.loss, rtol=2e-5, atol=1e-6)
    for one, another in zip(ours, theirs, strict=True):
        near(one, another.double(), 2e-4, 3e-5)


# What PyTorch makes of the operators


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiles_as_one_graph(dtype):
    batch = in_dtype(example(), dtype)
    expected, theirs = run(batch, "triton")
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda given: v8_detection_loss(**given, **batch[1], path="triton"), fullgraph=True, backend="aot_eager"
    )
    leaves = {name: batch[0][name].clone().requires_grad_() for name in ("boxes", "scores")}
    found = compiled(batch[0] | leaves)
    assert torch.equal(found.fg_mask, expected.fg_mask)
    torch.testing.assert_close(found.loss, expected.loss)
    for one, other in zip(torch.autograd.grad(found.loss.sum(), list(leaves.values())), theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_no_value_is_looked_at():
    """On fake tensors every look at a value would raise."""
    given, options = example()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {name: mode.from_tensor(value) for name, value in given.items()}
        leaves = [fake[name].requires_grad_() for name in ("boxes", "scores")]
        found = v8_detection_loss(**fake, **options, path="triton")
        slopes = torch.autograd.grad(found.loss.sum(), leaves)
    assert found.loss.shape == (3,)
    assert [tuple(slope.shape) for slope in slopes] == [(2, 64, 126), (2, 3, 126)]


# Planted faults


FAULTS = {
    "mask one short at a tile's end": ("inside = anchor < anchors", "inside = anchor < anchors - 1"),
    "mask one short in the classes": ("there = column < classes", "there = column < classes - 1"),
    "mask one short in the bins": ("0.0), mask=(bins < R)", "0.0), mask=(bins < R - 1)"),
    "background not filled with zeros": ("tl.float32), mask=(bins < R)", "tl.float32), mask=(bins < 0)"),
    "ties to the second box": ("tl.where(one == other, 0.5, 0.0)", "tl.where(one == other, 0.0, 0.0)"),
    "the nearest bin for the lower": ("tl.floor(clamped)", "tl.floor(clamped + 0.5)"),
    "a factor forgotten": ("scale * factor", "scale"),
    "a term's sum lost": ("tl.store(sums + (images + image) * tiles + tile, distance_sum)", "pass"),
}


def tied():
    """Truths at whole bins, predictions that end at their sides, a tile without foreground, a last lone anchor."""
    made = problem(13, anchors=65, reg_max=2, share=0.7)
    made.points, made.strides = made.points.round(), torch.full_like(made.strides, 8)
    rows = made.owner.clamp(min=0).long()[..., None].expand(-1, -1, 4)
    near = torch.tensor([[-4.0, -4.0, 4.0, 4.0]]).expand(2, 1, 4) + made.points[:1].repeat(1, 2) * 8
    made.gt_boxes[:, :1] = near
    made.owner[:, 0], made.score[:, 0] = 0, 0.7
    made.boxes[:, :, 0] = 0  # half a cell to each side: as far as the truth
    made.score[:, -1], made.owner[:, -1] = 0.9, rows[:, -1, 0].int()
    made.gt_boxes[:, 1:] = made.gt_boxes[:, 1:].div(8).round() * 8
    return made


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_caught(planted, poisoned, monkeypatch, name):
    fault, factor = FAULTS[name], torch.tensor([2.0, 2.0, 2.0])
    compare(tied())
    compare(tied(), factor)
    if fault[0] in inspect.getsource(detection_terms):
        terms = planted(detection_terms, fault)
    else:
        overlap = planted(complete_iou, fault)
        monkeypatch.setattr(detection_terms, "complete_iou_slopes", overlap.complete_iou_slopes)
        terms = detection_terms
    monkeypatch.setattr(detection_loss, "box_kernel", terms.box_kernel)
    monkeypatch.setattr(detection_loss, "class_kernel", terms.class_kernel)
    with pytest.raises(AssertionError):  # noqa: PT012 - whichever of the two shows it
        compare(tied())
        compare(tied(), factor)


def scored(made):
    """Arguments of `target_scores` but for its settings."""
    tensors = made.scores, made.boxes, made.owner, made.score, made.labels, made.gt_boxes, made.points, made.strides
    return tuple(tensor.to(DEVICE) for tensor in tensors)


def test_labels_below_all_classes_score_as_the_first():
    """Labels of padding, and what is refused elsewhere: no memory before the scores is read."""
    made, low = problem(4), problem(4)
    made.labels[:], low.labels[:] = 0, -8
    found, expected = (target_scores.target_scores(*scored(one), 16, "stable") for one in (low, made))
    assert expected.max() > 0
    assert torch.equal(found, expected)


def test_target_scores_carry_no_gradient():
    made = problem(3)
    for leaf in (made.scores, made.boxes, made.gt_boxes):
        leaf.requires_grad_()
    assert not target_scores.target_scores(*scored(made), 16, "stable").requires_grad


def test_a_lost_maximum_is_caught(planted):
    """Peaks of a row by plain stores: the last program's would stand."""
    lost = 'tl.atomic_max(peaks + row, metric.to(tl.int32, bitcast=True), mask=learns, sem="relaxed")'
    racing = planted(target_scores, (lost, "tl.store(peaks + row, metric.to(tl.int32, bitcast=True), mask=learns)"))
    made = problem(14, rows=2, scale=0.5)
    made.gt_boxes[:] = torch.tensor([-8.0, -8, 150, 150])
    right, wrong = (module.target_scores(*scored(made), 16, "stable") for module in (target_scores, racing))
    assert right.max() > 0.1
    assert not torch.allclose(right, wrong)


# Compiled for GPUs


def launches():
    """Every variant of every kernel once; see `tests.kernels.compiling`."""
    every = {"ignore_mask": torch.zeros(2, 70, dtype=torch.bool), "class_weights": torch.ones(5)}
    for dtype, reg_max, changes in (
        (torch.float32, 16, {}),
        (torch.bfloat16, 16, every | {"reduction": "none"}),
        (torch.float16, 16, {"ciou_alpha": "legacy", "target": torch.zeros(2, 70)}),
        (torch.float32, 5, {}),
        (torch.bfloat16, 1, every),
        (torch.float32, 1, {"reg1_distance": "zero"}),
    ):
        made = problem(dtype=dtype, reg_max=reg_max)
        leaves = [made.scores.requires_grad_(), made.boxes.requires_grad_()]
        given = made.scores, made.boxes, made.owner, made.score, made.labels, made.gt_boxes, made.points, made.strides
        decode.decode(made.boxes, made.points, made.strides, reg_max)
        targets._padded(torch.zeros(9), torch.zeros(9), torch.zeros(9, 4), 2, 9, *SIZE)
        target_scores.target_scores(*given, reg_max, changes.get("ciou_alpha", "stable"))
        loss = detection_loss.detection_loss(*given, SIZE, gains=GAINS, reg_max=reg_max, **changes).loss.sum()
        torch.autograd.grad(loss, leaves, retain_graph=True)
        torch.autograd.grad(loss, leaves)
