"""`hungarian`: the one-to-one matchers of DETR, YOLOS and RT-DETR."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from cases.case import Case
from cleanroom.assign.hungarian import HungarianMatcher, RTDETRHungarianMatcher, hungarian_match
from harness.candidates import by_path
from harness.operation import DropIn, Input, Operation, Output, Setting, Tensors, Upstream, release
from harness.operations.hungarian_compare import compare, spans
from harness.relations import reasons
from harness.relations.declaration import Axis, Images, Margins, Relations, Rows
from harness.relations.matching import no_quantities, optimal, pairs, set_pairs
from harness.relations.reasons import exempt

TOLERATED_SINCE = {"transformers": (5, 18, 0), "ultralytics": (8, 0, 182)}
"""First release in which a cost that is not finite no longer stops the matcher (`spec/eras.md`)."""
SINCE = {"ultralytics": (8, 0, 119)}
"""First release of a package that has the matcher."""


def _upstream(name: str, variant: str) -> Upstream:
    def era(version: str) -> dict[str, Any]:
        return {} if release(version) >= TOLERATED_SINCE[name] else {"non_finite": "raise"}

    return Upstream(options=lambda version: {"variant": variant}, era=era, since=SINCE.get(name, ()))


def _bind(
    logits: Tensor,
    pred_boxes: Tensor,
    labels: Tensor,
    boxes: Tensor,
    *,
    variant: str,
    sizes: list[int],
    class_cost: float,
    bbox_cost: float,
    giou_cost: float,
    non_finite: str | None = None,
    path: str = "auto",
    **focal: Any,
) -> tuple[Callable[[], Any], Callable[[Any], Tensors]]:
    """The classes that drop in, called as upstream's are; former eras have only the function beneath them."""
    if non_finite:
        weights = {"class_cost": class_cost, "bbox_cost": bbox_cost, "giou_cost": giou_cost}
        settings = {"variant": variant, "non_finite": non_finite, "path": path, **weights, **focal}
        return lambda: hungarian_match(logits, pred_boxes, labels, boxes, sizes, **settings), lambda m: m._asdict()
    if variant == "detr":
        images = zip(labels.split(sizes), boxes.split(sizes), strict=True)
        targets = [{"class_labels": some, "boxes": others} for some, others in images]
        outputs = {"logits": logits, "pred_boxes": pred_boxes}
        matcher = HungarianMatcher(class_cost, bbox_cost, giou_cost, path=path)
        return lambda: matcher(outputs, targets), _joined
    gain = {"class": class_cost, "bbox": bbox_cost, "giou": giou_cost}
    matcher = RTDETRHungarianMatcher(gain, path=path, **focal)
    return lambda: matcher(pred_boxes, logits, boxes, labels, sizes), _joined


def _joined(matches: list[tuple[Tensor, Tensor]]) -> Tensors:
    nothing = torch.empty(0, dtype=torch.int64)
    queries, targets = zip((nothing, nothing), *matches, strict=True)
    return {"queries": torch.cat(queries), "targets": torch.cat(targets)}


def invariants(case: Case, outputs: Tensors) -> str | None:
    """A valid matching of every image: as many pairs as fit, ascending queries, each target once."""
    total, places = case.tensors["logits"].shape[1], spans(case)
    queries, targets = outputs["queries"].tolist(), outputs["targets"].tolist()
    expected = places[-1].end if places else 0
    if not len(queries) == len(targets) == expected:
        return f"{len(queries)} queries and {len(targets)} targets, expected {expected} pairs"
    for b, span in enumerate(places):
        some, others = queries[span.start : span.end], targets[span.start : span.end]
        if any(query >= following for query, following in pairwise(some)):
            return f"queries of image {b} do not ascend: {some[:8]}"
        if some and (some[0] < 0 or some[-1] >= total):
            return f"queries of image {b} leave [0, {total})"
        if any(not 0 <= target - span.first < span.targets for target in others):
            return f"targets of image {b} leave [{span.first}, {span.first + span.targets})"
        if len(set(others)) != len(others):
            return f"targets of image {b} repeat"
    return None


