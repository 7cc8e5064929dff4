"""Intervals hold the truth about 95 times in 100, and are no wider than they must be."""

from __future__ import annotations

import math

import numpy as np
import pytest

from bmctl.core.stats import (
    mean_interval,
    paired_interval,
    percentiles,
    ratio_interval,
    redrawn,
    t_quantile,
    wilson,
)

TRIALS = 1500


def coverage(intervals: list[tuple[float, float]], truth: float) -> float:
    return float(np.mean([low <= truth <= high for low, high in intervals]))


def mean_width(intervals: list[tuple[float, float]]) -> float:
    return float(np.mean([high - low for low, high in intervals]))


def test_wilson_gives_the_published_values() -> None:
    # Newcombe 1998, https://doi.org/10.1002/(SICI)1097-0258(19980430)17:8<857::AID-SIM777>3.0.CO;2-E, table I, method 3
    assert wilson(81, total=263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(15, total=148) == pytest.approx((0.0624, 0.1605), abs=5e-5)
    assert wilson(0, total=20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(1, total=29) == pytest.approx((0.0061, 0.1718), abs=5e-5)


def test_wilson_stays_within_zero_and_one() -> None:
    assert wilson(0, total=7)[0] == 0.0
    assert wilson(7, total=7)[1] == 1.0


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99])
def test_a_share_is_covered(share: float) -> None:
    rng = np.random.default_rng(1)
    intervals = [mean_interval(rng.random(300) < share) for _ in range(TRIALS)]
    assert 0.93 <= coverage(intervals, share) <= 0.98


def test_a_mean_of_few_numbers_is_covered() -> None:
    """With the normal quantile in place of Student's, five numbers are covered 88 times in 100."""
    rng = np.random.default_rng(2)
    intervals = [mean_interval(rng.normal(3.0, 2.0, size=5)) for _ in range(TRIALS)]
    assert 0.935 <= coverage(intervals, 3.0) <= 0.965


@pytest.mark.parametrize(
    ("df", "expected"), [(1, 12.706), (2, 4.303), (3, 3.182), (5, 2.571), (30, 2.042), (1000, 1.962)]
)
def test_t_quantiles_are_those_of_the_tables(df: int, expected: float) -> None:
    assert t_quantile(0.975, df=df) == pytest.approx(expected, rel=2e-3)


def matched(rng: np.random.Generator, *, number: int, gained: float, lost: float) -> tuple[np.ndarray, np.ndarray]:
    """Scores of two models that disagree on a share of `gained + lost` of the samples."""
    draw = rng.random(number)
    first = (draw < gained) | ((draw >= gained + lost) & (draw < 0.9))
    second = ((draw >= gained) & (draw < gained + lost)) | ((draw >= gained + lost) & (draw < 0.9))
    return first.astype(np.float32), second.astype(np.float32)


@pytest.mark.parametrize(("gained", "lost"), [(0.03, 0.01), (0.02, 0.02), (0.004, 0.002), (0.15, 0.1)])
def test_a_paired_difference_is_covered(gained: float, lost: float) -> None:
    rng = np.random.default_rng(3)
    intervals = [paired_interval(*matched(rng, number=500, gained=gained, lost=lost)) for _ in range(TRIALS)]
    assert 0.93 <= coverage(intervals, gained - lost) <= 0.99


def test_a_paired_difference_is_narrower_than_an_unpaired_one() -> None:
    rng = np.random.default_rng(4)
    pairs = [matched(rng, number=500, gained=0.03, lost=0.01) for _ in range(300)]
    paired = mean_width([paired_interval(a, b) for a, b in pairs])
    exact = 2 * 1.96 * math.sqrt((0.04 - 0.02**2) / 500)
    unpaired = 2 * 1.96 * math.sqrt(2 * 0.9 * 0.1 / 500)
    assert paired == pytest.approx(exact, rel=0.05)
    assert paired < 0.6 * unpaired


def test_a_paired_difference_of_equal_scores_still_has_a_width() -> None:
    """Agresti & Min: with b = c = 0 the half-width is z / (n + 2)."""
    scores = np.ones(498)
    assert paired_interval(scores, scores) == pytest.approx((-1.96 / 500, 1.96 / 500), abs=1e-5)


def test_a_large_paired_difference_is_as_computed_by_hand() -> None:
    """100 samples, 40 gained and 10 lost: 30/102 -+ 1.96 sqrt(51 - 30^2/102) / 102."""
    first = np.array([1] * 40 + [0] * 10 + [1] * 50)
    second = np.array([0] * 40 + [1] * 10 + [1] * 50)
    assert paired_interval(first, second) == pytest.approx((0.16933, 0.41891), abs=2e-5)


