"""The end-to-end criteria against the worked examples of yolo_losses.md, section 4."""

import pytest
import torch

from cleanroom.losses.v8_detection import v8_detection_loss, v8DetectionLoss
from cleanroom.losses.v10_detection import E2EDetectLoss, E2ELoss, branch_weights, v10_detection_loss, v10DetectLoss
from tests.cleanroom.yolo_examples import example, first_rows, model, pattern

BRANCHES = ("o2m_boxes", "o2m_scores", "o2o_boxes", "o2o_scores")
ITEMS = {
    "ultralytics": (8.806814, 132.9123, 5.796085),
    "original": (6.346406, 42.02716, 4.206256, 2.460407, 90.88515, 1.589829),
    "e2e": (2.460407, 90.88515, 1.589829),
}


def both(batch=None):
    """The example of section 4 and its settings."""
    given, settings = batch or example()
    branches = {
        "o2m_boxes": given.pop("boxes"),
        "o2m_scores": given.pop("scores"),
        "o2o_boxes": pattern((2, 64, 126), 1, 0.5, 1.3),
        "o2o_scores": pattern((2, 3, 126), 2, 0.8, 0.9) - 2,
    }
    return branches | given, settings


def evaluate(given, settings, **changes):
    given = given | {name: given[name].clone().requires_grad_() for name in BRANCHES}
    found = v10_detection_loss(**given, **settings, **changes)
    return found, torch.autograd.grad(found.loss.sum(), [given[name] for name in BRANCHES])


def norms(gradients):
    return [gradient.double().norm().item() for gradient in gradients]


def as_upstream(given, settings):
    feats = [torch.zeros(2, 1, *level) for level in settings["levels"]]
    preds = {
        name: {"boxes": given[f"{branch}_boxes"], "scores": given[f"{branch}_scores"], "feats": feats}
        for name, branch in (("one2many", "o2m"), ("one2one", "o2o"))
    }
    return preds, {name: given[name] for name in ("batch_idx", "cls", "bboxes")}


def trained(criterion, epochs):
    for _ in range(epochs):
        criterion.update()
    return criterion


def stand_in(epochs=100):
    found = model()
    found.args.epochs = epochs
    return found


@pytest.mark.parametrize("path", ["sparse", "static"])
@pytest.mark.parametrize(
    ("form", "changes", "loss", "gradients"),
    [
        ("ultralytics", {}, (17.61363, 265.8246, 11.59217), (0.316691, 3.22356, 0.340119, 7.11918)),
        ("original", {}, (295.0305,), (0.316691, 3.22356, 0.340119, 7.11918)),
        ("e2e", {}, (11.13841, 103.5975, 7.365942), (0.253352, 2.57885, 0.0680237, 1.42384)),
        ("e2e", {"updates": 1, "epochs": 10}, (10.53392, 111.1977, 6.958942), None),
    ],
)
def test_worked_example(form, changes, loss, gradients, path):
    found, gradient = evaluate(*both(), form=form, path=path, **changes)
    assert found.loss.flatten().tolist() == pytest.approx(loss, rel=1e-5)
    assert found.loss.ndim == (0 if form == "original" else 1)
    assert found.items.tolist() == pytest.approx(ITEMS[form], rel=1e-5)
    assert not found.items.requires_grad
    assert found.fg_mask.shape == found.target_gt_idx.shape == (2, 2, 126)
    assert found.fg_mask[0].sum(1).tolist() == [20, 10]
    assert (found.fg_mask[1].sum(1) <= torch.tensor([2, 1])).all()
    if gradients:
        assert norms(gradient) == pytest.approx(gradients, rel=1e-4)


