"""Image classification: one label per image; cross-entropy, accuracy, and macro F1 beside it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Literal

from bmctl.core.evaluation import SHARE, Evaluation, Metric
from bmctl.schema import Ratio, Strict

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

    from bmctl.tasks import Part

METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (Metric("accuracy", unit=SHARE), Metric("macro_f1", unit=SHARE), Metric("loss", "lower", "nats"))
}
TARGET, PREDICTED, LOSS = range(3)
"""Columns of an evaluation's counts."""


class Config(Strict):
    kind: Literal["classify"] = "classify"
    label_smoothing: Ratio = 0.0


def loss(outputs: torch.Tensor, targets: torch.Tensor, *, config: Config) -> torch.Tensor:
    """Mean cross-entropy, in float32 whatever the precision of the forward pass.

    Args:
        outputs: Logits [N, K].
        targets: int64 [N].
        config: Label smoothing.
    """
    from torch.nn import functional

    return functional.cross_entropy(outputs.float(), targets, label_smoothing=config.label_smoothing)


def score(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """float32 [N]: 1 where the largest logit is the target's, else 0."""
    return (outputs.argmax(dim=1) == targets).float()


def distill_loss(student: torch.Tensor, teacher: torch.Tensor, *, temperature: float) -> torch.Tensor:
    """T^2 KL(teacher || student), both softened by T, mean over samples.

    Args:
        student: Logits [N, K].
        teacher: Logits [N, K].
        temperature: T.

    Source: Hinton, Vinyals, Dean 2015, https://arxiv.org/abs/1503.02531
    """
    from torch.nn import functional

    log_student = functional.log_softmax(student.float() / temperature, dim=1)
    log_teacher = functional.log_softmax(teacher.float() / temperature, dim=1)
    return temperature**2 * functional.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)


def parts(model: nn.Module) -> dict[str, nn.Module]:
    """The graphs to export, by name: a classifier is one."""
    return {"model": model}


def evaluate(
    parts: Mapping[str, Part], batches: Iterable[tuple[np.ndarray, np.ndarray]], *, config: Config
) -> Evaluation:
    """Accuracy, macro F1 and the loss (without label smoothing) on one split; the trivial predictor is the majority.

    Args:
        parts: ``{"model": f}``, f from float32 [n, C, H, W] to logits [n, K].
        batches: Inputs float32 [n, C, H, W] and labels int64 [n].
        config: Not used: smoothing is for training.

    Raises:
        DataError: No samples, or a label outside of the model's K classes.
        DivergedError: A logit is nan or infinite.
    """
    import numpy as np

    from bmctl.errors import DataError

    model = parts["model"]
    rows = []
    for x_nCHW, labels in batches:
        logits = np.asarray(model(x_nCHW)).astype(np.float32, copy=False)
        _check(logits, labels)
        shifted = logits - logits.max(axis=1, keepdims=True)
        losses = np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(labels)), labels]
        rows.append(np.stack([labels, logits.argmax(axis=1), losses], axis=1, dtype=np.float64))
    if not rows:
        raise DataError("there is nothing to evaluate: the split is empty")
    counts = np.concatenate(rows)
    majority = np.bincount(counts[:, TARGET].astype(np.intp)).max() / len(counts)
    return Evaluation("classify", counts, metrics(counts), baseline=float(majority))


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

    from bmctl.errors import DataError, DivergedError

    if logits.ndim != 2 or len(logits) != len(labels):
        raise ValueError(f"logits have the shape {logits.shape}, expected ({len(labels)}, classes)")
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise DataError(
            f"labels run from {labels.min()} to {labels.max()}, but the model has {logits.shape[1]} classes",
            hint="evaluate on data with the classes that the model was trained on",
        )
    if not np.isfinite(logits).all():
        raise DivergedError("the model's outputs are not finite", hint="lower the learning rate, or train in fp32")
