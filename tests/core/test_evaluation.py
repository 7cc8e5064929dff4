"""What a metric is: a name, which way is better, and a unit; the first of a task is the main one."""

from __future__ import annotations

import numpy as np
import pytest
from tests.core import regression

from bmctl.core.evaluation import Metric, main_metric
from bmctl.tasks import TASKS


def test_a_gain_follows_the_direction() -> None:
    assert Metric("accuracy").gain(0.9, over=0.8) == pytest.approx(0.1)
    assert Metric("rmse", "lower").gain(0.9, over=0.8) == pytest.approx(-0.1)


def test_the_first_metric_is_the_main_one() -> None:
    assert main_metric(regression).name == "rmse"
    found = regression.evaluation(regression.predicted())
    assert (found.name, found.value) == ("rmse", found.values["rmse"])


@pytest.mark.parametrize("task", [*TASKS.values(), regression], ids=lambda task: task.__name__)
def test_a_task_reads_its_counts_alike_everywhere(task: object) -> None:
    """Every metric by name and in order; those that are called means are means of what is given for them."""
    counts = np.random.default_rng(0).integers(0, 2, size=(50, 3)).astype(np.float64)
    before = counts.copy()
    values, means = task.metrics(counts), task.means(counts)
    assert list(values) == list(task.METRICS) == [metric.name for metric in task.METRICS.values()]
    assert set(means) <= set(values)
    for name, scores in means.items():
        assert scores.shape == (50,)
        assert scores.mean() == pytest.approx(values[name])
    assert np.array_equal(counts, before), "they only read"
    again = np.random.default_rng(1).permutation(50)
    assert task.metrics(counts[again]) == pytest.approx(values), "the order of samples says nothing"
