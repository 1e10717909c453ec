"""The pinned cases that are written by hand; `python -m cases.pin` writes their files again.

Worked examples come from the specification, the others from what people who train detectors ran into. Tags say what
a case is about; "tie" allows a legal choice among equals, and "divergence:ID" names the entry of divergences.toml
that must hold. The cases that field.toml names get the tag "field:ID" of their row.
"""

import importlib
import pkgutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import cases
from cases import field
from cases.case import Case
from cases.frame import Frame
from cases.pinned import FOLDER

#: The grid of the worked examples: anchor k = 4 * row + column has its centre at (8 * column + 4, 8 * row + 4).
GRID = Frame(32, 32, (8,))
#: The grid of simota.md 5: 16 anchors of stride 8, then 4 of stride 16.
TWO_LEVELS = Frame(32, 32, (8, 16))

Rows = Sequence[Sequence[float]]


def _wave(shape: tuple[int, ...], a: float, b: float, amplitude: float, offset: float) -> torch.Tensor:
    """The specification's inputs that need no random generator: offset + amplitude * sin(a * i + b), float32."""
    index = np.arange(np.prod(shape), dtype=np.float64)
    return torch.from_numpy(offset + amplitude * np.sin(a * index + b)).float().reshape(shape)


def _around(frame: Frame, half_side: float, changed: dict[int, Sequence[float]]) -> torch.Tensor:
    """(A, 4) xyxy predictions: a square around each anchor but for the anchors in `changed`."""
    points = torch.from_numpy(frame.points).float()
    boxes = torch.cat([points - half_side, points + half_side], dim=1)
    for anchor, box in changed.items():
        boxes[anchor] = torch.tensor(box)
    return boxes


def _tal(
    boxes: Rows,
    labels: Sequence[float],
    predictions: torch.Tensor,
    scores: float,
    changed: dict[tuple[int, int], float],
    tags: set[str],
    *,
    frame: Frame = GRID,
    valid: Sequence[bool] | None = None,
    classes: int = 2,
    topk: int = 3,
    topk2: int | None = None,
    stride: Sequence[int] = (8, 16, 32),
) -> Case:
    """One image: rows, their labels, predicted boxes, and scores that are equal but for those in `changed`."""
    all_scores = torch.full((1, frame.anchors, classes), float(scores))
    for (anchor, label), score in changed.items():
        all_scores[0, anchor, label] = score
    mask = [True] * len(boxes) if valid is None else valid
    tensors = {
        "pd_scores": all_scores,
        "pd_bboxes": predictions[None].clone(),
        "anc_points": torch.from_numpy(frame.points).float(),
        "gt_labels": torch.tensor(labels, dtype=torch.float32).reshape(1, -1, 1),
        "gt_bboxes": torch.tensor(boxes, dtype=torch.float32).reshape(1, -1, 4),
        "mask_gt": torch.tensor(mask, dtype=torch.float32).reshape(1, -1, 1),
    }
    settings = {
        "topk": topk,
        "topk2": topk2,
        "num_classes": classes,
        "alpha": 0.5,
        "beta": 6.0,
        "stride": list(stride),
        "eps": 1e-9,
    }
    return Case("tal", tensors, settings, "pinned", frozenset(tags))


def _tal_worked(tags: set[str], **settings: Any) -> Case:
    """task_aligned.md, worked example of section 8."""
    predictions = _around(GRID, 6, {5: (3, 3, 18, 18), 10: (11, 10, 30, 25)})
    scores = {(5, 0): 0.81, (10, 1): 0.64, (6, 1): 0.36, (11, 1): 0.30}
    rows = [(2, 2, 18, 18), (10, 10, 30, 26), (0, 0, 0, 0)]
    return _tal(rows, (0, 1, 0), predictions, 0.25, scores, {"worked-example", *tags}, valid=(1, 1, 0), **settings)


