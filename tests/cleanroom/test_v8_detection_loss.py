"""The detection criterion against the worked examples and edge cases of yolo_losses.md, section 3, and by hand."""

import pytest
import torch
from torch import inf, nan
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cleanroom.losses._yolo_head import _remembered, distances, make_geometry
from cleanroom.losses.v8_detection import v8_detection_loss, v8DetectionLoss
from tests.cleanroom.yolo_by_hand import by_hand
from tests.cleanroom.yolo_examples import GAINS, as_upstream, example, first_rows, model, pattern

PATHS = pytest.mark.parametrize("path", ["sparse", "static"])


def everywhere():
    """One object over all anchors."""
    given = {
        "boxes": pattern((1, 64, 11), 1, 0.7, 0.3),
        "scores": pattern((1, 3, 11), 2, 1.1, 0.5) - 2,
        "batch_idx": torch.zeros(1),
        "cls": torch.zeros(1),
        "bboxes": torch.tensor([[0.5, 0.5, 4.0, 4.0]]),
    }
    return given, {"levels": [[3, 3], [1, 1], [1, 1]], "strides": [8, 16, 32], "num_classes": 3, "topk": 11}


def scene(seed, *, reg_max=16, classes=5, images=3, objects=7, dtype=torch.float32):
    """A random batch: boxes of all sizes, logits about them; the last image is empty."""
    generator = torch.Generator().manual_seed(seed)
    levels, strides = [[12, 8], [6, 4], [3, 2]], [8, 16, 32]
    anchors = sum(rows * columns for rows, columns in levels)
    count = objects * (images - 1)
    shares = torch.rand(count, 4, generator=generator) * torch.tensor([1, 1, 0.6, 0.6])
    given = {
        "boxes": (torch.randn(images, 4 * reg_max, anchors, generator=generator) * (1.5 if reg_max > 1 else 2)),
        "scores": torch.randn(images, classes, anchors, generator=generator) * 2 - 2,
        "batch_idx": torch.arange(images - 1).repeat_interleave(objects).float(),
        "cls": torch.randint(0, classes, (count,), generator=generator).float(),
        "bboxes": shares,
    }
    given |= {name: given[name].to(dtype) for name in ("boxes", "scores")}
    settings = {
        "levels": levels,
        "strides": strides,
        "num_classes": classes,
        "reg_max": reg_max,
        "gains": GAINS,
        "class_weights": None,
    }
    return given, settings


def gradients(loss, given):
    return torch.autograd.grad(loss, [given["boxes"], given["scores"]], retain_graph=True)


def tracked(given):
    return given | {name: given[name].clone().requires_grad_() for name in ("boxes", "scores")}


def evaluate(given, settings, **changes):
    """The result and the gradients of the summed vector."""
    given = tracked(given)
    found = v8_detection_loss(**given, **(settings | changes))
    return found, gradients(found.loss.sum(), given)


def norms(found):
    return [gradient.double().norm().item() for gradient in found]


def close(actual, expected, rel=1e-5):
    assert torch.as_tensor(actual).flatten().tolist() == pytest.approx(expected, rel=rel)


@PATHS
@pytest.mark.parametrize(
    ("reg_max", "loss", "norm"),
    [
        (16, (12.69281, 84.05433, 8.412513), (0.316691, 3.22356)),
        (1, (5.991073, 38.49861, 0.1940555), (1.85525, 1.41933)),
    ],
)
def test_worked_example(reg_max, loss, norm, path):
    found, gradient = evaluate(*example(reg_max), path=path)
    close(found.loss.detach(), loss)
    close(found.items, [value / 2 for value in loss])
    assert not found.items.requires_grad
    assert found.fg_mask.sum(1).tolist() == [20, 10]
    assert found.loss.dtype == found.items.dtype == torch.float32
    assert norms(gradient) == pytest.approx(norm, rel=1e-4)


@PATHS
@pytest.mark.parametrize(("reg_max", "box", "distance"), [(16, 0.114950, 0.267462), (1, 1.79423, 0.0647761)])
def test_gradient_of_each_component(reg_max, box, distance, path):
    given, settings = example(reg_max)
    given = tracked(given)
    loss = v8_detection_loss(**given, **settings, path=path).loss
    each = [norms(gradients(component, given)) for component in loss]
    assert [row[0] for row in each] == pytest.approx([box, 0, distance], rel=1e-4)
    assert [row[1] > 0 for row in each] == [False, True, False]


