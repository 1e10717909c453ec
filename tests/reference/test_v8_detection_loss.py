"""The adapter of the detection criterion, against the worked example of yolo_losses.md, section 3."""

import pytest
import torch

from cases.v8_detection_loss import example

BOTH = ["ultralytics==8.4.190", "ultralytics==8.1.47"]
CURRENT, OLD = BOTH
EACH = pytest.mark.parametrize("spec", BOTH)


def ask(oracle, spec, given, assignment=()):
    tensors, settings = given
    leaves = {name: tensors[name].clone().requires_grad_() for name in ("boxes", "scores")}
    return oracle(spec).bind("v8_detection_loss", tensors | leaves, settings, *assignment)


def norms(answer):
    return [gradient.double().norm().item() for gradient in answer["gradients"].values()]


@pytest.mark.oracle
@EACH
def test_worked_example(oracle, spec):
    answer = ask(oracle, spec, example())
    found = answer["outputs"]
    assert found["total"].item() == pytest.approx(12.69281 + 84.05433 + 8.412513, rel=1e-6)
    assert found["items"].tolist() == pytest.approx([6.346406, 42.02716, 4.206256], rel=1e-6)
    assert found["fg_mask"].sum(1).tolist() == [20, 10]
    assert norms(answer) == pytest.approx([0.316691, 3.22356], rel=1e-5)
    assert all(torch.equal(tensor, answer["tensors"][name]) for name, tensor in example()[0].items())


@pytest.mark.oracle
@EACH
def test_one_bin(oracle, spec):
    """Until 8.3.253 there was no third term."""
    answer = ask(oracle, spec, example(1))
    last = 0.09702775 if spec == CURRENT else 0
    assert answer["outputs"]["items"].tolist() == pytest.approx([2.995536, 19.24930, last], rel=1e-6)
    assert norms(answer)[0] == pytest.approx(1.85525 if spec == CURRENT else 1.79423, rel=1e-5)


@pytest.mark.oracle
@EACH
def test_float64_targets_are_float32_for_upstream(oracle, spec):
    tensors, settings = example()
    wide = {name: tensor.double() for name, tensor in tensors.items()}
    answer = ask(oracle, spec, (wide, settings))
    assert answer["outputs"]["items"].tolist() == pytest.approx([6.346406, 42.027185, 4.206257], rel=1e-6)
    assert [gradient.dtype for gradient in answer["gradients"].values()] == [torch.float64] * 2


@pytest.mark.oracle
@EACH
def test_without_ground_truth(oracle, spec):
    tensors, settings = example()
    answer = ask(oracle, spec, (tensors | {n: tensors[n][:0] for n in ("batch_idx", "cls", "bboxes")}, settings))
    found = answer["outputs"]
    assert found["total"].item() == pytest.approx(181.4841, rel=1e-6)
    assert found["fg_mask"].dtype == torch.bool
    assert not found["fg_mask"].any()
    assert found["target_gt_idx"].dtype == torch.int64
    assert norms(answer)[0] == 0


@pytest.mark.oracle
@EACH
@pytest.mark.parametrize("gain", ["box", "cls", "dfl"])
def test_gains_arrive(oracle, spec, gain):
    tensors, settings = example()
    alone = dict.fromkeys(("box", "cls", "dfl"), 0.0) | {gain: 1.0}
    items = ask(oracle, spec, (tensors, settings | {"gains": alone}))["outputs"]["items"]
    assert [value != 0 for value in items.tolist()] == [name == gain for name in alone]


@pytest.mark.oracle
@EACH
def test_topk_arrives(oracle, spec):
    tensors, settings = example()
    found = ask(oracle, spec, (tensors, settings | {"topk": 1}))["outputs"]
    assert found["total"].item() == pytest.approx(5.078484 + 181.8618 + 3.505775, rel=1e-6)


@pytest.mark.oracle
def test_later_settings_arrive(oracle):
    tensors, settings = example()
    kept = ask(oracle, CURRENT, (tensors, settings | {"topk": 7, "topk2": 1}))["outputs"]["items"]
    assert (kept * 2).tolist() == pytest.approx([5.078484, 181.8618, 3.505775], rel=1e-6)
    weighted = ask(oracle, CURRENT, (tensors, settings | {"class_weights": [0.5, 1, 2]}))
    assert weighted["outputs"]["items"][1].item() * 2 == pytest.approx(98.01527, rel=1e-6)
    assert norms(weighted)[1] == pytest.approx(4.27717, rel=1e-5)


@pytest.mark.oracle
@pytest.mark.parametrize("changes", [{"topk2": 1}, {"class_weights": [1.0, 1.0, 1.0]}])
def test_later_settings_are_refused_before(oracle, changes):
    tensors, settings = example()
    with pytest.raises(RuntimeError, match="RequestError"):
        ask(oracle, OLD, (tensors, settings | changes))


@pytest.mark.oracle
@EACH
def test_a_given_assignment_is_answered(oracle, spec):
    given = example()
    free = ask(oracle, spec, given)
    same = ask(oracle, spec, given, [{name: free["outputs"][name] for name in ("fg_mask", "target_gt_idx")}])
    assert same["outputs"]["items"].tolist() == pytest.approx(free["outputs"]["items"].tolist(), rel=1e-6)
    assert norms(same) == pytest.approx(norms(free), rel=1e-6)
    fewer = free["outputs"]["fg_mask"].clone()
    fewer[0] = False
    index = free["outputs"]["target_gt_idx"] * fewer
    other = ask(oracle, spec, given, [{"fg_mask": fewer, "target_gt_idx": index}])
    assert torch.equal(other["outputs"]["fg_mask"], fewer)
    assert not other["gradients"]["boxes"][0].any()
    assert other["gradients"]["boxes"][1].any()


@pytest.mark.oracle
@EACH
def test_what_the_assigner_is_asked(oracle, spec):
    tensors, settings = example()
    asked, chosen, answer = oracle(spec).assigner_inputs("v8_detection_loss", tensors, settings | {"topk": 3})
    assert (chosen["topk"], chosen["topk2"], chosen["alpha"], chosen["beta"]) == (3, None, 0.5, 6.0)
    torch.testing.assert_close(asked["pd_scores"], tensors["scores"].sigmoid().mT)
    assert asked["anc_points"][[0, 125]].tolist() == [[4, 4], [80, 48]]
    # (0.5, 0.5, 0.6, 0.7) of 96 x 64 pixels; the image has one row less than the other.
    assert asked["gt_bboxes"][1].flatten().tolist() == pytest.approx([19.2, 9.6, 76.8, 54.4, 0, 0, 0, 0], rel=1e-6)
    assert asked["mask_gt"].flatten().tolist() == [1, 1, 1, 0]
    total = ask(oracle, spec, (tensors, settings | {"topk": 3}))["outputs"]
    assert all(torch.equal(answer[name], total[name]) for name in ("fg_mask", "target_gt_idx"))
    assert torch.equal(answer["target_scores"].sum(-1) > 0, answer["fg_mask"])


@pytest.mark.oracle
@EACH
def test_foreground_without_a_score_is_background(oracle, spec):
    """Boxes off the image take whichever anchors come first among metrics of 0; boxes like these have no score."""
    tensors, settings = example()
    tensors["bboxes"][:, 2:] = 0.0
    found = ask(oracle, spec, (tensors, settings))["outputs"]
    assert not found["fg_mask"].any()
    assert not found["target_gt_idx"].any()
