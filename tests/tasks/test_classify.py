"""Classification: loss, distillation and metrics against values worked out by hand or by scikit-learn."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Self

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, log_loss
from tests.specs import image_spec

from bmctl.core.columns import Class, Picture, Text
from bmctl.core.evaluation import Evaluation
from bmctl.core.runner import Bounds
from bmctl.errors import DataError, DivergedError
from bmctl.schema import Signature, TensorSpec
from bmctl.tasks import TASKS, Part, Task, classify, parts_of, writes

CONFIG = classify.Config()
FACTS = classify.Facts(class_names=("a", "b", "c", "d", "e", "f"))
RNG = np.random.default_rng(0)


class Echo:
    """A runner whose logits are its input, whatever a foreign graph may call the two."""

    bounds: Mapping[str, Bounds] = {}

    def __init__(self, *, takes: str = "input", gives: str = "logits") -> None:
        taken, given = (TensorSpec(name=name, dtype="float32", shape=("batch", "classes")) for name in (takes, gives))
        self.signature = Signature(inputs=(taken,), outputs=(given,))

    def run(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {self.signature.outputs[0].name: feed[self.signature.inputs[0].name]}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        pass


def batches(logits: np.ndarray, labels: np.ndarray, *, size: int) -> Iterator[dict[str, np.ndarray]]:
    """What the model takes are its logits."""
    for start in range(0, len(labels), size):
        part = slice(start, start + size)
        yield {"input": logits[part], "label": labels[part]}


def evaluate(logits: np.ndarray, labels: np.ndarray, *, size: int = 7) -> Evaluation:
    return classify.evaluate({"model": Echo()}, batches(logits, labels, size=size), config=CONFIG, facts=FACTS)


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
        classify.evaluate({"model": Echo()}, [{"input": part, "label": np.array(labels)}], config=CONFIG, facts=FACTS)


def test_an_empty_split_is_refused() -> None:
    with pytest.raises(DataError, match="empty"):
        classify.evaluate({"model": Echo()}, [], config=CONFIG, facts=FACTS)


def test_a_foreign_graph_may_call_its_tensors_anything() -> None:
    logits, labels = RNG.normal(size=(9, 3)).astype(np.float32), RNG.integers(0, 3, 9)
    foreign = {"model": Echo(takes="x:0", gives="probs")}
    found = classify.evaluate(foreign, batches(logits, labels, size=4), config=CONFIG, facts=FACTS)
    assert np.array_equal(found.counts, evaluate(logits, labels).counts)


def test_predictions_are_ranked_and_named() -> None:
    batch = {"input": np.array([[0, 3, 1, 3, 2, -1], [9, 0, 0, 0, 0, 0]], np.float32)}
    first, second = classify.predict({"model": Echo()}, batch, config=CONFIG, facts=FACTS)
    assert [one["class_name"] for one in first["top"]] == ["b", "d", "e", "c", "a"], "equal scores keep their order"
    assert first["class_index"] == 1 and first["score"] == first["top"][1]["score"]
    want = torch.softmax(torch.from_numpy(batch["input"]).double(), dim=1)[0, [1, 3, 4, 2, 0]]
    assert [one["score"] for one in first["top"]] == pytest.approx(want.tolist(), abs=1e-6)
    assert classify.words(second) == "a 99.9%"
    assert set(classify.COLUMNS) <= set(first)


def test_predictions_without_facts_and_without_sense() -> None:
    (one,) = classify.predict({"model": Echo()}, {"input": np.eye(1, 3, 2, np.float32)}, config=CONFIG, facts=None)
    assert one["class_name"] == "2"
    with pytest.raises(DivergedError, match="nan or inf"):
        list(classify.predict({"model": Echo()}, {"input": np.full((1, 3), np.nan)}, config=CONFIG, facts=FACTS))


def test_the_data_say_which_classes_there_are() -> None:
    facts = classify.facts({"picture": Picture(), "label": Class(names=("cat", "dog"))}, CONFIG, {})
    assert facts.class_names == ("cat", "dog") and classify.told(facts) == {"num_classes": 2}
    labels = classify.targets({"label": [1, 0, 1]}, config=CONFIG, facts=facts)["label"]
    assert labels.tolist() == [1, 0, 1] and labels.dtype == np.int64
    with pytest.raises(DataError, match="its samples have text, and no label"):
        classify.facts({"text": Text()}, CONFIG, {})


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
    assert task.GIVES and all(isinstance(name, str) for name in task.GIVES)
    assert task.METRICS and task.COLUMNS
    more = {"predict": {"decode"}} if writes(kind) else {}
    for name, _ in inspect.getmembers(Task, inspect.isfunction):
        if not name.startswith("_"):
            assert inspect.signature(getattr(task, name)).parameters.keys() == (
                inspect.signature(getattr(Task, name)).parameters.keys() - {"self"} | more.get(name, set())
            ), name


def test_a_classifier_is_one_graph() -> None:
    given = image_spec("bmctl:mlp").given
    signatures, model = classify.signatures(given, FACTS), torch.nn.Identity()
    assert signatures["model"].inputs == given
    (logits,) = signatures["model"].outputs
    assert (logits.name, logits.shape, logits.role) == ("logits", ("batch", 6), "scores")
    assert parts_of(classify, model, signatures) == {"model": Part(model, signatures["model"])}
    assert parts_of(None, model, signatures) == {"model": Part(model, signatures["model"])}, "nobody knows the task"