@PATHS
@pytest.mark.parametrize(
    ("batch", "changes", "expected"),
    [
        (example(), {"gains": {"box": 1, "cls": 1, "dfl": 1}}, (1.692375, 168.1087, 5.608342)),
        (example(), {"class_weights": [0.5, 1, 2]}, (12.69281, 98.01527, 8.412513)),
        (example(), {"class_weights": torch.tensor([0.5, 1, 2], dtype=torch.float16)}, (12.69281, 98.01527, 8.412513)),
        (example(), {"topk": 1}, (5.078484, 181.8618, 3.505775)),
        (example(), {"topk": 7, "topk2": 1}, (5.078484, 181.8618, 3.505775)),
        (first_rows(0), {}, (0, 181.4841, 0)),
        (first_rows(2), {}, (13.43361, 183.2211, 8.466196)),
        (everywhere(), {}, (2.740346, 1.683716, 4.867168)),
        (example(classes=1), {}, (12.77446, 36.21199, 8.468525)),
    ],
)
def test_edges_with_their_numbers(batch, changes, expected, path):
    found, gradient = evaluate(*batch, **changes, path=path)
    close(found.loss.detach(), expected)
    assert all(value.isfinite().all() for value in gradient)


def test_gradient_of_class_weights():
    assert norms(evaluate(*example(), class_weights=[0.5, 1, 2])[1])[1] == pytest.approx(4.27717, rel=1e-4)


def test_every_anchor_is_foreground():
    found, _ = evaluate(*everywhere())
    assert found.fg_mask.all()
    assert not found.target_gt_idx.any()


@PATHS
@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_without_foreground(path, shift):
    given, settings = first_rows(0) if shift == 0 else example()
    given["bboxes"] = given["bboxes"] + torch.tensor([shift, 0, 0, 0])
    found, (boxes, scores) = evaluate(given, settings, path=path)
    close(found.loss.detach(), (0, 181.4841, 0))
    assert boxes.shape == given["boxes"].shape
    assert not boxes.any()
    assert scores.any()
    assert not found.fg_mask.any()


@PATHS
def test_the_normaliser_has_a_floor(path):
    """A lone object with one anchor: sum T < 1, so the class term is not divided."""
    given, settings = first_rows(1)
    found, _ = evaluate(given, settings, topk=1, path=path)
    assert found.fg_mask.sum() == 1
    plain = torch.nn.functional.softplus(given["scores"].double()).sum() * 0.5
    assert 0 < abs(plain - found.items[1]) < 2  # the target's share
    expected = by_hand(**given, found=found, settings=settings).sum(0)
    torch.testing.assert_close(found.items.double(), expected, rtol=1e-5, atol=0)


@PATHS
@pytest.mark.parametrize("reg_max", [16, 2, 1])
@pytest.mark.parametrize("seed", range(3))
def test_by_hand(seed, reg_max, path):
    given, settings = scene(seed, reg_max=reg_max)
    settings["class_weights"] = [0.5, 1, 2, 0, 1.5]
    found, gradient = evaluate(given, settings, path=path)
    wide = tracked({name: value.double() for name, value in given.items()})
    expected = by_hand(**wide, found=found, settings=settings).sum(0)
    torch.testing.assert_close(found.items.double(), expected.detach(), rtol=2e-5, atol=1e-8)
    for ours, theirs in zip(gradient, gradients(expected.sum() * 3, wide), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-4, atol=2e-6 * theirs.abs().max().item())


@PATHS
@pytest.mark.parametrize("reg_max", [16, 1])
def test_float64_is_exact(reg_max, path):
    given, settings = scene(4, reg_max=reg_max, dtype=torch.float64)
    found, gradient = evaluate(given, settings, path=path)
    wide = tracked(given)
    expected = by_hand(**wide, found=found, settings=settings).sum(0)
    assert gradient[0].dtype == torch.float64
    for ours, theirs in zip(gradient, gradients(expected.sum() * 3, wide), strict=True):
        # Overlaps of the target scores are float32, here as upstream: the smallest are known to some 1e-5.
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7 * theirs.abs().max().item())


@PATHS
@pytest.mark.parametrize("seed", range(3))
def test_ignored_anchors_by_hand(seed, path):
    given, settings = scene(seed)
    ignore = torch.rand(3, 126, generator=torch.Generator().manual_seed(seed)) < 0.4
    found, gradient = evaluate(given, settings, ignore_mask=ignore, path=path)
    plain, _ = evaluate(given, settings, path=path)
    assert torch.equal(found.fg_mask, plain.fg_mask)
    assert (found.fg_mask & ignore).any()
    wide = tracked({name: value.double() for name, value in given.items()})
    expected = by_hand(**wide, found=found, settings=settings, ignore=ignore).sum(0)
    torch.testing.assert_close(found.items.double(), expected.detach(), rtol=2e-5, atol=1e-8)
    for ours, theirs in zip(gradient, gradients(expected.sum() * 3, wide), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=2e-4, atol=2e-6 * theirs.abs().max().item())
        assert not ours.mT[ignore].any()


