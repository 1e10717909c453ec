"""RT-DETR's set losses: focal, varifocal or BCE class term, L1 and GIoU over matched queries of every decoder layer.

Specification: set_prediction.md, part B. After Zhao et al., DETRs Beat YOLOs on Real-time Object Detection, 2024.
All layers are matched in one call; the class term is one pass over the scores of all layers, the box terms are one
over all pairs, those of the denoising queries included.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cleanroom.assign._matching_checks import choose_matched_path
from cleanroom.assign.hungarian import Pairs, RTDETRHungarianMatcher
from cleanroom.assign.matching_cost import CostTerms
from cleanroom.losses import _rtdetr_checks as checks
from cleanroom.losses._query_class import ClassForm
from cleanroom.losses._rtdetr_terms import TERMS, Layers, Settings, given_matches, match_stack, stacked_terms
from cleanroom.paths import choose_path

_GAIN = {"class": 1, "bbox": 5, "giou": 2}
_MATCHING_GAIN = {"class": 2, "bbox": 5, "giou": 2}


class RTDETRLoss(NamedTuple):
    """Loss of a batch.

    `total` (): the sum of `terms` (K,): class, bbox and giou of the last layer; with `aux_loss` those of all other
    layers together; and both again for the denoising queries where there are any. With `reduction="none"` they are
    (B,) and (K, B). `queries` and `targets` (P,) int64 are the pairs of the matchings made: those of the last layer,
    then of the others in their order (for `use_uni_match` of layer `uni_match_ind` alone); image after image, targets
    counted through the batch.
    """

    total: Tensor
    terms: Tensor
    queries: Tensor
    targets: Tensor


def rtdetr_loss(
    pred_bboxes: Tensor,
    pred_scores: Tensor,
    cls: Tensor,
    bboxes: Tensor,
    dn_bboxes: Tensor | None = None,
    dn_scores: Tensor | None = None,
    dn_pos_idx: Tensor | None = None,
    dn_gt_idx: Tensor | None = None,
    *,
    gt_groups: Sequence[int],
    num_classes: int = 80,
    loss_gain: Mapping[str, float] | None = None,
    aux_loss: bool = True,
    use_fl: bool = True,
    use_vfl: bool = False,
    use_uni_match: bool = False,
    uni_match_ind: int = 0,
    gamma: float = 1.5,
    alpha: float = 0.25,
    vfl_gamma: float | None = None,
    vfl_alpha: float | None = None,
    dn_pos_counts: Sequence[int] = (),
    dn_gt_counts: Sequence[int] = (),
    dn_num_group: int = 1,
    ignore_mask: Tensor | None = None,
    reduction: str = "sum",
    path: str = "auto",
) -> RTDETRLoss:
    """Loss of all decoder layers against the ground truths of a batch (set_prediction.md B3 to B6).

    Args:
        pred_bboxes: (L, B, Q, 4) floating, (cx, cy, w, h) normalised to the image; the last layer is the main one.
        pred_scores: (L, B, Q, C) floating, logits.
        cls: (M,) int64 or int32, image by image, in [0, C - 1].
        bboxes: (M, 4) floating, (cx, cy, w, h) normalised.
        dn_bboxes, dn_scores: (L', B, R, 4) and (L', B, R, C), the denoising queries; None: none.
        dn_pos_idx: int64, for each image the positives among its R denoising queries, distinct, image by image.
        dn_gt_idx: int64, for each image the ground truths of one group, counted through the batch.
        gt_groups: ground truths of each image, numbers of sum M; images beyond its length have none.
        num_classes: C.
        loss_gain: weights of `class`, `bbox` and `giou`; default 1, 5, 2.
        aux_loss: layers before the last have terms too.
        use_fl, use_vfl: varifocal (both; focal where nothing is matched), focal (`use_fl`) or binary cross-entropy.
        use_uni_match, uni_match_ind: all layers before the last take the pairs of this one of them.
        gamma, alpha: of focal and varifocal loss.
        vfl_gamma, vfl_alpha: of the varifocal loss, where they differ (ultralytics before 8.3.117: 2 and 0.75).
        dn_pos_counts, dn_gt_counts: entries of `dn_pos_idx` and `dn_gt_idx` of each image, B numbers.
        dn_num_group: how often the ground truths of an image repeat along its positives.
        ignore_mask: (B, Q) bool, queries that take no part in any term, nor in the number of pairs or queries that a
            term is divided by; they are matched as without it. Denoising queries are not concerned.
        reduction: `sum`, or `none`: what each image contributes; the sum over images is the usual value.
        path: `sparse` or `static` (no shape depends on values, and the matching is an operator that torch.compile
            does not look into), `triton` (the matching is made on the device); `auto` chooses by device and tracing.

    Half inputs are computed in float32. More is accepted than upstream takes: float64 and half boxes. The matching is
    made in float32; a cost that is not finite counts as 0. Gradient goes to the predicted scores and boxes, not
    through the matching.

    Raises:
        ValueError: shapes, counts or classes that disagree; no image, layer or query; a gain that is missing.
        IndexError: `uni_match_ind` out of range; `dn_pos_idx` or `dn_gt_idx` too, where the CPU can look at them
            (elsewhere they then mean any query or ground truth).
        TypeError: dtypes other than the above.
    """
    settings = _settings(loss_gain, aux_loss, use_fl, use_vfl, gamma, alpha, vfl_gamma, vfl_alpha)
    checks.reduction(reduction)
    checks.predictions(pred_bboxes, pred_scores, num_classes)
    checks.mask(ignore_mask, pred_scores)
    batch = {"cls": cls, "bboxes": bboxes, "gt_groups": gt_groups}
    path = choose_matched_path(path, pred_bboxes.shape[2], pred_bboxes, pred_scores, cls, bboxes)
    sparse = path == "sparse"
    shared = uni_match_ind if use_uni_match and aux_loss else None
    matcher = RTDETRHungarianMatcher(_MATCHING_GAIN)
    stack, queries, targets = _matched_stack(
        pred_bboxes, pred_scores, batch, settings, matcher=matcher, shared=shared, path=path
    )
    stacks = [stack._replace(kept=None if ignore_mask is None else ~ignore_mask)]
    if dn_bboxes is not None:
        checks.denoising(dn_bboxes, dn_scores, dn_pos_idx, dn_gt_idx, pred_scores)
        positions = dn_pos_idx.split(checks.counts("dn_pos_counts", dn_pos_counts, dn_pos_idx, dn_bboxes))
        truths = dn_gt_idx.split(checks.counts("dn_gt_counts", dn_gt_counts, dn_gt_idx, dn_bboxes))
        pairs = _denoising_pairs(positions, truths, dn_num_group)
        stacks.append(_given_stack(dn_bboxes, dn_scores, pairs, len(cls), settings, sparse=sparse))
    terms = torch.cat(stacked_terms(stacks, cls, bboxes, settings, per_image=reduction == "none"))
    return RTDETRLoss(terms.sum(0), terms, queries, targets)


class DETRLoss(nn.Module):
    """RT-DETR's criterion with the constructor and the call of ultralytics 8.4.190.

    Args:
        nc: classes.
        loss_gain, aux_loss, use_fl, use_vfl, use_uni_match, uni_match_ind, gamma, alpha, vfl_gamma, vfl_alpha, path:
            see `rtdetr_loss`; the last three are ours.

    `matcher` holds the weights of the matching: 2, 5, 2.
    """

    def __init__(
        self,
        nc: int = 80,
        loss_gain: Mapping[str, float] | None = None,
        aux_loss: bool = True,
        use_fl: bool = True,
        use_vfl: bool = False,
        use_uni_match: bool = False,
        uni_match_ind: int = 0,
        gamma: float = 1.5,
        alpha: float = 0.25,
        *,
        vfl_gamma: float | None = None,
        vfl_alpha: float | None = None,
        path: str = "auto",
    ) -> None:
        super().__init__()
        self.nc = nc
        self.matcher = RTDETRHungarianMatcher(_MATCHING_GAIN)
        self.loss_gain = dict(_GAIN if loss_gain is None else loss_gain)
        self.aux_loss = aux_loss
        self.use_fl, self.use_vfl = use_fl, use_vfl
        self.use_uni_match, self.uni_match_ind = use_uni_match, uni_match_ind
        self.gamma, self.alpha = gamma, alpha
        self.vfl_gamma, self.vfl_alpha = vfl_gamma, vfl_alpha
        self.path = path

    def forward(
        self,
        pred_bboxes: Tensor,
        pred_scores: Tensor,
        batch: Mapping[str, Any],
        postfix: str = "",
        match_indices: Sequence[Pairs] | None = None,
    ) -> dict[str, Tensor]:
        """Loss of a batch.

        Args:
            pred_bboxes: (L, B, Q, 4), see `rtdetr_loss`.
            pred_scores: (L, B, Q, C) logits.
            batch: `cls` (M,), `bboxes` (M, 4) and `gt_groups`, a list.
            postfix: appended to every name.
            match_indices: for each image queries and ground truths (counted through the batch), the pairs of every
                layer instead of a matching.

        Returns:
            0-dim `loss_class`, `loss_bbox`, `loss_giou` of the last layer, and with `aux_loss` the same with `_aux`:
            the sums over all other layers (zeros without gradient where there are none).
        """
        stack = self._stack(pred_bboxes, pred_scores, batch, match_indices)
        (terms,) = stacked_terms([stack], batch["cls"], batch["bboxes"], self._settings, per_image=False)
        return self._named(terms, pred_bboxes, postfix)

    @property
    def _settings(self) -> Settings:
        return _settings(
            self.loss_gain,
            self.aux_loss,
            self.use_fl,
            self.use_vfl,
            self.gamma,
            self.alpha,
            self.vfl_gamma,
            self.vfl_alpha,
        )

    def _stack(
        self,
        pred_bboxes: Tensor,
        pred_scores: Tensor,
        batch: Mapping[str, Any],
        match_indices: Sequence[Pairs] | None = None,
    ) -> Layers:
        """The decoder's layers with their pairs."""
        checks.predictions(pred_bboxes, pred_scores, self.nc)
        path = choose_matched_path(
            self.path, pred_bboxes.shape[2], pred_bboxes, pred_scores, batch["cls"], batch["bboxes"]
        )
        if match_indices is None:
            shared = self.uni_match_ind if self.use_uni_match and self.aux_loss else None
            return _matched_stack(
                pred_bboxes, pred_scores, batch, self._settings, matcher=self.matcher, shared=shared, path=path
            )[0]
        checks.ground_truths(batch, pred_scores)
        number = len(batch["cls"])
        return _given_stack(
            pred_bboxes,
            pred_scores,
            match_indices,
            number,
            self._settings,
            sparse=path == "sparse",
            name="match_indices",
        )

    def _named(self, terms: Tensor, pred_bboxes: Tensor, postfix: str) -> dict[str, Tensor]:
        names = [f"loss_{term}" for term in TERMS]
        if self.aux_loss:
            names += [f"{name}_aux" for name in names]
        entries = {f"{name}{postfix}": term for name, term in zip(names, terms.unbind(), strict=True)}
        if self.aux_loss and len(pred_bboxes) == 1:
            entries |= {name: term.new_zeros(()) for name, term in list(entries.items())[len(TERMS) :]}
        return entries


