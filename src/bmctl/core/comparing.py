"""95 % intervals of a task's metrics, of one artifact and of how much worse it is than another on the same samples."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from bmctl.core.evaluation import Counting, Evaluation, Metric
from bmctl.core.stats import Interval, is_binary, mean_interval, paired_interval, percentiles, redrawn

By = Literal["wilson", "t", "bootstrap"]
"""How an interval was taken."""


@dataclass(frozen=True)
class Sampled:
    """An evaluation, and what its intervals are taken from: made once, used for every comparison."""

    evaluation: Evaluation
    task: Counting

    @cached_property
    def means(self) -> dict[str, NDArray[np.float64]]:
        return self.task.means(self.evaluation.counts)

    @cached_property
    def redrawn(self) -> dict[str, NDArray[np.float64]]:
        """Every metric on redrawn samples: the same samples for all artifacts, so that differences are paired."""
        return redrawn(self.evaluation.counts, self.task.metrics)


def interval(sampled: Sampled, name: str) -> tuple[Interval, By]:
    """Interval of one metric: Wilson's for a share of samples, Student's t for another mean, else a bootstrap."""
    if name not in sampled.means:
        return percentiles(sampled.redrawn[name]), "bootstrap"
    scores = sampled.means[name]
    return mean_interval(scores), "wilson" if is_binary(scores) else "t"


def worse_by(sampled: Sampled, versus: Sampled, metric: Metric) -> tuple[float, Interval]:
    """By how much a metric is worse than `versus` has it, in its unit, and the interval of that; negative is better.

    Args:
        sampled: Scored on the same samples as `versus`, in the same order.

    Raises:
        ValueError: They are of different numbers of samples.
    """
    better, worse = (versus, sampled) if metric.better == "higher" else (sampled, versus)
    number = len(versus.evaluation.counts)
    if len(sampled.evaluation.counts) != number:
        raise ValueError(f"{len(sampled.evaluation.counts)} samples cannot be paired with {number}")
    name = metric.name
    drop = better.evaluation.values[name] - worse.evaluation.values[name]
    if name in sampled.means and name in versus.means:
        return drop, paired_interval(better.means[name], worse.means[name])
    return drop, percentiles(better.redrawn[name] - worse.redrawn[name])
