"""Classification: one label per sample, whatever the sample is; cross-entropy, accuracy, and macro F1 beside it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from bmctl.core.columns import Class, Column
from bmctl.core.evaluation import SHARE, Evaluation, Metric
from bmctl.core.runner import Runner, feed_of
from bmctl.errors import DataError, DivergedError
from bmctl.schema import BATCH, Many, Ratio, Signature, Strict, TensorSpec

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (Metric("accuracy", unit=SHARE), Metric("macro_f1", unit=SHARE), Metric("loss", "lower", "nats"))
}
SCORED = "accuracy"
TARGET, PREDICTED, LOSS = range(3)
"""Columns of an evaluation's counts."""
GIVES = ("logits",)
LABEL = "label"
COLUMNS = ("class_name", "class_index", "score")
TOP = 5
"""Classes that a prediction names."""


class Config(Strict):
    kind: Literal["classify"] = "classify"
    label_smoothing: Ratio = 0.0


class Facts(Strict):
    """What the data say that a model of this task has to know.

    Attributes:
        class_names: In the order of the logits.
    """

    kind: Literal["classify"] = "classify"
    class_names: Many[str]


# -- data -------------------------------------------------------------------------------------------


def needs(config: Config) -> tuple[str, ...]:
    """Columns that the targets are taken from: the model does not see them."""
    return (LABEL,)


def facts(columns: Mapping[str, Column], config: Config, told: Mapping[str, Any]) -> Facts:
    """The classes.

    Raises:
        DataError: The source has no labels.
    """
    column = columns.get(LABEL)
    if not isinstance(column, Class):
        raise DataError(
            f"data.source: its samples have {', '.join(columns)}, and no label to classify by",
            hint="take a source with labels, or another task",
        )
    return Facts(class_names=column.names)


def balance(config: Config) -> str | None:
    """The column of which `limit` takes the classes in equal numbers."""
    return LABEL


def targets(records: Mapping[str, Sequence[Any]], *, config: Config, facts: Facts) -> dict[str, np.ndarray]:
    """``label``: int64 [n]."""
    import numpy as np

    return {LABEL: np.asarray(records[LABEL], np.int64)}


def told(facts: Facts) -> dict[str, Any]:
    """The number of classes, for the model's head."""
    return {"num_classes": len(facts.class_names)}


# -- training ---------------------------------------------------------------------------------------


def loss(
    outputs: Mapping[str, torch.Tensor],
    batch: Mapping[str, torch.Tensor],
    *,
    config: Config,
    facts: Facts | None = None,
) -> torch.Tensor:
    """Mean cross-entropy, in float32 whatever the precision of the forward pass.

    Args:
        outputs: ``logits`` [N, K].
        batch: ``label`` int64 [N].
        config: Label smoothing.
        facts: Not used.
    """
    from torch.nn import functional

    logits = outputs["logits"].float()
    return functional.cross_entropy(logits, batch[LABEL], label_smoothing=config.label_smoothing)


def score(
    outputs: Mapping[str, torch.Tensor], batch: Mapping[str, torch.Tensor], *, facts: Facts | None = None
) -> torch.Tensor:
    """float32 [N]: 1 where the largest logit is the target's, else 0."""
    return (outputs["logits"].argmax(dim=1) == batch[LABEL]).float()


def distill_loss(
    student: Mapping[str, torch.Tensor], teacher: Mapping[str, torch.Tensor], *, temperature: float
) -> torch.Tensor:
    """T^2 KL(teacher || student), both softened by T, mean over samples.

    Args:
        student: ``logits`` [N, K].
        teacher: ``logits`` [N, K].
        temperature: T.

    Source: Hinton, Vinyals, Dean 2015, https://arxiv.org/abs/1503.02531
    """
    from torch.nn import functional

    log_student = functional.log_softmax(student["logits"].float() / temperature, dim=1)
    log_teacher = functional.log_softmax(teacher["logits"].float() / temperature, dim=1)
    return temperature**2 * functional.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)


# -- graphs -----------------------------------------------------------------------------------------


def signatures(given: Sequence[TensorSpec], facts: Facts, model: nn.Module | None = None) -> dict[str, Signature]:
    """A classifier is one graph: from what the input gives to a row of scores per sample."""
    shape = (BATCH, len(facts.class_names))
    logits = TensorSpec(name="logits", dtype="float32", shape=shape, role="scores", meaning="class scores")
    return {"model": Signature(inputs=tuple(given), outputs=(logits,))}


def modules(model: nn.Module) -> dict[str, nn.Module]:
    """The model itself."""
    return {"model": model}