@PATHS
def test_reduction_none_is_each_image(path):
    given, settings = scene(5)
    found, gradient = evaluate(given, settings, reduction="none", path=path)
    whole, whole_gradient = evaluate(given, settings, path=path)
    assert found.loss.shape == found.items.shape == (3, 3)
    torch.testing.assert_close(found.items.sum(0), whole.items)
    torch.testing.assert_close(found.loss.sum(0), whole.loss)
    assert found.loss[2, 0] == found.loss[2, 2] == 0  # nothing in the last image
    assert found.loss[2, 1] > 0
    for ours, theirs in zip(gradient, whole_gradient, strict=True):
        torch.testing.assert_close(ours, theirs)
    expected = by_hand(**given, found=found, settings=settings)
    torch.testing.assert_close(found.items.double(), expected, rtol=2e-5, atol=1e-8)


@pytest.mark.parametrize("reg_max", [16, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", range(4))
def test_paths_decide_alike(seed, dtype, reg_max):
    given, settings = scene(seed, reg_max=reg_max, dtype=dtype)
    settings["topk2"] = [None, 1, 3, 14][seed]
    (sparse, ours), (static, theirs) = (evaluate(given, settings, path=path) for path in ("sparse", "static"))
    assert torch.equal(sparse.fg_mask, static.fg_mask)
    assert torch.equal(sparse.target_gt_idx, static.target_gt_idx)
    torch.testing.assert_close(sparse.loss, static.loss, rtol=1e-5, atol=1e-6)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=max(1e-4, torch.finfo(dtype).eps), atol=1e-6)


@PATHS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes(dtype, path):
    given, settings = example()
    given |= {name: given[name].to(dtype) for name in ("boxes", "scores")}
    found, gradient = evaluate(given, settings, path=path)
    # Decisions are made in the dtype, sums are not: all are close to the float64 numbers.
    close(found.loss.detach(), (12.69281, 84.05437, 8.412514), rel=1e-6 if dtype == torch.float64 else 2e-3)
    assert found.loss.dtype == torch.float32
    assert [value.dtype for value in gradient] == [dtype, dtype]
    assert norms(gradient) == pytest.approx((0.316691, 3.22356), rel=1e-4 if dtype == torch.float64 else 2e-3)


def test_fake_anchors_are_not_remembered():
    """They would serve the next training step, which has values."""
    given = [[5, 3]], [8.0], torch.float32, torch.device("cpu")
    with FakeTensorMode():
        assert isinstance(make_geometry(*given).points, FakeTensor)
    assert type(make_geometry(*given).points) is torch.Tensor


@PATHS
@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_autocast_keeps_the_numbers_in_float32(low, dtype, path):
    _remembered.cache_clear()  # the anchors too are made under it
    given, settings = example()
    given |= {name: given[name].to(dtype) for name in ("boxes", "scores")}
    given = tracked(given)
    with torch.autocast("cpu", low):
        found = v8_detection_loss(**given, **settings, path=path)
    close(found.loss.detach(), (12.69281, 84.05437, 8.412514), rel=5e-3)
    assert found.loss.dtype == torch.float32
    assert [value.dtype for value in gradients(found.loss.sum(), given)] == [dtype, dtype]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_what_decides_is_computed_in_the_dtype_of_the_channels(dtype):
    """Or of the autocast around; what is told afterwards in neither."""
    rows = pattern((50, 64), 3, 0.7, 0.3)
    share = rows.to(dtype).view(50, 4, 16).softmax(-1)
    expected = (share.double() @ torch.arange(16.0, dtype=torch.float64)).to(dtype)
    assert torch.equal(distances(rows.to(dtype), 16), expected)
    with torch.autocast("cpu", dtype):
        assert distances(rows, 16).dtype == dtype
        assert distances(rows, 16, exact=True).dtype == torch.float32
        assert distances(rows.double(), 16).dtype == torch.float64


def test_half_sums_do_not_overflow():
    """80 classes, 2 x 2100 anchors: upstream's class term is infinite in float16."""
    given, settings = example(classes=80)
    given["scores"] = torch.zeros(2, 80, 2100, dtype=torch.float16)
    given["boxes"] = torch.zeros(2, 64, 2100, dtype=torch.float16)
    settings["levels"] = [[40, 40], [20, 20], [10, 10]]
    found, _ = evaluate(given, settings)
    assert found.loss.isfinite().all()
    assert found.items[1] > 65504 / 100


class TestNonFinite:
    """Section 3's list; where upstream spreads a NaN over terms or gradients, ours stays with its place."""

    OUTSIDE, INSIDE = 0, 40  # anchors of image 0: in the corner, inside the first object

    @pytest.fixture(autouse=True, params=["sparse", "static"])
    def _path(self, request):
        self.path = request.param

    def spoiled(self, name, channel, anchor, value, reg_max=16):
        given, settings = example(reg_max)
        given[name][0, channel, anchor] = value
        return evaluate(given, settings, path=self.path)

    def test_nan_score_is_a_nan_class_term(self):
        for anchor in (self.OUTSIDE, self.INSIDE):
            found, (boxes, scores) = self.spoiled("scores", 1, anchor, nan)
            assert found.loss.isnan().tolist() == [False, True, False]
            assert boxes.isfinite().all()
            assert scores.isnan().sum() == 1
            assert scores[0, 1, anchor].isnan()

    def test_nan_score_of_the_ground_truths_class_is_not_chosen(self):
        found, (boxes, _) = self.spoiled("scores", 0, self.INSIDE, nan)
        assert found.loss.isnan().tolist() == [False, True, False]
        assert not found.fg_mask[0, self.INSIDE]
        assert boxes.isfinite().all()

    @pytest.mark.parametrize("value", [nan, inf])
    @pytest.mark.parametrize("reg_max", [16, 1])
    def test_box_channel_is_not_chosen(self, value, reg_max):
        for anchor in (self.OUTSIDE, self.INSIDE):
            found, gradient = self.spoiled("boxes", 0, anchor, value, reg_max)
            assert found.loss.isfinite().all()
            assert all(one.isfinite().all() for one in gradient)
            assert not found.fg_mask[0, anchor]

    def test_places_that_stay_empty_may_hold_nan(self):
        """The static path has places for all that could be proposed, and fills them up with background."""
        given, settings = example()
        given["bboxes"][2, 0] = 9
        given["boxes"][0, 0, self.OUTSIDE] = nan
        found, gradient = evaluate(given, settings, path=self.path)
        assert found.fg_mask.sum() < 30
        assert found.loss.isfinite().all()
        assert all(one.isfinite().all() for one in gradient)

    def test_impossible_bin_is_fine(self):
        found, gradient = self.spoiled("boxes", 15, self.INSIDE, -inf)
        assert found.loss.isfinite().all()
        assert all(one.isfinite().all() for one in gradient)

    def test_large_logits_are_finite(self):
        given, settings = example()
        found, gradient = evaluate(given | {"scores": given["scores"].sign() * 1e4}, settings, path=self.path)
        assert found.loss.isfinite().all()
        assert all(one.isfinite().all() for one in gradient)

    def test_infinite_score_of_background(self):
        found, _ = self.spoiled("scores", 1, self.OUTSIDE, inf)
        assert found.loss[1] == inf
        # BCE of a certain negative is 0; upstream computes infinity minus infinity.
        found, _ = self.spoiled("scores", 1, self.OUTSIDE, -inf)
        assert found.loss.isfinite().all()

    def test_overflowing_distance(self):
        found, gradient = self.spoiled("boxes", 2, self.INSIDE, 1e30, reg_max=1)
        assert found.loss.isfinite().all()
        assert all(one.isfinite().all() for one in gradient)

    def test_box_that_counts_as_padding(self):
        given, settings = example()
        for row in ([-0.8, -0.4, 0.4, 0.5], [nan, 0.4, 0.4, 0.5]):
            given["bboxes"][0] = torch.tensor(row)
            found, _ = evaluate(given, settings, path=self.path)
            assert found.loss.isfinite().all()
            assert (found.target_gt_idx[0][found.fg_mask[0]] == 1).all()

    def test_corner_sum_of_zero_counts_as_padding(self):
        given, settings = example()
        given["bboxes"][2] = torch.tensor([0.0, 0.0, 1.0, 1.0])
        found, _ = evaluate(given, settings, path=self.path)
        assert not found.fg_mask[1].any()
        given["bboxes"][2, :2] += 0.05
        found, _ = evaluate(given, settings, path=self.path)
        assert found.fg_mask[1].any()

    def test_foreground_without_a_score_is_background(self):
        """Nothing overlaps a point: the assigner fills up with the first anchors in reach, which carry no loss."""
        given, settings = example(reg_max=1)
        given["bboxes"][2] = torch.tensor([20 / 96, 4 / 64, 0, 0])
        found, _ = evaluate(given, settings, path=self.path)
        assert found.fg_mask[0].any()
        assert not found.fg_mask[1].any()
        assert not found.target_gt_idx[1].any()
        given["batch_idx"][:] = 0  # the point is the third object of its image
        found, _ = evaluate(given, settings, path=self.path)
        assert not found.target_gt_idx[~found.fg_mask].any()

    def test_zero_size_box_with_a_positive_centre_is_valid(self):
        given, settings = example()
        given["bboxes"][2, 2:] = 0
        found, _ = evaluate(given, settings, path=self.path)
        assert found.loss.isfinite().all()


class TestLabels:
    def test_dtypes_and_columns(self):
        given, settings = example()
        expected = v8_detection_loss(**given, **settings).loss
        for dtype in (torch.int64, torch.int32, torch.float64, torch.float16):
            for shape in ((-1,), (-1, 1)):
                other = {name: given[name].to(dtype).view(shape) for name in ("batch_idx", "cls")}
                assert torch.equal(v8_detection_loss(**(given | other), **settings).loss, expected)

    def test_class_of_a_row_without_anchors_may_be_any(self):
        """Spare places of the static path carry the first row of their image."""
        given, settings = example()
        given["cls"][0], given["bboxes"][0] = 99, torch.tensor([3.0, 3.0, 0.1, 0.1])
        sparse, static = (v8_detection_loss(**given, **settings, path=path).loss for path in ("sparse", "static"))
        assert sparse.isfinite().all()
        torch.testing.assert_close(sparse, static)

    def test_label_minus_one_reads_the_last_class_and_trains_the_first(self):
        given, settings = example()
        given["cls"][2] = -1
        _, (_, scores) = evaluate(given, settings)
        found, _ = evaluate(given, settings)
        mine = found.fg_mask[1].nonzero()[:, 0]
        assert len(mine)
        background = given["scores"][1].sigmoid() * scores[1].max() / given["scores"][1].sigmoid().max()
        pulled = (scores[1] < background * 0.999)[:, mine]
        assert pulled[0].any()
        assert not pulled[1:].any()

    def test_fractions_are_truncated(self):
        given, settings = example()
        expected = v8_detection_loss(**given, **settings).loss
        assert torch.equal(v8_detection_loss(**(given | {"cls": given["cls"] + 0.9}), **settings).loss, expected)

    @PATHS
    def test_more_rows_than_needed_change_nothing(self, path):
        given, settings = example()
        expected = v8_detection_loss(**given, **settings, path=path)
        found = v8_detection_loss(**given, **settings, max_objects=9, path=path)
        assert torch.equal(found.loss, expected.loss)
        assert torch.equal(found.target_gt_idx, expected.target_gt_idx)

    @pytest.mark.parametrize("order", [[0, 1, 0], [1, 1, 0], [1, 0, 1]])
    def test_unsorted(self, order):
        given, settings = example(batch_idx=torch.tensor(order))
        with pytest.raises(ValueError, match="batch_idx must not descend"):
            v8_detection_loss(**given, **settings)
        with pytest.raises(RuntimeError, match="batch_idx must not descend"):
            v8_detection_loss(**given, **settings, path="static")

    @pytest.mark.parametrize("image", [2, -1])
    def test_image_out_of_range(self, image):
        index = [0, 0, image] if image > 0 else [image, 0, 1]
        given, settings = example(batch_idx=torch.tensor(index))
        with pytest.raises(ValueError, match=r"batch_idx must be in \[0, 2\)"):
            v8_detection_loss(**given, **settings)
        with pytest.raises(RuntimeError, match=r"batch_idx must not descend, and stay in \[0, 2\)"):
            v8_detection_loss(**given, **settings, path="static")

    def test_too_few_rows(self):
        given, settings = example()
        with pytest.raises(ValueError, match="max_objects is 1, but batch_idx has 2 objects of one image"):
            v8_detection_loss(**given, **settings, max_objects=1)
        with pytest.raises(RuntimeError, match="max_objects is 1"):
            v8_detection_loss(**given, **settings, max_objects=1, path="static")

    def test_class_out_of_range(self):
        given, settings = example(cls=torch.tensor([0, 2, 3]))
        with pytest.raises(IndexError, match=r"cls: .* 3 of a row that contains an anchor is outside \[-3, 3\)"):
            v8_detection_loss(**given, **settings)
        with pytest.raises(RuntimeError, match=r"cls: .* outside \[-3, 3\)"):
            v8_detection_loss(**given, **settings, path="static")
        # A row without a candidate is never looked up.
        given["bboxes"][2, 0] = 9
        assert v8_detection_loss(**given, **settings).loss.isfinite().all()


@pytest.mark.parametrize(
    ("name", "change", "error"),
    [
        ("boxes", lambda t: t[:, 1:], ValueError),
        ("boxes", lambda t: t.long(), TypeError),
        ("scores", lambda t: t[:, 1:], ValueError),
        ("scores", lambda t: t[0], ValueError),
        ("scores", lambda t: t.long(), TypeError),
        ("batch_idx", lambda t: t[1:], ValueError),
        ("cls", lambda t: t[1:], ValueError),
        ("bboxes", lambda t: t[:, 1:], ValueError),
    ],
)
def test_errors_name_the_tensor(name, change, error):
    given, settings = example()
    with pytest.raises(error, match=name):
        v8_detection_loss(**(given | {name: change(given[name])}), **settings)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"levels": [[8, 12]]}, ValueError),
        ({"levels": []}, ValueError),
        ({"strides": [8]}, ValueError),
        ({"num_classes": 4}, ValueError),
        ({"reg_max": 0}, ValueError),
        ({"gains": {"box": 1.0}}, ValueError),
        ({"topk": 127}, ValueError),
        ({"topk2": 127}, ValueError),
        ({"class_weights": [1.0, 2.0]}, ValueError),
        ({"reduction": "mean"}, ValueError),
        ({"ignore_mask": torch.zeros(2, 125, dtype=torch.bool)}, ValueError),
        ({"ignore_mask": torch.zeros(2, 126)}, TypeError),
        ({"small_box": "never"}, ValueError),
        ({"pair_domain": "inside"}, ValueError),
        ({"ciou_alpha": "new"}, ValueError),
        ({"reg1_distance": "l2"}, ValueError),
        ({"path": "fast"}, ValueError),
    ],
)
def test_errors_name_the_setting(changes, error):
    given, settings = example()
    with pytest.raises(error, match="scores" if "num_classes" in changes else next(iter(changes))):
        v8_detection_loss(**given, **(settings | changes))


