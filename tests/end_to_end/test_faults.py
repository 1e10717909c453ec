"""Planted faults are caught, each by name; the unspoiled control in the same run is not."""

import functools

import pytest

from tests.end_to_end.conftest import plug

QUICK = ("--no-bench", "--shrink-seconds", "0", "--dtypes", "float32", "--workers", "1")

TAL = (
    "tal",
    "tal_static",
    "tal_topk_one_less",
    "tal_alpha_off",
    "tal_diou",
    "tal_conflict_by_metric",
    "tal_index_shifted",
    "tal_every_output_shifted",
    "tal_mutates",
    "tal_leaks_gradient",
    "tal_raises",
)
SIMOTA = (
    "simota",
    "simota_static",
    "simota_radius_off",
    "simota_k_rounded",
    "simota_no_penalty",
    "simota_conflict_by_overlap",
)
ASSIGNMENT = (
    "linear_sum_assignment",
    "linear_sum_assignment_greedy",
    "linear_sum_assignment_padding",
    "linear_sum_assignment_column_twice",
)
HUNGARIAN = ("hungarian", "hungarian_no_giou", "hungarian_index_shifted")


RUNS = {
    "tal": ("--oracles", "ultralytics==8.4.190", "--examples", "24", *plug(*TAL)),
    "simota": ("--examples", "24", *plug(*SIMOTA)),
    "hungarian": ("--oracles", "transformers==5.23.0", "--examples", "24", *plug(*HUNGARIAN)),
    "linear_sum_assignment": ("--examples", "24", *plug(*ASSIGNMENT)),
}


@pytest.fixture(scope="session")
def runs(harness_run):
    """`runs(operation)`: one run an operation, made when first asked for, with all its faults beside the control."""
    return functools.cache(lambda operation: harness_run("--ops", operation, *RUNS[operation], *QUICK))


def operation_of(candidate):
    return next(name for name in RUNS if candidate.startswith(name))


@pytest.mark.oracle
@pytest.mark.parametrize(
    "control", ["tal", "tal_static", "simota", "simota_static", "hungarian", "linear_sum_assignment"]
)
def test_the_control_holds(runs, control):
    run = runs(operation_of(control))
    assert run.failures(control) == []
    assert run.operation(control)["match"] > 0


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("fault", "output"),
    [
        ("tal_topk_one_less", "fg_mask, target_gt_idx"),
        ("tal_alpha_off", "target_scores"),
        ("tal_diou", "target_scores"),
        ("tal_conflict_by_metric", "fg_mask, target_gt_idx"),
        ("tal_index_shifted", "invariants"),
        ("tal_every_output_shifted", "fg_mask, target_gt_idx"),
        ("tal_mutates", "side effects"),
        ("tal_leaks_gradient", "side effects"),
        ("tal_raises", "rejection"),
        ("simota_radius_off", "matched_gt"),
        ("simota_k_rounded", "matched_gt"),
        ("simota_no_penalty", "matched_gt"),
        ("simota_conflict_by_overlap", "matched_gt"),
        ("hungarian_no_giou", "queries, targets"),
        ("hungarian_index_shifted", "invariants"),
        ("linear_sum_assignment_greedy", "columns"),
        ("linear_sum_assignment_padding", "invariants"),
        ("linear_sum_assignment_column_twice", "invariants"),
    ],
)
def test_a_planted_fault_is_caught(runs, fault, output):
    run = runs(operation_of(fault))
    assert run.code == 1
    failures = run.failures(fault)
    # Where the fault lies, not merely that something failed: a fault that only raised would prove nothing.
    verdict = "candidate-error" if output == "rejection" else "mismatch"
    assert (verdict, output) in {(row["verdict"], row["output"]) for row in failures}
    assert all((run.folder / row["replay"]).is_file() for row in failures)


@pytest.mark.oracle
def test_a_candidate_that_exits_or_hangs_gets_a_verdict_and_the_run_goes_on(harness_run):
    run = harness_run(
        "--ops", "hungarian", "--oracles", "transformers==5.23.0", "--examples", "0", "--time-limit", "2", *QUICK,
        *plug("exits", "hangs", "hungarian"),
    )  # fmt: skip
    assert run.code == 1
    assert {row["verdict"] for row in run.failures("exits")} == {"crash"}
    assert {row["verdict"] for row in run.failures("hangs")} == {"timeout"}
    cases = {row["cases"] for row in run.summary["operations"]}
    assert len(cases) == 1
    assert run.failures("hungarian") == []
