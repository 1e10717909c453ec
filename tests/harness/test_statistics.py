import math

import numpy as np
import pytest

from harness.statistics import MINIMUM_PAIRS, paired_ratio

COMPARISONS = 500
# The 5th of 999 sorted resamples is the 99% bound; more would only steady its last digit.
RESAMPLES = 999


def machine_noise(generator: np.random.Generator, pairs: int) -> tuple[np.ndarray, np.ndarray]:
    """Nanoseconds of two identical implementations on a busy machine: 20 ms, 3% noise a sample, a drift of
    20%, one pair in ten hit as a whole by up to 5 times, one sample in twenty alone by up to twice.
    """
    shared = 20e6 * np.linspace(1.0, 1.2, pairs)
    shared *= np.where(generator.random(pairs) < 0.1, generator.uniform(1, 5, pairs), 1)

    def sample() -> np.ndarray:
        alone = np.where(generator.random(pairs) < 0.05, generator.uniform(1, 2, pairs), 1)
        return shared * alone * generator.lognormal(0, 0.03, pairs)

    return sample(), sample()


def verdicts(*, pairs: int, slowdown: float) -> list[str]:
    found = []
    for seed in range(COMPARISONS):
        oracle, candidate = machine_noise(np.random.default_rng(seed), pairs)
        found.append(paired_ratio(oracle, candidate * slowdown, seed=seed, resamples=RESAMPLES).verdict)
    return found


@pytest.mark.parametrize("pairs", [MINIMUM_PAIRS, 40])
def test_identical_implementations_raise_at_most_one_percent_false_alarms(pairs):
    found = verdicts(pairs=pairs, slowdown=1.0)
    assert found.count("faster") + found.count("slower") <= 0.01 * COMPARISONS


def test_a_ten_percent_slowdown_is_found():
    assert verdicts(pairs=40, slowdown=1.1).count("slower") >= 0.95 * COMPARISONS


def test_a_ten_percent_speedup_is_found():
    assert verdicts(pairs=40, slowdown=1 / 1.1).count("faster") >= 0.95 * COMPARISONS


def test_identical_implementations_are_the_same_once_there_are_enough_pairs():
    assert verdicts(pairs=200, slowdown=1.0).count("same") >= 0.95 * COMPARISONS


def test_noise_as_wide_as_the_effect_is_ambiguous():
    oracle = [100, 130] * 10
    result = paired_ratio(oracle, [100] * 20, seed=0)
    assert result.verdict == "ambiguous"
    assert result.low == pytest.approx(1.0)
    assert result.high == pytest.approx(1.3)


def test_speedup_is_the_median_of_paired_ratios_and_not_the_ratio_of_medians():
    result = paired_ratio([100, 900, 500] * 3, [50, 450, 900] * 3, seed=0)
    assert result.speedup == pytest.approx(2.0), "the medians themselves are 500 and 450"
    assert result.low <= result.speedup <= result.high
    assert result.pairs == 9


@pytest.mark.parametrize(
    ("oracle", "candidate", "verdict"),
    [
        (1000, 1000, "same"),
        (1019, 1000, "same"),
        (1000, 1019, "same"),
        (1021, 1000, "faster"),
        (1000, 1021, "slower"),
    ],
)
def test_tied_samples_give_a_finite_interval_and_the_band_decides(oracle, candidate, verdict):
    result = paired_ratio([oracle] * 20, [candidate] * 20, seed=0)
    assert result.verdict == verdict
    assert result.speedup == result.low == result.high == pytest.approx(oracle / candidate)


def test_the_verdict_is_bound_to_the_dead_band_and_the_interval_to_the_confidence():
    generator = np.random.default_rng(0)
    oracle, candidate = machine_noise(generator, 40)
    slower = candidate * 1.1
    assert paired_ratio(oracle, slower, dead_band=0.2, seed=0).verdict == "same"
    wide = paired_ratio(oracle, slower, confidence=0.99, seed=0)
    narrow = paired_ratio(oracle, slower, confidence=0.8, seed=0)
    assert wide.high - wide.low > narrow.high - narrow.low


def test_too_few_pairs_keep_their_interval_from_two_on():
    result = paired_ratio([200] * (MINIMUM_PAIRS - 1), [100] * (MINIMUM_PAIRS - 1), seed=0)
    assert result.verdict == "too-few-pairs"
    assert result.low == pytest.approx(2.0)
    one = paired_ratio([200], [100], seed=0)
    assert (one.verdict, one.low, one.high, one.pairs) == ("too-few-pairs", None, None, 1)
    assert one.speedup == pytest.approx(2.0)


def test_the_same_seed_gives_the_same_interval():
    oracle, candidate = machine_noise(np.random.default_rng(0), 30)

    def judged(seed):
        # With few resamples the bounds still depend on the draw.
        return paired_ratio(oracle, candidate, seed=seed, resamples=99)

    assert judged(7) == judged(7)
    assert len({judged(seed) for seed in range(10)}) > 1


@pytest.mark.parametrize("bad", [math.nan, math.inf, 0, -1])
@pytest.mark.parametrize("name", ["oracle_ns", "candidate_ns"])
def test_durations_that_cannot_be_are_refused_by_name(name, bad):
    arguments = {"oracle_ns": [1, 1, 1], "candidate_ns": [1, 1, 1], name: [1, bad, 1]}
    with pytest.raises(ValueError, match=rf"{name}\[1\]"):
        paired_ratio(**arguments, seed=0)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"oracle_ns": []}, "oracle_ns"),
        ({"oracle_ns": [[1, 1]]}, "oracle_ns"),
        ({"candidate_ns": [1]}, "candidate_ns"),
        ({"confidence": 1.0}, "confidence"),
        ({"confidence": math.nan}, "confidence"),
        ({"dead_band": -0.1}, "dead_band"),
        ({"dead_band": math.nan}, "dead_band"),
    ],
)
def test_bad_arguments_are_refused_by_name(arguments, name):
    with pytest.raises(ValueError, match=name):
        paired_ratio(**{"oracle_ns": [1, 1], "candidate_ns": [1, 1], **arguments}, seed=0)
