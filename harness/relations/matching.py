"""Matchings under relations: pairs as an owner for each query, and proofs that no matching is cheaper."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace

import torch
from torch import Tensor

from cases.case import Case
from harness.relations.trial import Broken, Trial

DUAL_ULPS = 4.0
"""Units of the costs' dtype, of the magnitude of the costs chosen, by which a matching may miss the optimum."""


def owners(queries: Tensor, targets: Tensor, sizes: list[int], total: int, *, through: bool) -> Tensor:
    """(K, B, Q) ground truth of each query in its image, -1 for none, of K matchings one after the other.

    `through` says that targets are counted through the batch.
    """
    per_image = [min(total, size) for size in sizes]
    count = sum(per_image)
    layers = len(queries) // count if count else 1
    found = queries.new_full((layers, len(sizes), total), -1)
    image = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(per_image, dtype=torch.int64)).repeat(layers)
    layer = torch.arange(layers).repeat_interleave(count) if count else torch.empty(0, dtype=torch.int64)
    if through:
        before = torch.tensor([0, *sizes]).cumsum(0)[:-1]
        targets = targets - before.to(targets.device)[image]
    found[layer, image, queries] = targets
    return found


def optimal(trial: Trial) -> bool:
    """Each image's matching costs no more than the best of an exact solver, inside the noise of the costs."""
    from harness.operations.hungarian_compare import above_best, by_image, costs

    case = trial.case
    trial.own()
    known, tried = SimpleNamespace(case=case, era={}), False
    for image, pairs in enumerate(by_image(case, trial.raw())):
        if not pairs:
            continue
        excess = above_best(costs(known, image), pairs)
        tried = True
        if not excess.legal:
            raise Broken(
                f"the matching of image {image} costs {excess.margin:.6g} more than the best; noise {excess.noise:.3g}"
            )
    return tried


def certified(trial: Trial) -> bool:
    """Duals of each problem that prove the rows' columns to be the best: no path of exchanges is cheaper."""
    case, tried = trial.case, False
    columns = trial.own()["columns"]
    cost = case.tensors["cost"].double()
    for problem, (rows, width) in enumerate(case.settings["sizes"]):
        block = cost[problem, :rows, :width]
        if not block.numel() or not bool(block.isfinite().all()):
            continue
        chosen = columns[problem, :rows]
        matched = (chosen >= 0).nonzero()[:, 0]
        tried = True
        if len(matched) < rows:  # more rows than columns: the columns choose among rows
            owner = torch.full((width,), -1)
            owner[chosen[matched]] = matched
            block, chosen = block.T, owner
        scale = float(block.abs().gather(1, chosen.clamp(min=0)[:, None]).sum())
        slack = DUAL_ULPS * torch.finfo(case.tensors["cost"].dtype).eps * scale
        gain = _exchange(block, chosen, slack)
        if gain > slack:
            raise Broken(f"problem {problem}: exchanges of columns save {gain:.6g}; rounding explains {slack:.3g}")
    return tried


def _exchange(cost: Tensor, chosen: Tensor, slack: float) -> float:
    """What the cheapest chain of exchanges saves: 0 where duals exist, infinity for an endless one.

    `cost` (n, m) with n <= m, `chosen` (n,). Potentials of the columns are shortest paths: a row may give its column up
    and take another for the difference of their costs. Where they settle, they are the duals of the columns.
    """
    rows, columns = cost.shape
    difference = cost - cost.gather(1, chosen[:, None])
    reach = torch.zeros(columns, dtype=torch.float64)
    free = torch.ones(columns, dtype=torch.bool)
    free[chosen] = False
    for _ in range(rows + 1):
        through = (reach[chosen][:, None] + difference).amin(0)
        better = torch.minimum(reach, through)
        if bool((reach - better <= slack / (rows + 1)).all()):
            return float(-better[free].min().clamp(max=0)) if bool(free.any()) else 0.0
        reach = better
    return float("inf")


def no_quantities(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A comparator of matchings has the costs from the case."""
    return {}


def pairs(case: Case, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Outputs of `hungarian` with owners as pairs again."""
    owner = outputs["owner"][0]
    image, query = (owner >= 0).nonzero(as_tuple=True)
    targets = owner[image, query]
    if case.settings["variant"] == "rtdetr":
        targets = targets + torch.tensor([0, *case.settings["sizes"]]).cumsum(0)[image].to(targets.device)
    return {"queries": query, "targets": targets}


def set_pairs(case: Case, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Outputs of `hungarian` with owners for pairs."""
    logits, sizes = case.tensors["logits"], case.settings["sizes"]
    return _dense(outputs, sizes, logits.shape[1], case.settings.get("variant") == "rtdetr")


def rtdetr_pairs(case: Case, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Outputs of `rtdetr_loss` with owners for pairs."""
    return _dense(outputs, case.settings["gt_groups"], case.tensors["pred_scores"].shape[2], True)


def _dense(outputs: Mapping[str, Tensor], sizes: list[int], total: int, through: bool) -> dict[str, Tensor]:
    found = {name: value for name, value in outputs.items() if name not in ("queries", "targets")}
    return {**found, "owner": owners(outputs["queries"], outputs["targets"], sizes, total, through=through)}
