"""Regression: one number per sample, whatever the sample is; root mean squared error, and the share that is explained.

The model works in deviations of the training values; metrics and predictions are in the values' own unit.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from bmctl.core.columns import Column, Real
from bmctl.core.evaluation import Evaluation, Metric
from bmctl.core.runner import Runner, feed_of
from bmctl.errors import DataError, DivergedError
from bmctl.schema import BATCH, Positive, Signature, Strict, TensorSpec

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

    Tensors = Mapping[str, torch.Tensor]

METRICS: Mapping[str, Metric] = {
    metric.name: metric for metric in (Metric("rmse", "lower"), Metric("mae", "lower"), Metric("r2"))
}
SCORED = "mae"
TARGET, PREDICTED = range(2)
"""Columns of an evaluation's counts."""
VALUE, OUTPUT = "value", "prediction"
GIVES = (OUTPUT,)
COLUMNS = (VALUE,)


class Config(Strict):
    """Attributes:
    loss: Of the error in deviations: its square, `huber`, which is its size where that is above 1, or its size.
    """

    kind: Literal["regress"] = "regress"
    loss: Literal["squared", "huber", "absolute"] = "squared"


class Facts(Strict):
    """Attributes:
    mean: Of the training values; so is `std`.
    """

    kind: Literal["regress"] = "regress"
    mean: float
    std: Positive


# -- data -------------------------------------------------------------------------------------------


def needs(config: Config) -> tuple[str, ...]:
    """Columns that the targets are taken from: the model does not see them."""
    return (VALUE,)


def facts(columns: Mapping[str, Column], config: Config, told: Mapping[str, Any]) -> Facts:
    """Mean and deviation of the training values.

    Raises:
        DataError: The source has no number to predict.
    """
    column = columns.get(VALUE)
    if not isinstance(column, Real):
        raise DataError(
            f"data.source: its samples have {', '.join(columns)}, and no number to predict",
            hint="of a table, name the column: --set data.source.value=NAME",
        )
    return Facts(mean=column.mean, std=column.std)


def balance(config: Config) -> None:
    """Numbers have no classes: samples are taken as they come."""


def targets(records: Mapping[str, Sequence[Any]], *, config: Config, facts: Facts) -> dict[str, np.ndarray]:
    """``value``: float32 [n], in its own unit."""
    import numpy as np

    return {VALUE: np.asarray(records[VALUE], np.float32)}


def told(facts: Facts) -> dict[str, Any]:
    """A head of one number."""
    return {"num_classes": 1}


# -- training ---------------------------------------------------------------------------------------


def loss(outputs: Tensors, batch: Tensors, *, config: Config, facts: Facts) -> torch.Tensor:
    """Mean loss, in float32 whatever the precision of the forward pass.

    Args:
        outputs: ``prediction`` [N, 1], in deviations from the mean.
        batch: ``value`` float32 [N].
        config: Which loss.
        facts: Mean and deviation.
    """
    from torch.nn import functional

    of_error: dict[str, Any] = {
        "squared": functional.mse_loss,
        "huber": functional.huber_loss,
        "absolute": functional.l1_loss,
    }
    found: torch.Tensor = of_error[config.loss](outputs[OUTPUT].float()[:, 0], (batch[VALUE] - facts.mean) / facts.std)
    return found


def score(outputs: Tensors, batch: Tensors, *, facts: Facts) -> torch.Tensor:
    """float32 [N]: size of the error, in the values' unit."""
    return (outputs[OUTPUT].float()[:, 0] * facts.std + facts.mean - batch[VALUE]).abs()


def distill_loss(student: Tensors, teacher: Tensors, *, temperature: float) -> torch.Tensor:
    """Mean squared difference; there is nothing to soften."""
    return (student[OUTPUT].float() - teacher[OUTPUT].float()).square().mean()


# -- graphs -----------------------------------------------------------------------------------------


def signatures(given: Sequence[TensorSpec], facts: Facts, model: nn.Module | None = None) -> dict[str, Signature]:
    """One graph: from what the input gives to a number per sample."""
    meaning = f"in deviations: times {facts.std:.9g}, plus {facts.mean:.9g}"
    made = TensorSpec(name=OUTPUT, dtype="float32", shape=(BATCH, 1), meaning=meaning)
    return {"model": Signature(inputs=tuple(given), outputs=(made,))}


def modules(model: nn.Module) -> dict[str, nn.Module]:
    """The model itself."""
    return {"model": model}


def predict(
    runners: Mapping[str, Runner], batch: Mapping[str, np.ndarray], *, config: Config, facts: Facts
) -> Iterator[dict[str, Any]]:
    """``value`` of each sample.

    Args:
        runners: ``{"model": ...}``.
        batch: The model's fields.
        config: Not used.
        facts: Mean and deviation.

    Raises:
        DivergedError: An output is nan or infinite.
    """
    import numpy as np

    values = _values(runners["model"], batch, facts)
    if not np.isfinite(values).all():
        raise DivergedError("the model's outputs hold nan or inf", hint="bmctl evaluate tells which stage broke it")
    for value in values:
        yield {VALUE: float(f"{value:.7g}")}


def words(prediction: Mapping[str, Any]) -> str:
    """``327.4``."""
    return f"{prediction[VALUE]:,.4g}"


# -- evaluation -------------------------------------------------------------------------------------


def evaluate(
    runners: Mapping[str, Runner], batches: Iterable[Mapping[str, np.ndarray]], *, config: Config, facts: Facts
) -> Evaluation:
    """Errors on one split; the trivial predictor says the mean of the training values.

    Args:
        runners: ``{"model": ...}``.
        batches: The model's fields, and ``value`` float32 [n].
        config: Not used: every loss is judged alike.
        facts: Mean and deviation.

    Raises:
        DataError: No samples.
    """
    import numpy as np

    rows = [np.stack([batch[VALUE], _values(runners["model"], batch, facts)], axis=1) for batch in batches]
    if not rows:
        raise DataError("there is nothing to evaluate: the split is empty")
    counts = np.concatenate(rows, dtype=np.float64)
    return Evaluation("regress", counts, metrics(counts), baseline=_root(np.square(counts[:, TARGET] - facts.mean)))


def _values(runner: Runner, batch: Mapping[str, np.ndarray], facts: Facts) -> np.ndarray:
    """float64 [n], in the values' unit; of the one output, whatever a foreign graph calls it."""
    import numpy as np

    outputs = runner.run(feed_of(runner, batch))
    made = outputs[runner.signature.outputs[0].name].astype(np.float64)
    return made.reshape(len(made)) * facts.std + facts.mean


def metrics(counts: np.ndarray) -> dict[str, float]:
    """Every metric of METRICS.

    Args:
        counts: float64 [N, 2], columns TARGET and PREDICTED.
    """
    import numpy as np

    target = counts[:, TARGET]
    squared = np.square(counts[:, PREDICTED] - target)
    spread = np.square(target - target.mean()).sum()
    r2 = 1 - squared.sum() / spread if spread > 0 else 0.0
    return {"rmse": _root(squared), "mae": float(means(counts)["mae"].mean()), "r2": float(r2)}


def means(counts: np.ndarray) -> dict[str, np.ndarray]:
    """Per sample, float64 [N]: the size of the error."""
    return {"mae": abs(counts[:, PREDICTED] - counts[:, TARGET])}


def _root(squared: np.ndarray) -> float:
    return float(squared.mean() ** 0.5)