def test_topk_is_not_checked_without_ground_truth():
    given, settings = first_rows(0)
    close(v8_detection_loss(**given, **settings, topk=1000).loss, (0, 181.4841, 0))


@PATHS
def test_inputs_stay_and_targets_have_no_gradient(path):
    given, settings = example()
    before = {name: value.clone() for name, value in given.items()}
    given = {name: value.requires_grad_() for name, value in given.items()}
    loss = v8_detection_loss(**given, **settings, path=path).loss
    loss.sum().backward()
    assert all(torch.equal(given[name].detach(), value) for name, value in before.items())
    assert [given[name].grad is None for name in given] == [False, False, True, True, True]


def test_labels_may_stay_on_the_host():
    """Trainers leave them there; the meta device stands for one on which no value can be read."""
    given, settings = example()
    there = given | {name: given[name].to("meta").requires_grad_() for name in ("boxes", "scores")}
    found = v8_detection_loss(**there, **settings)
    assert found.loss.device.type == found.fg_mask.device.type == "meta"
    assert [gradient.shape for gradient in gradients(found.loss.sum(), there)] == [(2, 64, 126), (2, 3, 126)]
    with pytest.raises(ValueError, match="batch_idx must not descend"):
        v8_detection_loss(**(there | {"batch_idx": torch.tensor([0, 1, 0])}), **settings)


