"""The adapter of RT-DETR's set losses, against the worked example B9 of set_prediction.md, and upstream's denoising."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cases.rtdetr_loss import example
from cleanroom.losses.denoising import denoising_indices

NEW, FORMER = "ultralytics==8.4.190", "ultralytics==8.1.47"
EACH = pytest.mark.parametrize("spec", [NEW, FORMER])
CLASS_TERMS = {"varifocal": 1.2989279, "focal": 2.8127673, "bce": 5.6680536}


def chosen(form):
    return {"use_fl": form != "bce", "use_vfl": form == "varifocal"}


def ask(oracle, spec, *given):
    return oracle(spec).bind("rtdetr_loss", *given)["outputs"]


@pytest.mark.oracle
@EACH
@pytest.mark.parametrize("form", CLASS_TERMS)
def test_worked_example(oracle, spec, form):
    tensors, settings = example(**chosen(form))
    answer = oracle(spec).bind("rtdetr_loss", tensors, settings)
    found = answer["outputs"]
    # Before 8.3.117 the varifocal loss had other parameters.
    of_class = 2.83244 if (spec, form) == (FORMER, "varifocal") else CLASS_TERMS[form]
    expected = [of_class, 2.3110454, 1.6626315, 0, 0, 0]
    assert found["terms"].tolist() == pytest.approx(expected, rel=2e-6)
    assert found["total"].item() == pytest.approx(sum(expected), rel=2e-6)
    assert (found["queries"].tolist(), found["targets"].tolist()) == ([0, 3, 3], [1, 0, 2])
    assert all(torch.equal(tensor, answer["tensors"][name]) for name, tensor in tensors.items())


@pytest.mark.oracle
def test_worked_example_of_three_layers(oracle):
    found = ask(oracle, NEW, *example(3))
    expected = [1.234918, 1.295418, 1.371488, 2.610989, 4.439822, 3.304632]
    assert found["terms"].tolist() == pytest.approx(expected, abs=1e-6)
    assert found["queries"].tolist() == [0, 3, 3, 0, 3, 3, 1, 2, 1]  # the last layer is matched first
    assert found["targets"].tolist() == [1, 0, 2, 1, 0, 2, 1, 0, 2]


@pytest.mark.oracle
@EACH
@pytest.mark.parametrize(("index", "queries"), [(0, [0, 3, 3]), (1, [1, 2, 1])])
def test_a_shared_matching(oracle, spec, index, queries):
    found = ask(oracle, spec, *example(3, use_uni_match=True, uni_match_ind=index))
    assert found["queries"].tolist() == [0, 3, 3, *queries]
    bbox = 6.020159 if index == 0 else 5.477429
    assert found["terms"][4].item() == pytest.approx(bbox, abs=2e-6)


@pytest.mark.oracle
@EACH
def test_denoising(oracle, spec):
    found = ask(oracle, spec, *example(denoising=True))
    of_class = 3.245151 if spec == FORMER else 1.338871
    assert found["terms"][6:].tolist() == pytest.approx([of_class, 2.610837, 1.796269, 0, 0, 0], abs=2e-6)
    assert found["queries"].tolist() == [0, 3, 3]  # denoising queries are not matched


@pytest.mark.oracle
@EACH
def test_without_auxiliary_layers(oracle, spec):
    assert ask(oracle, spec, *example(3, denoising=True, aux_loss=False))["terms"].shape == (6,)


@pytest.mark.oracle
@EACH
def test_no_ground_truth(oracle, spec):
    tensors, settings = example(gt_groups=[0, 0])
    tensors |= {name: tensors[name][:0] for name in ("cls", "bboxes")}
    found = ask(oracle, spec, tensors, settings)
    assert found["terms"].tolist() == pytest.approx([11.876269, 0, 0, 0, 0, 0], rel=1e-6)
    assert found["queries"].shape == (0,)


@pytest.mark.oracle
@EACH
@pytest.mark.parametrize("form", CLASS_TERMS)
def test_float64(oracle, spec, form):
    tensors, settings = example(3, denoising=True, **chosen(form))
    wide = {n: t.double() if t.is_floating_point() else t for n, t in tensors.items()}
    found, narrow = ask(oracle, spec, wide, settings), ask(oracle, spec, tensors, settings)
    assert found["terms"].dtype == torch.float64
    torch.testing.assert_close(found["terms"].float(), narrow["terms"])
    assert not torch.equal(found["terms"], found["terms"].float().double())
    moved = wide | {"pred_scores": wide["pred_scores"] + 1e-10}
    assert ask(oracle, spec, moved, settings)["terms"][0] != found["terms"][0]
    assert torch.equal(ask(oracle, spec, tensors, settings)["terms"], narrow["terms"])  # the default dtype is back


@pytest.mark.oracle
@EACH
def test_upstream_rejects_half_boxes(oracle, spec):
    tensors, settings = example()
    tensors |= {name: tensors[name].half() for name in ("pred_bboxes", "bboxes")}
    with pytest.raises(RuntimeError, match="Index put requires the source and destination dtypes match"):
        ask(oracle, spec, tensors, settings)


@pytest.mark.oracle
def test_older_releases_lack_gamma_and_subsets(oracle):
    with pytest.raises(RuntimeError, match=r"RequestError: .* knows .* only"):
        ask(oracle, FORMER, *example(gamma=2.0))
    tensors, settings = example(denoising=True, dn_pos_counts=[2, 2], dn_gt_counts=[1, 1])
    tensors |= {"dn_pos_idx": torch.tensor([0, 4, 0, 4]), "dn_gt_idx": torch.tensor([1, 2])}
    with pytest.raises(RuntimeError, match=r"RequestError: .* denoises every ground truth"):
        ask(oracle, FORMER, tensors, settings)
    assert ask(oracle, NEW, tensors, settings)["terms"][6].item() == pytest.approx(1.956482, abs=1e-6)


GROUPS = [[2, 1], [3, 0, 1], [7, 2], [5, 5], [0, 0]]
SCRIPT = """
import json, sys, torch
from cases.rtdetr_loss import example
from reference import OracleSpec, load

