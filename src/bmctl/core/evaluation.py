"""What one artifact is worth on one split: what a task's `evaluate` gives, and reports and gates read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    import numpy as np

SHARE = "share"
"""The unit of what lies in [0, 1] and is shown in per cent; its differences are points."""


@dataclass(frozen=True)
class Metric:
    """What a task measures.

    Attributes:
        better: Which way is better.
        unit: SHARE, a word such as ``nats``, or nothing.
    """

    name: str
    better: Literal["higher", "lower"] = "higher"
    unit: str = ""

    def gain(self, value: float, *, over: float) -> float:
        """By how much `value` is better than `over`, in the metric's unit: negative where it is worse."""
        return value - over if self.better == "higher" else over - value


class Counting(Protocol):
    """The part of a task that reads counts: a module of tasks/ satisfies it."""

    METRICS: Mapping[str, Metric]
    """By name, the main one first."""

    def metrics(self, counts: np.ndarray) -> dict[str, float]:
        """Every metric of METRICS, in its order, of counts float64 [N, k]; pure: rows may be drawn again."""
        ...

    def means(self, counts: np.ndarray) -> dict[str, np.ndarray]:
        """Per sample, float64 [N], of those metrics that are a mean over samples: their intervals need no redrawing."""
        ...


@dataclass(frozen=True)
class Evaluation:
    """What one artifact is worth on one split.

    Attributes:
        task: Kind of the task, whose `metrics` makes `values` from `counts`.
        counts: float64 [N, k], per sample all that the task's metrics are made from, such as target and prediction, a
            squared error, or hits of n-grams.
        values: Of every metric of the task, the main one first.
        baseline: The main metric of a trivial predictor on the same split.
    """

    task: str
    counts: np.ndarray
    values: Mapping[str, float]
    baseline: float

    @property
    def name(self) -> str:
        """Of the main metric."""
        return next(iter(self.values))

    @property
    def value(self) -> float:
        """Of the main metric."""
        return self.values[self.name]


def main_metric(task: Counting) -> Metric:
    """What a task's artifacts are selected, compared and gated by where nothing else is said."""
    return next(iter(task.METRICS.values()))
