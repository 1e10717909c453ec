"""L1 term of YOLOX's head and its target for a given assignment (specification: yolox_losses.md, section 3)."""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from reference.bound import Bound
from reference.yolox.head import bare_head


def bind(tensors: Mapping[str, Tensor], settings: Mapping[str, object]) -> Bound:
    """Prepare the head's own target and distance, image by image as its loss does."""
    return Bound(partial(_run, bare_head(0, use_l1=True), tensors), _translate)


def _run(head: object, tensors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    raw, mask = tensors["origin_preds"], tensors["fg_mask"]
    cells = [tensors[name][0] for name in ("strides", "x_shifts", "y_shifts")]
    targets = []
    for image in range(len(mask)):
        chosen = mask[image]
        stride, x, y = (cell[chosen] for cell in cells)
        boxes = tensors["gt_boxes"][image][tensors["matched_gt"][image][chosen]]
        targets.append(head.get_l1_target(raw.new_zeros(len(boxes), 4), boxes, stride, x_shifts=x, y_shifts=y))
    target = torch.cat(targets, 0)
    loss = head.l1_loss(raw.view(-1, 4)[mask.view(-1)], target).sum() / max(len(target), 1)
    return loss, target


def _translate(raw: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    return {"loss_l1": raw[0], "l1_target": raw[1]}
