"""Regression: one number per sample."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import pytest
import torch

from bmctl.core.columns import Class, Real
from bmctl.core.runner import Bounds, Closing
from bmctl.errors import DataError, DivergedError
from bmctl.schema import BATCH, Signature, TensorSpec
from bmctl.tasks import regress

FACTS = regress.Facts(mean=100.0, std=20.0)
CONFIG = regress.Config()


class Echo(Closing):
    """Gives what it is fed."""

    signature = Signature(
        inputs=(TensorSpec(name="x", dtype="float32", shape=(BATCH, 1)),),
        outputs=(TensorSpec(name="y", dtype="float32", shape=(BATCH, 1)),),
    )
    bounds: ClassVar[dict[str, Bounds]] = {}

    def run(self, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"y": feed["x"]}


def batch(said: list[float], values: list[float]) -> dict[str, np.ndarray]:
    return {"x": np.array(said, np.float32)[:, None], "value": np.array(values, np.float32)}


def test_metrics_are_in_the_values_own_unit() -> None:
    batches = [batch([0, 1], [100, 126]), batch([-1], [72])]
    found = regress.evaluate({"model": Echo()}, batches, config=CONFIG, facts=FACTS)
    errors = np.array([0, 6, 8.0])
    assert found.values["rmse"] == pytest.approx(np.sqrt((errors**2).mean()))
    assert found.values["mae"] == pytest.approx(errors.mean())
    spread = np.square(np.array([100, 126, 72]) - 298 / 3).sum()
    assert found.values["r2"] == pytest.approx(1 - 100 / spread)
    assert found.baseline == pytest.approx(np.sqrt((0 + 26**2 + 28**2) / 3))
    assert list(found.values) == list(regress.METRICS)


def test_the_loss_is_that_of_deviations() -> None:
    outputs, target = {"prediction": torch.tensor([[0.5], [-3.0]])}, {"value": torch.tensor([100.0, 80.0])}
    errors = torch.tensor([0.5, -2.0])
    expected = {"squared": errors.square().mean(), "absolute": errors.abs().mean(), "huber": (0.125 + 1.5) / 2}
    for name, value in expected.items():
        config = regress.Config.model_validate({"loss": name})
        assert float(regress.loss(outputs, target, config=config, facts=FACTS)) == pytest.approx(float(value))
    assert regress.score(outputs, target, facts=FACTS).tolist() == [10.0, 40.0]


def test_predictions_are_values() -> None:
    (found,) = regress.predict({"model": Echo()}, batch([1.23456789], [0]), config=CONFIG, facts=FACTS)
    assert found == {"value": 124.6914}
    assert regress.words(found) == "124.7"


def test_what_is_not_finite_is_no_prediction() -> None:
    with pytest.raises(DivergedError):
        list(regress.predict({"model": Echo()}, batch([np.nan], [0]), config=CONFIG, facts=FACTS))


def test_facts_are_those_of_a_number() -> None:
    assert regress.facts({"value": Real(mean=3.0, std=2.0)}, CONFIG, {}) == regress.Facts(mean=3.0, std=2.0)
    with pytest.raises(DataError, match="no number to predict"):
        regress.facts({"label": Class(("a", "b"))}, CONFIG, {})


def test_nothing_to_evaluate() -> None:
    with pytest.raises(DataError, match="the split is empty"):
        regress.evaluate({"model": Echo()}, [], config=CONFIG, facts=FACTS)
