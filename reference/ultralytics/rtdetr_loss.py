"""Set losses of RT-DETR (specification: set_prediction.md, part B)."""

import inspect
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from reference.bound import Bound
from reference.errors import RequestError
from reference.pairs import join_pairs
from reference.ultralytics.modules import public

MATCHER_INPUTS = ("pred_boxes", "logits", "boxes", "labels")
"""What the matcher is called with, before the ground truths of each image, by the names of `hungarian`."""

CLASSES = ("DETRLoss", "RTDETRDetectionLoss")
SETTINGS = ("loss_gain", "aux_loss", "use_fl", "use_vfl", "use_uni_match", "uni_match_ind")
FOCAL = {"gamma": 1.5, "alpha": 0.25}
"""Settings since 8.3.117, and what they were before."""

Tensors = Mapping[str, Tensor]
Settings = Mapping[str, object]


def bind(tensors: Tensors, settings: Settings, assignment: Tensors | None = None) -> Bound:
    """Prepare the call; with `assignment` ("queries", "targets") the matcher inside answers that.

    Cases with denoising queries call the criterion of the detection model, others the one beneath it. Raises
    RequestError where this version lacks a setting that the case uses.

    float64: upstream rejects float64 boxes, since it writes overlaps into a tensor of the default dtype. Such a case
    runs with float64 as that default, and with class terms that narrow nothing; of upstream's casts to float32 only
    the matcher's stays, on which decisions hang.
    """
    criterion, given = _criterion(tensors, settings, assignment)
    call = partial(criterion, *given)
    if tensors["pred_bboxes"].dtype == torch.float64:
        call = partial(_in_float64, criterion, given)

    def losses(raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
        terms = torch.stack(list(raw.values()))
        return {"total": terms.sum(), "terms": terms}

    def translate(raw: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return losses(raw) | join_pairs([pair for pairs in criterion.matcher.answers for pair in pairs])

    return Bound(call, translate, losses)


def assigner_inputs(
    tensors: Tensors, settings: Settings
) -> list[tuple[dict[str, Tensor], dict[str, object], dict[str, Tensor]]]:
    """Return what the criterion hands to its matcher, call by call: (tensors, settings, answer) of `hungarian`."""
    criterion, given = _criterion(tensors, settings)
    with torch.no_grad():
        if tensors["pred_bboxes"].dtype == torch.float64:
            _in_float64(criterion, given)
        else:
            criterion(*given)
    inner = criterion.matcher.matcher
    chosen = {"variant": "rtdetr", "use_fl": inner.use_fl, "alpha": inner.alpha, "gamma": inner.gamma}
    chosen |= {f"{term}_cost": float(inner.cost_gain[term]) for term in ("class", "bbox", "giou")}
    return [
        (dict(zip(MATCHER_INPUTS, inputs, strict=True)), {**chosen, "sizes": sizes}, join_pairs(pairs))
        for (*inputs, sizes), pairs in zip(criterion.matcher.calls, criterion.matcher.answers, strict=True)
    ]


def quantities(tensors: Tensors, settings: Settings) -> dict[str, Tensor]:
    """Return nothing: what decides is asked of the operation `hungarian`."""
    return {}


class _Recorder(nn.Module):
    """A matcher's stand-in: keeps calls and answers of the criterion's last run. With an assignment it answers that,
    call after call, without asking the matcher."""

    def __init__(self, matcher: nn.Module, assignment: Tensors | None) -> None:
        super().__init__()
        self.matcher = matcher
        self.assignment = assignment and (assignment["queries"], assignment["targets"])
        self.start()

    def start(self) -> None:
        """Forget the last run."""
        self.calls: list[tuple[Any, ...]] = []
        self.answers: list[Sequence[tuple[Tensor, Tensor]]] = []
        self.used = 0

    def forward(self, *given: Any, **more: Any) -> Sequence[tuple[Tensor, Tensor]]:
        """Match; `more` is what older versions pass for masks."""
        pairs = self.matcher(*given, **more) if self.assignment is None else self._told(given[0].shape[1], given[-1])
        self.calls.append(given)
        self.answers.append(pairs)
        return pairs

    def _told(self, queries: int, sizes: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
        counts = [min(queries, size) for size in sizes]
        span = slice(self.used, self.used + sum(counts))
        self.used = span.stop
        return list(zip(*(given[span].split(counts) for given in self.assignment), strict=True))


def _criterion(
    tensors: Tensors, settings: Settings, assignment: Tensors | None = None
) -> tuple[nn.Module, tuple[Any, ...]]:
    """The criterion with its matcher recorded, and what it is called with."""
    plain, denoising = (public("models.utils.loss", name) for name in CLASSES)
    focal = {name: settings[name] for name in FOCAL}
    if "gamma" not in inspect.signature(plain).parameters:
        if focal != FOCAL:
            raise RequestError(f"this version of ultralytics knows {FOCAL} only, and the case sets {focal}")
        focal = {}
    chosen = {name: settings[name] for name in SETTINGS} | focal
    batch = {"cls": tensors["cls"], "bboxes": tensors["bboxes"], "gt_groups": list(settings["gt_groups"])}
    predictions = tensors["pred_bboxes"], tensors["pred_scores"]
    if "dn_bboxes" in tensors:
        criterion = denoising(settings["num_classes"], **chosen)
        given = (
            predictions,
            batch,
            tensors["dn_bboxes"],
            tensors["dn_scores"],
            _dn_meta(denoising, tensors, settings),
        )
    else:
        criterion = plain(settings["num_classes"], **chosen)
        given = *predictions, batch
    criterion.matcher = _Recorder(criterion.matcher, assignment)
    criterion.register_forward_pre_hook(lambda *_: criterion.matcher.start())
    return criterion, given


def _dn_meta(criterion: type, tensors: Tensors, settings: Settings) -> dict[str, Any]:
    every = torch.arange(len(tensors["cls"]), device=tensors["cls"].device)
    if "dn_gt_idx" not in inspect.signature(criterion.get_dn_match_indices).parameters and not torch.equal(
        tensors["dn_gt_idx"], every
    ):
        raise RequestError("this version of ultralytics denoises every ground truth in order, and the case does not")
    positions = tensors["dn_pos_idx"].split(settings["dn_pos_counts"])
    truths = tensors["dn_gt_idx"].split(settings["dn_gt_counts"])
    queries = tensors["dn_bboxes"].shape[2], tensors["pred_bboxes"].shape[2]
    groups = settings["dn_num_group"]
    return {"dn_pos_idx": positions, "dn_gt_idx": truths, "dn_num_group": groups, "dn_num_split": list(queries)}


def _in_float64(criterion: nn.Module, given: tuple[Any, ...]) -> dict[str, Tensor]:
    """See `bind`."""
    for name in ("fl", "vfl"):
        term = getattr(criterion, name, None)
        if term is not None and not isinstance(term, _Wide):
            setattr(criterion, name, _Wide(term))
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        return criterion(*given)
    finally:
        torch.set_default_dtype(before)


class _Wide(nn.Module):
    """A class term in which labels are float64 and `.float()` narrows nothing."""

    def __init__(self, term: nn.Module) -> None:
        super().__init__()
        self.term = term

    def forward(self, *given: Tensor) -> Tensor:
        """Call the term."""
        with mock.patch.object(Tensor, "float", Tensor.double):
            return self.term(*(value.double() for value in given))
