"""Each field case fails on the fault it is named after, as that was reported, and holds without it.

What a row of `cases/field.toml` says of its cases is thereby tested on the broken code (U#22971).
"""

import functools
from unittest import mock

import pandas as pd
import pytest
import torch

from cases.pinned import FOLDER, pinned
from harness.verdict import HOLDS
from tests.field_faults import CONTROLS, FAULTS, HUNGARIAN

#: Stored cases alone, and of those the field's. A hang costs its limit, in which every other candidate ends many times.
QUICK = ("--examples", "0", "--no-bench", "--no-relations", "--shrink-seconds", "0", "--workers", "1")
LIMITS = dict.fromkeys(CONTROLS, "60") | {HUNGARIAN: "4"}
ORACLES = "ultralytics==8.4.190,yolox==0.3.0,transformers==5.23.0"


def field_cases(operation=None):
    """The pinned cases that carry the tag of a row."""
    tagged = [case for case in pinned() if any(tag.startswith("field:") for tag in case.tags)]
    return [case for case in tagged if operation in (None, case.operation)]


@pytest.fixture(scope="session")
def verdicts(harness_run, tmp_path_factory):
    """`verdicts(operation)`: verdicts of one run with all its faults, by candidate and case; made when asked for."""
    folder = tmp_path_factory.mktemp("field")
    for case in field_cases():
        name = f"{case.origin.removeprefix('pinned:')}.safetensors"
        (folder / name).symlink_to(FOLDER / name)

    @functools.cache
    def run(operation):
        names = dict.fromkeys(fault.candidate for fault in FAULTS if fault.operation == operation)
        plugged = [f"--candidate={name}=tests.field_faults:{name}" for name in (CONTROLS[operation], *names)]
        limits = ("--time-limit", LIMITS[operation])
        with mock.patch("cases.pinned.FOLDER", folder):
            made = harness_run(
                "--ops", operation, "--oracles", ORACLES, "--dtypes", "float32", *QUICK, *limits, *plugged
            )
        frame = pd.read_parquet(made.folder / "verdicts.parquet")
        return frame.set_index(["candidate", "origin"])

    return run


@pytest.mark.oracle
@pytest.mark.parametrize("operation", CONTROLS)
def test_field_cases_hold_without_a_fault(verdicts, operation):
    own = verdicts(operation).loc[CONTROLS[operation]]
    assert {case.origin for case in field_cases(operation)} == set(own.index)
    assert own[~own.verdict.isin(HOLDS)].detail.to_dict() == {}


@pytest.mark.oracle
@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_a_field_case_falls_on_the_fault_it_is_named_after(verdicts, fault):
    rows = verdicts(fault.operation).loc[fault.candidate]
    for name in fault.cases:
        row = rows.loc[f"pinned:{fault.operation}-field-{name}"]
        assert f"field:{fault.row}" in row.tags.split()
        assert (row.verdict, row.output) == (fault.verdict, fault.output or row.output), row.detail


@pytest.mark.skipif(not torch.cuda.is_available(), reason="what differs between a GPU and the CPU needs a GPU")
def test_autocast_decides_alike_on_both_devices():
    """U#25990, the part that only a GPU shows."""
    from harness.execute import autocasting
    from harness.operation import AUTOCAST
    from harness.operations import operation

    for case in pinned("v8_detection_loss"):
        if "field:U#25990" in case.tags:
            found = []
            for device in ("cpu", "cuda"):
                settings = {key: value for key, value in case.settings.items() if key != AUTOCAST}
                tensors = case.to(device).tensors
                with autocasting(tensors, case.settings[AUTOCAST]):
                    found.append(operation(case.operation).candidates["torch"](**tensors, **settings))
            for name in ("fg_mask", "target_gt_idx"):
                assert torch.equal(found[0][name], found[1][name].cpu())


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="the second GPU needs two")
def test_everything_stays_on_the_second_gpu():
    """yolov7#306, the part that only two GPUs show."""
    from harness.operation import AUTOCAST
    from harness.operations import operation

    [case] = [case for case in pinned("v8_detection_loss") if "field:yolov7#306" in case.tags]
    settings = {key: value for key, value in case.settings.items() if key != AUTOCAST}
    outputs = operation(case.operation).candidates["torch"](**case.to("cuda:1").tensors, **settings)
    assert {str(value.device) for value in outputs.values()} == {"cuda:1"}
