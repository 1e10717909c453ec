"""Relations without an oracle: each is shown to fail on a fault, and every operation says which it has."""

import functools
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

import cases
import reports.relations
from cases.case import Case
from cases.pinned import pinned
from harness.bars import relations as bars
from harness.operations import NAMES as OPERATIONS
from harness.operations import operation
from harness.relations import BROKEN, HOLDS, NAMES, REJECTED, check, matching, trying
from harness.relations.declaration import Relations
from harness.relations.trial import Broken, Trial
from harness.worker import as_outputs
from tests import relation_faults as faults

DATA = {
    "images": "images",
    "ground truths": "truths",
    "anchors": "anchors",
    "levels": "levels",
    "classes": "classes",
    "padding": "padding",
    "scale": "scale",
    "gradcheck": "gradcheck",
    "optimality": "optimality",
    "monotony": "monotony",
}
"""Relation -> what it needs of a declaration."""
OF_ALL = {"repeat", "inputs"}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def stored(name):
    return [case for case in pinned(name) if "invalid" not in case.tags]


@functools.cache
def pool(name):
    """Stored cases and some drawn ones."""
    return [*trying.spare(name, {}), *stored(name)]


def tried(name, call, relations, most=1):
    """Rows of the first case that breaks one of the relations, or of all until each was tried `most` times."""
    rows, missing, held = [], set(relations), Counter()
    for case in pool(name):
        found = check(operation(name), case, call, tuple(missing))
        rows += found
        held.update(row["relation"] for row in found if row["verdict"] == HOLDS)
        missing -= {relation for relation, count in held.items() if count >= most}
        if not missing or any(row["verdict"] == BROKEN for row in found):
            break
    return rows, missing


def built_in(name):
    return lambda tensors, settings: as_outputs(operation(name).candidates["torch"](**tensors, **settings))


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_has_a_relation_or_a_reason(name):
    declared = operation(name).relations
    assert declared != Relations()
    assert set(declared.exempt) <= set(NAMES)
    assert all(len(reason) > 10 for reason in declared.exempt.values())
    assert not OF_ALL & set(declared.exempt)
    for relation, data in DATA.items():
        # A reason beside the data would be stale, neither of them a gap.
        assert bool(getattr(declared, data)) != (relation in declared.exempt), relation
    assert ("leak" in declared.exempt) == bool(operation(name).gradients or name == "make_anchors")
    assert "alone" in declared.exempt or declared.images or declared.anchors


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_relation_is_tried_on_stored_cases_and_holds(name):
    declared = operation(name).relations.declared()
    rows, missing = tried(name, built_in(name), declared)
    assert [row for row in rows if row["verdict"] == BROKEN] == []
    assert missing == set()


@pytest.mark.parametrize(
    ("relation", "name", "fault"),
    [
        ("images", "class_bce", faults.last_image_is_special),
        ("alone", "class_bce", faults.images_share_a_mean),
        ("ground truths", "tal", faults.first_row_is_enlarged),
        ("anchors", "tal", faults.first_anchor_is_never_chosen),
        ("anchors", "hungarian", faults.first_query_is_cheap),
        ("levels", "make_anchors", faults.first_level_is_shifted),
        ("classes", "class_bce", faults.class_0_weighs_more),
        ("padding", "tal", faults.padding_votes_for_anchor_0),
        ("scale", "bboxes_iou", faults.epsilon_of_a_pixel),
        ("repeat", "dfl_loss", faults.counts_its_calls),
        ("repeat", "dfl_loss", faults.refuses_deterministic_algorithms),
        ("inputs", "dfl_loss", faults.clamps_its_target),
        ("leak", "tal", faults.leaks_gradient),
        ("gradcheck", "dfl_loss", faults.slope_is_larger),
        ("optimality", "hungarian", faults.matches_without_boxes),
        ("optimality", "linear_sum_assignment", faults.assigns_greedily),
        ("monotony", "tal", faults.large_topk_is_cut_to_1),
        ("monotony", "class_bce", faults.surer_is_cheaper),
    ],
)
def test_a_relation_fails_on_its_fault(relation, name, fault):
    rows, _ = tried(name, lambda tensors, settings: fault(**tensors, **settings), (relation,), most=40)
    assert [row["relation"] for row in rows if row["verdict"] == BROKEN] == [relation]
    assert rows[-1]["detail"]


def test_every_relation_has_a_fault():
    shown = test_a_relation_fails_on_its_fault.pytestmark[0].args[1]
    assert {relation for relation, _, _ in shown} == set(NAMES)


def test_a_tie_is_no_contradiction_and_a_worse_matching_is():
    """All costs equal: any matching in any order is right. One pair exchanged for a dearer one is not."""
    case = Case.load(Path(cases.__file__).parent / "pinned" / "hungarian-rtdetr-all-costs-equal.safetensors")
    rows = check(operation("hungarian"), case, built_in("hungarian"), ("ground truths", "anchors", "optimality"))
    assert [row["verdict"] for row in rows] == [HOLDS] * 3


def test_other_pairs_of_a_loss_are_a_tie_at_the_same_total_alone():
    trial = Trial(operation("rtdetr_loss"), stored("rtdetr_loss")[0], None)
    expected = {"total": torch.tensor(2.0), "owner": torch.tensor([0, 1]), "gradient of pred_bboxes": torch.arange(2.0)}
    crossed = {name: value.flip(0) if value.ndim else value for name, value in expected.items()}
    trial.by_cost(expected, crossed)
    dearer = {**crossed, "total": torch.tensor(2.0001)}
    other_slope = {**crossed, "owner": expected["owner"]}
    for wrong in (dearer, other_slope):
        with pytest.raises(Broken):
            trial.by_cost(expected, wrong)


