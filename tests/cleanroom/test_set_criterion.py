"""The classes with upstream's constructors against `set_loss`, their methods against their whole, and bad input."""

from types import SimpleNamespace

import pytest
import torch

from cleanroom.assign.hungarian import HungarianMatcher
from cleanroom.losses import set_criterion
from cleanroom.losses.set_criterion import ForObjectDetectionLoss, ForSegmentationLoss, ImageLoss, SetCriterion
from cleanroom.losses.set_prediction import set_loss, term_names
from tests.cleanroom.elsewhere import ELSEWHERE, Device, fetched

IMAGES, QUERIES, CLASSES, SIZES = 3, 7, 4, (3, 0, 2)
LAYERS = 4
NAMES = ["labels", "boxes", "cardinality", "masks"]
TERMS = ["loss_ce", "loss_bbox", "loss_giou", "cardinality_error", "loss_mask", "loss_dice"]
COEFFICIENTS = {
    "bbox_loss_coefficient": 3.0,
    "giou_loss_coefficient": 0.5,
    "mask_loss_coefficient": 1.5,
    "dice_loss_coefficient": 0.25,
}
KINDS = pytest.mark.parametrize("kind", [ImageLoss, SetCriterion])


@pytest.fixture
def scene():
    """All layers of a decoder, the last one last, and the batch."""
    draw = torch.Generator().manual_seed(0)

    def rand(*shape):
        return torch.rand(*shape, generator=draw)

    return SimpleNamespace(
        logits=(rand(LAYERS, IMAGES, QUERIES, CLASSES + 1) * 4).requires_grad_(),
        boxes=(rand(LAYERS, IMAGES, QUERIES, 4) * 0.4 + 0.2).requires_grad_(),
        pred_masks=(rand(IMAGES, QUERIES, 5, 6) * 6 - 3).requires_grad_(),
        labels=torch.randint(CLASSES, (sum(SIZES),), generator=draw),
        targets=rand(sum(SIZES), 4) * 0.4 + 0.2,
        masks=rand(sum(SIZES), 10, 12) < 0.4,
    )


def batch_of(scene, key):
    parts = (part.split(SIZES) for part in (scene.labels, scene.targets, scene.masks))
    return [{key: labels, "boxes": boxes, "masks": masks} for labels, boxes, masks in zip(*parts, strict=True)]


def outputs_of(scene, kind):
    """What a model gives: the last layer, and the others as auxiliary ones."""
    *others, last = ({kind.logits_key: z, "pred_boxes": p} for z, p in zip(scene.logits, scene.boxes, strict=True))
    return {**last, "pred_masks": scene.pred_masks, kind.auxiliary_key: others}


def criterion_of(kind, losses=NAMES, matcher=None):
    matcher = matcher or HungarianMatcher(1, 5, 2)
    given = (CLASSES, matcher, {"loss_ce": 1.0}) if kind is SetCriterion else (matcher, CLASSES)
    return kind(*given, 0.1, losses)


def whole(scene, **settings):
    *others, last = zip(scene.logits, scene.boxes, strict=True)
    auxiliary = {"aux_logits": [z for z, _ in others], "aux_boxes": [p for _, p in others]}
    masks = {"pred_masks": scene.pred_masks, "masks": scene.masks}
    return set_loss(*last, scene.labels, scene.targets, SIZES, **auxiliary, **masks, **settings)


def config(**changes):
    own = {"class_cost": 1, "bbox_cost": 5, "giou_cost": 2}
    own |= {"num_labels": CLASSES, "eos_coefficient": 0.1, "auxiliary_loss": True, "decoder_layers": LAYERS}
    return SimpleNamespace(**own | COEFFICIENTS | changes)


@KINDS
def test_entries_are_the_terms_of_the_loss(scene, kind):
    found = criterion_of(kind)(outputs_of(scene, kind), batch_of(scene, kind.labels_key))
    expected = dict(zip(term_names(LAYERS - 1, masks=True), whole(scene).terms, strict=True))
    if kind is SetCriterion:
        places = [place for place, name in enumerate(found) if name == "class_error"]
        assert places == [list(found).index("loss_ce") + 1]
        found.pop("class_error")
    assert list(found) == list(expected)
    torch.testing.assert_close(found, expected)


@KINDS
@pytest.mark.parametrize("left", NAMES)
def test_losses_that_are_not_asked_for_are_left_out(scene, kind, left):
    some = [name for name in NAMES if name != left]
    batch = batch_of(scene, kind.labels_key)
    every, found = (criterion_of(kind, names)(outputs_of(scene, kind), batch) for names in (NAMES, some))
    gone = {"labels": ("loss_ce", "class_error"), "boxes": ("loss_bbox", "loss_giou")}
    gone |= {"cardinality": ("cardinality_error",), "masks": ("loss_mask", "loss_dice")}
    expected = {name: value for name, value in every.items() if not name.startswith(gone[left])}
    assert list(found) == list(expected)
    torch.testing.assert_close(found, expected)


