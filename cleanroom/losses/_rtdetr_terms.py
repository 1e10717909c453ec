"""What RT-DETR's loss is made of: pairs of all decoder layers, and the terms over a stack of layers."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cleanroom.assign._matching_op import matched_layers
from cleanroom.assign.hungarian import match_layers
from cleanroom.assign.matching_cost import CostTerms
from cleanroom.losses._pair_boxes import PairTerms, pair_terms
from cleanroom.losses._query_class import ClassForm, class_sums, sums_by_image

TERMS = ("class", "bbox", "giou")
"""The terms, in the order of every result; names of the gains."""


class Matches(NamedTuple):
    """Pairs of L layers, the same number for each: (L, P) int64, image after image.

    `images` in [0, B), `queries` within the image, `targets` counted through the batch. `counts`: pairs of
    each image, the same in every layer; None where the host does not look at them.
    """

    images: Tensor
    queries: Tensor
    targets: Tensor
    counts: list[int] | None


class Layers(NamedTuple):
    """A stack of decoder layers with its pairs: the decoder's queries, or its denoising queries.

    `boxes` (L, B, Q, 4), `scores` (L, B, Q, C); `kept` (B, Q) bool, the queries that take part, or None for all.
    """

    boxes: Tensor
    scores: Tensor
    matches: Matches
    kept: Tensor | None = None


class Settings(NamedTuple):
    """How terms are weighted (`gain`, by the names `TERMS`), and the class loss with and without pairs."""

    gain: Mapping[str, float]
    paired: ClassForm
    unpaired: ClassForm
    aux_loss: bool


def match_stack(
    boxes: Tensor,
    scores: Tensor,
    cls: Tensor,
    truths: Tensor,
    sizes: Sequence[int],
    *,
    cost: CostTerms,
    shared: int | None,
    sparse: bool,
    solver: str = "auto",
) -> tuple[Matches, Tensor, Tensor]:
    """Match every layer of a stack, or the last one and layer `shared`, whose pairs then serve all others.

    Returns:
        The pairs of every layer; and queries and targets of the matchings made, last layer first.
    """
    number, batch = boxes.shape[:2]
    if shared is not None and number > 1:
        boxes, scores = (torch.stack([given[shared], given[-1]]) for given in (boxes, scores))
    made = boxes.shape[0]
    if sparse:
        # All layers as one batch: one image has too few pairs to be worth a call of its own.
        pairs = match_layers(
            [scores.flatten(0, 1)],
            [boxes.flatten(0, 1)],
            cls.repeat(made),
            truths.repeat(made, 1),
            [*sizes] * made,
            terms=cost,
        )
        counts = [len(queries) for queries, _ in pairs[:batch]]
        images = torch.arange(batch).repeat_interleave(torch.tensor(counts))
        firsts = torch.tensor([0, *sizes]).cumsum(0)[images]
        queries = torch.cat([some for some, _ in pairs]).view(made, -1)
        targets = torch.cat([some for _, some in pairs]).view(made, -1) + firsts
        images = images.expand_as(queries)
    else:
        found = matched_layers(scores.unbind(), boxes.unbind(), cls, truths, sizes, terms=cost, path=solver)
        images, queries, targets = (given.view(made, -1) for given in found)
        counts = None
    decided = (torch.cat([given[-1:], given[:-1]]).flatten() for given in (queries, targets))
    if made < number:
        images, queries, targets = (
            torch.cat([given[:1].expand(number - 1, -1), given[1:]]) for given in (images, queries, targets)
        )
    return Matches(images, queries, targets, counts), *decided


def given_matches(
    pairs: Sequence[tuple[Tensor, Tensor]], number: int, device: torch.device, *, sparse: bool
) -> Matches:
    """Pairs that serve each of `number` layers: for each image queries and targets, counted through the batch."""
    images = torch.cat([torch.full_like(queries, image) for image, (queries, _) in enumerate(pairs)])
    queries, targets = (torch.cat(given) for given in zip(*pairs, strict=True))
    expanded = (given.to(device).expand(number, -1) for given in (images, queries, targets))
    return Matches(*expanded, [len(queries) for queries, _ in pairs] if sparse else None)


def stacked_terms(
    stacks: Sequence[Layers], cls: Tensor, truths: Tensor, settings: Settings, *, per_image: bool
) -> list[Tensor]:
    """Terms of each stack: (3,), or (6,) with `aux_loss`; (3, B) or (6, B) if `per_image`."""
    rows, targets = [], []
    for stack in stacks:
        batch, queries = stack.boxes.shape[1:3]
        rows.append((_through_layers(stack.matches.images, batch) * queries + stack.matches.queries).flatten())
        targets.append(stack.matches.targets.flatten())
    pairs = pair_terms([stack.boxes for stack in stacks], rows, truths[torch.cat(targets)])
    sizes = [len(some) for some in targets]
    own = zip(*(given.split(sizes) for given in pairs), strict=True)
    results = []
    for stack, of_pairs in zip(stacks, own, strict=True):
        layers = _layer_terms(stack, PairTerms(*of_pairs), cls, settings, per_image=per_image)
        last, others = layers[:, -1], layers[:, :-1].sum(1)
        results.append(torch.cat([last, others]) if settings.aux_loss else last)
    return results


def _layer_terms(stack: Layers, pairs: PairTerms, cls: Tensor, settings: Settings, *, per_image: bool) -> Tensor:
    """(3, L), or (3, L, B) if `per_image`."""
    matches, kept = stack.matches, stack.kept
    number, batch, queries, classes = stack.scores.shape
    count = matches.queries.shape[1]
    form = settings.paired if count else settings.unpaired
    images = _through_layers(matches.images, batch).flatten()
    divisor = max(count, 1) if kept is None else kept[matches.images, matches.queries].sum(1).clamp(min=1).unsqueeze(1)
    of_class = divisor
    if form.kind == "bce":
        # Upstream takes the mean over queries, and does not divide by the pairs.
        of_class = queries if kept is None else kept.sum(1).clamp(min=1)
    # A number is multiplied within the pass over the scores. While tracing it may be a symbol, which can't.
    early = kept is None and not torch.compiler.is_compiling()
    sums = class_sums(
        stack.scores.flatten(0, 1),
        images,
        (matches.queries * classes + cls[matches.targets]).flatten(),
        pairs.iou,
        form,
        scale=settings.gain["class"] / of_class if early else 1.0,
        kept=None if kept is None else kept.repeat(number, 1),
        counts=None if matches.counts is None else matches.counts * number,
    ).view(number, batch)
    if not early:
        sums = sums * settings.gain["class"] / of_class
    terms = [sums if per_image else sums.sum(1)]
    for name, of_pairs in (("bbox", pairs.distance), ("giou", pairs.loss)):
        values = of_pairs
        if kept is not None:
            values = values.masked_fill(~kept[matches.images, matches.queries].flatten(), 0)
        if per_image:
            by_image = sums_by_image(values, images, number * batch).view(number, batch)
            terms.append(by_image * (settings.gain[name] / divisor))
        else:
            by_layer = values.view(number, count).sum(1)
            terms.append(by_layer * (settings.gain[name] / (divisor if kept is None else divisor.squeeze(1))))
    return torch.stack(terms)


def _through_layers(images: Tensor, batch: int) -> Tensor:
    """Images of pairs (L, P) counted through all layers, in [0, L * B)."""
    return images + batch * torch.arange(images.shape[0], device=images.device).unsqueeze(1)