def _tal_cases() -> Iterator[tuple[str, Case]]:
    yield "worked-example-topk-3", _tal_worked(set(), topk=3)
    yield "worked-example-topk-3-topk2-1", _tal_worked({"topk2"}, topk=3, topk2=1)
    yield "worked-example-topk-6", _tal_worked(set(), topk=6)
    # Rows 0 and 1 propose anchor 5; row 2, which proposes 6, overlaps 5 most and wins it too: more than K anchors.
    yield (
        "conflict-nonproposing-winner",
        _tal(
            [(8, 8, 24, 24), (4, 4, 20, 20), (6, 6, 22, 22)],
            (0, 0, 1),
            _around(GRID, 1, {5: (5.5, 5.5, 21.5, 21.5), 6: (6, 6, 22, 22)}),
            0.01,
            {(5, 0): 0.9, (5, 1): 0.3, (6, 1): 0.9},
            {"conflict"},
            topk=1,
        ),
    )
    near = _around(GRID, 6, {5: (3, 3, 18, 18), 6: (5, 2, 20, 17)})
    same = [(2, 2, 18, 18), (2, 2, 18, 18)]
    yield "identical-ground-truths", _tal(same, (0, 0), near, 0.25, {(5, 0): 0.8}, {"identical", "tie"})
    yield (
        "identical-boxes-two-classes",
        _tal(same, (0, 1), near, 0.25, {(5, 0): 0.8, (6, 1): 0.7}, {"identical", "tie"}),
    )
    # The only anchor of the small box goes to the large one, which overlaps its prediction more.
    yield (
        "field-u-4848-neighbour-starves-small-box",
        _tal(
            [(1, 1, 31, 31), (9, 9, 15, 15)],
            (0, 1),
            _around(GRID, 10, {5: (1, 1, 28, 28)}),
            0.5,
            {(5, 0): 0.9},
            # Anchors placed alike around the small box have equal metrics, and only some are proposed.
            {"conflict", "tiny", "tie"},
            stride=(8,),
            topk=10,
        ),
    )
    ordinary = _around(GRID, 7, {})
    yield (
        "field-u-19514-no-anchor-centre",
        _tal(
            [(15, 15, 17, 17)],
            (0,),
            _around(GRID, 7, {5: (14, 14, 18, 18)}),
            0.5,
            {},
            {"tiny", "no-candidate-row"},
            stride=(8,),
        ),
    )
    # Lengthened for membership alone: an assigner of rotated boxes lengthened its caller's.
    yield (
        "field-u-24260-small-box",
        _tal([(10, 9, 19, 15)], (0,), _around(GRID, 7, {5: (10, 9, 18, 15)}), 0.5, {(5, 0): 0.9}, {"tiny"}, topk=1),
    )
    # The same box where it is lengthened: it has the four anchors around it.
    yield (
        "field-u-19514-between-anchor-centres",
        _tal(
            [(15, 15, 17, 17)],
            (0,),
            _around(GRID, 7, {5: (14, 14, 18, 18), 6: (14.5, 14.5, 17.5, 17.5)}),
            0.5,
            {(5, 0): 0.9},
            {"tiny"},
            topk=2,
        ),
    )
    # Up to 8.4.127 the rule for small boxes was not monotonic in their size. Each box is centred on a
    # corner of cells, so that its candidates are the four anchors around it or none.
    strip = Frame(128, 32, (8,))
    sides = (6, 7.9, 8, 8.1, 10, 15.9, 16, 16.1)
    centres = [(16 * position + 8, 16) for position in range(len(sides))]
    yield (
        "field-u-25912-small-box-size-sweep",
        _tal(
            [(x - s / 2, y - s / 2, x + s / 2, y + s / 2) for (x, y), s in zip(centres, sides, strict=True)],
            range(8),
            _around(strip, 7.5, {}),
            0.5,
            {},
            {"tiny", "tie"},
            frame=strip,
            classes=8,
            topk=4,
        ),
    )
    for name, box in (
        ("edges-on-anchor-centres", (4, 4, 20, 20)),
        ("edges-just-inside-anchor-centres", (3.999, 3.999, 20.001, 20.001)),
        # Through centre form and back the left edge becomes 27.99999809 and lets in the anchors at 28.
        ("edge-moved-by-centre-form", (28, 4, 51.22970962, 28)),
        ("thin-box-one-side-lengthened", (13, 13, 29, 14)),
        ("point-box", (15, 15, 15, 15)),
        ("inverted-box", (20, 20, 10, 10)),
        ("box-outside-the-image", (-50, -50, -49, -49)),
    ):
        yield name, _tal([box], (1,), ordinary, 0.5, {}, {"edge", "tie"}, topk=10)
    # Anchor 0 is of row 1: votes of the padded rows would make it contested.
    first = (1, 1, 15, 15)
    yield (
        "field-paddledetection-5710-padding-votes",
        _tal(
            [(0, 0, 0, 0), first, (0, 0, 0, 0), (0, 0, 32, 32)],
            (0, 1, 0, 1),
            _around(GRID, 6, {0: (1, 1, 14, 14)}),
            0.25,
            {(0, 1): 0.9},
            {"padding", "tie"},
            valid=(0, 1, 0, 0),
        ),
    )
    # Anchor 0 lies in no ground truth: a vote of a padded row would make it foreground.
    yield (
        "field-paddledetection-5710-padding-proposes",
        _tal(
            [(0, 0, 0, 0), (10, 10, 30, 30), (0, 0, 0, 0)],
            (0, 1, 0),
            _around(GRID, 6, {10: (11, 10, 30, 29)}),
            0.25,
            {},
            {"padding"},
            valid=(0, 1, 0),
            topk=1,
        ),
    )
    yield (
        "padding-rows-of-nan",
        _tal(
            [first, (np.nan,) * 4, (10, 10, 30, 30)],
            (1, 0, 0),
            _around(GRID, 6, {}),
            0.25,
            {(0, 1): 0.9},
            {"padding", "padding-nan"},
            valid=(1, 0, 1),
            topk=1,
        ),
    )
    yield (
        "padding-labels-beyond-classes",
        _tal(
            [first, (0, 0, 0, 0)],
            (1, 1000),
            ordinary,
            0.25,
            {(0, 1): 0.9},
            {"padding-labels"},
            valid=(1, 0),
            topk=1,
        ),
    )
    # With all metrics 0 the positives depend on the order of ties alone.
    yield (
        "field-multimediatechlab-yolo-103-all-metrics-zero",
        _tal([(2, 2, 30, 30), (0, 0, 16, 16)], (0, 1), ordinary, 0.0, {}, {"tie"}, topk=10),
    )
    # Both rows contain every anchor but those of the border; each proposes anchor 5 alone.
    yield (
        "field-multimediatechlab-yolo-103-positives-never-grow",
        _tal(
            [(2, 2, 30, 30), (3, 3, 28, 28)],
            (0, 1),
            _around(GRID, 6, {5: (3, 3, 28, 28)}),
            0.25,
            {(5, 0): 0.9, (5, 1): 0.8},
            {"conflict"},
            topk=1,
        ),
    )
    # Row 2 overlaps the box predicted at anchor 5 more than the two rows that contain it: spec/task_aligned.md 12.
    yield (
        "field-tencent-yolo-master-253-outsider-overlaps-most",
        _tal(
            [(4.5, 4.5, 19, 19), (5, 5, 19.5, 19.5), (12.5, 12.5, 30, 30)],
            (0, 0, 1),
            _around(GRID, 1, {5: (8, 8, 26, 26)}),
            0.5,
            {},
            # The anchors of row 2 have equal metrics.
            {"conflict", "tie"},
            topk=1,
        ),
    )
    yield (
        "field-tencent-yolo-master-253-zero-overlap-conflict",
        _tal(
            [(100, 100, 120, 120), (2, 2, 18, 18), (2, 2, 18, 18)],
            (1, 0, 0),
            _around(GRID, 1, dict.fromkeys(range(16), (200, 200, 210, 210))),
            0.5,
            {},
            {"tie", "conflict"},
            topk=16,
        ),
    )
    yield (
        "field-multimediatechlab-yolo-48-predictions-detached",
        _tal([(2, 2, 18, 18)], (0,), near, 0.25, {(5, 0): 0.8, (6, 0): 0.6}, {"detached"}, topk=2),
    )
    yield "no-ground-truth", _tal([], (), ordinary, 0.5, {}, {"no-ground-truth"})
    yield "only-padding", _tal([(0, 0, 0, 0)] * 2, (1, 0), ordinary, 0.5, {}, {"padding"}, valid=(0, 0))
    yield (
        "negative-label",
        _tal([(2, 2, 18, 18)], (-1,), near, 0.25, {(5, 1): 0.8}, {"labels-negative"}),
    )
    poisoned = _around(GRID, 6, {5: (3, 3, np.nan, 18), 6: (5, 2, 20, 17)})
    yield (
        "nan-prediction-of-a-candidate",
        _tal(
            [(2, 2, 18, 18)],
            (0,),
            poisoned,
            0.25,
            {},
            {"non-finite", "divergence:tal-non-finite-prediction"},
        ),
    )
    yield (
        "nan-prediction-outside-all-boxes",
        _tal(
            [(2, 2, 18, 18)],
            (0,),
            _around(GRID, 6, {5: (3, 3, 18, 18), 15: (np.nan,) * 4}),
            0.25,
            {(5, 0): 0.8},
            {"non-finite"},
        ),
    )