oracle = load(OracleSpec.parse(sys.argv[1]))
found = {}

tensors, settings = example(3)
free = oracle.bind("rtdetr_loss", tensors, settings)
own = free.translate(free())
other = {"queries": torch.tensor([1, 2, 0] * 3), "targets": torch.tensor([0, 1, 2] * 3)}
told = oracle.bind("rtdetr_loss", tensors, settings, other)
twice = [told.translate(told()) for _ in range(2)]
again = oracle.bind("rtdetr_loss", tensors, settings, own)
found["assigned"] = {
    "its own": torch.equal(again.translate(again())["terms"], own["terms"]),
    "another": torch.equal(twice[0]["terms"], own["terms"]),
    "repeats": torch.equal(twice[0]["terms"], twice[1]["terms"]),
    "queries": twice[1]["queries"].tolist(),
    "targets": twice[1]["targets"].tolist(),
}

tensors = {n: t.requires_grad_() if n.startswith("pred") else t for n, t in tensors.items()}
found["inner"] = []
for given, chosen, answer in oracle.assigner_inputs("rtdetr_loss", tensors, settings):
    bound = oracle.bind("hungarian", given, chosen)
    other = bound.translate(bound())
    layer = [i for i in range(3) if torch.equal(given["pred_boxes"], tensors["pred_bboxes"][i])]
    same = all(torch.equal(other[name], answer[name]) for name in answer)
    found["inner"].append([layer, same, answer["queries"].tolist(), chosen["class_cost"], chosen["sizes"]])

from ultralytics.models.utils.ops import get_cdn_group

found["denoised"] = []
for sizes in json.loads(sys.argv[2]):
    image = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    batch = {"cls": torch.zeros_like(image), "bboxes": torch.rand(len(image), 4), "batch_idx": image}
    meta = get_cdn_group(batch | {"gt_groups": sizes}, 3, 20, torch.rand(3, 8), 5, training=True)[3]
    if meta is not None:
        meta = {n: [i.tolist() if torch.is_tensor(i) else i for i in v] if n != "dn_num_group" else v
                for n, v in meta.items()}
    found["denoised"].append(meta)
print(json.dumps(found))
"""


@pytest.fixture(scope="module", params=[NEW, FORMER])
def in_a_process(request):
    """The release, and what the script prints in a process that holds it."""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", SCRIPT, request.param, json.dumps(GROUPS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    # The last line alone: a traceback quotes upstream's source.
    assert done.returncode == 0, done.stderr.splitlines()[-1]
    return request.param, json.loads(done.stdout.splitlines()[-1])


@pytest.mark.oracle
def test_an_assignment_takes_the_place_of_the_matcher(in_a_process):
    found = in_a_process[1]["assigned"]
    assert found == {
        "its own": True,
        "another": False,
        "repeats": True,
        "queries": [1, 2, 0] * 3,
        "targets": [0, 1, 2] * 3,
    }


@pytest.mark.oracle
def test_what_the_matcher_is_given(in_a_process):
    assert in_a_process[1]["inner"] == [
        [[2], True, [0, 3, 3], 2.0, [2, 1]],
        [[0], True, [0, 3, 3], 2.0, [2, 1]],
        [[1], True, [1, 2, 1], 2.0, [2, 1]],
    ]


@pytest.mark.oracle
def test_denoising_indices_are_those_of_upstream(in_a_process):
    spec, found = in_a_process
    era = {} if spec == NEW else {"layout": "halves", "cap": False}
    for sizes, theirs in zip(GROUPS, found["denoised"], strict=True):
        ours = denoising_indices(sizes, 20, 5, **era)
        if theirs is None:
            assert ours is None
            continue
        assert [some.tolist() for some in ours.dn_pos_idx] == theirs["dn_pos_idx"]
        assert (ours.dn_num_group, ours.dn_num_split) == (theirs["dn_num_group"], theirs["dn_num_split"])
        if spec == FORMER:
            assert "dn_gt_idx" not in theirs
        elif max(sizes) <= 5:
            assert [some.tolist() for some in ours.dn_gt_idx] == theirs["dn_gt_idx"]
        else:  # which ground truths a crowded image keeps is random
            assert [len(some) for some in ours.dn_gt_idx] == [len(some) for some in theirs["dn_gt_idx"]]