def test_a_paired_difference_is_first_minus_second() -> None:
    first, second = np.array([1, 1, 1, 1, 0] * 40), np.array([1, 0, 0, 1, 0] * 40)
    low, high = paired_interval(first, second)
    assert 0 < low < 0.4 < high
    assert paired_interval(second, first) == pytest.approx((-high, -low))


def test_a_paired_difference_of_other_scores_is_covered_and_uses_the_pairs() -> None:
    rng = np.random.default_rng(5)
    intervals = []
    for _ in range(TRIALS):
        sample = rng.normal(0, 5, size=40)
        intervals.append(paired_interval(sample + rng.normal(0.3, 0.5, size=40), sample))
    assert 0.935 <= coverage(intervals, 0.3) <= 0.965
    assert mean_width(intervals) == pytest.approx(2 * 2.023 * 0.5 / math.sqrt(40), rel=0.05)


def test_a_ratio_of_timings_is_covered_while_the_machine_drifts() -> None:
    rng = np.random.default_rng(6)
    intervals = []
    for _ in range(250):
        drift = np.exp(rng.normal(0, 0.3, size=25))  # slows both sides of a round alike
        slow = 27 * drift * np.exp(rng.normal(0, 0.05, size=25))
        fast = 10 * drift * np.exp(rng.normal(0, 0.05, size=25))
        intervals.append(ratio_interval(slow, fast))
    assert 0.92 <= coverage(intervals, 2.7) <= 1.0


def test_a_ratio_pairs_the_rounds() -> None:
    drift = np.array([1.0, 5.0, 2.0, 9.0, 3.0, 4.0, 8.0])
    assert ratio_interval(3 * drift, drift) == pytest.approx((3.0, 3.0))
    low, high = ratio_interval(3 * drift, drift[::-1])
    assert high - low > 0.5


def test_a_ratio_is_the_same_every_time() -> None:
    rng = np.random.default_rng(7)
    slow, fast = rng.uniform(2, 3, 15), rng.uniform(1, 2, 15)
    assert ratio_interval(slow, fast) == ratio_interval(slow, fast)


@pytest.mark.parametrize("scores", [[], [0.5, math.nan], [math.inf], [[1.0, 0.0]]])
def test_what_has_no_mean_is_refused(scores: list[float]) -> None:
    with pytest.raises(ValueError, match=r"per sample|finite"):
        mean_interval(scores)


def test_unequal_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="3 and 2"):
        paired_interval([1, 0, 1], [1, 0])
    with pytest.raises(ValueError, match="same rounds"):
        ratio_interval([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="positive"):
        ratio_interval([1.0, 0.0], [1.0, 1.0])


def test_one_number_says_nothing() -> None:
    assert mean_interval([0.3]) == (-math.inf, math.inf)


def test_a_redrawn_mean_is_covered() -> None:
    rng = np.random.default_rng(8)
    values = rng.exponential(2.0, size=(60, 80, 1))
    intervals = [percentiles(redrawn(one, lambda rows: {"mean": rows.mean()})["mean"]) for one in values]
    assert 0.85 <= coverage(intervals, 2.0) <= 1.0


def test_drawing_again_draws_the_same() -> None:
    """So that two models on the same samples are compared on the same draws."""
    counts = np.random.default_rng(9).normal(size=(30, 2))
    first, second = (redrawn(counts[:, [column]], lambda rows: {"x": rows.sum()})["x"] for column in (0, 1))
    both = redrawn(counts, lambda rows: {"x": rows.sum()})["x"]
    assert both == pytest.approx(first + second)


def test_of_many_samples_fewer_are_drawn_for_an_interval_as_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = np.random.default_rng(10).normal(3.0, 2.0, size=(4000, 1))
    drawn = []

    def mean(rows: np.ndarray) -> dict[str, float]:
        drawn.append(len(rows))
        return {"mean": float(rows.mean())}

    whole = percentiles(redrawn(counts, mean)["mean"])
    monkeypatch.setattr("bmctl.core.stats.MOST_DRAWN", 400)
    drawn.clear()
    fewer = percentiles(redrawn(counts, mean)["mean"])
    assert set(drawn[1:]) == {400}
    assert fewer[1] - fewer[0] == pytest.approx(whole[1] - whole[0], rel=0.15)
    assert np.mean(fewer) == pytest.approx(counts.mean(), abs=0.01)


def test_draws_without_a_value_are_left_out() -> None:
    assert percentiles(np.array([np.nan, 1.0, 1.0, np.inf])) == (1.0, 1.0)
    assert percentiles(np.array([np.nan])) == (-math.inf, math.inf)
    assert np.isnan(redrawn(np.ones((1, 1)), lambda rows: {"mean": rows.mean()})["mean"]).all()
