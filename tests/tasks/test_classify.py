"""Classification: loss, distillation and metrics against values worked out by hand or by scikit-learn."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, log_loss

from bmctl.errors import DataError, DivergedError
from bmctl.tasks import TASKS, classify

CONFIG = classify.Config()
RNG = np.random.default_rng(0)


def batches(logits: np.ndarray, labels: np.ndarray, *, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The 'inputs' are the logits: the part under test is the identity."""
    for start in range(0, len(labels), size):
        yield logits[start : start + size], labels[start : start + size]


def evaluate(logits: np.ndarray, labels: np.ndarray, *, size: int = 7) -> object:
    return classify.evaluate({"model": lambda x: x}, batches(logits, labels, size=size), config=CONFIG)


def test_numbers_agree_with_scikit_learn() -> None:
    logits = RNG.normal(size=(50, 4)).astype(np.float32) * 3
    labels = RNG.integers(0, 4, 50)
    found = evaluate(logits, labels)
    predicted = logits.argmax(axis=1)
    probabilities = torch.softmax(torch.from_numpy(logits).double(), dim=1).numpy()
    assert list(found.values) == list(classify.METRICS) == ["accuracy", "macro_f1", "loss"]
    assert (found.name, found.value) == ("accuracy", (predicted == labels).mean())
    assert np.array_equal(found.counts[:, :2], np.stack([labels, predicted], axis=1))
    assert np.array_equal(classify.means(found.counts)["accuracy"], predicted == labels)
    assert found.values == classify.metrics(found.counts)
    assert found.baseline == pytest.approx(np.bincount(labels).max() / 50)
    assert found.values["loss"] == pytest.approx(log_loss(labels, probabilities, labels=range(4)), rel=1e-5)
    assert found.values["macro_f1"] == pytest.approx(f1_score(labels, predicted, average="macro"))


def test_the_batches_do_not_matter() -> None:
    logits, labels = RNG.normal(size=(23, 3)).astype(np.float32), RNG.integers(0, 3, 23)
    one, many = evaluate(logits, labels, size=23), evaluate(logits, labels, size=4)
    assert np.array_equal(one.counts[:, :2], many.counts[:, :2])
    assert one.values["loss"] == pytest.approx(many.values["loss"], rel=1e-6)


def test_large_logits_do_not_overflow() -> None:
    found = evaluate(np.array([[1e5, 0.0], [-1e5, 1e5]], np.float32), np.array([0, 0]))
    assert found.values["loss"] == pytest.approx(1e5)


@pytest.mark.parametrize(
    ("logits", "labels", "error", "said"),
    [
        ([[0.0, np.nan]], [0], DivergedError, "not finite"),
        ([[0.0, np.inf]], [0], DivergedError, "not finite"),
        ([[0.0, 1.0]], [2], DataError, "labels run from 2 to 2, but the model has 2 classes"),
        ([[0.0, 1.0]], [-1], DataError, "labels run from -1"),
        ([[0.0, 1.0]], [0, 1], ValueError, "shape"),
        ([0.0, 1.0], [0, 1], ValueError, "shape"),
    ],
)
def test_nonsense_is_refused(logits: list, labels: list, error: type[Exception], said: str) -> None:
    part = np.array(logits, np.float32)
    with pytest.raises(error, match=said):
        classify.evaluate({"model": lambda x: part}, [(part, np.array(labels))], config=CONFIG)


def test_an_empty_split_is_refused() -> None:
    with pytest.raises(DataError, match="empty"):
        classify.evaluate({"model": lambda x: x}, [], config=CONFIG)


def named(logits: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"logits": logits}


def test_loss_smooths_and_is_taken_in_float32() -> None:
    outputs, targets = torch.randn(6, 5), torch.randint(0, 5, (6,))
    batch = {"input": torch.zeros(6), "label": targets}
    plain = torch.nn.functional.cross_entropy(outputs, targets)
    smooth = classify.Config(label_smoothing=0.1)
    assert torch.equal(classify.loss(named(outputs), batch, config=CONFIG), plain)
    spread = -torch.log_softmax(outputs, dim=1).mean(dim=1).mean()
    expected = float(0.9 * plain + 0.1 * spread)
    assert classify.loss(named(outputs), batch, config=smooth) == pytest.approx(expected, rel=1e-5)
    assert classify.loss(named(outputs.bfloat16()), batch, config=CONFIG).dtype == torch.float32


def test_distillation_is_tsquared_kl() -> None:
    student, teacher = torch.randn(6, 5), torch.randn(6, 5)
    p, q = torch.softmax(teacher / 4, dim=1), torch.softmax(student / 4, dim=1)
    expected = 16 * (p * (p.log() - q.log())).sum(dim=1).mean()
    found = classify.distill_loss(named(student), named(teacher), temperature=4.0)
    assert found == pytest.approx(float(expected), rel=1e-5)
    assert float(classify.distill_loss(named(teacher), named(teacher), temperature=2.0)) == pytest.approx(0, abs=1e-6)


def test_scores_are_per_sample() -> None:
    outputs = named(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    assert classify.score(outputs, {"label": torch.tensor([1, 1])}).tolist() == [1.0, 0.0]


@pytest.mark.parametrize("kind", TASKS)
def test_every_task_has_what_the_engine_calls(kind: str) -> None:
    task = TASKS[kind]
    assert task.Config.model_fields["kind"].default == kind
    model = torch.nn.Identity()
    assert list(task.parts(model).values()) == [model]
    assert task.GIVES and all(isinstance(name, str) for name in task.GIVES)
    for name in ("loss", "score", "distill_loss", "evaluate", "metrics", "means", "predict"):
        assert callable(getattr(task, name))
