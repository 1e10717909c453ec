"""End-to-end detection criteria: a one-to-many and a one-to-one branch of a head, each with its own assignment.

Specification: yolo_losses.md, section 4. YOLOv10 (Wang et al., arXiv:2405.14458); the weights that shift from one
branch to the other are those of YOLO26.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cleanroom.losses.v8_detection import GAINS, DetectionLoss, v8_detection_loss, v8DetectionLoss

FORMS = ("ultralytics", "original", "e2e")
#: topk and topk2 of the one-to-many and of the one-to-one branch.
BRANCHES = {"ultralytics": ((10, None), (1, None)), "original": ((10, None), (1, None)), "e2e": ((10, None), (7, 1))}
FIRST, LAST = 0.8, 0.1  # weight of the one-to-many branch before training, and in the end


class EndToEndLoss(NamedTuple):
    """Loss and decisions of both branches, one-to-many first."""

    loss: Tensor  # (3,) float32, times B; "original": 0-dim, the sum over components
    items: Tensor  # (3,) float32, detached, not times B; "original": (6,)
    fg_mask: Tensor  # (2, B, A) bool
    target_gt_idx: Tensor  # (2, B, A) int64


def branch_weights(updates: int, epochs: int) -> tuple[float, float]:
    """Weights of the one-to-many and the one-to-one branch of YOLO26 after `updates` epochs of `epochs`."""
    many = max(1 - updates / max(epochs - 1, 1), 0) * (FIRST - LAST) + LAST
    return many, max(1 - many, 0)


def v10_detection_loss(
    o2m_boxes: Tensor,
    o2m_scores: Tensor,
    o2o_boxes: Tensor,
    o2o_scores: Tensor,
    batch_idx: Tensor,
    cls: Tensor,
    bboxes: Tensor,
    *,
    levels: Sequence[Sequence[int]],
    strides: Sequence[float],
    num_classes: int,
    form: str = "ultralytics",
    updates: int = 0,
    epochs: int = 100,
    reg_max: int = 16,
    gains: Mapping[str, float] = GAINS,
    class_weights: Tensor | Sequence[float] | None = None,
    o2m_ignore_mask: Tensor | None = None,
    o2o_ignore_mask: Tensor | None = None,
    **settings: Any,
) -> EndToEndLoss:
    """Loss of both branches of an end-to-end head; gradient to both boxes and both scores.

    Args:
        o2m_boxes, o2m_scores: (B, 4 R, A) and (B, C, A) of the one-to-many branch, see `v8_detection_loss`.
        o2o_boxes, o2o_scores: of the one-to-one branch.
        batch_idx, cls, bboxes, levels, strides, num_classes, reg_max, gains, class_weights: see `v8_detection_loss`.
        form: "ultralytics": sum of both losses, sum of their items (one-to-one: topk 1). "original": the scalar sum,
            six items, one-to-many first. "e2e": weighted by `branch_weights` (one-to-one: topk 7, topk2 1), items of
            the one-to-one branch alone.
        updates, epochs: of "e2e": epochs that are over, and all.
        o2m_ignore_mask, o2o_ignore_mask: (B, A) bool; see `ignore_mask` of `v8_detection_loss`.
        settings: further ones of `v8_detection_loss`: `reduction` ("none": one more dim, the images, before the
            components), `max_objects`, eras and `path`.

    Raises:
        ValueError, TypeError, IndexError: as `v8_detection_loss`; or `form` is unknown.
    """
    if form not in FORMS:
        raise ValueError(f"form must be one of {FORMS}, got {form!r}")
    shared = {
        "levels": levels,
        "strides": strides,
        "num_classes": num_classes,
        "reg_max": reg_max,
        "gains": gains,
        "class_weights": class_weights,
        **settings,
    }
    branches = (("o2m", o2m_boxes, o2m_scores, o2m_ignore_mask), ("o2o", o2o_boxes, o2o_scores, o2o_ignore_mask))
    found = []
    for (name, boxes, scores, ignore_mask), (topk, topk2) in zip(branches, BRANCHES[form], strict=True):
        try:
            found.append(
                v8_detection_loss(
                    boxes,
                    scores,
                    batch_idx,
                    cls,
                    bboxes,
                    topk=topk,
                    topk2=topk2,
                    ignore_mask=ignore_mask,
                    **shared,
                )
            )
        except (ValueError, TypeError) as error:  # names of the branch's own arguments
            raise type(error)(_renamed(str(error), name)) from None
    return joined(*found, form, branch_weights(updates, epochs))


def _renamed(message: str, branch: str) -> str:
    return re.sub(r"\b(boxes|scores|ignore_mask)\b", rf"{branch}_\1", message)


def joined(many: DetectionLoss, one: DetectionLoss, form: str, weights: tuple[float, float]) -> EndToEndLoss:
    """Both branches' losses as one; `weights` are those of "e2e"."""
    if form == "ultralytics":
        loss, items = many.loss + one.loss, many.items + one.items
    elif form == "original":
        loss, items = many.loss.sum(-1) + one.loss.sum(-1), torch.cat((many.items, one.items), -1)
    else:
        loss, items = weights[0] * many.loss + weights[1] * one.loss, one.items
    masks, indices = (torch.stack(pair) for pair in zip(many[2:], one[2:], strict=True))
    return EndToEndLoss(loss, items, masks, indices)


