"""What the adapters of the detection criteria share: the model they are built from, what they are called with.

Upstream's criteria read a trained model and a batch of the trainer's; section 12 of yolo_losses.md lists what they
look at. Since 8.4.0 predictions are a dict; before, a list of maps (B, 4R + C, h, w), one a level.
"""

import inspect
from collections.abc import Callable, Mapping
from itertools import pairwise
from types import SimpleNamespace

import torch
from torch import Tensor

from reference.errors import RequestError
from reference.ultralytics.modules import public

ASSIGNER_INPUTS = ("pd_scores", "pd_bboxes", "anc_points", "gt_labels", "gt_bboxes", "mask_gt")
ASSIGNER_OUTPUTS = ("target_labels", "target_bboxes", "target_scores", "fg_mask", "target_gt_idx")
MIN_MEMORY = {"min_memory": False}
"""What some releases up to 8.0.51 also read of the trainer's arguments: no loop over rows to save memory."""
ALPHA, BETA, EPS = 0.5, 6.0, 1e-9  # of the task-aligned assigner inside the criteria

Tensors = Mapping[str, Tensor]
Settings = Mapping[str, object]


class Recorder:
    """An assigner's stand-in: calls it, and keeps its inputs and answer by the names of the operation `tal`."""

    def __init__(self, assigner: Callable[..., tuple[Tensor, ...]]) -> None:
        self.assigner = assigner
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}

    def __call__(self, *given: Tensor) -> tuple[Tensor, ...]:
        """Assign."""
        answer = self.assigner(*given)
        self.inputs = dict(zip(ASSIGNER_INPUTS, given, strict=True))
        self.outputs = dict(zip(ASSIGNER_OUTPUTS, answer, strict=True))
        return answer

    def decisions(self) -> dict[str, Tensor]:
        """Foreground and ground-truth index (B, A), anchors without a score as background: see `normalised`."""
        return normalised(self.outputs)


class Answering:
    """An assigner that gives every anchor the ground truth it is told: `fg_mask` and `target_gt_idx` (B, A).

    Scores are those of the definition (task_aligned.md, section 4, step 7), with upstream's public overlap.
    """

    def __init__(self, assignment: Tensors) -> None:
        self.foreground, self.index = assignment["fg_mask"], assignment["target_gt_idx"]

    @torch.no_grad()
    def __call__(
        self,
        pd_scores: Tensor,
        pd_bboxes: Tensor,
        anc_points: Tensor,
        gt_labels: Tensor,
        gt_bboxes: Tensor,
        mask_gt: Tensor,
    ) -> tuple[Tensor, ...]:
        """Upstream's five outputs."""
        bbox_iou = public("utils.metrics", "bbox_iou")
        foreground, index, classes = self.foreground, self.index, pd_scores.shape[-1]
        if gt_bboxes.shape[1] == 0:
            return index, torch.zeros_like(pd_bboxes), torch.zeros_like(pd_scores), foreground, index
        label = gt_labels[..., 0].long().gather(1, index)
        boxes = gt_bboxes.gather(1, index[..., None].expand(-1, -1, 4))
        score = pd_scores.gather(2, (label % classes)[..., None])[..., 0]
        overlap = bbox_iou(boxes, pd_bboxes, xywh=False, CIoU=True)[..., 0].clamp(min=0)
        metric = torch.where(foreground, score**ALPHA * overlap**BETA, 0)
        overlap = torch.where(foreground, overlap, 0)
        shape = gt_bboxes.shape[:2]
        best_metric = metric.new_zeros(shape).scatter_reduce(1, index, metric, "amax").gather(1, index)
        best_overlap = overlap.new_zeros(shape).scatter_reduce(1, index, overlap, "amax").gather(1, index)
        value = metric * best_overlap / (best_metric + EPS)
        label = label.clamp(min=0)
        scores = value.new_zeros(pd_scores.shape).scatter_(2, label[..., None], value[..., None])
        return label, boxes, scores, foreground, index


def normalised(outputs: Tensors) -> dict[str, Tensor]:
    """Decisions that the loss can see: an anchor whose target score is 0 carries no loss, and is background.

    Among metrics of 0 the order of ties decides who is foreground (task_aligned.md, section 6).
    """
    foreground = outputs["target_scores"].sum(-1) > 0
    index = outputs["target_gt_idx"]
    return {"fg_mask": foreground, "target_gt_idx": torch.where(foreground, index, torch.zeros_like(index)).long()}