class RTDETRDetectionLoss(DETRLoss):
    """`DETRLoss` with denoising queries, called as in ultralytics 8.4.190."""

    def forward(
        self,
        preds: tuple[Tensor, Tensor],
        batch: Mapping[str, Any],
        dn_bboxes: Tensor | None = None,
        dn_scores: Tensor | None = None,
        dn_meta: Mapping[str, Any] | None = None,
    ) -> dict[str, Tensor]:
        """Loss of a batch.

        Args:
            preds: boxes (L, B, Q, 4) and scores (L, B, Q, C).
            batch: see `DETRLoss`.
            dn_bboxes, dn_scores: (L', B, R, 4) and (L', B, R, C) of the denoising queries.
            dn_meta: `dn_pos_idx`, `dn_gt_idx` (lists of a tensor an image; where the second is missing, all ground
                truths in order, as before ultralytics 8.4.125) and `dn_num_group`; None: no denoising.

        Returns:
            The entries of `DETRLoss`, and the same with `_dn` for the denoising queries, zeros where there are none.
        """
        boxes, scores = preds
        stack = self._stack(boxes, scores, batch)
        cls, truths, settings = batch["cls"], batch["bboxes"], self._settings
        if dn_meta is None:
            (terms,) = stacked_terms([stack], cls, truths, settings, per_image=False)
            entries = self._named(terms, boxes, "")
            return entries | {f"{name}_dn": entry.new_zeros(()) for name, entry in entries.items()}
        if dn_bboxes is None or dn_scores is None:
            raise ValueError("dn_bboxes and dn_scores are needed where dn_meta is given")
        checks.predictions(dn_bboxes, dn_scores, self.nc, names=("dn_bboxes", "dn_scores"))
        of_images = dn_meta.get("dn_gt_idx")
        if of_images is None:
            of_images = torch.arange(len(cls)).split(list(batch["gt_groups"]))
        pairs = _denoising_pairs(dn_meta["dn_pos_idx"], of_images, dn_meta["dn_num_group"])
        sparse = choose_path(self.path, dn_bboxes, dn_scores) == "sparse"
        denoising = _given_stack(dn_bboxes, dn_scores, pairs, len(cls), settings, sparse=sparse)
        terms, of_denoising = stacked_terms([stack, denoising], cls, truths, settings, per_image=False)
        return self._named(terms, boxes, "") | self._named(of_denoising, dn_bboxes, "_dn")


