"""95 % intervals: of a mean score, of the difference of two scores on the same samples, of any function of samples, of
a ratio of timings.

All are deterministic: where samples are redrawn, the seed is fixed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

CONFIDENCE = 0.95
Z = NormalDist().inv_cdf(0.5 + CONFIDENCE / 2)
RESAMPLES = 4000
REDRAWS = 1000
"""How often samples are drawn again: a second for 10,000 of them."""

MOST_DRAWN = 20_000
"""Of more samples only so many are drawn at a time, for the same cost whatever their number."""

Interval = tuple[float, float]


def is_binary(scores: NDArray[np.floating]) -> bool:
    """Whether every score is exactly 0 or 1, as a classifier's hits are."""
    return bool(np.all((scores == 0) | (scores == 1)))


def mean_interval(scores: ArrayLike) -> Interval:
    """Interval of the mean of independent per-sample scores.

    Wilson's score interval for scores of 0 and 1, Student's t otherwise.

    Args:
        scores: [N], finite.

    Returns:
        (low, high); both infinite for a single score that is not 0 or 1.

    Raises:
        ValueError: No scores, or not finite.

    Source: Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953
    """
    values = _checked(scores)
    if is_binary(values):
        return wilson(round(float(values.sum())), total=len(values))
    return _t_interval(values)


def wilson(hits: int, *, total: int) -> Interval:
    """Wilson's score interval of a proportion of `hits` in `total`; it never leaves [0, 1]."""
    share = hits / total
    shrink = 1 + Z**2 / total
    centre = (share + Z**2 / (2 * total)) / shrink
    half = Z / shrink * math.sqrt(share * (1 - share) / total + Z**2 / (4 * total**2))
    return (0.0 if hits == 0 else max(0.0, centre - half)), (1.0 if hits == total else min(1.0, centre + half))


def paired_interval(first: ArrayLike, second: ArrayLike) -> Interval:
    """Interval of mean(first) - mean(second), both scored on the same samples in the same order.

    For scores of 0 and 1 it is the adjusted Wald interval of matched pairs: half a pair is added to each of the four
    cells, so that it keeps its coverage with few disagreements, and has a width when there are none. Student's t on
    the differences otherwise.

    Args:
        first: [N], finite.
        second: [N], finite.

    Raises:
        ValueError: Lengths differ, no scores, or not finite.

    Source: Agresti & Min 2005, https://doi.org/10.1002/sim.1781
    """
    a, b = _checked(first), _checked(second)
    if len(a) != len(b):
        raise ValueError(f"paired scores must be of the same samples: {len(a)} and {len(b)} of them")
    if not (is_binary(a) and is_binary(b)):
        return _t_interval(a - b)
    gained = float(np.sum((a == 1) & (b == 0))) + 0.5
    lost = float(np.sum((a == 0) & (b == 1))) + 0.5
    total = len(a) + 2
    centre = (gained - lost) / total
    half = Z / total * math.sqrt(gained + lost - (gained - lost) ** 2 / total)
    return max(-1.0, centre - half), min(1.0, centre + half)


def ratio_interval(numerator: ArrayLike, denominator: ArrayLike, *, seed: int = 0) -> Interval:
    """Interval of median(numerator) / median(denominator) of timings taken in the same interleaved rounds.

    Rounds are redrawn as pairs: what slows the machine for a round slows both, and cancels.

    Args:
        numerator: [rounds], positive, one timing per round.
        denominator: [rounds], positive, in the same unit.

    Raises:
        ValueError: Lengths differ, none, not finite or not positive.

    Source: Efron & Tibshirani 1993, An Introduction to the Bootstrap, chapter 13 (percentile interval).
    """
    a, b = _checked(numerator), _checked(denominator)
    if len(a) != len(b):
        raise ValueError(f"timings must be of the same rounds: {len(a)} and {len(b)} of them")
    if min(a.min(), b.min()) <= 0:
        raise ValueError("timings must be positive")
    drawn = np.random.default_rng(seed).integers(0, len(a), size=(RESAMPLES, len(a)))
    ratios = np.median(a[drawn], axis=1) / np.median(b[drawn], axis=1)
    return percentiles(ratios)


def redrawn(
    counts: NDArray[np.float64], combine: Callable[[NDArray[np.float64]], Mapping[str, float]], *, seed: int = 0
) -> dict[str, NDArray[np.float64]]:
    """Values of `combine` on samples drawn again with replacement, REDRAWS times.

    The draws depend on the number of samples alone: values of two models on the same samples are paired by place.
    Where fewer samples are drawn than there are, values are drawn towards the value of all, as their spread is that
    of fewer.

    Args:
        counts: [N, k], rows of samples.
        combine: From [n, k] to numbers by name.

    Returns:
        Per name float64 [REDRAWS]; nan where `combine` has no value for what was drawn, all nan for one sample.

    Source: Efron & Tibshirani 1993, An Introduction to the Bootstrap, chapter 13; Bickel, Goetze & van Zwet 1997,
        Resampling fewer than n observations, Statistica Sinica 7.
    """
    number, whole = len(counts), combine(counts)
    drawn = min(number, MOST_DRAWN)
    found = {name: np.full(REDRAWS, np.nan) for name in whole}
    if number < 2:
        return found
    rng = np.random.default_rng(seed)
    with np.errstate(divide="ignore", invalid="ignore"):
        for place in range(REDRAWS):
            for name, value in combine(counts[rng.integers(0, number, size=drawn)]).items():
                found[name][place] = value
    if drawn == number:
        return found
    shrink = math.sqrt(drawn / number)
    return {name: whole[name] + shrink * (values - whole[name]) for name, values in found.items()}


def percentiles(values: NDArray[np.float64]) -> Interval:
    """Percentile interval of redrawn values; infinite where none of them is finite."""
    finite = values[np.isfinite(values)]
    if len(finite) == 0:
        return -math.inf, math.inf
    low, high = np.quantile(finite, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def t_quantile(probability: float, *, df: int) -> float:
    """Quantile of Student's t: exact for 1 and 2 degrees of freedom, within 0.2 % from 3 on.

    Source: Abramowitz & Stegun 1964, 26.7.5.
    """
    if df == 1:
        return math.tan(math.pi * (probability - 0.5))
    if df == 2:
        return (2 * probability - 1) * math.sqrt(2 / (4 * probability * (1 - probability)))
    z = NormalDist().inv_cdf(probability)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / df**power for power, term in enumerate(terms, start=1))


def _t_interval(values: NDArray[np.float64]) -> Interval:
    if len(values) < 2:
        return -math.inf, math.inf
    mean = float(values.mean())
    error = float(values.std(ddof=1)) / math.sqrt(len(values))
    half = t_quantile(0.5 + CONFIDENCE / 2, df=len(values) - 1) * error
    return mean - half, mean + half


def _checked(values: ArrayLike | Sequence[float]) -> NDArray[np.float64]:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or len(array) == 0:
        raise ValueError(f"one number per sample is needed, got an array of shape {array.shape}")
    if not np.all(np.isfinite(array)):
        raise ValueError("scores and timings must be finite")
    return array
