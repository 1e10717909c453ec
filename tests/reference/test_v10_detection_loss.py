"""The adapter of the end-to-end criteria, against the worked examples of yolo_losses.md, section 4."""

import pytest
import torch

from cases.v10_detection_loss import example

CURRENT, OLD = "ultralytics==8.4.190", "ultralytics==8.1.47"
LEAVES = ("o2m_boxes", "o2m_scores", "o2o_boxes", "o2o_scores")
UNWEIGHTED = (0.316691, 3.22356, 0.340119, 7.11918)


def ask(oracle, spec, given, *assignment):
    tensors, settings = given
    leaves = {name: tensors[name].clone().requires_grad_() for name in LEAVES}
    return oracle(spec).bind("v10_detection_loss", tensors | leaves, settings, *assignment)


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("spec", "form", "changes", "total", "items", "gradients"),
    [
        (CURRENT, "ultralytics", {}, 295.0304, (8.806814, 132.9123, 5.796085), UNWEIGHTED),
        *(
            (spec, "original", {}, 295.0305, (6.346406, 42.02716, 4.206256, 2.460407, 90.88515, 1.589829), UNWEIGHTED)
            for spec in (CURRENT, OLD)
        ),
        (CURRENT, "e2e", {}, 122.1019, (2.460407, 90.88515, 1.589829), (0.253352, 2.57885, 0.0680237, 1.42384)),
        (CURRENT, "e2e", {"updates": 1, "epochs": 10}, 128.6906, (2.460407, 90.88515, 1.589829), None),
    ],
)
def test_worked_example(oracle, spec, form, changes, total, items, gradients):
    answer = ask(oracle, spec, example(form, **changes))
    found = answer["outputs"]
    assert found["total"].item() == pytest.approx(total, rel=1e-6)
    assert found["items"].tolist() == pytest.approx(items, rel=1e-6)
    assert found["fg_mask"].shape == found["target_gt_idx"].shape == (2, 2, 126)
    assert found["fg_mask"][0].sum(1).tolist() == [20, 10]
    if gradients:
        norms = [gradient.norm().item() for gradient in answer["gradients"].values()]
        assert norms == pytest.approx(gradients, rel=1e-5)


@pytest.mark.oracle
@pytest.mark.parametrize("form", ["ultralytics", "e2e"])
def test_forms_that_came_later_are_refused(oracle, form):
    with pytest.raises(RuntimeError, match=f"RequestError: .* no form '{form}'"):
        ask(oracle, OLD, example(form))


@pytest.mark.oracle
@pytest.mark.parametrize(
    ("spec", "form"), [(CURRENT, "ultralytics"), (CURRENT, "original"), (CURRENT, "e2e"), (OLD, "original")]
)
def test_both_assigners(oracle, spec, form):
    given = example(form)
    free = ask(oracle, spec, given)
    many, one = oracle(spec).assigner_inputs("v10_detection_loss", *given)
    second = (7, 1) if form == "e2e" else (1, None)
    assert [(settings["topk"], settings["topk2"]) for _, settings, _ in (many, one)] == [(10, None), second]
    for index, (_, _, answer) in enumerate((many, one)):
        assert torch.equal(answer["fg_mask"], free["outputs"]["fg_mask"][index])
    assignment = {name: free["outputs"][name].clone() for name in ("fg_mask", "target_gt_idx")}
    same = ask(oracle, spec, given, assignment)
    assert same["outputs"]["total"].item() == pytest.approx(free["outputs"]["total"].item(), rel=1e-6)
    for value in assignment.values():
        value[1] = 0
    other = ask(oracle, spec, given, assignment)
    assert other["gradients"]["o2m_boxes"].any()
    assert not other["gradients"]["o2o_boxes"].any()