@PATHS
def test_backward_twice_is_the_same_bits(path):
    given, settings = example()
    given = tracked(given)
    loss = v8_detection_loss(**given, **settings, path=path).loss
    first, second = (gradients(loss.sum() * scale, given) for scale in (1, 65536))
    for one, scaled in zip(first, second, strict=True):
        assert torch.equal(one * 65536, scaled)


def test_images_are_independent_but_for_the_normaliser():
    """Permuted images give permuted gradients."""
    given, settings = scene(6)
    found, gradient = evaluate(given, settings)
    order = torch.tensor([1, 0, 2])
    swapped = given | {name: given[name][order] for name in ("boxes", "scores")}
    rows = torch.cat([torch.arange(7, 14), torch.arange(7)])
    swapped |= {name: given[name][rows] for name in ("cls", "bboxes")}
    other, other_gradient = evaluate(swapped, settings)
    assert torch.equal(found.fg_mask[order], other.fg_mask)
    assert torch.equal(found.target_gt_idx[order], other.target_gt_idx)
    torch.testing.assert_close(found.loss, other.loss)
    for ours, theirs in zip(gradient, other_gradient, strict=True):
        torch.testing.assert_close(ours[order], theirs)


def test_eras_reach_the_assigner_and_the_third_term():
    given, settings = example(reg_max=1)
    assert v8_detection_loss(**given, **settings, reg1_distance="zero").loss[2] == 0
    # A box below 16 pixels: a candidate of the anchors in reach since 8.4.0, of those below 8 until 8.4.127.
    given["bboxes"][2] = torch.tensor([0.5, 0.5, 10 / 96, 10 / 64])
    counts = {
        rule: int(v8_detection_loss(**given, **settings, small_box=rule).fg_mask[1].sum())
        for rule in ("off", "first_stride", "min_side")
    }
    assert counts["off"] == counts["first_stride"] <= counts["min_side"]
    given["bboxes"][2] = torch.tensor([0.5, 0.5, 2 / 96, 2 / 64])
    off = v8_detection_loss(**given, **settings, small_box="off", edge_round_trip=False)
    assert not off.fg_mask[1].any()