@KINDS
def test_single_terms_are_those_of_the_whole(scene, kind):
    """Under the same pairs, and D given."""
    batch, outputs = batch_of(scene, kind.labels_key), outputs_of(scene, kind)
    whole = criterion_of(kind)(outputs, batch)
    criterion = criterion_of(kind)
    names = {"logits": outputs[kind.logits_key], "pred_boxes": outputs["pred_boxes"]}
    indices = HungarianMatcher(1, 5, 2)(names, [{"class_labels": one[kind.labels_key], **one} for one in batch])
    for count in (sum(SIZES), 2 * sum(SIZES)):
        found = {}
        for name in NAMES:
            found |= criterion.get_loss(name, outputs, batch, indices, count)
        assert set(found) == set(TERMS) | ({"class_error"} if kind is SetCriterion else set())
        for name, value in found.items():
            divided = name in {"loss_bbox", "loss_giou", "loss_mask", "loss_dice"}
            expected = whole[name] * sum(SIZES) / count if divided else whole[name]
            torch.testing.assert_close(value, expected, msg=f"{name}: {{}}".format)


def test_the_class_error_can_be_left_out(scene):
    batch, outputs = batch_of(scene, "labels"), outputs_of(scene, SetCriterion)
    indices = [(torch.arange(size), torch.arange(size)) for size in SIZES]
    found = criterion_of(SetCriterion).loss_labels(outputs, batch, indices, 1.0, log=False)
    assert list(found) == ["loss_ce"]