def is_dict_era() -> bool:
    """Whether this version takes predictions as a dict (8.4.0 on); its assigner and criterion then know topk2."""
    return "topk2" in inspect.signature(public("utils.tal", "TaskAlignedAssigner")).parameters


def model(settings: Settings, **arguments: object) -> SimpleNamespace:
    """The least that a criterion needs of a model; `arguments` are further attributes of `model.args`.

    Raises RequestError where this version knows no class weights and the case has some.
    """
    head = SimpleNamespace(
        stride=torch.tensor([float(stride) for stride in settings["strides"]]),
        nc=settings["num_classes"],
        reg_max=settings["reg_max"],
        no=settings["num_classes"] + 4 * settings["reg_max"],
    )
    weights = settings.get("class_weights")
    if weights is not None and not is_dict_era():
        raise RequestError("this version of ultralytics has no class weights, and the case has some")
    found = SimpleNamespace(
        args=SimpleNamespace(**settings["gains"], **MIN_MEMORY, **arguments),
        model=[head],
        parameters=lambda: iter([torch.zeros(1)]),
    )
    if weights is not None:
        found.class_weights = torch.tensor(weights)
    return found


def criterion(
    settings: Settings, topk: int, topk2: int | None, assignment: Tensors | None = None, **arguments: object
) -> Callable:
    """Upstream's detection criterion; its `assigner` is a Recorder, which answers `assignment` where one is given.

    Raises RequestError where this version knows no `topk2` and one is asked for.
    """
    holder = public("utils.loss", "v8DetectionLoss")
    if is_dict_era():
        found = holder(model(settings, **arguments), tal_topk=topk, tal_topk2=topk2)
    else:
        if topk2 is not None:
            raise RequestError(f"this version of ultralytics has no topk2, and the case sets it to {topk2}")
        found = holder(model(settings, **arguments))
        assigner = public("utils.tal", "TaskAlignedAssigner")
        found.assigner = assigner(topk=topk, num_classes=settings["num_classes"], alpha=ALPHA, beta=BETA)
    found.assigner = Recorder(found.assigner if assignment is None else Answering(assignment))
    return found


def predictions(boxes: Tensor, scores: Tensor, levels: list[list[int]]) -> dict[str, object] | list[Tensor]:
    """Predictions in the layout of this version; views of the tensors given, or computed from them."""
    images = len(boxes)
    if is_dict_era():
        return {"boxes": boxes, "scores": scores, "feats": [boxes.new_zeros(images, 1, h, w) for h, w in levels]}
    ends = torch.tensor([0, *(h * w for h, w in levels)]).cumsum(0).tolist()
    both = torch.cat([boxes, scores], dim=1)
    return [
        both[:, :, start:end].reshape(images, both.shape[1], h, w)
        for (start, end), (h, w) in zip(pairwise(ends), levels, strict=True)
    ]


def batch(tensors: Tensors) -> dict[str, Tensor]:
    """The trainer's batch. Upstream rejects targets in float64; those of a case are float32 numbers."""
    names = ("batch_idx", "cls", "bboxes")
    return {name: tensors[name].float() if tensors[name].dtype == torch.float64 else tensors[name] for name in names}


def items(raw: Mapping[str, Tensor] | Tensor) -> Tensor:
    """Loss items as one tensor: a dict since 8.4.112, a tensor before."""
    return torch.stack(list(raw.values())) if isinstance(raw, Mapping) else raw


def assigner_call(
    recorder: Recorder, settings: Settings, topk: int, topk2: int | None
) -> tuple[dict[str, Tensor], dict[str, object], dict[str, Tensor]]:
    """Inputs, settings and answer of the assigner's last call, as the operation `tal` names them.

    The answer is `normalised`, with the label and box that background anchors carry.
    """
    inputs, answer = recorder.inputs, recorder.outputs | recorder.decisions()
    if inputs["gt_bboxes"].shape[1]:
        index = answer["target_gt_idx"]
        answer["target_labels"] = inputs["gt_labels"][..., 0].long().gather(1, index).clamp(min=0)
        answer["target_bboxes"] = inputs["gt_bboxes"].gather(1, index[..., None].expand(-1, -1, 4))
    return inputs, _tal_settings(settings, topk, topk2), answer


def _tal_settings(settings: Settings, topk: int, topk2: int | None) -> dict[str, object]:
    return {
        "topk": topk,
        "topk2": topk2,
        "num_classes": settings["num_classes"],
        "alpha": ALPHA,
        "beta": BETA,
        "stride": list(settings["strides"]),
        "eps": EPS,
    }