def _settings(
    gain: Mapping[str, float] | None,
    aux_loss: bool,
    use_fl: bool,
    use_vfl: bool,
    gamma: float,
    alpha: float,
    vfl_gamma: float | None,
    vfl_alpha: float | None,
) -> Settings:
    gain = _GAIN if gain is None else gain
    missing = [term for term in TERMS if term not in gain]
    if missing:
        raise ValueError(f"loss_gain has no {missing[0]!r}")
    unpaired = ClassForm("focal" if use_fl else "bce", gamma, alpha)
    paired = unpaired
    if use_fl and use_vfl:
        paired = ClassForm(
            "varifocal", gamma if vfl_gamma is None else vfl_gamma, alpha if vfl_alpha is None else vfl_alpha
        )
    return Settings(gain, paired, unpaired, aux_loss)


def _matched_stack(
    boxes: Tensor,
    scores: Tensor,
    batch: Mapping[str, Any],
    settings: Settings,
    *,
    matcher: RTDETRHungarianMatcher,
    shared: int | None,
    path: str,
) -> tuple[Layers, Tensor, Tensor]:
    """The layers that have terms, matched; and queries and targets of the matchings made, see `match_stack`."""
    sizes = checks.ground_truths(batch, scores)
    checks.classes(batch["cls"], scores.shape[3])
    if not settings.aux_loss:
        boxes, scores = boxes[-1:], scores[-1:]
    if shared is not None:
        shared = checks.shared_layer(shared, boxes.shape[0] - 1)
    gains = (float(matcher.cost_gain[term]) for term in TERMS)
    cost = CostTerms("rtdetr", *gains, matcher.use_fl, matcher.alpha, matcher.gamma)
    matches, queries, targets = match_stack(
        boxes,
        scores,
        batch["cls"],
        batch["bboxes"],
        sizes,
        cost=cost,
        shared=shared,
        sparse=path == "sparse",
        solver="triton" if path == "triton" else "scipy",
    )
    return Layers(boxes, scores, matches), queries, targets


def _denoising_pairs(positions: Sequence[Tensor], truths: Sequence[Tensor], groups: int) -> list[Pairs]:
    """For each image its positives and their ground truths, the list of one group after another."""
    if len(positions) != len(truths):
        raise ValueError(f"dn_pos_idx is for {len(positions)} images, dn_gt_idx for {len(truths)}")
    return [(own, some.repeat(groups)) for own, some in zip(positions, truths, strict=True)]


def _given_stack(
    boxes: Tensor,
    scores: Tensor,
    pairs: Sequence[Pairs],
    truths: int,
    settings: Settings,
    *,
    sparse: bool,
    name: str = "dn_pos_idx",
) -> Layers:
    """A stack of layers that all have these pairs; negative indices count from the end, as in upstream."""
    checks.pairs(pairs, boxes, truths, name=name)
    if not settings.aux_loss:
        boxes, scores = boxes[-1:], scores[-1:]
    queries = boxes.shape[2]
    counted = [(own % queries, some % max(truths, 1)) for own, some in pairs]
    return Layers(boxes, scores, given_matches(counted, boxes.shape[0], boxes.device, sparse=sparse))