@KINDS
def test_another_matcher_is_asked_about_every_layer(scene, kind):
    """It sees logits and boxes of one layer under upstream's names, and its pairs are the ones that count."""
    seen = []

    def matcher(outputs, targets):
        seen.append(outputs)
        return [(torch.arange(size).flip(0), torch.arange(size)) for size in SIZES]

    found = criterion_of(kind, matcher=matcher)(outputs_of(scene, kind), batch_of(scene, kind.labels_key))
    assert [sorted(some) for some in seen] == [sorted((kind.logits_key, "pred_boxes"))] * LAYERS
    # The last layer first, as in the entries.
    order = [LAYERS - 1, *range(LAYERS - 1)]
    assert all(some["pred_boxes"].equal(scene.boxes[layer]) for some, layer in zip(seen, order, strict=True))
    images = torch.tensor([0, 0, 0, 2, 2])
    queries = torch.tensor([2, 1, 0, 1, 0])
    for layer, suffix in zip(order, ("", "_0", "_1", "_2"), strict=True):
        distance = (scene.boxes[layer][images, queries] - scene.targets).abs().sum() / sum(SIZES)
        torch.testing.assert_close(found[f"loss_bbox{suffix}"], distance)


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize(("changes", "counted"), [({}, 3), ({"decoder_layers": 3}, 2), ({"auxiliary_loss": False}, 0)])
def test_totals_of_transformers(scene, masks, changes, counted):
    given = [scene.logits[-1], batch_of(scene, "class_labels"), "cpu", scene.boxes[-1]]
    function, settings = (
        (ForSegmentationLoss, config(**changes)) if masks else (ForObjectDetectionLoss, config(**changes))
    )
    given += [scene.pred_masks] if masks else []
    total, entries, auxiliary = function(*given, settings, scene.logits, scene.boxes, ignored=1)
    layers = LAYERS if settings.auxiliary_loss else 1
    assert set(entries) == set(term_names(layers - 1, masks=masks))
    weights = {"loss_ce": 1.0, "loss_bbox": 3.0, "loss_giou": 0.5}
    expected = sum(
        weight * entries[f"{name}{suffix}"]
        for name, weight in weights.items()
        for suffix in ("", *(f"_{layer}" for layer in range(counted)))
    )
    if masks:
        expected = expected + 1.5 * entries["loss_mask"] + 0.25 * entries["loss_dice"]
    torch.testing.assert_close(total, expected)
    if layers == 1:
        assert auxiliary is None
    else:
        assert len(auxiliary) == LAYERS - 1
        for layer, some in enumerate(auxiliary):
            assert some["logits"].equal(scene.logits[layer])
            assert some["pred_boxes"].equal(scene.boxes[layer])
    leaves = [scene.logits, scene.boxes, *([scene.pred_masks] if masks else [])]
    for one, other in zip(
        *(torch.autograd.grad(loss, leaves, retain_graph=True) for loss in (total, expected)), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_the_costs_of_the_matching_are_those_of_the_configuration(scene, monkeypatch):
    seen = []
    real = set_criterion.match
    monkeypatch.setattr(set_criterion, "match", lambda *given, **named: seen.append(given[2]) or real(*given, **named))
    settings = config(class_cost=2, bbox_cost=3, giou_cost=4, auxiliary_loss=False)
    ForObjectDetectionLoss(scene.logits[-1], batch_of(scene, "class_labels"), None, scene.boxes[-1], settings)
    [costs] = seen
    assert costs[:4] == ("detr", 2, 3, 4)


@KINDS
def test_every_tensor_has_a_say_in_where_the_pairs_are_found(scene, kind, monkeypatch):
    asked = []
    monkeypatch.setattr(set_criterion, "choose_matched_path", lambda *given: asked.append(given) or "sparse")
    criterion_of(kind)(outputs_of(scene, kind), batch_of(scene, kind.labels_key))
    [(path, queries, *tensors)] = asked
    assert (path, queries) == ("auto", QUERIES)
    wanted = scene.logits[-1], scene.boxes[-1], scene.labels, scene.targets
    assert all(torch.equal(one, other) for one, other in zip(tensors, wanted, strict=True))


@KINDS
def test_bad_input_is_named(scene, kind):
    criterion, outputs, batch = criterion_of(kind), outputs_of(scene, kind), batch_of(scene, kind.labels_key)
    indices = [(torch.arange(size), torch.arange(size)) for size in SIZES]
    with pytest.raises(ValueError, match=r"losses must be among .* got 'keypoints'"):
        criterion.get_loss("keypoints", outputs, batch, indices, 1.0)
    with pytest.raises(ValueError, match=r"losses must be among .* got 'keypoints'"):
        criterion_of(kind, ["keypoints"])(outputs, batch)
    for name in (kind.logits_key, "pred_boxes", "pred_masks"):
        with pytest.raises(KeyError, match=f"outputs have no '{name}'"):
            criterion({key: value for key, value in outputs.items() if key != name}, batch)
    with pytest.raises(ValueError, match="targets is empty"):
        criterion(outputs, [])
    for call in (criterion.loss_labels, criterion.loss_boxes):
        with pytest.raises(ValueError, match="targets is empty"):
            call(outputs, [], [], 1.0)
    short = [{**batch[0], "boxes": batch[0]["boxes"][:2]}, *batch[1:]]
    with pytest.raises(ValueError, match=f"boxes and {kind.labels_key} of an image differ in length"):
        criterion(outputs, short)
    columns = rf"logits must have shape \(B, Q, {CLASSES + 1}\)"
    for wrong in (scene.logits[-1][..., 1:], scene.logits[-1][0]):
        for call in (
            lambda some: criterion(some, batch),
            lambda some: criterion.loss_labels(some, batch, indices, 1.0),
        ):
            with pytest.raises(ValueError, match=columns):
                call({**outputs, kind.logits_key: wrong})
    far = [(indices[0][0] + QUERIES, indices[0][1]), *indices[1:]]
    with pytest.raises(IndexError, match="ind"):
        criterion.loss_boxes(outputs, batch, far, 1.0)


@KINDS
def test_pairs_may_count_from_the_end(scene, kind):
    criterion, outputs, batch = criterion_of(kind), outputs_of(scene, kind), batch_of(scene, kind.labels_key)
    forward = [(torch.arange(size) + 1, torch.arange(size)) for size in SIZES]
    back = [(queries - QUERIES, targets - size) for (queries, targets), size in zip(forward, SIZES, strict=True)]
    for name in NAMES:
        torch.testing.assert_close(*(criterion.get_loss(name, outputs, batch, pairs, 1.0) for pairs in (forward, back)))


@pytest.mark.parametrize("missing", ["outputs_class", "outputs_coord"])
def test_auxiliary_layers_that_are_missing_are_named(scene, missing):
    layers = {"outputs_class": scene.logits, "outputs_coord": scene.boxes} | {missing: None}
    given = scene.logits[-1], batch_of(scene, "class_labels"), None, scene.boxes[-1], config()
    with pytest.raises(ValueError, match="outputs_class and outputs_coord are needed"):
        ForObjectDetectionLoss(*given, **layers)


@KINDS
def test_one_target_is_divided_by_one(scene, kind):
    outputs = {kind.logits_key: scene.logits[0, :1], "pred_boxes": scene.boxes[0, :1]}
    batch = [{kind.labels_key: scene.labels[:1], "boxes": scene.targets[:1]}]
    found = criterion_of(kind, ["boxes"], lambda *_: [(torch.tensor([2]), torch.tensor([0]))])(outputs, batch)
    torch.testing.assert_close(found["loss_bbox"], (scene.boxes[0, 0, 2] - scene.targets[0]).abs().sum())


@KINDS
def test_everything_stays_where_the_logits_are(scene, kind, monkeypatch):
    """On a device that is not the CPU; pairs of another matcher come from the host, as upstream's do."""
    known = torch.is_autocast_enabled
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *of: str(*of) != ELSEWHERE.type and known(*of))
    indices = [(torch.arange(size), torch.arange(size)) for size in SIZES]

    def found(scene):
        criterion = criterion_of(kind, matcher=lambda *_: indices).to(scene.logits.device)
        batch, outputs = batch_of(scene, kind.labels_key), outputs_of(scene, kind)
        singly = [criterion.get_loss(name, outputs, batch, indices, 3.0) for name in NAMES]
        nothing = [(torch.empty(0, dtype=torch.int64),) * 2] * IMAGES
        without = criterion.get_loss("labels", outputs, batch, nothing, 3.0)
        return [criterion(outputs, batch), *singly, without]

    expected = found(scene)
    with Device() as device:
        elsewhere = found(SimpleNamespace(**{name: device.put(value) for name, value in vars(scene).items()}))
    for some, others in zip(elsewhere, expected, strict=True):
        torch.testing.assert_close({name: fetched(value) for name, value in some.items()}, others)