def minimum_bytes(case: Case, outputs: Tensors) -> int:
    """Every box and label once, outputs once, and of the logits all (softmax) or one a pair of an image."""
    tensors, sizes, logits = case.tensors, case.settings["sizes"], case.tensors["logits"]
    every = case.settings["variant"] == "detr" or not case.settings["use_fl"]
    used = [len(some.unique()) for some in tensors["labels"].split(sizes)]
    columns = sum(logits.shape[2] if every and count else count for count in used)
    scores = columns * logits.shape[1] * logits.element_size()
    boxes = sum(tensors[name].nbytes for name in ("pred_boxes", "labels", "boxes"))
    return boxes + scores + sum(tensor.nbytes for tensor in outputs.values())


OPERATION = Operation(
    name="hungarian",
    summary="Bipartite matching of queries and ground truths at least class, L1 and GIoU cost",
    source="spec/set_prediction.md A1 to A3, B1, B2; DETR (Carion et al., arXiv:2005.12872)",
    inputs=(
        Input(
            "logits",
            "(B, Q, K)",
            "floating",
            "class logits; K = C + 1 with no object last (detr), C (rtdetr)",
        ),
        Input("pred_boxes", "(B, Q, 4)", "floating", "predicted boxes, cxcywh normalised to the image"),
        Input("labels", "(G,)", "int64", "classes of the ground truths, image after image"),
        Input("boxes", "(G, 4)", "floating", "ground truths, cxcywh normalised, image after image"),
    ),
    settings=(
        Setting("variant", "detr", "cost and indices of detr (transformers) or rtdetr (ultralytics)"),
        Setting("sizes", [], "ground truths of each image; their sum is G"),
        Setting("class_cost", 1.0, "weight of the class term"),
        Setting("bbox_cost", 5.0, "weight of the L1 distance"),
        Setting("giou_cost", 2.0, "weight of the GIoU"),
        Setting("use_fl", True, "rtdetr: sigmoid focal class cost, else minus the softmax"),
        Setting("alpha", 0.25, "rtdetr: balance of the focal cost"),
        Setting("gamma", 2.0, "rtdetr: exponent of the focal cost"),
    ),
    outputs=(
        Output("queries", "(P,)", "int64", "matched queries, ascending in each image", decision=True),
        Output("targets", "(P,)", "int64", "their ground truths, local (detr) or global (rtdetr)", decision=True),
    ),
    upstreams={
        "transformers": _upstream("transformers", "detr"),
        "ultralytics": _upstream("ultralytics", "rtdetr"),
    },
    candidates=by_path(DropIn(_bind), on_device="scipy"),
    predictions=("logits", "pred_boxes"),
    compare=compare,
    invariants=invariants,
    minimum_bytes=minimum_bytes,
    workloads=("detr-b16", "coco-b1"),
    relations=Relations(
        images=Images(
            {"logits": 0, "pred_boxes": 0, "owner": 1}, blocks={"labels": "sizes", "boxes": "sizes"}, lists=("sizes",)
        ),
        truths=Rows(count=lambda case: case.settings["sizes"], blocks=("labels", "boxes"), counted={"owner": 1}),
        anchors=Axis({"logits": 1, "pred_boxes": 1, "owner": 2}),
        classes=Axis({"logits": 2}, last={"logits": 1}, counted={"labels": None}),
        optimality=optimal,
        dense=set_pairs,
        margins=Margins(no_quantities, restore=pairs),
        free=("logits", "pred_boxes", "boxes"),
        exempt=exempt(
            levels=reasons.NO_LEVELS,
            padding=reasons.RAGGED,
            scale=reasons.NORMALISED,
            gradcheck=reasons.ASSIGNER,
            monotony=reasons.NOTHING_GROWS,
        ),
    ),
)