def _simota(
    images: Sequence[Rows],
    classes: Sequence[Sequence[float]],
    tags: set[str],
    *,
    frame: Frame = TWO_LEVELS,
    predictions: torch.Tensor | None = None,
    padding: float = 0.0,
) -> Case:
    """Images of centre-form rows. Predictions are those of simota.md 5 unless centre-form (B, N, 4) ones with equal
    logits are given.
    """
    batch, anchors = len(images), frame.anchors
    columns, rows, strides = torch.from_numpy(frame.cells).float().T[:, None]
    if predictions is None:
        # r = 0.5 * sin(0.7 anchor + 1.3 channel + 0.4 image), decoded as simota.md 3.1.
        image, anchor, channel = np.ogrid[:batch, :anchors, :7]
        raw = torch.from_numpy(0.5 * np.sin(0.7 * anchor + 1.3 * channel + 0.4 * image)).float()
        centres = (raw[..., :2] + torch.stack([columns[0], rows[0]], dim=-1)) * strides[0, :, None]
        predictions = torch.cat([centres, raw[..., 2:4].exp() * strides[0, :, None]], dim=-1)
        objectness, logits = raw[..., 4:5].clone(), raw[..., 5:].clone()
    else:
        objectness, logits = torch.zeros(batch, anchors, 1), torch.zeros(batch, anchors, 2)
    most = max(map(len, images)) + (padding != 0)
    boxes, labels = torch.full((batch, most, 4), padding), torch.full((batch, most), padding)
    for position, (image_boxes, image_classes) in enumerate(zip(images, classes, strict=True)):
        boxes[position, : len(image_boxes)] = torch.tensor(image_boxes, dtype=torch.float32).reshape(-1, 4)
        labels[position, : len(image_boxes)] = torch.tensor(image_classes, dtype=torch.float32)
    tensors = {
        "gt_boxes": boxes,
        "gt_classes": labels,
        "num_gt": torch.tensor([len(image) for image in images]),
        "pred_boxes": predictions,
        "cls_logits": logits,
        "obj_logits": objectness,
        "strides": strides,
        "x_shifts": columns,
        "y_shifts": rows,
    }
    return Case("simota", tensors, {"num_classes": 2}, "pinned", frozenset(tags))