@pytest.mark.parametrize("form", ITEMS)
def test_it_is_the_criterion_twice(form):
    """Each branch alone, with the topk of its form."""
    given, settings = both()
    labels = {name: given[name] for name in ("batch_idx", "cls", "bboxes")}
    found, _ = evaluate(given, settings, form=form)
    second = {"topk": 7, "topk2": 1} if form == "e2e" else {"topk": 1}
    for branch, topk, index in (("o2m", {"topk": 10}, 0), ("o2o", second, 1)):
        own = {name: given[f"{branch}_{name}"] for name in ("boxes", "scores")}
        alone = v8_detection_loss(**own, **labels, **settings, **topk)
        assert torch.equal(found.fg_mask[index], alone.fg_mask)
        assert torch.equal(found.target_gt_idx[index], alone.target_gt_idx)


@pytest.mark.parametrize(("form", "weights"), [("ultralytics", (1, 1)), ("original", (1, 1)), ("e2e", (0.8, 0.2))])
def test_without_ground_truth(form, weights):
    given, settings = both(first_rows(0))
    found, gradient = evaluate(given, settings, form=form)
    plain = [torch.nn.functional.softplus(given[f"{name}_scores"].double()).sum() for name in ("o2m", "o2o")]
    expected = sum(weight * value for weight, value in zip(weights, plain, strict=True))
    assert found.loss.sum().item() == pytest.approx(expected.item(), rel=1e-5)
    assert [bool(value.any()) for value in gradient] == [False, True, False, True]


@pytest.mark.parametrize(
    ("updates", "epochs", "expected"),
    [
        (0, 100, 0.8),
        (1, 100, 0.792929),
        (49, 100, 0.453535),
        (99, 100, 0.1),
        (500, 100, 0.1),
        (1, 10, 0.722222),
        (1, 1, 0.1),
        (1, 2, 0.1),
    ],
)
def test_schedule(updates, epochs, expected):
    many, one = branch_weights(updates, epochs)
    assert many == pytest.approx(expected, abs=1e-6)
    assert one == pytest.approx(1 - expected, abs=1e-6)
    criterion = E2ELoss(stand_in(epochs))
    assert criterion.decay(updates) == many
    assert (criterion.updates, criterion.o2m, criterion.o2o) == (0, 0.8, pytest.approx(0.2))
    trained(criterion, updates)
    assert criterion.updates == updates
    assert (criterion.o2m, criterion.o2o) == pytest.approx((many, one))


def test_epochs_are_read_at_each_update():
    stand = stand_in(10)
    criterion = E2ELoss(stand)
    stand.args.epochs = 100
    criterion.update()
    assert criterion.o2m == pytest.approx(0.792929, abs=1e-6)


def test_resumed():
    """The trainer sets `updates` and calls `update` once."""
    criterion = E2ELoss(stand_in())
    criterion.updates = 48
    criterion.update()
    assert criterion.o2m == pytest.approx(0.453535, abs=1e-6)


@pytest.mark.parametrize(
    ("criterion", "form", "updates"),
    [
        (E2EDetectLoss(model()), "ultralytics", 0),
        (v10DetectLoss(model()), "original", 0),
        (trained(E2ELoss(stand_in()), 3), "e2e", 3),
    ],
)
def test_classes(criterion, form, updates):
    given, settings = both()
    preds, batch = as_upstream(given, settings)
    loss, items = criterion(preds, batch)
    expected = v10_detection_loss(**given, **settings, form=form, updates=updates)
    torch.testing.assert_close(loss, expected.loss, rtol=0, atol=0)
    if form != "original":
        assert list(items) == ["box_loss", "cls_loss", "dfl_loss"]
        items = torch.stack(list(items.values()))
    torch.testing.assert_close(items, expected.items, rtol=0, atol=0)
    torch.testing.assert_close(criterion(("inference output", preds), batch)[0], loss, rtol=0, atol=0)
    found = criterion.evaluate(preds, batch)
    assert torch.equal(found.fg_mask, expected.fg_mask)
    with pytest.raises(TypeError, match="preds"):
        criterion([preds], batch)


