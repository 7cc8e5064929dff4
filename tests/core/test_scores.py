"""Evaluations on disk: every count to the last bit, as small as it goes, and nothing that does not fit is believed."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from tests.core import regression

from bmctl.core import scores
from bmctl.core.evaluation import Evaluation, Metric
from bmctl.tasks import TASKS, classify

KINDS = {**TASKS, regression.KIND: regression}
MEAN = SimpleNamespace(
    METRICS={"return": Metric("return")},
    metrics=lambda counts: {"return": float(counts[:, 0].mean())},
    means=lambda counts: {"return": counts[:, 0]},
)


def key(kind: str) -> scores.Key:
    return scores.Key(artifact="a" * 64, backend="b", data="d", split="test", limit=None, task={"kind": kind}, input={})


def written(path: Path, evaluation: Evaluation, **changes: Any) -> Path:
    content = scores.pack(evaluation, key=key(evaluation.task)).model_dump(mode="json")
    path.write_text(json.dumps({**content, **changes}))
    return path


def classified() -> Evaluation:
    rng = np.random.default_rng(0)
    counts = np.stack([rng.integers(0, 10, 333), rng.integers(0, 10, 333), rng.random(333, dtype=np.float32)], axis=1)
    return Evaluation("classify", counts, classify.metrics(counts), 0.1)


@pytest.mark.parametrize(
    "found",
    [
        classified(),
        regression.evaluation(regression.predicted()),
        regression.evaluation(regression.predicted(number=1)),
    ],
    ids=["accuracy", "rmse and f1", "one sample"],
)
def test_what_is_read_is_what_was_written(tmp_path: Path, found: Evaluation) -> None:
    filed = scores.read(written(tmp_path / "x.json", found), tasks=KINDS)
    assert np.array_equal(filed.evaluation.counts, found.counts)
    assert filed.evaluation.counts.dtype == np.float64
    assert list(filed.evaluation.values.items()) == list(found.values.items())
    assert (filed.evaluation.baseline, filed.key) == (found.baseline, key(found.task))


@pytest.mark.parametrize(
    ("column", "dtype"),
    [
        ([0, 1, 1], "bits"),
        ([0, 255, 3], "u1"),
        ([0, 256, 3], "u2"),
        ([0, 2**32 - 1], "u4"),
        ([-1, 5], "i4"),
        ([0.5, -(2.0**40)], "f4"),
        ([0.1, 2.0], "f8"),
        ([2.0**33 + 1, 0], "f8"),
    ],
)
def test_a_column_is_as_small_as_its_numbers_allow(column: list[float], dtype: str) -> None:
    counts = np.array(column, dtype=np.float64)[:, None]
    packed = scores.pack(Evaluation("mean", counts, MEAN.metrics(counts), 0.0), key=key("mean"))
    assert packed.counts[0].dtype == dtype
    assert np.array_equal(scores.unpack(packed, tasks={"mean": MEAN}).counts, counts)


def test_a_classifiers_file_is_small(tmp_path: Path) -> None:
    """A byte for the target, one for the prediction, four for the loss, in base64."""
    assert written(tmp_path / "x.json", classified()).stat().st_size < 333 * 6 * 4 / 3 + 700


def test_counts_that_are_not_finite_are_not_written() -> None:
    counts = np.array([[np.nan], [1.0]])
    with pytest.raises(ValueError, match="finite"):
        scores.pack(Evaluation("mean", counts, {"return": 1.0}, 0.0), key=key("mean"))


OF_ANOTHER = base64.b64encode(bytes(range(256)) + bytes(77)).decode()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"values": {"accuracy": 0.5, "macro_f1": 0.5, "loss": 0.5}}, "the counts make"),
        ({"values": {"accuracy": 0.5}}, "instead of accuracy, macro_f1, loss"),
        ({"num_samples": 332}, "333 bytes of u1 for 332 samples"),
        ({"counts": []}, "no columns"),
        ({"counts": [{"dtype": "u1", "data": OF_ANOTHER}] * 3}, "the counts make 1.0"),
        ({"counts": [{"dtype": "bits", "data": "AAAA"}]}, "3 bytes of bits"),
        ({"counts": [{"dtype": "u1", "data": "*"}]}, "counts"),
        ({"counts": [{"dtype": "O", "data": ""}]}, "dtype"),
        ({"key": key("nope").model_dump()}, "no task 'nope'"),
        ({"format": 1}, "format"),
    ],
    ids=["values", "names", "number", "none", "flipped", "bits", "base64", "dtype", "task", "format"],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        scores.read(written(tmp_path / "x.json", classified(), **changes), tasks=KINDS)


def test_counts_of_another_task_are_refused(tmp_path: Path) -> None:
    found = regression.evaluation(regression.predicted())
    with pytest.raises(ValueError, match=r"counts|values"):
        scores.read(written(tmp_path / "x.json", found, key=key("classify").model_dump()), tasks=KINDS)