@pytest.mark.parametrize(("sizes", "worse"), [((3, 3), True), ((3, 5), True), ((5, 3), True), ((3, 3), False)])
def test_duals_certify_an_optimum_and_nothing_else(sizes, worse):
    cost = torch.rand(1, *sizes, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    case = Case("linear_sum_assignment", {"cost": cost}, {"sizes": [list(sizes)]}, "test", frozenset())

    def call(tensors, settings):
        columns = built_in("linear_sum_assignment")(tensors, settings)["columns"].clone()
        if worse:
            pair = (columns[0] >= 0).nonzero()[:2, 0]
            columns[0, pair] = columns[0, pair.flip(0)]
        return {"columns": columns}

    [row] = check(operation("linear_sum_assignment"), case, call, ("optimality",))
    assert row["verdict"] == (BROKEN if worse else HOLDS)


def test_owners_of_layers_and_images():
    queries, targets = torch.tensor([0, 2, 1, 1, 2, 0]), torch.tensor([1, 0, 0, 0, 1, 0])
    found = matching.owners(queries, targets, [2, 1], 3, through=False)
    assert found.tolist() == [[[1, -1, 0], [-1, 0, -1]], [[-1, 0, 1], [0, -1, -1]]]


def test_a_case_that_the_subject_rejects_is_counted_apart():
    def refuses(tensors, settings):
        raise ValueError("planted")

    rows = check(operation("dfl_loss"), stored("dfl_loss")[0], refuses)
    assert {row["verdict"] for row in rows} == {REJECTED}


def test_one_that_only_rejects_what_follows_is_broken():
    case = next(case for case in stored("dfl_loss") if len(case.tensors["target"]) > 1)
    seen = []

    def refuses(tensors, settings):
        if seen and not torch.equal(tensors["target"], seen[0]):
            raise ValueError("planted")
        seen.append(tensors["target"].clone())
        return built_in("dfl_loss")(tensors, settings)

    [row] = check(operation("dfl_loss"), case, refuses, ("anchors",))
    assert (row["verdict"], "planted" in row["detail"]) == (BROKEN, True)


def row(**changes):
    """A row of the frame."""
    usual = {"operation": "dfl_loss", "oracle": "", "subject": "torch", "device": "cpu", "relation": "repeat"}
    more = {"dtype": "float32", "case": "0", "origin": "", "verdict": "holds", "detail": "", "replay": ""}
    return {**usual, **more, **changes}


FINDING = row(oracle="ultralytics==8.4.190", subject="upstream", verdict="finding", detail="differs", replay="a.file")


def test_a_broken_relation_falls_and_a_finding_does_not():
    assert all(bar.ok for bar in bars.bars(pd.DataFrame([row(), FINDING])))
    [bar] = bars.bars(pd.DataFrame([row(), FINDING, row(verdict="broken", detail="two", replay="b.file")]))
    assert (bar.ok, bar.bar, bar.reason) == (False, "repeat of dfl_loss, torch", "two; b.file")


class OfOneOperation:
    """What a bar reads of a plan."""

    relations = ("repeat", "levels")

    def pairs(self):
        return [("dfl_loss", "ultralytics==8.4.190")]

    def candidates_of(self, name):
        return ("torch",)


@pytest.mark.parametrize(
    ("rows", "ok"),
    [
        ([row()], True),
        ([row(verdict="broken")], True),
        ([row(verdict="rejected")], False),
        ([FINDING], False),
        ([row(relation="inputs")], False),
        ([], False),
    ],
)
def test_a_relation_that_was_never_tried_falls(rows, ok):
    assert [bar.ok for bar in bars.untried(pd.DataFrame(rows), OfOneOperation())] == [ok]


def test_the_report_lists_findings_apart_with_the_smallest_case():
    larger = replace_case(FINDING, case="1", replay="")
    found = reports.relations.tables(pd.DataFrame([row(), larger, FINDING, row(case="2", verdict="broken")]))
    assert [table.name for table in found] == ["relations-broken", "relations-findings", "relations"]
    [line] = found[1].rows
    assert (line["replay"].text, line["cases"].value, line["detail"].text) == ("a.file", 2, "differs")
    counts = {line["subject"].text: line for line in found[2].rows}
    assert counts["torch"]["broken"].value == 1
    assert counts["ultralytics==8.4.190"]["finding"].value == 2
    assert [table.name for table in reports.relations.tables(pd.DataFrame([row()]))] == ["relations"]


def replace_case(given, **changes):
    return {**given, **changes}


def test_stirring_keeps_what_counts():
    from harness.relations.trial import Trial

    case = stored("tal")[0]
    moved = Trial(operation("tal"), case, None).stirred().case
    assert torch.equal(moved.tensors["gt_labels"], case.tensors["gt_labels"])
    assert not torch.equal(moved.tensors["pd_bboxes"], case.tensors["pd_bboxes"])
    again = Trial(operation("tal"), replace(case, origin="elsewhere"), None).stirred().case
    assert torch.equal(moved.tensors["pd_bboxes"], again.tensors["pd_bboxes"])
