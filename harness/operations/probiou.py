"""`probiou`: similarity of rotated boxes as Gaussians, paired and pairwise."""

from __future__ import annotations

from typing import Any

from cases.case import Case
from cleanroom.boxes import batch_probiou, probiou
from harness.operation import Input, Operation, Output, Setting, Tensors, Upstream, release
from harness.relations import reasons
from harness.relations.declaration import Axis, Relations, Scale
from harness.relations.quantities import largest_with_itself
from harness.relations.reasons import exempt

FLOOR_SINCE = (8, 4, 84)
EPS = 1e-7
LARGEST_SIDE = 100


def _options(version: str) -> dict[str, Any]:
    return {"floor": release(version) >= FLOOR_SINCE}


def _torch(*, pairwise: bool, eps: float, **given: Any) -> Tensors:
    if pairwise:
        return {"similarity": batch_probiou(given["obb1"], given["obb2"], eps)}
    return {"similarity": probiou(eps=eps, **given)}


def _proper(case: Case) -> bool:
    """Sides beside which an epsilon vanishes, and which no determinant loses."""
    if case.settings["floor"] or case.settings["eps"] > EPS:
        return False
    sides = [case.tensors[name][:, 2:4].abs() for name in ("obb1", "obb2")]
    return all(bool(((side >= 1) & (side < LARGEST_SIDE)).all()) for side in sides)


def _smooth(case: Case) -> bool:
    """Complete IoU holds the weight of its aspect term fixed."""
    return not case.settings["CIoU"] and _proper(case)


def _in_rows(case: Case) -> bool:
    """As many rows on both sides, each pair its own."""
    one, two = (case.tensors[name] for name in ("obb1", "obb2"))
    return not case.settings["pairwise"] and one.shape == two.shape


OPERATION = Operation(
    name="probiou",
    summary="Probabilistic IoU of rotated boxes: 1 minus the Hellinger distance of their Gaussians",
    source="spec/boxes.md sections 11 and 12; Llerena et al., arXiv:2106.06072",
    inputs=(
        Input("obb1", "(N, 5)", "floating", "centre, width, height and angle in radians"),
        Input("obb2", "(N, 5) or (M, 5)", "floating", "boxes, as many or one; pairwise: any number"),
    ),
    settings=(
        Setting("pairwise", False, "every box with every other: (N, M)"),
        Setting("CIoU", False, "less the aspect term of complete IoU"),
        Setting("floor", 0.0, "added to both variances of both boxes; 0.01 in the box loss"),
        Setting("eps", 1e-7, "added to denominators"),
    ),
    outputs=(Output("similarity", "(N, 1) or (N, M)", "promoted", "similarity of each pair"),),
    upstreams={"ultralytics": Upstream(options=_options)},
    candidates={"torch": _torch},
    predictions=("obb1", "obb2"),
    gradients=("obb1", "obb2"),
    workloads=("coco-b1", "coco-b16"),
    relations=Relations(
        anchors=Axis({"obb1": 0, "obb2": 0, "similarity": 0}),
        scale=Scale({"obb1": slice(0, 4), "obb2": slice(0, 4)}, fits=_proper, exact=False),
        smooth=_smooth,
        gradcheck=("obb1", "obb2"),
        monotony=largest_with_itself("obb1", "obb2", "similarity"),
        free=("obb1", "obb2"),
        fits=_in_rows,
        exempt=exempt(
            ground_truths=reasons.NO_ROWS,
            levels=reasons.NO_LEVELS,
            classes=reasons.NO_CLASSES,
            padding=reasons.NO_PADDING,
            leak=reasons.DIFFERENTIABLE,
            optimality=reasons.NOTHING_MATCHED,
            images=reasons.NO_IMAGES,
        ),
    ),
)