def _simota_cases() -> Iterator[tuple[str, Case]]:
    worked = [(10, 12, 14, 16), (20, 22, 18, 12)]
    yield "worked-example", _simota([worked], [(1, 0)], {"worked-example"})
    # Centres on the edge of a box, and a square whose half side is the distance of a centre; simota.md 5.2.
    edges = [[(12, 12, 16, 16)], [(24, 24, 2, 2)]]
    yield "region-edges", _simota(edges, [(0,), (1,)], {"edge", "tie"})
    # Ground truths 0 and 1 select anchor 5 only; ground truth 2 selects 9, but fits 5 better than they do.
    shifted = [(10, 16, 20, 20), (9, 16, 20, 20), (16, 16, 20, 20)]
    predictions = torch.cat([torch.from_numpy(GRID.points).float(), torch.full((16, 2), 2.0)], dim=1)
    predictions[5], predictions[9] = torch.tensor([14.0, 16, 20, 20]), torch.tensor([16.0, 16, 20, 20])
    yield (
        "conflict-nonproposing-winner",
        _simota([shifted], [(0, 0, 0)], {"conflict"}, frame=GRID, predictions=predictions[None]),
    )
    yield "identical-ground-truths", _simota([worked[:1] * 2], [(1, 1)], {"identical", "tie"})
    # Both ground truths select the anchor that fits either; the later one fits it better.
    contested = torch.cat([torch.from_numpy(GRID.points).float(), torch.full((16, 2), 2.0)], dim=1)
    contested[5] = torch.tensor([13.0, 13, 18, 18])
    yield (
        "field-clrernet-78-one-anchor-two-ground-truths",
        _simota(
            [[(11, 11, 16, 16), (13, 13, 17, 17)]], [(0, 1)], {"conflict"}, frame=GRID, predictions=contested[None]
        ),
    )
    yield "identical-boxes-two-classes", _simota([worked[:1] * 2], [(1, 0)], {"identical", "tie"})
    # Every pair of the outside box has the penalty, which leaves float32 steps of 1/128: ties.
    yield "field-md-6731-box-outside-the-image", _simota([[worked[0], (60, 60, 8, 8)]], [(1, 0)], {"off-image", "tie"})
    yield "tiny-box-no-anchor-centre", _simota([[(16, 16, 2, 2)]], [(0,)], {"tiny", "tie"})
    yield "field-pixeltable-yolox-16-zero-area", _simota([[worked[0], (20, 20, 0, 0)]], [(1, 0)], {"zero-area", "tie"})
    yield (
        "more-ground-truths-than-anchors",
        _simota([[(2 + i, 30 - i, 6, 9) for i in range(30)]], [[i % 2 for i in range(30)]], {"conflict", "tie"}),
    )
    yield (
        "empty-image-and-padding-of-nan",
        _simota([worked, [], worked[1:]], [(1, 0), (), (0,)], {"empty-image", "padding-nan"}, padding=np.nan),
    )
    # No candidate anchors: an error of top-k upstream.
    yield (
        "field-yx-811-no-candidate-anchor",
        _simota([[(500, 500, 8, 8)]], [(0,)], {"no-candidate", "invalid", "divergence:simota-no-candidate"}),
    )