@PATHS
def test_the_score_sum_has_a_floor_since_8_0_11(path):
    given, settings = first_rows(1)
    given["boxes"] = given["boxes"] * 0  # poor predictions
    floored, free = (
        v8_detection_loss(**given, **settings, score_sum_floor=floor, path=path) for floor in (True, False)
    )
    former = by_hand(**given, found=free, settings=settings, floor=0.0).sum(0)
    torch.testing.assert_close(free.items, former.float(), rtol=1e-5, atol=1e-6)
    share = floored.items / free.items  # the sum of scores
    assert 0 < share[1] < 0.9
    torch.testing.assert_close(share, share[1].expand(3))
    # Without a score to sum there is nothing to divide by.
    given, settings = first_rows(0)
    without = [
        v8_detection_loss(**given, **settings, score_sum_floor=floor, path=path).items for floor in (True, False)
    ]
    assert torch.equal(*without)


@PATHS
def test_the_pair_domain_reaches_the_assigner(path):
    given, settings = scene(5, images=2, objects=20)
    now, former = (
        v8_detection_loss(**given, **settings, pair_domain=domain, path=path) for domain in ("candidates", "all")
    )
    assert not torch.equal(now.target_gt_idx, former.target_gt_idx)
    torch.testing.assert_close(former.items, by_hand(**given, found=former, settings=settings).sum(0).float())


