"""What one artifact is worth on one split: what a task's `evaluate` gives, and reports and gates read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Evaluation:
    """What one artifact is worth on one split.

    Attributes:
        metric: Name of the task's metric, larger is better.
        value: Its value.
        scores: Per sample, float32 [N]; `value` is their mean. Paired intervals are taken on these.
        baseline: What a trivial predictor gets on the same split.
        extra: Further numbers, such as the loss.
    """

    metric: str
    value: float
    scores: np.ndarray
    baseline: float
    extra: Mapping[str, float]
