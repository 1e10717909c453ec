"""Total loss of DETR and YOLOS (specification: set_prediction.md, A2 to A9)."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from reference.bound import Bound
from reference.pairs import join_pairs
from reference.transformers.criterion import Settings, Tensors, targets

MATCHER_SETTINGS = ("class_cost", "bbox_cost", "giou_cost")
PARTS = ("HungarianMatcher", "ImageLoss")
"""Public classes that the totals build for every call, by the names under which they look them up."""


def bind(tensors: Tensors, settings: Settings, assignment: Tensors | None = None) -> Bound:
    """Prepare the call; with `assignment` ("queries", "targets") the matcher inside answers that.

    Upstream builds a matcher and a float32 criterion in every call. Here the matcher keeps what it answers, and the
    criterion's weights are in the dtype of the logits, as a user has to cast them.
    """
    call, recorder = _prepared(tensors, settings, assignment)

    def losses(raw: tuple[Tensor, dict[str, Tensor], Any]) -> dict[str, Tensor]:
        return {"total": raw[0]}

    def translate(raw: tuple[Tensor, dict[str, Tensor], Any]) -> dict[str, Tensor]:
        pairs = join_pairs([pair for pairs in recorder.answers for pair in pairs])
        return losses(raw) | {"terms": torch.stack(list(raw[1].values())), **pairs}

    return Bound(call, translate, losses)


def assigner_inputs(
    tensors: Tensors, settings: Settings
) -> list[tuple[dict[str, Tensor], dict[str, object], dict[str, Tensor]]]:
    """Return what the total hands to its matcher, call by call: (tensors, settings, answer) of `hungarian`."""
    call, recorder = _prepared(tensors, settings)
    with torch.no_grad():
        call()
    chosen = {"variant": "detr", "sizes": list(settings["sizes"])}
    chosen |= {name: settings[name] for name in MATCHER_SETTINGS}
    ground_truths = {name: tensors[name] for name in ("labels", "boxes")}
    return [
        ({"logits": outputs["logits"], "pred_boxes": outputs["pred_boxes"], **ground_truths}, chosen, join_pairs(pairs))
        for outputs, pairs in zip(recorder.calls, recorder.answers, strict=True)
    ]


def quantities(tensors: Tensors, settings: Settings) -> dict[str, Tensor]:
    """Return nothing: what decides is asked of the operation `hungarian`."""
    return {}


class _Recorder:
    """What the matcher was asked and answered in the last call; with an assignment the answers, call after call."""

    def __init__(self, assignment: Tensors | None) -> None:
        self.assignment = assignment and (assignment["queries"], assignment["targets"])
        self.start()

    def start(self) -> None:
        """Forget the last call."""
        self.calls: list[dict[str, Tensor]] = []
        self.answers: list[Sequence[tuple[Tensor, Tensor]]] = []
        self.used = 0

    def answer(self, match: Callable[..., Any], outputs: dict[str, Tensor], truths: list[dict[str, Tensor]]) -> Any:
        """Match, or say what has been told."""
        pairs = match(outputs, truths) if self.assignment is None else self._told(outputs, truths)
        self.calls.append(outputs)
        self.answers.append(pairs)
        return pairs

    def _told(self, outputs: dict[str, Tensor], truths: list[dict[str, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        counts = [min(outputs["logits"].shape[1], len(truth["boxes"])) for truth in truths]
        span = slice(self.used, self.used + sum(counts))
        self.used = span.stop
        return list(zip(*(given[span].split(counts) for given in self.assignment), strict=True))


def _prepared(
    tensors: Tensors, settings: Settings, assignment: Tensors | None = None
) -> tuple[Callable[[], Any], _Recorder]:
    """Upstream's call, and what its matcher does."""
    import transformers.loss.loss_for_object_detection as upstream

    masks = "pred_masks" in tensors
    truths = targets(tensors, settings, class_labels="labels", boxes="boxes", **({"masks": "masks"} if masks else {}))
    logits, boxes = tensors["logits"], tensors["pred_boxes"]
    given = [logits, truths, logits.device, boxes, *([tensors["pred_masks"]] if masks else []), _config(settings)]
    if "aux_logits" in tensors:
        # Upstream takes all layers, and leaves the last one out.
        given += [
            torch.cat([tensors[former], last.unsqueeze(0)])
            for former, last in (("aux_logits", logits), ("aux_boxes", boxes))
        ]
    total = upstream.ForSegmentationLoss if masks else upstream.ForObjectDetectionLoss
    recorder = _Recorder(assignment)
    replaced = _replaced(upstream, recorder, logits.dtype)

    def call() -> Any:
        recorder.start()
        with _names(upstream, replaced):
            return total(*given)

    return call, recorder


def _config(settings: Settings) -> SimpleNamespace:
    return SimpleNamespace(
        **{name: settings[name] for name in MATCHER_SETTINGS},
        num_labels=settings["num_classes"],
        eos_coefficient=settings["eos_coef"],
        auxiliary_loss=settings["auxiliary"],
        decoder_layers=settings["decoder_layers"],
        bbox_loss_coefficient=settings["bbox_coef"],
        giou_loss_coefficient=settings["giou_coef"],
        mask_loss_coefficient=settings["mask_coef"],
        dice_loss_coefficient=settings["dice_coef"],
    )


def _replaced(upstream: Any, recorder: _Recorder, dtype: torch.dtype) -> dict[str, type[nn.Module]]:
    """Upstream's classes with what `bind` says added."""

    class Matcher(upstream.HungarianMatcher):
        def forward(self, outputs: dict[str, Tensor], truths: list[dict[str, Tensor]]) -> Any:
            return recorder.answer(super().forward, outputs, truths)

    class Criterion(upstream.ImageLoss):
        def __init__(self, *given: Any, **named: Any) -> None:
            super().__init__(*given, **named)
            self.to(dtype)

    return dict(zip(PARTS, (Matcher, Criterion), strict=True))


@contextmanager
def _names(module: Any, values: dict[str, Any]) -> Iterator[None]:
    """Other values for names of a module."""
    before = {name: getattr(module, name) for name in values}
    for name, value in values.items():
        setattr(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(module, name, value)