class Made(TorchDispatchMode):
    """Sizes of the tensors that operations make, in elements; those that return their arguments' memory make none."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = function(*args, **kwargs)
        given = {memory(value) for value in tree_leaves((args, kwargs))}
        made = [value for value in tree_leaves(result) if memory(value) not in {None, *given}]
        self.sizes += [value.untyped_storage().nbytes() // value.element_size() for value in made]
        return result


def memory(value):
    return value.untyped_storage().data_ptr() if isinstance(value, torch.Tensor) else None


def test_nothing_of_the_size_of_the_logits_but_their_gradient(monkeypatch):
    """Class logits are read in blocks, no dense target is made, and few boxes are decoded."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    given, settings = example()
    generator = torch.Generator().manual_seed(0)
    given["scores"] = torch.randn(2, 80, 4200, generator=generator)
    given["boxes"] = torch.randn(2, 64, 4200, generator=generator)
    settings |= {"levels": [[80, 40], [40, 20], [20, 10]], "num_classes": 80}
    given["bboxes"][:, 2:] = 0.2
    given = tracked(given)
    with Made() as forward:
        loss = v8_detection_loss(**given, **settings).loss.sum()
    assert max(forward.sizes) < 2 * 64 * 4200 / 2
    with Made() as backward:
        gradients(loss, given)
    assert sorted(backward.sizes)[-2:] == [2 * 64 * 4200, 2 * 80 * 4200]
    assert sorted(backward.sizes)[-3] < 2 * 64 * 4200 / 2


