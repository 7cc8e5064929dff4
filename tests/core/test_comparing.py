"""Metrics that are no mean get intervals too, alone and against another artifact on the same samples."""

from __future__ import annotations

import math

import numpy as np
import pytest
from tests.core import regression

from bmctl.core.comparing import Sampled, interval, worse_by
from bmctl.core.evaluation import Evaluation
from bmctl.core.stats import mean_interval, paired_interval
from bmctl.tasks import classify

TRIALS = 40


def sampled(**made: float) -> Sampled:
    return Sampled(regression.evaluation(regression.predicted(**made)), regression)


def classified(hits: np.ndarray) -> Sampled:
    target = np.arange(len(hits)) % 5
    counts = np.stack([target, np.where(hits, target, (target + 1) % 5), np.full(len(hits), 0.5)], axis=1)
    counts = counts.astype(np.float64)
    return Sampled(Evaluation("classify", counts, classify.metrics(counts), 0.2), classify)


def test_accuracy_keeps_the_intervals_of_hits() -> None:
    hits = np.arange(300) % 9 != 0
    fewer = hits & (np.arange(300) % 17 != 0)
    better, worse = classified(hits), classified(fewer)
    assert interval(better, "accuracy") == (mean_interval(hits), "wilson")
    drop, (low, high) = worse_by(worse, better, classify.METRICS["accuracy"])
    assert drop == hits.mean() - fewer.mean()
    assert (low, high) == paired_interval(hits, fewer)


def test_a_mean_of_numbers_gets_students_interval() -> None:
    one = sampled()
    assert interval(one, "mae") == (mean_interval(np.abs(one.evaluation.counts[:, 0])), "t")


@pytest.mark.parametrize(("name", "truth"), [("rmse", 0.5), ("f1", 0.8524)])
def test_what_is_no_mean_is_covered(name: str, truth: float) -> None:
    """P(both positive) of two normal variables with a correlation of 1 / sqrt(1.25) is 0.4262, and f1 twice that."""
    rng, inside = np.random.default_rng(5), 0
    for _ in range(TRIALS):
        number, guess = rng.normal(size=(2, 300)) * [[1], [0.5]] + [[0], [0]]
        counts = np.stack([guess, number > 0, number + guess > 0], axis=1).astype(np.float64)
        (low, high), by = interval(Sampled(regression.evaluation(counts), regression), name)
        assert by == "bootstrap"
        inside += low <= truth <= high
    assert 0.85 <= inside / TRIALS <= 1.0


@pytest.mark.parametrize("name", ["rmse", "f1", "mae"])
def test_worse_is_positive_whichever_way_is_better(name: str) -> None:
    good, bad = sampled(noise=0.4, seed=1), sampled(noise=0.8, seed=2)
    metric = regression.METRICS[name]
    drop, (low, high) = worse_by(bad, good, metric)
    assert 0 < low < drop < high
    assert drop == pytest.approx(abs(good.evaluation.values[name] - bad.evaluation.values[name]))
    back, ends = worse_by(good, bad, metric)
    assert back == -drop
    assert ends == pytest.approx((-high, -low))


@pytest.mark.parametrize("name", ["rmse", "f1"])
def test_a_comparison_uses_the_pairs(name: str) -> None:
    """Two predictors with mostly the same errors: the difference is surer than either value."""
    first = regression.predicted()
    second = first.copy()
    second[:20] = regression.predicted(seed=3)[:20]
    one, two = (Sampled(regression.evaluation(counts), regression) for counts in (first, second))
    _, (low, high) = worse_by(two, one, regression.METRICS[name])
    (alone_low, alone_high), _ = interval(one, name)
    assert 0 < high - low < 0.7 * (alone_high - alone_low)


def test_other_numbers_of_samples_are_not_paired() -> None:
    with pytest.raises(ValueError, match="300 samples cannot be paired with 400"):
        worse_by(sampled(number=300), sampled(), regression.METRICS["rmse"])


def test_one_sample_says_nothing() -> None:
    assert interval(sampled(number=1), "rmse")[0] == (-math.inf, math.inf)