class E2EDetectLoss:
    """Drop-in for ``ultralytics.utils.loss.E2EDetectLoss``: the unweighted sum of both branches ("ultralytics").

    `model` and `settings` as for `v8DetectionLoss`.
    """

    form = "ultralytics"

    def __init__(self, model: Any, **settings: Any) -> None:
        (many, _), (one, _) = BRANCHES[self.form]
        self.one2many = v8DetectionLoss(model, many, **settings)
        self.one2one = v8DetectionLoss(model, one, **settings)

    def __call__(self, preds: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss (3,) times B, to be summed and differentiated, and the items by name, summed over the branches.

        Args:
            preds: dict with `one2many` and `one2one`, each as `v8DetectionLoss` takes it, or a 2-tuple with that dict.
            batch: `batch_idx`, `cls` and `bboxes`.
        """
        found = self.evaluate(preds, batch)
        return found.loss, dict(zip(self.one2many.names, found.items.unbind(-1), strict=True))

    def evaluate(self, preds: Any, batch: Mapping[str, Tensor]) -> EndToEndLoss:
        """The call's result with the decisions."""
        many, one = _branches(preds)
        return joined(self.one2many.evaluate(many, batch), self.one2one.evaluate(one, batch), self.form, (1, 1))


class v10DetectLoss(E2EDetectLoss):  # noqa: N801 - upstream's name
    """Drop-in for ``v10DetectLoss`` of the YOLOv10 repository: a scalar and six items, one-to-many first.

    A branch of `preds` may also be what that repository hands over: a list of maps (B, 4 R + C, h, w), one a level.
    """

    form = "original"

    def __call__(self, preds: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Loss 0-dim, times B, and items (6,): box, class and distance term of each branch."""
        found = self.evaluate(preds, batch)
        return found.loss, found.items

    def evaluate(self, preds: Any, batch: Mapping[str, Tensor]) -> EndToEndLoss:
        """The call's result with the decisions."""
        many, one = (self._of_maps(branch) for branch in _branches(preds))
        return super().evaluate({"one2many": many, "one2one": one}, batch)

    def _of_maps(self, branch: Any) -> Any:
        if not isinstance(branch, list):
            return branch
        channels = torch.cat([level.flatten(2) for level in branch], 2)
        boxes, scores = channels.tensor_split([4 * self.one2many.settings["reg_max"]], 1)
        return {"boxes": boxes, "scores": scores, "feats": branch}


class E2ELoss:
    """Drop-in for ``ultralytics.utils.loss.E2ELoss``: weights move from the one-to-many to the one-to-one branch.

    `loss_fn` makes a branch's criterion from the model and `tal_topk`, `tal_topk2`; by default `v8DetectionLoss`, which
    takes `settings`. `update()` is to be called after each epoch of `model.args.epochs`.
    """

    def __init__(self, model: Any, loss_fn: Callable[..., Any] = v8DetectionLoss, **settings: Any) -> None:
        (many, _), (one, kept) = BRANCHES["e2e"]
        self.hyp = model.args
        self.one2many = loss_fn(model, tal_topk=many, **settings)
        self.one2one = loss_fn(model, tal_topk=one, tal_topk2=kept, **settings)
        self.updates = 0
        self.o2m, self.o2o = FIRST, 1 - FIRST

    def update(self) -> None:
        """One epoch is over: move the weights."""
        self.updates += 1
        self.o2m, self.o2o = branch_weights(self.updates, self.hyp.epochs)

    def decay(self, x: int) -> float:
        """Weight of the one-to-many branch after x epochs."""
        return branch_weights(x, self.hyp.epochs)[0]

    def __call__(self, preds: Any, batch: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Weighted loss (3,) times B, and the items of the one-to-one branch alone; arguments as `E2EDetectLoss`."""
        many, one = _branches(preds)
        loss, _ = self.one2many(many, batch)
        own, items = self.one2one(one, batch)
        return self.o2m * loss + self.o2o * own, items

    def evaluate(self, preds: Any, batch: Mapping[str, Tensor]) -> EndToEndLoss:
        """The call's result with the decisions, where `loss_fn` is `v8DetectionLoss`."""
        many, one = _branches(preds)
        found = self.one2many.evaluate(many, batch), self.one2one.evaluate(one, batch)
        return joined(*found, "e2e", (self.o2m, self.o2o))


def _branches(preds: Any) -> tuple[Any, Any]:
    preds = preds[1] if isinstance(preds, tuple) else preds
    if not isinstance(preds, Mapping):
        raise TypeError(f"preds must be a dict, or a 2-tuple with a dict, got {type(preds).__name__}")
    return preds["one2many"], preds["one2one"]
