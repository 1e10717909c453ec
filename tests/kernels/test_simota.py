"""SimOTA's kernels against the torch path. Decisions are asked to be equal, and overlaps to the bit.

On a GPU logarithms round otherwise than here, so that a near tie may fall otherwise; the harness judges those by
margins.
"""

from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cases.pinned import pinned
from cases.simota import cases
from cleanroom.assign._simota_cost import Rules, anchor_grid
from cleanroom.assign._simota_static import match_static
from cleanroom.assign.simota import SimOTAAssigner, simota_assign
from cleanroom.kernels import runtime, simota
from tests.cleanroom.test_simota import CENTRE, UNION, conflict_scene, pairs, random_scene, worked_scene
from tests.kernels.conftest import DEVICE, programs_reordered

CHEAP = UNION | {"penalty": 3.0}  # penalised pairs compete with free ones
SETTINGS = {"union": UNION, "centre": CENTRE, "cheap": CHEAP}
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ROOT = Path(__file__).parents[2]
# The interpreter's own arithmetic on the edge cases; the torch path has the same infinities and says nothing.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|divide by zero):RuntimeWarning")


def arguments(scene, rules=UNION):
    """Arguments of match_static and match_triton, on the device under test."""
    scene = {name: value.to(DEVICE) for name, value in scene.items()}
    real = torch.arange(scene["gt_boxes"].shape[1], device=DEVICE) < scene["num_gt"][:, None]
    labels = torch.where(real, scene["gt_classes"], 0).long()
    grid = anchor_grid(scene["strides"], scene["x_shifts"], scene["y_shifts"])
    truths = scene["gt_boxes"], scene["gt_classes"], labels, real
    return [*truths, scene["pred_boxes"], scene["cls_logits"], scene["obj_logits"], grid, Rules(**rules)]


def match(given, module=simota):
    return module.match_triton(*given)


def differences(got, want):
    """What differs, in words; nothing where all does agree."""
    names = ("owner", "class", "overlap")
    found = [
        f"{name}: {int((a != b).sum())} of {b.numel()}"
        for name, a, b in zip(names, got, want, strict=True)
        if a.dtype != b.dtype or not torch.equal(a, b)
    ]
    return "; ".join(found)


def small_scene(seed, **changes):
    """An empty image between two others: 84 anchors of three levels."""
    return random_scene(seed, **{"counts": (2, 0, 5), "size": 64} | changes)


def crowded():
    """One image with every kind of decision: conflicts, ties, penalised pairs and boxes without a free pair."""
    scene = small_scene(2, counts=(9,))
    scene["gt_boxes"][0, 3] = scene["gt_boxes"][0, 1]  # a tie in every column
    scene["gt_classes"][0, 3] = scene["gt_classes"][0, 1]
    scene["gt_boxes"][0, 4] = torch.tensor([300.0, 300, 20, 20])  # outside: ties in its row
    return scene


# --- Against the torch path ----------------------------------------------------------------------------------------


def _quick(case):
    """Few enough programs for the interpreter."""
    return "small" in case.tags and case.tensors["num_gt"].sum() <= 10


@settings(max_examples=6, derandomize=True, deadline=None, suppress_health_check=list(HealthCheck))
@given(cases(dtypes=("float32", "float16", "bfloat16")).filter(_quick), st.sampled_from(sorted(SETTINGS)))
def test_drawn_scenes(case, name):
    scene = {key: value.to(DEVICE) for key, value in case.tensors.items()}
    asked = {**scene, **case.settings, **SETTINGS[name]}
    try:
        want = simota_assign(**asked, path="static")
    except IndexError:  # a label that is no class
        with pytest.raises(IndexError, match="gt_classes"):
            simota_assign(**asked, path="triton")
        return
    got = simota_assign(**asked, path="triton")
    assert not differences(got[1:4], want[1:4])
    assert torch.equal(got.fg_mask, want.fg_mask)
    assert torch.equal(got.num_fg, want.num_fg)


@pytest.mark.parametrize("case", pinned("simota"), ids=lambda case: case.origin)
def test_pinned_scenes(case):
    scene = {name: value.to(DEVICE) for name, value in case.tensors.items()}
    got, want = (simota_assign(**scene, **case.settings, path=path) for path in ("triton", "static"))
    assert not differences(got[1:4], want[1:4])


