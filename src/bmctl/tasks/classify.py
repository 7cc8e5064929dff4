"""Classification: one label per sample, be it an image or a text; cross-entropy, accuracy, and macro F1 beside it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from bmctl.core.columns import Class, Column
from bmctl.core.evaluation import Evaluation
from bmctl.errors import DataError
from bmctl.schema import Many, Ratio, Strict

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

    from bmctl.tasks import Part

METRIC = "accuracy"
LABEL = "label"


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


def needs(config: Config) -> tuple[str, ...]:
    """Columns that the targets are taken from: the model does not see them."""
    return (LABEL,)


def facts(columns: Mapping[str, Column], config: Config) -> Facts:
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


def told(facts: Facts) -> dict[str, int]:
    """What the model has to know: ``num_classes``."""
    return {"num_classes": len(facts.class_names)}


def balance(config: Config) -> str | None:
    """The column of which `limit` takes the classes in equal numbers."""
    return LABEL


def targets(records: Mapping[str, Sequence[Any]], *, config: Config, facts: Facts) -> dict[str, np.ndarray]:
    """``label``: int64 [n]."""
    import numpy as np

    return {LABEL: np.asarray(records[LABEL], np.int64)}


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
    """Accuracy on one split, with the loss (without label smoothing) and macro F1 in `extra`.

    Args:
        parts: ``{"model": f}``, f from float32 [n, C, H, W] to logits [n, K].
        batches: Inputs float32 [n, C, H, W] and labels int64 [n].
        config: Not used: smoothing is for training.

    Raises:
        DataError: No samples, or a label outside of the model's K classes.
        DivergedError: A logit is nan or infinite.
    """
    import numpy as np

    model = parts["model"]
    predicted, target, losses = [], [], []
    for x_nCHW, labels in batches:
        logits = np.asarray(model(x_nCHW)).astype(np.float32, copy=False)
        _check(logits, labels)
        predicted.append(logits.argmax(axis=1))
        target.append(labels)
        shifted = logits - logits.max(axis=1, keepdims=True)
        losses.append(np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(len(labels)), labels])
    if not target:
        raise DataError("there is nothing to evaluate: the split is empty")
    predictions, labels = np.concatenate(predicted), np.concatenate(target)
    scores = (predictions == labels).astype(np.float32)
    return Evaluation(
        metric=METRIC,
        value=float(scores.mean(dtype=np.float64)),
        scores=scores,
        baseline=float(np.bincount(labels).max() / len(labels)),
        extra={
            "loss": float(np.concatenate(losses).mean(dtype=np.float64)),
            "macro_f1": macro_f1(predictions, labels),
        },
    )


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

    from bmctl.errors import DivergedError

    if logits.ndim != 2 or len(logits) != len(labels):
        raise ValueError(f"logits have the shape {logits.shape}, expected ({len(labels)}, classes)")
    if labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise DataError(
            f"labels run from {labels.min()} to {labels.max()}, but the model has {logits.shape[1]} classes",
            hint="evaluate on data with the classes that the model was trained on",
        )
    if not np.isfinite(logits).all():
        raise DivergedError("the model's outputs are not finite", hint="lower the learning rate, or train in fp32")
