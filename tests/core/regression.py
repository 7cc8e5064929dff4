"""A task for tests whose main metric is no mean and better when lower: numbers are predicted, and whether they are
positive."""

from __future__ import annotations

import numpy as np

from bmctl.core.evaluation import SHARE, Evaluation, Metric

KIND = "regression"
METRICS = {
    metric.name: metric for metric in (Metric("rmse", "lower"), Metric("f1", unit=SHARE), Metric("mae", "lower", "cm"))
}


def metrics(counts: np.ndarray) -> dict[str, float]:
    """Of counts [N, 3]: error, is positive, is predicted as such."""
    error, target, predicted = counts.T
    f1 = 2 * (target * predicted).sum() / max(1, (target + predicted).sum())
    return {"rmse": float(np.sqrt((error**2).mean())), "f1": float(f1), "mae": float(np.abs(error).mean())}


def means(counts: np.ndarray) -> dict[str, np.ndarray]:
    return {"mae": np.abs(counts[:, 0])}


def predicted(*, number: int = 400, noise: float = 0.5, seed: int = 0) -> np.ndarray:
    """Counts of a predictor with so much noise; the numbers to predict are the same for all."""
    truth = np.random.default_rng(99).normal(size=number)
    guess = truth + noise * np.random.default_rng(seed).normal(size=number)
    return np.stack([guess - truth, truth > 0, guess > 0], axis=1).astype(np.float64)


def evaluation(counts: np.ndarray) -> Evaluation:
    return Evaluation(KIND, counts, metrics(counts), baseline=1.0)