@pytest.mark.parametrize("rules", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_random_scenes(dtype, rules):
    given = arguments(small_scene(1, dtype=dtype), rules)
    assert not differences(match(given), match_static(*given))


def test_worked_example():
    result = simota_assign(**{k: v.to(DEVICE) for k, v in worked_scene().items()}, num_classes=2, path="triton")
    assert pairs(result) == {5: 0, 19: 1}
    assert result.matched_iou[0, [5, 19]].tolist() == pytest.approx([0.168707, 0.652423], abs=1e-6)


def spoilt(name, image, at, value, *truths):
    scene = worked_scene(*truths)
    scene[name][image, at] = value
    return scene


def twins(number):
    """The same box of the same class many times."""
    scene = conflict_scene({44: 0.9}, [(40.0, 40, 40, 40)] * number)
    return scene | {"gt_classes": torch.zeros(1, number)}


def cancelling():
    """Ten of twenty free pairs, whose costs differ by a thirtieth of the float32 unit of their class sums."""
    scene = worked_scene([(16.0, 16, 32, 32)], [0])
    scene["cls_logits"] = torch.full((1, 20, 80), -14.0)
    scene["cls_logits"][0, :, 0] = 15
    scene["cls_logits"][0, :, 1] = -8 - torch.arange(20) * 3e-6
    scene["obj_logits"][:] = 12.0
    scene["pred_boxes"][:] = torch.tensor([16.0, 16, 32, 32])
    return scene


EDGES = {
    "crowded": crowded,
    "no-row-is-real": lambda: small_scene(0, counts=(0, 0)),
    "one-anchor": lambda: {k: v[:, -1:] if v.shape[1:2] == (84,) else v for k, v in small_scene(3).items()},
    "one-class": lambda: small_scene(4, classes=1),
    "far-outside": lambda: worked_scene([(-900.0, -900, 8, 8)], [0]),
    "some-outside": lambda: worked_scene([(10.0, 12, 14, 16), (300.0, 300, 10, 10)], [1, 0]),
    "more-boxes-than-anchors": lambda: worked_scene([(10.0 + g % 7, 12, 14, 16) for g in range(24)], [0, 1] * 12),
    "exact-ties-of-many": lambda: twins(12),
    "cancelling": cancelling,
    "ten-of-which-none-is-free": lambda: spoilt(
        "pred_boxes", 0, slice(None), torch.tensor([16.0, 16, 4, 4]), [(16.0, 16, 4, 4), (16.0, 16, 32, 32)], [1, 0]
    ),
    "k-beyond-the-candidates": lambda: conflict_scene(dict.fromkeys(range(100), 1.0), [(1.0, 1, 4, 4)] * 2),
    "zero-area": lambda: worked_scene([(12.0, 12, 0, 0), (12, 12, 30, 0)], [1, 0]),
    "zero-area-on-zero-area": lambda: spoilt("pred_boxes", 0, 5, torch.zeros(4)),
    "inverted": lambda: worked_scene([(12.0, 12, -8, 10)], [1]),
    "nan-box": lambda: spoilt("gt_boxes", 0, 0, torch.tensor([12, 12, torch.nan, 9])),
    "nan-centre": lambda: spoilt("pred_boxes", 0, 5, torch.tensor([torch.nan, 12, 9, 9])),
    "infinite-centre": lambda: spoilt("pred_boxes", 0, slice(4, 12), torch.tensor([torch.inf, 12, 9, 9])),
    "infinite-below-of-all": lambda: spoilt("pred_boxes", 0, slice(None), torch.tensor([12, -torch.inf, 9, torch.inf])),
    "infinite-width": lambda: spoilt("pred_boxes", 0, 5, torch.tensor([12, 12, torch.inf, 9])),
    "infinite-width-of-all": lambda: spoilt("pred_boxes", 0, slice(None), torch.tensor([12, 12, torch.inf, 0])),
    "nan-class-logit": lambda: spoilt("cls_logits", 0, 5, torch.tensor([torch.nan, 1])),
    "nan-objectness": lambda: spoilt("obj_logits", 0, 5, torch.nan),
    "nan-everywhere": lambda: spoilt("cls_logits", 0, slice(None), torch.nan),
    "saturated": lambda: spoilt("cls_logits", 0, slice(None, None, 2), torch.inf),
    "saturated-low": lambda: spoilt("obj_logits", 0, slice(None, None, 2), -torch.inf),
    "fractional-class": lambda: worked_scene(classes=(1.0, 0.9)),
}


@pytest.mark.parametrize("build", EDGES.values(), ids=EDGES)
def test_edges(build):
    given = arguments(build())
    assert not differences(match(given), match_static(*given))


def test_kinds_of_labels_and_boxes():
    scene = worked_scene()
    for classes, boxes in ((torch.int32, torch.int64), (torch.uint8, torch.float16), (torch.bfloat16, torch.float32)):
        given = arguments(
            scene | {"gt_classes": scene["gt_classes"].to(classes), "gt_boxes": scene["gt_boxes"].to(boxes)}
        )
        assert not differences(match(given), match_static(*given))


@pytest.mark.parametrize("shape", [(0, 3, 84), (3, 0, 84)])
def test_nothing_to_match(shape):
    images, boxes, anchors = shape
    given = arguments(small_scene(0))
    given = [value[:images] if isinstance(value, torch.Tensor) else value for value in given]
    given[:4] = [value[:, :boxes] for value in given[:4]]
    owner, classes, iou = match(given)
    assert owner.shape == classes.shape == iou.shape == (images, anchors)
    assert (owner == -1).all()
    assert not classes.any()
    assert not iou.any()


@pytest.mark.parametrize("label", [-1, 2**40])
def test_label_that_is_no_class_is_told(label):
    """No element is read for it: the scene's other image keeps its result."""
    given = arguments(small_scene(1))
    want = match_static(*given)
    given[2][0, 1] = label
    if DEVICE.type == "cpu":
        with pytest.raises(RuntimeError, match=r"gt_classes must lie in \[0, 5\)"):
            match(given)
    got = simota._match(*given[:5], [given[5].mT], given[6], *given[7], *given[8])
    assert not got[3]
    assert torch.equal(got[0][2], want[0][2])


# --- Blocks, layouts, memory ---------------------------------------------------------------------------------------


def with_blocks(monkeypatch, anchors, classes, rows):
    blocks = {"CLASS_ANCHORS": anchors, "CLAIM_ANCHORS": anchors, "RESOLVE_ANCHORS": anchors}
    blocks |= {"CLASS_CLASSES": classes, "CLASS_ROWS": rows, "RESOLVE_ROWS": rows}
    for name, size in blocks.items():
        monkeypatch.setattr(simota, name, size)


@pytest.mark.parametrize("blocks", [(16, 2, 2), (64, 4, 8), (128, 16, 32)], ids=["smaller", "equal", "larger"])
def test_blocks(blocks, monkeypatch, poisoned):
    scene = small_scene(5, counts=(6, 8), classes=4)  # 8 rows
    scene = {k: v[:, :64] if v.shape[1:2] == (84,) else v[:, :8] if k.startswith("gt") else v for k, v in scene.items()}
    with_blocks(monkeypatch, *blocks)
    given = arguments(scene)
    assert not differences(match(given), match_static(*given))


def scattered(value):
    """The same elements amid others that must not be read: NaN, or the largest number."""
    if not isinstance(value, torch.Tensor):
        return value
    if value.is_floating_point():
        worst = torch.nan
    else:
        worst = True if value.dtype == torch.bool else torch.iinfo(value.dtype).max
    around = torch.full([2 * size + 3 for size in value.shape], worst, dtype=value.dtype, device=value.device)
    inner = around[tuple(slice(2, 2 + 2 * size, 2) for size in value.shape)]
    return inner.copy_(value)


def levels_of(rows):
    """Rows (B, 84, C) as the channels of three levels, each inside a head's raw map."""
    parts = rows.split([64, 16, 4], 1)
    return [scattered(part.mT) for part in parts]


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(dtype, poisoned):
    given = arguments(crowded() | {k: v.to(dtype) for k, v in crowded().items() if k.endswith(("boxes", "logits"))})
    want = match_static(*given)
    logits = given[5]
    given = [scattered(value) for value in given[:7]] + [type(given[7])(*map(scattered, given[7])), given[8]]
    for layout in (given[5], logits.mT.contiguous().mT, levels_of(logits), [logits.mT[..., :80], logits.mT[..., 80:]]):
        given[5] = layout
        assert not differences(match(given), want)
    given[5] = list(logits.mT.split(20, 2))  # more levels than are read where they lie
    assert len(given[5]) > simota.LEVELS
    assert not differences(match(given), want)
    given[5] = [*given[5][:3], logits.mT[..., 60:]]
    assert not differences(match(given), want)


def test_padding_is_not_read(poisoned):
    given = arguments(small_scene(6))
    want = match(given)
    boxes, classes, labels, real = given[:4]
    given[:4] = boxes.where(real[..., None], torch.nan), classes.where(real, torch.nan), labels.where(real, 2**50), real
    assert not differences(match(given), want)


def test_repeats_bitwise(poisoned):
    given = arguments(crowded())
    assert not differences(match(given), match(given))


def test_any_order_of_programs(reordered, poisoned):
    given = arguments(crowded())
    assert not differences(match(given), match_static(*given))


class Allocated(TorchDispatchMode):
    """Sizes of all results that are no view of an argument."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given, made = ([v for v in tree_leaves(tree) if isinstance(v, torch.Tensor)] for tree in (args, result))
        known = {value.untyped_storage().data_ptr() for value in given}
        self.sizes += [value.numel() for value in made if value.untyped_storage().data_ptr() not in known]
        return result


@pytest.mark.parametrize("layout", [lambda rows: rows, levels_of], ids=["rows", "levels"])
def test_nothing_of_boxes_by_anchors_or_anchors_by_classes(layout, allocations):
    scene = {k: v.to(DEVICE) for k, v in small_scene(7, counts=(5, 9)).items()}
    scene["cls_logits"] = layout(scene["cls_logits"])
    with Allocated() as seen:
        simota_assign(**scene, num_classes=5, path="triton")
    assert set(allocations) == {(2, 84), ()}
    assert max(seen.sizes) == 2 * 84


# --- As an operator ------------------------------------------------------------------------------------------------


def test_compiles_into_one_graph():
    scene = {k: v.to(DEVICE) for k, v in small_scene(8, counts=(3, 1)).items()}
    compiled = torch.compile(simota_assign, fullgraph=True, backend="aot_eager")
    want = simota_assign(**scene, num_classes=5, path="static")
    assert not differences(compiled(**scene, num_classes=5, path="triton")[1:4], want[1:4])


def test_traces_without_values():
    device = "cuda" if torch.backends.cuda.is_built() else "cpu"  # fake CUDA tensors need the real build
    with FakeTensorMode():
        scene = {name: torch.empty_like(value, device=device) for name, value in small_scene(0).items()}
        result = simota_assign(**scene, num_classes=5, path="triton")
    assert result.matched_gt.shape == (3, 84)
    assert result.matched_iou.device.type == device


def test_operator_is_what_it_says():
    given = arguments(small_scene(1, counts=(2,)))
    given = *given[:5], [given[5].mT], given[6], *given[7], *given[8]
    torch.library.opcheck(torch.ops.cleanroom.simota_match.default, given)


def test_class_equals_function():
    scene = {k: v.to(DEVICE) for k, v in worked_scene().items()}
    assigner = SimOTAAssigner(2, path="triton")
    classes, mask, _, gt, foreground = assigner(
        0, 2, 20, scene["gt_boxes"][0], scene["gt_classes"][0], scene["pred_boxes"][0],
        scene["strides"], scene["x_shifts"], scene["y_shifts"], scene["cls_logits"], None, scene["obj_logits"],
    )  # fmt: skip
    assert mask.nonzero().flatten().tolist() == [5, 19]
    assert (classes.tolist(), gt.tolist(), foreground) == ([1, 0], [0, 1], 2)


# --- Planted faults ------------------------------------------------------------------------------------------------

CLAIM = 'tl.atomic_add(claims + image * anchors + claimed, word, mask=chosen, sem="relaxed")'
NO_CLAIMS = "tl.store(claims + image * anchors + anchor, tl.zeros((ANCHORS,), tl.int64), mask=there)"
WRITE_OVERLAP = "iou.to(matched_iou.dtype.element_ty), mask="
SUM = "-tl.sum(log_absent, 1)"
FAULTS = {
    "last anchor of a level not summed": [("there = anchor < end\n", "there = anchor < end - 1\n")],
    "last anchor not scanned": [
        ("there = anchor < anchors\n        # All", "there = anchor < anchors - 1\n        # All")
    ],
    "one class too many": [("(entry < classes)", "(entry <= classes)")],
    "last rows not near": [("row < boxes, other=0) != 0\n        if", "row < boxes - 3, other=0) != 0\n        if")],
    "equal costs by highest anchor": [
        ("index.to(tl.uint64)", "(0xFFFF - index).to(tl.uint64)"),
        ("(costs & _LOW_WORD).to(tl.int64)", "0xFFFF - (costs & _LOW_WORD).to(tl.int64)"),
        ("(cheapest & _LOW_WORD).to(tl.int32)", "0xFFFF - (cheapest & _LOW_WORD).to(tl.int32)"),
    ],
    "equal costs by highest row": [
        ("wanted, row[:, None])", "wanted, 0xFFFF - row[:, None])"),
        ("(cheapest & _LOW_WORD).to(tl.int32)", "0xFFFF - (cheapest & _LOW_WORD).to(tl.int32)"),
    ],
    "claims not zeroed": [(NO_CLAIMS, "pass")],
    "background overlaps not written": [(f"{WRITE_OVERLAP}there", f"{WRITE_OVERLAP}owned")],
    "lost atomic": [(CLAIM, "tl.store(claims + image * anchors + claimed, word, mask=chosen)")],
    "one claimant keeps it": [("word >= 2 * _ONE_CLAIM", "word >= 3 * _ONE_CLAIM")],
    "penalised pairs forgotten": [("if tl.max(costs) >= least_penalised:", "if tl.max(costs) < 0:")],
    "penalty taken to decide": [("+ penalty - _SLACK", "+ 1e30")],
    "nine overlaps count": [("tl.static_range(_TEN)", "tl.static_range(_TEN - 1)")],
    "class sums in float32": [(SUM, f"{SUM}.to(tl.float32).to(tl.float64)")],
}


def run(module, given):
    """Rows, classes and overlaps of a module's own launches, without the assertion."""
    return module._match(*given[:5], [given[5].mT], given[6], *given[7], *given[8])[:3]


@cache
def fault_scenes():
    """Scenes among which each of the faults shows, amid what must not be read; and what is right."""
    scenes = [
        arguments(crowded()),
        arguments(cancelling()),
        arguments(small_scene(5, counts=(3, 5), classes=4), CHEAP),
        arguments(twins(2)),
    ]
    return [([*map(scattered, scene[:7]), *scene[7:]], match_static(*scene)) for scene in scenes]


@pytest.mark.parametrize("name", ["none", *FAULTS])
def test_planted_fault_shows(name, planted, poisoned):
    module = planted(simota, *FAULTS.get(name, []))
    shown = any(differences(run(module, given), want) for given, want in fault_scenes())
    assert shown == (name != "none")


@pytest.mark.skipif(not runtime.INTERPRETED, reason="the device itself decides on the order of programs")
def test_lost_atomic_depends_on_the_order_of_programs(planted):
    """That another order shows claims that overwrite each other, so that `reordered` means something."""
    given = arguments(twins(2))
    for module, depends in ((simota, False), (planted(simota, *FAULTS["lost atomic"]), True)):
        forwards = run(module, given)
        with programs_reordered(lambda natural: natural[::-1]):
            backwards = run(module, given)
        assert bool(differences(backwards, forwards)) == depends


# --- The compiler --------------------------------------------------------------------------------------------------


def launches():
    """Every variant of every kernel once; see tests/kernels/compiling.py."""
    variants = (
        (torch.float32, torch.float32, "union", 1),
        (torch.bfloat16, torch.int64, "centre", simota.LEVELS),
    )
    for dtype, classes, region, levels in variants:
        simota._match(
            torch.zeros(2, 3, 4, dtype=dtype), torch.zeros(2, 3, dtype=classes), torch.zeros(2, 3).long(),
            torch.ones(2, 3).bool(), torch.zeros(2, 40, 4, dtype=dtype),
            [torch.zeros(2, 8, 40 // levels, dtype=dtype)] * levels, torch.zeros(2, 40, 1, dtype=dtype),
            torch.zeros(40), torch.zeros(40), torch.ones(40), 2.5, 1e5, region,
        )  # fmt: skip