def predict(
    runners: Mapping[str, Runner], batch: Mapping[str, np.ndarray], *, config: Config, facts: Facts | None
) -> Iterator[dict[str, Any]]:
    """The likeliest classes of each sample: softmax in double precision; equal scores keep the order of the classes.

    Args:
        runners: ``{"model": ...}``, from what the input gives to logits [n, K].
        batch: The model's fields.
        facts: Names of the classes; None calls them by their numbers.

    Raises:
        DivergedError: A logit is nan or infinite.
    """
    import numpy as np

    logits = _logits(runners["model"], batch)
    if not np.isfinite(logits).all():
        raise DivergedError("the model's outputs hold nan or inf", hint="bmctl evaluate tells which stage broke it")
    z = logits.astype(np.float64)
    scores = np.exp(z - z.max(axis=1, keepdims=True))
    scores /= scores.sum(axis=1, keepdims=True)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :TOP]
    names = facts.class_names if facts else tuple(str(i) for i in range(logits.shape[1]))
    for row, best in zip(scores, order, strict=True):
        ranked = [{"class_name": names[i], "score": round(float(row[i]), 6)} for i in best]
        yield {
            "class_name": ranked[0]["class_name"],
            "class_index": int(best[0]),
            "score": ranked[0]["score"],
            "top": ranked,
        }


def words(prediction: Mapping[str, Any]) -> str:
    """``Trouser 100.0%``."""
    return f"{prediction['class_name']} {prediction['score']:.1%}"


# -- evaluation -------------------------------------------------------------------------------------


def evaluate(
    runners: Mapping[str, Runner],
    batches: Iterable[Mapping[str, np.ndarray]],
    *,
    config: Config,
    facts: Facts | None = None,
) -> Evaluation:
    """Accuracy, macro F1 and the loss (without label smoothing) on one split; the trivial predictor is the majority.

    Args:
        runners: ``{"model": ...}``, from what the input gives to logits [n, K].
        batches: The model's fields, and ``label`` int64 [n].
        config: Not used: smoothing is for training.
        facts: Not used.

    Raises:
        DataError: No samples, or a label outside of the model's K classes.
        DivergedError: A logit is nan or infinite.
    """
    import numpy as np

    rows = []
    for batch in batches:
        labels = batch[LABEL]
        logits = _logits(runners["model"], batch).astype(np.float32, copy=False)
        _check(logits, labels)
        shifted = logits - logits.max(axis=1, keepdims=True)
        losses = np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(labels)), labels]
        rows.append(np.stack([labels, logits.argmax(axis=1), losses], axis=1, dtype=np.float64))
    if not rows:
        raise DataError("there is nothing to evaluate: the split is empty")
    counts = np.concatenate(rows)
    majority = np.bincount(counts[:, TARGET].astype(np.intp)).max() / len(counts)
    return Evaluation("classify", counts, metrics(counts), baseline=float(majority))


def _logits(runner: Runner, batch: Mapping[str, np.ndarray]) -> np.ndarray:
    """Of the one output, whatever a foreign graph calls it."""
    outputs = runner.run(feed_of(runner, batch))
    return outputs[runner.signature.outputs[0].name]


def metrics(counts: np.ndarray) -> dict[str, float]:
    """Every metric of METRICS.

    Args:
        counts: float64 [N, 3], columns TARGET, PREDICTED and LOSS.
    """
    import numpy as np

    target, predicted = (counts[:, column].astype(np.intp) for column in (TARGET, PREDICTED))
    mean = {name: float(scores.mean()) for name, scores in means(counts).items()}
    return {"accuracy": mean["accuracy"], "macro_f1": macro_f1(predicted, target), "loss": mean["loss"]}


def means(counts: np.ndarray) -> dict[str, np.ndarray]:
    """Per sample, float64 [N]: hits of 0 and 1, and cross-entropy."""
    import numpy as np

    return {"accuracy": (counts[:, TARGET] == counts[:, PREDICTED]).astype(np.float64), "loss": counts[:, LOSS]}


def macro_f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Mean F1 over the classes that occur in labels or predictions.

    Args:
        predictions: Class indices [N].
        labels: Class indices [N].
    """
    import numpy as np

    num_classes = int(max(predictions.max(), labels.max())) + 1
    hits = np.bincount(labels[predictions == labels], minlength=num_classes)
    both = np.bincount(labels, minlength=num_classes) + np.bincount(predictions, minlength=num_classes)
    return float(np.mean(2 * hits[both > 0] / both[both > 0]))


def _check(logits: np.ndarray, labels: np.ndarray) -> None:
    import numpy as np

    if logits.ndim != 2 or len(logits) != len(labels):
        raise ValueError(f"logits have the shape {logits.shape}, expected ({len(labels)}, classes)")
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise DataError(
            f"labels run from {labels.min()} to {labels.max()}, but the model has {logits.shape[1]} classes",
            hint="evaluate on data with the classes that the model was trained on",
        )
    if not np.isfinite(logits).all():
        raise DivergedError("the model's outputs are not finite", hint="lower the learning rate, or train in fp32")
