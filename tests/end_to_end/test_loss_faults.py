"""Faults planted in losses and their gradients are caught, each where it lies; the controls beside them hold."""

import functools

import pytest

QUICK = ("--no-bench", "--shrink-seconds", "0", "--dtypes", "float32", "--workers", "1", "--examples", "10")
NEWEST = {
    **dict.fromkeys(("bbox_loss", "v8_detection_loss"), "ultralytics==8.4.190"),
    **dict.fromkeys(("iou_loss", "yolox_bce"), "yolox==0.3.0"),
    **dict.fromkeys(("set_class_loss", "generalized_box_iou", "set_loss"), "transformers==5.23.0"),
}
CONTROLS = (*((name, name) for name in NEWEST), ("v8_detection_loss", "v8_detection_loss_static"))
FAULTS = (
    ("bbox_loss", "bbox_loss_alpha_not_constant", "gradient of pred_bboxes"),
    ("bbox_loss", "bbox_loss_v_without_factor", "loss_iou"),
    ("bbox_loss", "bbox_loss_dfl_weights_swapped", "loss_dfl"),
    ("bbox_loss", "bbox_loss_dfl_clamp_at_reg_max", "loss_dfl"),
    ("bbox_loss", "bbox_loss_unweighted", "loss_iou"),
    ("bbox_loss", "bbox_loss_wrong_axis", "loss_dfl"),
    ("v8_detection_loss", "v8_detection_loss_no_floor", "total"),
    ("v8_detection_loss", "v8_detection_loss_no_batch_factor", "total"),
    ("v8_detection_loss", "v8_detection_loss_no_gain", "total"),
    ("v8_detection_loss", "v8_detection_loss_sigmoid_twice", "total"),
    ("v8_detection_loss", "v8_detection_loss_gradient_through_assigner", "gradient of scores"),
    ("iou_loss", "iou_loss_not_squared", "loss"),
    ("yolox_bce", "yolox_bce_objectness_over_positives", "loss_obj"),
    ("yolox_bce", "yolox_bce_hard_classes", "loss_cls"),
    ("set_class_loss", "set_class_loss_no_object_weight_dropped", "loss_ce"),
    ("generalized_box_iou", "generalized_box_iou_over_union", "giou"),
    ("set_loss", "set_loss_auxiliary_layers_skipped", "total"),
)


def plugged(name):
    """The `--candidate` options of an operation's controls and faults."""
    own = [control for operation, control in CONTROLS if operation == name]
    own += [fault for operation, fault, _ in FAULTS if operation == name]
    return [option for one in own for option in ("--candidate", f"{one}=tests.loss_faults:{one}")]


@pytest.fixture(scope="session")
def runs(harness_run):
    """`runs(operation)`: one run an operation, made when first asked for, its faults beside its controls."""
    return functools.cache(lambda name: harness_run("--ops", name, "--oracles", NEWEST[name], *QUICK, *plugged(name)))


@pytest.mark.oracle
@pytest.mark.parametrize(("operation", "control"), CONTROLS)
def test_the_control_holds(runs, operation, control):
    run = runs(operation)
    assert run.failures(control) == []
    assert run.operation(control)["match"] > 0


@pytest.mark.oracle
@pytest.mark.parametrize(("operation", "fault", "output"), FAULTS)
def test_a_planted_fault_is_caught(runs, operation, fault, output):
    run = runs(operation)
    assert run.code == 1
    failures = run.failures(fault)
    # Where the fault lies, not merely that something failed.
    assert ("mismatch", output) in {(row["verdict"], row["output"]) for row in failures}
    assert all((run.folder / row["replay"]).is_file() for row in failures)