class TestCompiled:
    @pytest.fixture(autouse=True)
    def _fresh(self):
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    @pytest.mark.parametrize(("backend", "reg_max"), [("aot_eager", 16), ("eager", 1)])
    def test_one_graph(self, backend, reg_max):
        given, settings = scene(7, reg_max=reg_max)
        settings["class_weights"] = torch.tensor([0.5, 1, 2, 0, 1.5])
        expected, gradient = evaluate(given, settings, path="static")
        given = tracked(given)
        compiled = torch.compile(
            lambda **tensors: v8_detection_loss(**tensors, **settings), fullgraph=True, backend=backend
        )
        found = compiled(**given)
        assert torch.equal(found.fg_mask, expected.fg_mask)
        assert torch.equal(found.target_gt_idx, expected.target_gt_idx)
        torch.testing.assert_close(found.loss, expected.loss)
        for ours, theirs in zip(gradients(found.loss.sum(), given), gradient, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)

    def test_the_class_in_one_graph(self):
        given, settings = example()
        criterion = v8DetectionLoss(model())
        preds, batch = as_upstream(given, settings)
        expected, items = criterion(preds, batch)
        compiled = torch.compile(criterion, fullgraph=True, backend="eager")
        loss, compiled_items = compiled(preds, batch)
        torch.testing.assert_close(loss, expected)
        assert list(compiled_items) == list(items)

    def test_no_value_is_looked_at(self):
        """On fake tensors every look at a value would raise."""
        given, settings = scene(8)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            fake = tracked({name: mode.from_tensor(value) for name, value in given.items()})
            found = v8_detection_loss(**fake, **settings, max_objects=12, path="static")
            boxes, scores = gradients(found.loss.sum(), fake)
        assert found.loss.shape == (3,)
        assert boxes.shape == given["boxes"].shape
        assert scores.shape == given["scores"].shape


class TestClass:
    def test_two_bins_have_a_distribution(self):
        assert v8DetectionLoss(model(2)).names[-1] == "dfl_loss"

    @pytest.mark.parametrize(("reg_max", "last"), [(16, "dfl_loss"), (1, "l1_loss")])
    def test_call(self, reg_max, last):
        given, settings = example(reg_max)
        preds, batch = as_upstream(tracked(given), settings)
        criterion = v8DetectionLoss(model(reg_max))
        loss, items = criterion(preds, batch)
        expected = v8_detection_loss(**given, **settings)
        assert torch.equal(loss, expected.loss)
        assert loss.requires_grad
        assert list(items) == ["box_loss", "cls_loss", last]
        assert all(value.shape == () and value.dtype == torch.float32 for value in items.values())
        assert not any(value.requires_grad for value in items.values())
        assert torch.equal(torch.stack(list(items.values())), expected.items)
        again, _ = criterion(("inference output", preds), batch)
        assert torch.equal(again, loss)
        with pytest.raises(TypeError, match="preds"):
            criterion([preds], batch)

    def test_gains_are_read_at_each_call(self):
        given, settings = example()
        stand_in = model()
        criterion = v8DetectionLoss(stand_in)
        stand_in.args.box = stand_in.args.cls = stand_in.args.dfl = 1.0
        close(criterion(*as_upstream(given, settings))[0], (1.692375, 168.1087, 5.608342))
        del stand_in.args.dfl
        with pytest.raises(AttributeError, match="dfl"):
            criterion(*as_upstream(given, settings))

    def test_settings(self):
        given, settings = example()
        close(v8DetectionLoss(model(), 7, 1)(*as_upstream(given, settings))[0], (5.078484, 181.8618, 3.505775))
        close(v8DetectionLoss(model(), tal_topk=1)(*as_upstream(given, settings))[0], (5.078484, 181.8618, 3.505775))
        weighted = v8DetectionLoss(model(class_weights=torch.tensor([0.5, 1, 2])))
        assert weighted(*as_upstream(given, settings))[0][1].item() == pytest.approx(98.01527, rel=1e-5)

    def test_mask_and_reduction(self):
        given, settings = example()
        ignore = torch.zeros(2, 126, dtype=torch.bool)
        ignore[0] = True
        found = v8DetectionLoss(model()).evaluate(*as_upstream(given, settings), reduction="none", ignore_mask=ignore)
        assert found.loss[0].tolist() == [0, 0, 0]
        assert (found.loss[1] > 0).all()

    def test_grid_is_built_in_the_dtype_of_the_feature_maps(self):
        given, settings = example()
        preds, batch = as_upstream(given, settings)
        preds["feats"] = [level.half() for level in preds["feats"]]
        close(v8DetectionLoss(model())(preds, batch)[0], (12.69281, 84.05433, 8.412513))

    def test_validation_does_not_spoil_training(self):
        """What is kept from a call in inference mode is fit for autograd."""
        with torch.inference_mode():
            geometry = make_geometry([[7, 5]], [8], torch.float32, torch.device("cpu"))
        assert not geometry.points.is_inference()
        given, settings = example()
        given["scores"], settings["levels"] = given["scores"][:, :, :120], [[8, 12], [4, 6]]
        given["boxes"] = given["boxes"][:, :, :120]
        criterion = v8DetectionLoss(model())
        with torch.inference_mode():
            expected, _ = criterion(*as_upstream(given, settings))
        loss, _ = criterion(*as_upstream(tracked(given), settings))
        assert torch.equal(loss, expected)
        loss.sum().backward()