def test_maps_of_the_original_repository():
    """Until 8.3 a branch was a list of maps (B, 4 R + C, h, w), one a level."""
    given, settings = both()
    preds, batch = as_upstream(given, settings)
    expected, items = v10DetectLoss(model())(preds, batch)
    leaves, maps = {}, {}
    for name, branch in preds.items():
        leaves[name] = torch.cat((branch["boxes"], branch["scores"]), 1).requires_grad_()
        cells = [rows * columns for rows, columns in settings["levels"]]
        levels = zip(leaves[name].split(cells, 2), settings["levels"], strict=True)
        maps[name] = [channels.unflatten(2, tuple(level)) for channels, level in levels]
    loss, six = v10DetectLoss(model())(maps, batch)
    assert torch.equal(loss, expected)
    assert torch.equal(six, items)
    gradient = torch.autograd.grad(loss, list(leaves.values()))
    parts = [part for one in gradient for part in (one[:, :64], one[:, 64:])]
    assert norms(parts) == pytest.approx((0.316691, 3.22356, 0.340119, 7.11918), rel=1e-4)


def test_another_criterion_in_both_branches():
    made = []

    class Counting(v8DetectionLoss):
        def __init__(self, model, tal_topk, tal_topk2=None):
            super().__init__(model, tal_topk, tal_topk2)
            made.append((tal_topk, tal_topk2))

    given, settings = both()
    loss, _ = E2ELoss(stand_in(), Counting)(*as_upstream(given, settings))
    assert made == [(10, None), (7, 1)]
    assert loss.tolist() == pytest.approx((11.13841, 103.5975, 7.365942), rel=1e-5)


def test_masks_and_reduction():
    given, settings = both()
    ignore = torch.zeros(2, 126, dtype=torch.bool)
    ignore[:, :100] = True
    for form, components in (("ultralytics", (3,)), ("original", ()), ("e2e", (3,))):
        whole, gradient = evaluate(given, settings, form=form, o2o_ignore_mask=ignore)
        each, _ = evaluate(given, settings, form=form, o2o_ignore_mask=ignore, reduction="none")
        assert each.loss.shape == (2, *components)
        torch.testing.assert_close(each.loss.sum(0), whole.loss)
        torch.testing.assert_close(each.items.sum(0), whole.items)
        many, _, boxes, scores = gradient
        assert many[:, :, :100].any()
        assert not boxes[:, :, :100].any()
        assert not scores[:, :, :100].any()


def test_errors_name_the_branch():
    given, settings = both()
    with pytest.raises(ValueError, match="form must be one of"):
        v10_detection_loss(**given, **settings, form="v10")
    for name in BRANCHES:
        with pytest.raises(ValueError, match=name):
            v10_detection_loss(**(given | {name: given[name][:, 1:]}), **settings)
    with pytest.raises(ValueError, match=r"^batch_idx"):
        v10_detection_loss(**(given | {"batch_idx": torch.tensor([0, 1, 0])}), **settings)
    with pytest.raises(IndexError, match="cls"):
        v10_detection_loss(**(given | {"cls": torch.full((3,), 7)}), **settings)


def test_compiles_as_one_graph():
    torch._dynamo.reset()
    given, settings = both()
    expected, gradient = evaluate(given, settings, form="e2e", path="static")
    leaves = given | {name: given[name].clone().requires_grad_() for name in BRANCHES}
    compiled = torch.compile(
        lambda **tensors: v10_detection_loss(**tensors, **settings, form="e2e"), fullgraph=True, backend="eager"
    )
    found = compiled(**leaves)
    torch.testing.assert_close(found.loss, expected.loss)
    assert torch.equal(found.target_gt_idx, expected.target_gt_idx)
    found = torch.autograd.grad(found.loss.sum(), [leaves[name] for name in BRANCHES])
    for ours, theirs in zip(found, gradient, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_gains():
    given, settings = both()
    settings["gains"] = {"box": 0.0, "cls": 1.0, "dfl": 0.0}
    found, gradient = evaluate(given, settings)
    assert found.items.tolist() == pytest.approx((0, 132.9123 * 2, 0), rel=1e-5)
    assert [bool(value.any()) for value in gradient] == [False, True, False, True]
