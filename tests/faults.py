"""Candidates with a fault planted in each, and their controls without one: what the harness must tell apart.

Each takes what every candidate takes, all by keyword, and spoils the built-in candidate in one way.
"""

import ctypes
import os
import time
from pathlib import Path
from unittest import mock

import torch

from cleanroom.assign import _simota_sparse, _tal_sparse, _tal_terms
from harness.operations import operation

PLACE = "CLEANROOM_TEST_PLACE"
"""Environment variable with the file in which a waiting candidate says its process."""


def right(name):
    """The built-in candidate, unspoiled: the control of every fault test."""
    return operation(name).candidates["torch"]


def tal(**given):
    return right("tal")(**given)


def tal_static(**given):
    """The path that CUDA takes, on the CPU."""
    return right("tal")(**given, path="static")


def tal_topk_one_less(*, topk, **given):
    return right("tal")(topk=max(topk - 1, 1), **given)


def tal_alpha_off(*, alpha, **given):
    return right("tal")(alpha=alpha + 0.01, **given)


def tal_diou(**given):
    """CIoU without its aspect term."""
    complete_iou = _tal_terms.complete_iou

    def distance_iou(first, second, alpha):
        same = torch.zeros((), dtype=first.angle.dtype)
        return complete_iou(first._replace(angle=same), second._replace(angle=same), alpha)

    with mock.patch.object(_tal_terms, "complete_iou", distance_iou):
        return right("tal")(**given)


def tal_conflict_by_metric(**given):
    """An anchor that several ground truths propose goes to the largest metric instead of the largest overlap."""
    resolved, weighed = _tal_sparse._resolved, _tal_sparse._weighed

    def by_metric(*arguments):
        pairs = weighed(*arguments)
        return pairs._replace(overlap=pairs.metric)

    def resolved_by_metric(*arguments):
        with mock.patch.object(_tal_sparse, "_weighed", by_metric):
            return resolved(*arguments)

    with mock.patch.object(_tal_sparse, "_resolved", resolved_by_metric):
        return right("tal")(**given)


def tal_index_shifted(**given):
    outputs = right("tal")(**given)
    shifted = outputs["target_gt_idx"].roll(1, -1)
    return {**outputs, "target_gt_idx": shifted}


def tal_every_output_shifted(**given):
    """The whole assignment one anchor further: consistent in itself, so only the comparator can see it."""
    return {name: value.roll(1, 1) for name, value in right("tal")(**given).items()}


def tal_mutates(*, gt_bboxes, **given):
    outputs = right("tal")(gt_bboxes=gt_bboxes, **given)
    with torch.no_grad():
        gt_bboxes += 0.5
    return outputs


def tal_leaks_gradient(*, pd_scores, **given):
    outputs = right("tal")(pd_scores=pd_scores, **given)
    return {**outputs, "target_scores": outputs["target_scores"] + 0 * pd_scores.sum()}


def tal_raises(**given):
    raise RuntimeError("planted")


def exits(**given):
    os._exit(3)


def hangs(**given):
    time.sleep(600)


def simota(**given):
    return right("simota")(**given)


def simota_static(**given):
    """The path that CUDA takes, on the CPU."""
    return right("simota")(**given, path="static")


def simota_radius_off(**given):
    return right("simota")(**{**given, "radius": 2.4})


def simota_no_penalty(**given):
    return right("simota")(**{**given, "penalty": 0.0})


def simota_k_rounded(**given):
    """Dynamic k rounded to the nearest integer instead of truncated."""

    def rounded(iou, dtype):
        largest = iou.nan_to_num(nan=0.0).topk(min(10, iou.shape[-1])).values
        return largest.to(dtype).sum(-1).round().to(torch.int64).clamp_(min=1)

    with mock.patch.object(_simota_sparse, "dynamic_k", rounded):
        return right("simota")(**given)


def simota_conflict_by_overlap(**given):
    """A contested anchor goes to the ground truth of the largest overlap instead of the lowest cost."""
    cheapest = _simota_sparse._cheapest

    def most_overlapping(*arguments):
        with mock.patch.object(_simota_sparse, "pair_cost", lambda *terms: -terms[3]):
            return cheapest(*arguments)

    with mock.patch.object(_simota_sparse, "_cheapest", most_overlapping):
        return right("simota")(**given)


def hungarian(**given):
    return right("hungarian")(**given)


def hungarian_no_giou(*, giou_cost, **given):
    return right("hungarian")(giou_cost=0.0, **given)


def hungarian_index_shifted(**given):
    outputs = dict(right("hungarian")(**given))
    return {**outputs, "queries": outputs["queries"] + 1}


def linear_sum_assignment(**given):
    return right("linear_sum_assignment")(**given)


def linear_sum_assignment_greedy(*, cost, sizes):
    """Each row, in order, takes the cheapest column that is left."""
    found = torch.full(cost.shape[:2], -1)
    for problem, (rows, columns) in enumerate(sizes):
        block = cost[problem, :rows, :columns].clone()
        for row in range(min(rows, columns)):
            found[problem, row] = block[row].argmin()
            block[:, found[problem, row]] = torch.inf
    return {"columns": found}


def linear_sum_assignment_padding(*, cost, sizes):
    """Padding is read: the problem of another size gets the columns of the whole."""
    return right("linear_sum_assignment")(cost=cost.nan_to_num(), sizes=[list(cost.shape[1:]) for _ in sizes])


def linear_sum_assignment_column_twice(**given):
    found = linear_sum_assignment(**given)["columns"].clone()
    found[:, 1:2] = found[:, :1]
    return {"columns": found}


def crashes(**given):
    """A segmentation fault in native code."""
    ctypes.string_at(0)


def waits_to_be_killed(**given):
    """Says where it runs, and waits for whom this concerns; not a second time."""
    place = Path(os.environ[PLACE])
    if not place.exists():
        place.write_text(str(os.getpid()))
        time.sleep(60)
    [built_in] = [right(name) for name in ("generalized_box_iou", "cardinality_error") if _takes(name, given)]
    return built_in(**given)


def _takes(name, given):
    return {item.name for item in operation(name).inputs} <= set(given)


def says_what_no_frame_holds(**given):
    raise ValueError("boxes1 \ud800 <script>alert(1)</script>")


def takes_all_memory(**given):
    return {"queries": torch.ones(1 << 36), "targets": torch.ones(1)}
