"""Turns paired timings into a speedup, its interval and a verdict."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

# The fewest pairs that can tell two implementations apart at 99%: identical code leaves all n pairs on one
# side of 1 with probability 2 x 0.5^n, which is 1.6% for 7 pairs and 0.8% for 8.
MINIMUM_PAIRS = 8

DECIDABLE = frozenset({"faster", "slower", "same", "ambiguous"})
"""Verdicts of a timing that a bar may be held against: too few pairs or a busy machine prove nothing."""

RatioVerdict = Literal["faster", "slower", "same", "ambiguous", "too-few-pairs"]


@dataclass(frozen=True)
class PairedRatio:
    """Speedup of a candidate (oracle time over candidate time) with its interval, and what it says.

    `low` and `high` are None where one pair leaves no interval to estimate.
    """

    speedup: float
    low: float | None
    high: float | None
    verdict: RatioVerdict
    pairs: int


def paired_ratio(
    oracle_ns: Sequence[int],
    candidate_ns: Sequence[int],
    *,
    confidence: float = 0.99,
    dead_band: float = 0.02,
    seed: int,
    resamples: int = 9999,
) -> PairedRatio:
    """Judge paired timings by the median of their log-ratios and its percentile bootstrap interval.

    `oracle_ns[i]` and `candidate_ns[i]` are the nanoseconds of pair i, so that what slows both samples of a
    pair (drift, a busy machine) cancels. With the band d = 1 + `dead_band`, the verdict is

    - too-few-pairs: fewer than MINIMUM_PAIRS; the interval is given from two pairs on, but judges nothing;
    - faster: low > d; slower: high < 1 / d; same: 1 / d <= low and high <= d;
    - ambiguous: anything else.

    Equal arguments and `seed` give equal results. Raises ValueError naming the argument for durations that
    are not positive and finite, unequal numbers of them, none at all, or settings outside their range.

    Percentile and not BCa: BCa divides by the spread of the jackknife, which is zero for tied medians.
    """
    from scipy.stats import bootstrap

    oracle, candidate = _durations("oracle_ns", oracle_ns), _durations("candidate_ns", candidate_ns)
    if len(oracle) != len(candidate):
        raise ValueError(f"candidate_ns: {len(candidate)} durations for the {len(oracle)} of oracle_ns")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence: {confidence} is not between 0 and 1")
    if not 0 <= dead_band < math.inf:
        raise ValueError(f"dead_band: {dead_band} is not a finite number of at least 0")

    log_ratios = np.log(oracle) - np.log(candidate)
    pairs = len(log_ratios)
    speedup = math.exp(np.median(log_ratios))
    if pairs < 2:
        return PairedRatio(speedup, None, None, "too-few-pairs", pairs)
    interval = bootstrap(
        (log_ratios,),
        np.median,
        method="percentile",
        vectorized=True,
        confidence_level=confidence,
        n_resamples=resamples,
        random_state=np.random.default_rng(seed),
    ).confidence_interval
    low, high = math.exp(interval.low), math.exp(interval.high)
    return PairedRatio(speedup, low, high, _verdict(low, high, pairs, 1 + dead_band), pairs)


def _verdict(low: float, high: float, pairs: int, band: float) -> RatioVerdict:
    if pairs < MINIMUM_PAIRS:
        return "too-few-pairs"
    if low > band:
        return "faster"
    if high < 1 / band:
        return "slower"
    if 1 / band <= low and high <= band:
        return "same"
    return "ambiguous"


def _durations(name: str, nanoseconds: Sequence[int]) -> np.ndarray:
    durations = np.asarray(nanoseconds, dtype=np.float64)
    if durations.ndim != 1 or durations.size == 0:
        raise ValueError(f"{name}: needs a row of durations, got shape {durations.shape}")
    bad = np.flatnonzero(~(np.isfinite(durations) & (durations > 0)))
    if bad.size:
        raise ValueError(f"{name}[{bad[0]}]: {durations[bad[0]]} is not a positive, finite duration")
    return durations