def _hungarian(
    variant: str,
    logits: torch.Tensor,
    predictions: torch.Tensor,
    labels: Sequence[int],
    boxes: Rows,
    sizes: Sequence[int],
    tags: set[str],
) -> Case:
    tensors = {
        "logits": logits.clone(),
        "pred_boxes": predictions.clone(),
        "labels": torch.tensor(labels, dtype=torch.int64),
        "boxes": torch.tensor(boxes, dtype=predictions.dtype).reshape(-1, 4),
    }
    settings: dict[str, Any] = {"variant": variant, "sizes": list(sizes)}
    settings |= {"class_cost": 1.0 if variant == "detr" else 2.0, "bbox_cost": 5.0, "giou_cost": 2.0}
    if variant == "rtdetr":
        settings |= {"use_fl": True, "alpha": 0.25, "gamma": 2.0}
    return Case("hungarian", tensors, settings, "pinned", frozenset({f"variant-{variant}", *tags}))


def _hungarian_cases() -> Iterator[tuple[str, Case]]:
    predictions = _wave((2, 4, 4), 1.1, 0.5, 0.15, 0.4)
    # A13 and B9 share boxes and ground truths; A13 has a column for no object.
    truths = ([0, 2, 1], [(0.3, 0.4, 0.2, 0.3), (0.6, 0.5, 0.4, 0.2), (0.5, 0.5, 0.3, 0.3)])
    for variant, columns in (("detr", 4), ("rtdetr", 3)):
        logits = _wave((2, 4, columns), 0.9, 0.3, 2, 0)

        def case(
            labels: Sequence[int],
            boxes: Rows,
            sizes: Sequence[int],
            *tags: str,
            logits: torch.Tensor = logits,
            predictions: torch.Tensor = predictions,
            variant: str = variant,
        ) -> Case:
            return _hungarian(variant, logits, predictions, labels, boxes, sizes, set(tags))

        yield f"{variant}-worked-example", case(*truths, (2, 1), "worked-example")
        crowd = [(0.1 + 0.13 * i, 0.8 - 0.1 * i, 0.1 + 0.05 * i, 0.3 - 0.04 * i) for i in range(6)]
        yield (
            f"field-hf-28865-{variant}-more-targets-than-queries",
            case([0, 1, 2, 0, 1, 2, 1], [*crowd, truths[1][2]], (6, 1), "more-targets-than-queries"),
        )
        yield f"field-hf-28865-{variant}-as-many-targets", case([0, 1, 2, 0, 1], crowd[:5], (4, 1), "as-many-targets")
        # Both targets are nearest to the first query.
        wanted = [predictions[0, 0].tolist(), (predictions[0, 0] + 0.01).tolist()]
        yield f"field-deta-8-{variant}-one-query-two-targets", case([0, 0], wanted, (2, 0), "conflict")
        yield (
            f"{variant}-identical-ground-truths",
            case([1, 1, 1], truths[1][:1] * 3, (2, 1), "identical", "tie"),
        )
        yield (
            f"{variant}-all-costs-equal",
            case(
                [1, 1, 1],
                truths[1][:1] * 3,
                (2, 1),
                "tie",
                logits=torch.zeros_like(logits),
                predictions=torch.full_like(predictions, 0.4),
            ),
        )
        yield f"{variant}-first-image-empty", case([2, 1], truths[1][1:], (0, 2), "empty-image")
        yield f"field-hf-28865-{variant}-no-target", case([], [], (0, 0), "empty-image", "no-ground-truth")
        zero_area = [*truths[1][:2], (0.45, 0.45, 0.0, 0.0)]
        yield f"{variant}-zero-area-ground-truth", case(truths[0], zero_area, (2, 1), "zero-area")
        # A softmax spreads one NaN to all classes of its query; sigmoids do not.
        cell = logits.clone()
        cell[0, 3, 2] = torch.nan
        yield f"field-rf-431-{variant}-nan-cell", case(*truths, (2, 1), "non-finite", logits=cell)
        poisoned = logits.clone()
        poisoned[:, 3] = torch.nan
        yield f"field-rf-431-{variant}-nan-row", case(*truths, (2, 1), "non-finite", logits=poisoned)
        yield (
            f"field-rf-431-{variant}-nan-everywhere",
            case(*truths, (2, 1), "non-finite", "tie", logits=torch.full_like(logits, torch.nan)),
        )
        wide = predictions.clone()
        wide[:, 1, 2] = torch.inf
        yield f"field-rf-431-{variant}-infinite-row", case(*truths, (2, 1), "non-finite", predictions=wide)
        endless = predictions.clone()
        endless[..., 2] = torch.inf
        yield (
            f"field-u-25508-{variant}-no-finite-cost",
            case(*truths, (2, 1), "non-finite", "tie", predictions=endless),
        )
        saturated = (logits.sign() * 30).to(torch.float16)
        yield (
            f"{'field-hf-47000-' if variant == 'rtdetr' else ''}{variant}-saturated-half-logits",
            # A tie where upstream still computed in half: every saturated cost rounds to the same number.
            case(*truths, (2, 1), "mixed-dtype", "float16", "tie", logits=saturated),
        )


def pinned_cases() -> dict[str, Case]:
    """Every case written by hand, by its name: those here, and those that stand beside an operation's strategy."""
    groups = {"tal": _tal_cases(), "simota": _simota_cases(), "hungarian": _hungarian_cases()}
    for module in pkgutil.iter_modules(cases.__path__):
        found = getattr(importlib.import_module(f"cases.{module.name}"), "pinned_cases", None)
        if found is not None and module.name != "pin":
            groups[module.name] = found()
    found = {f"{operation}-{name}": case for operation, group in groups.items() for name, case in group}
    for row in field.rows():
        for name in row.cases:
            # A name that no case has is left to the test of the declaration, which says so.
            if name in found:
                found[name] = replace(found[name], tags=found[name].tags | {row.tag})
    return found


def main(folder: Path = FOLDER) -> None:
    """Write the files; others in the folder (counterexamples that a run found) stay."""
    folder.mkdir(exist_ok=True)
    written = pinned_cases()
    for name, case in written.items():
        case.save(folder / f"{name}.safetensors")
    print(f"{len(written)} cases written to {folder.name}/")


if __name__ == "__main__":
    main()
