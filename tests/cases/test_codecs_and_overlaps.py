"""The strategies of anchors, codecs and element-wise overlaps reach what they promise."""

from collections import Counter
from importlib import import_module

import pytest
import torch

from cases import bbox2dist, bbox_iou, codec_inputs, dfl_decode, dist2bbox, make_anchors
from cases.case import DTYPES
from cases.workloads import workload_case

MODULES = (make_anchors, dist2bbox, bbox2dist, dfl_decode, bbox_iou)
OPERATIONS = tuple(module.__name__.removeprefix("cases.") for module in MODULES)
each_operation = pytest.mark.parametrize("operation", OPERATIONS)

#: Tags, and the least number of 300 draws that have them.
WANTED = {
    "make_anchors": {"sizes": 40, "strides-tensor": 60, "no-cells": 20, "long": 8, "more-strides": 8},
    "dist2bbox": dict.fromkeys((*codec_inputs.LAYOUTS, "channels-first", "centres", "corners"), 10),
    "bbox2dist": dict.fromkeys(
        (*codec_inputs.LAYOUTS, "unbounded", "on-a-bound", "bound-15", "bound-0", "bound--2"), 6
    ),
    "dfl_decode": dict.fromkeys(
        ("bins-16", "bins-1", "bins-2", "logits-extreme", "logits-saturated", "logits-equal"), 8
    ),
    "bbox_iou": dict.fromkeys(
        (*bbox_iou.RELATIVES, "centres", "corners", "identical", "touching", "contained", "flat", "thin", "inverted"),
        20,
    )
    | dict.fromkeys(
        ("images", "all-pairs", "one-and-many", "one-box", "points", "equal-points", "far-away", "zeros"), 8
    ),
}


def counts(cases):
    return Counter(tag for case in cases for tag in case.tags)


@each_operation
def test_every_kind_is_reached_often(draw, operation):
    seen = counts(draw(operation))
    assert {dtype: seen[dtype] for dtype in DTYPES if seen[dtype] < 40} == {}
    common = {"empty": 8, "non-finite": 6, "mixed-dtype": 10} if operation != "make_anchors" else {}
    wanted = {"invalid": 4, **common, **WANTED[operation]}
    assert {tag: seen[tag] for tag, least in wanted.items() if seen[tag] < least} == {}


@each_operation
def test_most_cases_are_valid_finite_small_and_new(draw, operation):
    cases = draw(operation)
    seen = counts(cases)
    assert seen["invalid"] < len(cases) / 6
    assert seen["non-finite"] < len(cases) / 6
    assert seen["empty"] < len(cases) / 5
    assert len({case.digest for case in cases}) > len(cases) * 0.8
    assert max(tensor.numel() for case in cases for tensor in case.tensors.values()) < 20_000
    for case in cases:
        finite = all(bool(tensor.isfinite().all()) for tensor in case.tensors.values())
        assert finite or {"non-finite", "distances-huge"} & case.tags


@each_operation
def test_every_flaw_can_be_made_and_leaves_the_case_alone(draw, operation):
    sound = [case for case in draw(operation) if "invalid" not in case.tags][:60]
    before = [case.digest for case in sound]
    for flaw in import_module(f"cases.{operation}").FLAWS:
        made = [flaw.applied(case) for case in sound]
        flawed = [new for new, old in zip(made, sound, strict=True) if new is not old]
        assert len(flawed) >= 5, flaw
        assert all({"invalid", flaw.name} <= case.tags for case in flawed)
    assert [case.digest for case in sound] == before


def test_older_releases_are_spared_what_they_do_not_know(draw):
    options = {"sizes": False, "more_strides": False}
    older = draw("make_anchors", **options)
    assert all(make_anchors.allows(case, **options) for case in older)
    assert not all(make_anchors.allows(case, **options) for case in draw("make_anchors"))
    assert all("sizes" not in case.tensors for case in older)
    assert all(len(case.settings["strides"]) == len(case.tensors) for case in older)
    bounded = draw("bbox2dist", unbounded=False)
    assert all(bbox2dist.allows(case, unbounded=False) and case.settings["reg_max"] is not None for case in bounded)
    assert not all(bbox2dist.allows(case, unbounded=False) for case in draw("bbox2dist"))


def test_tagged_pairs_are_what_the_tag_says(draw):
    broadcast = points = 0
    for case in draw("bbox_iou", dtypes=("float64",)):
        one, two = case.tensors["box1"], case.tensors["box2"]
        if {"invalid", "empty", "non-finite"} & case.tags:
            continue
        broadcast += one.shape != two.shape
        assert one.shape == two.shape or {"all-pairs", "one-and-many"} & case.tags
        if {"equal-points", "pairs", "centres"} <= case.tags:
            assert bool(((one == two).all(-1) & (one[:, 2:] == 0).all(-1)).any())
            points += 1
    assert broadcast > 30
    assert points > 1


def test_distances_on_a_bound_are_on_it(draw):
    reached = 0
    for case in draw("bbox2dist", dtypes=("float32",)):
        if "on-a-bound" in case.tags and not {"invalid", "empty"} & case.tags:
            bound = torch.tensor(case.settings["reg_max"] - 0.01, dtype=torch.float32)
            reached += bool((case.tensors["bbox"].abs() == bound.abs()).any())
    assert reached > 10


@each_operation
def test_workloads_have_the_size_of_training(operation):
    for name, images in (("coco-b1", 1), ("coco-b16", 16)):
        tensors = workload_case(name, operation).tensors
        if operation == "make_anchors":
            assert sum(tensor[:, 0].numel() for tensor in tensors.values()) == images * 8400
        else:
            largest = next(tensors[key] for key in ("distance", "bbox", "logits", "box1") if key in tensors)
            assert largest[..., 0].numel() == images * 8400
