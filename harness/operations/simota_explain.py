"""Which quantity decided a pair of SimOTA, how far it was from deciding otherwise, and within what noise."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from harness.operations.simota_margins import TOP_OVERLAPS, Interval, Scene


@dataclass(frozen=True)
class Deciding:
    """A quantity of `spec/simota.md` section 4.8 and its distance to deciding otherwise, in its own unit."""

    name: str
    margin: float
    noise: float

    @property
    def share(self) -> float:
        """Margin over noise: at most 1 where the decision is open."""
        return self.margin / max(self.noise, sys.float_info.min)

    def __str__(self) -> str:
        return f"{self.name}: margin {self.margin:.3g}, noise {self.noise:.3g}"


def nearest(scene: Scene, rows: tuple[int, ...], anchor: int) -> Deciding:
    """The deciding quantity of the pairs (row, anchor) that is nearest to deciding otherwise."""
    return min((item for g in rows for item in _quantities(scene, g, anchor)), key=lambda item: item.share)


def _quantities(scene: Scene, g: int, a: int) -> Iterator[Deciding]:
    closest = int(scene.region.middle[:, a].argmax())
    yield _edge("candidate region", scene.region, closest, a)
    total, noise = scene.overlap_sum.middle[g].item(), scene.overlap_sum.noise[g].item()
    step = min(range(2, TOP_OVERLAPS + 1), key=lambda k: abs(total - k))
    yield Deciding(f"overlap sum {total:.9g} of ground truth {g} against {step}", abs(total - step), noise)
    row = scene.cost.middle[g].masked_fill(~scene.maybe_candidate, torch.inf)
    row[a] = torch.inf
    # The k-th of the others: the cheapest left out if this one is in, the dearest taken if it is out.
    rank = min(int(scene.k_high[g]), len(row)) - 1
    rival = int(row.argsort()[rank])
    yield _gap(scene, (g, a), (g, rival), f"anchor {rival}")
    column = scene.cost.middle[:, a].clone()
    column[g] = torch.inf
    if len(column) > 1:
        other = int(column.argmin())
        yield _gap(scene, (g, a), (other, a), f"ground truth {other}")


def _edge(name: str, distance: Interval, g: int, a: int) -> Deciding:
    margin, noise = distance.middle[g, a].abs().item(), distance.noise[g, a].item()
    return Deciding(f"distance of anchor {a} to the {name} of ground truth {g}", margin, noise)


def _gap(scene: Scene, pair: tuple[int, int], other: tuple[int, int], rival: str) -> Deciding:
    for g, a in (pair, other):
        if scene.free.low[g, a] <= 0 < scene.free.high[g, a]:
            # Whether it bears the penalty is open, and says more than a cost of 50,000 give or take 50,000.
            return _edge("region without penalty", scene.free, g, a)
    cost, noise = scene.cost.middle, scene.cost.noise
    for g, a in (pair, other):
        if not math.isfinite(noise[g, a]):
            return Deciding(f"cost of ground truth {g} and anchor {a}, not finite upstream", 0.0, math.inf)
    return Deciding(
        f"cost {cost[pair].item():.9g} of ground truth {pair[0]} and anchor {pair[1]} against {rival}",
        abs(cost[pair].item() - cost[other].item()),
        noise[pair].item() + noise[other].item(),
    )
