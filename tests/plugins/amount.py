"""A task: how much a sample is, where the names of its classes are amounts; a regression, whose metrics are better when
lower, and the main one no mean."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from bmctl.core.columns import Class, Column
from bmctl.core.evaluation import Evaluation, Metric
from bmctl.core.runner import Runner, feed_of
from bmctl.errors import DataError
from bmctl.schema import BATCH, Many, Positive, Signature, Strict, TensorSpec

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

Tensors = Mapping[str, "torch.Tensor"]

METRICS = {metric.name: metric for metric in (Metric("rmse", "lower", "kg"), Metric("mae", "lower", "kg"))}
SCORED = "mae"
GIVES = ("amount",)
COLUMNS = ("amount",)


class Config(Strict):
    kind: Literal["amount"] = "amount"
    beta: Positive = 1.0


class Facts(Strict):
    kind: Literal["amount"] = "amount"
    amounts: Many[float]


def needs(config: Config) -> tuple[str, ...]:
    return ("label",)


def facts(columns: Mapping[str, Column], config: Config, told: Mapping[str, Any]) -> Facts:
    column = columns.get("label")
    if not isinstance(column, Class):
        raise DataError("data.source: no label that says an amount")
    return Facts(amounts=tuple(map(float, column.names)))


def balance(config: Config) -> None:
    return None


def targets(records: Mapping[str, Sequence[Any]], *, config: Config, facts: Facts) -> dict[str, np.ndarray]:
    import numpy as np

    return {"weight": np.array(facts.amounts, np.float32)[np.asarray(records["label"])]}


def told(facts: Facts) -> dict[str, Any]:
    return {"num_classes": 1}


def loss(outputs: Tensors, batch: Tensors, *, config: Config, facts: Facts) -> torch.Tensor:
    from torch.nn import functional

    return functional.smooth_l1_loss(outputs["amount"].float()[:, 0], batch["weight"], beta=config.beta)


def score(outputs: Tensors, batch: Tensors, *, facts: Facts) -> torch.Tensor:
    return (outputs["amount"].float()[:, 0] - batch["weight"]).abs()


def distill_loss(student: Tensors, teacher: Tensors, *, temperature: float) -> torch.Tensor:
    return (student["amount"].float() - teacher["amount"].float()).square().mean()


def signatures(given: Sequence[TensorSpec], facts: Facts, model: nn.Module | None = None) -> dict[str, Signature]:
    return {
        "scale": Signature(inputs=tuple(given), outputs=(TensorSpec(name="amount", dtype="float32", shape=(BATCH, 1)),))
    }


def modules(model: nn.Module) -> dict[str, nn.Module]:
    return {"scale": model}


def evaluate(
    runners: Mapping[str, Runner], batches: Iterable[Mapping[str, np.ndarray]], *, config: Config, facts: Facts
) -> Evaluation:
    import numpy as np

    pairs = [np.stack([batch["weight"], _amounts(runners, batch)], axis=1) for batch in batches]
    counts = np.concatenate(pairs).astype(np.float64)
    return Evaluation("amount", counts, metrics(counts), baseline=float(counts[:, 0].std()))


def metrics(counts: np.ndarray) -> dict[str, float]:
    """Of counts [N, 2]: target, predicted."""
    error = counts[:, 1] - counts[:, 0]
    return {"rmse": float((error**2).mean() ** 0.5), "mae": float(abs(error).mean())}


def means(counts: np.ndarray) -> dict[str, np.ndarray]:
    return {"mae": abs(counts[:, 1] - counts[:, 0])}


def predict(
    runners: Mapping[str, Runner], batch: Mapping[str, np.ndarray], *, config: Config, facts: Facts
) -> Iterator[dict[str, Any]]:
    for amount in _amounts(runners, batch):
        yield {"amount": float(amount)}


def words(prediction: Mapping[str, Any]) -> str:
    return f"{prediction['amount']:.1f} kg"


def _amounts(runners: Mapping[str, Runner], batch: Mapping[str, np.ndarray]) -> np.ndarray:
    runner = runners["scale"]
    return runner.run(feed_of(runner, batch))["amount"][:, 0]
