"""What the adapters of YOLOX's losses share: a head without layers, and levels decoded as its forward pass does."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from reference.yolox.simota import HEAD, Answer, variant


def bare_head(num_classes: int, strides: Sequence[float] = (), use_l1: bool = False) -> Any:
    """A head with all that decoding, assigning and losses ask it for, and no layers: they would draw random numbers."""
    from yolox.models.losses import IOUloss
    from yolox.models.yolo_head import YOLOXHead

    head = YOLOXHead.__new__(YOLOXHead)
    nn.Module.__init__(head)
    head.num_classes = num_classes
    head.n_anchors = 1
    head.strides = list(strides)
    head.grids = [torch.zeros(1)] * len(strides)
    head.use_l1 = use_l1
    head.l1_loss = nn.L1Loss(reduction="none")
    head.bcewithlog_loss = nn.BCEWithLogitsLoss(reduction="none")
    head.iou_loss = IOUloss(reduction="none")
    return head


def levels(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    """The raw maps among the tensors: raw0, raw1 and so on."""
    return [tensors[name] for name in sorted(name for name in tensors if name.startswith("raw"))]


def decode(head: Any, maps: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Upstream's rows and grid of each level; it writes into the map it is given, hence the copies."""
    pairs = [
        head.get_output_and_grid(raw.clone(), level, stride, raw.type())
        for level, (raw, stride) in enumerate(zip(maps, head.strides, strict=True))
    ]
    return [rows for rows, _ in pairs], [grid for _, grid in pairs]


def constant_strides(maps: Sequence[Tensor], strides: Sequence[float]) -> list[Tensor]:
    """(1, n) of each level, in the maps' dtype."""
    return [raw.new_full((1, raw.shape[2:].numel()), stride) for raw, stride in zip(maps, strides, strict=True)]


class Recorder:
    """Stands in for `head.get_assignments`: passes calls on to it, or to `answer`, and keeps what went in and out.

    `answer(image, gt_boxes, gt_classes, pred_boxes)` gives upstream's five results.
    """

    def __init__(self, head: Any, answer: Callable[..., Answer] | None = None) -> None:
        self._original, self._answer = head.get_assignments, answer
        self._newer = variant() == HEAD
        self.answers: dict[int, Answer] = {}
        self.given: dict[int, tuple[Tensor, ...]] = {}
        head.get_assignments = self

    def __call__(self, *arguments: Any, **named: Any) -> Answer:
        """Answer one call of the head's loss."""
        # The release has the number of anchors third, newer checkouts have not.
        image, rest = arguments[0], arguments[2 if self._newer else 3 :]
        self.given[image] = rest
        if self._answer is None:
            self.answers[image] = self._original(*arguments, **named)
        else:
            self.answers[image] = self._answer(image, *rest[:3])
        return self.answers[image]

    def forget(self) -> None:
        """Before another call of the loss."""
        self.answers.clear()
        self.given.clear()
