"""SimOTA, the label assigner of YOLOX (Ge et al., "YOLOX: Exceeding YOLO Series in 2021", arXiv:2107.08430).

An anchor is a candidate of its image when its centre is near to any ground truth. Each ground truth takes the
k candidates of lowest cost, k being the truncated sum of its ten largest overlaps; an anchor taken more than once
goes to the ground truth that has the lowest cost there. Upstream builds ground truths x candidates x classes; here
the class cost of a pair is a sum over classes made once an anchor, with one entry exchanged.

Three paths give the same answer, but for the rounding of logarithms. On the CPU costs are computed only where they
can decide ("sparse"); on CUDA three kernels do it ("triton", `cleanroom.kernels.simota`); elsewhere, and on the CPU for
anchors that are not ordered by level, row and column, the batch runs with fixed shapes and no host synchronisation
("static").

Known divergences from yolox 0.3.0: an image without any candidate is all background (upstream raises); two boxes
without area overlap by 0 (upstream: NaN); a pair whose cost is NaN, from a box or a logit, is never chosen and its
overlap counts as 0 towards k (upstream raises on logits, and a NaN box sets every k to 1); overlaps are clamped to
[0, 1]; half-precision inputs are computed in float32; equal costs are taken by lowest anchor index.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cleanroom.assign._simota_cost import Rules, anchor_grid
from cleanroom.assign._simota_levels import find_levels
from cleanroom.assign._simota_logits import as_rows
from cleanroom.assign._simota_sparse import match_sparse
from cleanroom.assign._simota_static import match_static
from cleanroom.kernels import runtime
from cleanroom.paths import choose_path, data_dependent

if runtime.AVAILABLE:
    from cleanroom.kernels.simota import match_triton

REGIONS = ("union", "centre")


class SimOTAResult(NamedTuple):
    """The assignment of a batch; every tensor is (B, N) except the last, and background is -1 or 0."""

    fg_mask: Tensor
    """bool, the foreground anchors."""
    matched_gt: Tensor
    """int64, row of the ground truth, -1 on background."""
    matched_classes: Tensor
    """Class of the ground truth in the dtype of gt_classes, not truncated, 0 on background."""
    matched_iou: Tensor
    """Overlap with the ground truth in the promoted dtype of gt_boxes and pred_boxes, 0 on background."""
    num_fg: Tensor
    """(B,) int64, the number of foreground anchors."""


@torch.no_grad()
def simota_assign(
    gt_boxes: Tensor,
    gt_classes: Tensor,
    num_gt: Tensor,
    pred_boxes: Tensor,
    cls_logits: Tensor | Sequence[Tensor],
    obj_logits: Tensor,
    strides: Tensor,
    x_shifts: Tensor,
    y_shifts: Tensor,
    *,
    num_classes: int,
    radius: float = 2.5,
    penalty: float = 1e5,
    region: str = "union",
    path: str = "auto",
) -> SimOTAResult:
    """Assign the ground truths of a batch to anchors.

    Args:
        gt_boxes: (B, M, 4) boxes (cx, cy, w, h) in pixels, any number dtype.
        gt_classes: (B, M) classes, any number dtype; truncated toward zero they lie in [0, C).
        num_gt: (B,) integer; the first num_gt[b] rows of image b are real, the others are ignored.
        pred_boxes: (B, N, 4) decoded boxes (cx, cy, w, h) in pixels, floating.
        cls_logits: (B, N, C) floating; or (B, C, n) of each level, which the sparse path and the kernels read
            where they lie.
        obj_logits: (B, N, 1) floating.
        strides: (1, N) stride of each anchor in pixels.
        x_shifts: (1, N) column of each anchor in its level.
        y_shifts: (1, N) row of each anchor in its level.
        num_classes: C.
        radius: half side of the centre square in strides of the anchor.
        penalty: cost of a candidate that is not free for a ground truth.
        region: "union" (yolox 0.3.0: candidates lie in a box or a centre square, free pairs in both) or "centre"
            (yolox's repository since 2023, with radius 1.5 and penalty 1e6: the centre square alone).
        path: "auto", "sparse", "static" or "triton"; see the module and `choose_path`.

    Raises:
        TypeError: an argument has a dtype of the wrong kind.
        ValueError: a shape, `region` or `path` is wrong; on the CPU also num_gt outside [0, M].
        IndexError: a real class is outside [0, C) (CPU only; elsewhere the device asserts).
        RuntimeError: `path` is "triton" where kernels cannot run.

    Source: specification simota.md, section 4.
    """
    rules = _rules(radius, penalty, region)
    if gt_boxes.ndim != 3:
        raise ValueError(f"gt_boxes must be (B, M, 4), got {list(gt_boxes.shape)}")
    if pred_boxes.ndim != 3 or pred_boxes.shape[1] == 0:
        raise ValueError(f"pred_boxes must be (B, N, 4) with N >= 1, got {list(pred_boxes.shape)}")
    images, boxes, _ = gt_boxes.shape
    anchors = pred_boxes.shape[1]
    _expect("gt_boxes", gt_boxes, (images, boxes, 4))
    _expect("gt_classes", gt_classes, (images, boxes))
    _expect("num_gt", num_gt, (images,))
    _expect("pred_boxes", pred_boxes, (images, anchors, 4), floating=True)
    logits = _expect_logits(cls_logits, images, anchors, num_classes)
    _expect("obj_logits", obj_logits, (images, anchors, 1), floating=True)
    _expect("strides", strides, (1, anchors))
    _expect("x_shifts", x_shifts, (1, anchors))
    _expect("y_shifts", y_shifts, (1, anchors))
    if num_gt.is_floating_point():
        raise TypeError(f"num_gt must be an integer tensor, got {num_gt.dtype}")

    if boxes == 0:  # one padding row, so that gathering has something to read
        gt_boxes, gt_classes = gt_boxes.new_zeros(images, 1, 4), gt_classes.new_zeros(images, 1)
    real = torch.arange(gt_boxes.shape[1], device=num_gt.device) < num_gt[:, None]
    labels = torch.where(real, gt_classes, 0).to(torch.int64)
    tensors = gt_boxes, gt_classes, num_gt, pred_boxes, *logits, obj_logits, strides, x_shifts, y_shifts
    if data_dependent(*tensors):
        _check_values(num_gt, boxes, labels, num_classes)

    grid = anchor_grid(strides, x_shifts, y_shifts)
    truths = gt_boxes, gt_classes, labels, real
    chosen = choose_path(path, *tensors)
    levels = find_levels(grid, x_shifts, y_shifts) if chosen == "sparse" else None
    if levels is not None:
        matched = match_sparse(*truths, pred_boxes, cls_logits, obj_logits, grid, levels, rules)
    elif path == "sparse":
        raise ValueError("path 'sparse' needs anchors ordered by level, row and column: see strides and shifts")
    elif chosen == "triton":
        matched = match_triton(*truths, pred_boxes, cls_logits, obj_logits, grid, rules)
    else:
        matched = match_static(*truths, pred_boxes, as_rows(cls_logits), obj_logits, grid, rules)
    fg_mask = matched[0] >= 0
    return SimOTAResult(fg_mask, *matched, fg_mask.sum(1))


class SimOTAAssigner:
    """SimOTA for one image, with the arguments and the results of yolox 0.3.0's head.

    Drops in as `head.get_assignments = SimOTAAssigner(head.num_classes)`: the head's loss then calls it in place of
    its own method. Settings are those of simota_assign, and so are the results and divergences; the second
    low-memory call of upstream never happens, because memory is bounded.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        radius: float = 2.5,
        penalty: float = 1e5,
        region: str = "union",
        path: str = "auto",
    ) -> None:
        _rules(radius, penalty, region)
        choose_path(path)  # refuses a wrong path here rather than at the first call
        self.num_classes = num_classes
        self.settings = {"radius": radius, "penalty": penalty, "region": region, "path": path}

    @torch.no_grad()
    def __call__(
        self,
        image: int,
        num_gt: int,
        num_anchors: int,
        gt_boxes: Tensor,
        gt_classes: Tensor,
        pred_boxes: Tensor,
        strides: Tensor,
        x_shifts: Tensor,
        y_shifts: Tensor,
        cls_logits: Tensor,
        batch_boxes: Tensor,
        obj_logits: Tensor,
        labels: object = None,
        images: object = None,
        mode: str = "gpu",
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
        """Assign the ground truths of one image.

        Args:
            image: index of the image in the batch of logits.
            num_gt: G, the leading rows of gt_boxes and gt_classes that are used.
            num_anchors: N.
            gt_boxes: (G, 4) boxes (cx, cy, w, h) in pixels.
            gt_classes: (G,) classes.
            pred_boxes: (N, 4) decoded boxes of this image (cx, cy, w, h) in pixels.
            strides: (1, N), as are x_shifts and y_shifts, the cell indices.
            x_shifts: see strides.
            y_shifts: see strides.
            cls_logits: (B, N, C) class logits of the batch.
            batch_boxes: ignored.
            obj_logits: (B, N, 1) objectness logits of the batch.
            labels: ignored, as are images and mode.
            images: see labels.
            mode: see labels.

        Returns:
            For the F foreground anchors in ascending order: classes (F,) in the dtype of gt_classes, foreground
            mask (N,) bool, overlaps (F,), ground-truth rows (F,) int64, and F as an int. F makes the host wait
            for the device; simota_assign does not.

        Raises:
            What simota_assign raises.
        """
        _expect("pred_boxes", pred_boxes, (num_anchors, 4))
        row = slice(image, image + 1)
        result = simota_assign(
            gt_boxes[None, :num_gt],
            gt_classes[None, :num_gt],
            torch.full((1,), num_gt, device=pred_boxes.device),
            pred_boxes[None],
            cls_logits[row],
            obj_logits[row],
            strides,
            x_shifts,
            y_shifts,
            num_classes=self.num_classes,
            **self.settings,
        )
        fg_mask = result.fg_mask[0]
        foreground = fg_mask.nonzero().squeeze(1)
        return (
            result.matched_classes[0, foreground],
            fg_mask,
            result.matched_iou[0, foreground],
            result.matched_gt[0, foreground],
            len(foreground),
        )


def _rules(radius: float, penalty: float, region: str) -> Rules:
    if region not in REGIONS:
        raise ValueError(f"region must be one of {REGIONS}, got {region!r}")
    return Rules(radius, penalty, region)


def _expect(name: str, value: Tensor, shape: tuple[int, ...], floating: bool = False) -> None:
    if tuple(value.shape) != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(value.shape)}")
    if floating and not value.is_floating_point():
        raise TypeError(f"{name} must be floating, got {value.dtype}")


def _expect_logits(value: Tensor | Sequence[Tensor], images: int, anchors: int, classes: int) -> list[Tensor]:
    """The tensors that class logits consist of: rows, or levels."""
    if isinstance(value, Tensor):
        _expect("cls_logits", value, (images, anchors, classes), floating=True)
        return [value]
    for level in value:
        _expect("cls_logits", level, (images, classes, *level.shape[2:3]), floating=True)
    if sum(level.shape[2] for level in value) != anchors:
        raise ValueError(f"cls_logits must be of {anchors} anchors, got levels of {[v.shape[2] for v in value]}")
    return list(value)


def _check_values(num_gt: Tensor, boxes: int, labels: Tensor, num_classes: int) -> None:
    if bool(((num_gt < 0) | (num_gt > boxes)).any()):
        raise ValueError(f"num_gt must lie in [0, {boxes}], got {num_gt.tolist()}")
    if bool(((labels < 0) | (labels >= num_classes)).any()):
        raise IndexError(f"gt_classes must lie in [0, {num_classes}), got {labels.min()} to {labels.max()}")
