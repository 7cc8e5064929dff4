"""Several outputs at once: floats by error, scores by their largest too, integers and booleans by share."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bmctl.engine.artifacts.parity import Parity, compare, compare_all
from bmctl.schema import TensorSpec


def spec(name: str, dtype: str = "float32", role: str = "value") -> TensorSpec:
    return TensorSpec.model_validate({"name": name, "dtype": dtype, "shape": ("batch", 3), "role": role})


X = np.random.default_rng(0).standard_normal((4, 3)).astype(np.float32)
ASKED = {"tolerance": 1e-3, "min_agreement": 1.0, "source": "test"}


def judged(reference: Any, got: Any) -> Parity:
    arrays = (np.asarray(array, np.float32) for array in (reference, got))
    return compare(*arrays, tolerance=0.1, min_agreement=1.0, source="test")


def test_scores_by_their_largest_and_by_error() -> None:
    assert judged([[1, 10], [10, 1]], [[1, 10.5], [10, 1]]).passed
    assert judged([[1, 10]], [[1, 12]]).error == pytest.approx(0.2) and not judged([[1, 10]], [[1, 12]]).passed
    flipped = judged([[9, 10], [10, 0]], [[10, 9.5], [10, 0]])
    assert flipped.agreement == 0.5 and not flipped.passed
    assert judged([[9.9, 10]], [[10, 9.9]]).agreement == 1.0, "a tie"
    for bad in ([[np.nan, 10]], [[1, 10], [1, 10]], [[np.inf, 10]]):
        assert not judged([[1, 10]], bad).passed


def test_the_worst_output_is_told() -> None:
    outputs = (spec("a"), spec("b"))
    found = compare_all({"a": X, "b": X}, {"a": X, "b": X + 1}, outputs=outputs, **ASKED)  # type: ignore[arg-type]
    assert not found.passed
    assert found.output == "b"
    assert str(found).startswith("b: error")
    assert compare_all({"a": X, "b": X}, {"a": X, "b": X}, outputs=outputs, **ASKED).passed  # type: ignore[arg-type]


def test_one_output_of_scores_is_compared_as_ever() -> None:
    got = X + np.float32(1e-5)
    one = compare_all({"y": X}, {"y": got}, outputs=(spec("y", role="scores"),), **ASKED)  # type: ignore[arg-type]
    assert one == compare(X, got, **ASKED)  # type: ignore[arg-type]


def test_the_largest_counts_for_scores_alone() -> None:
    right, got = np.array([[0.0, 1.0, 9.0]], np.float32), np.array([[1.0, 0.0, 9.0]], np.float32)
    right[0, 2] = got[0, 2] = -9
    asked = {"tolerance": 0.2, "min_agreement": 1.0, "source": "test"}
    for role, passed in (("value", True), ("scores", False)):
        found = compare_all({"y": right}, {"y": got}, outputs=(spec("y", role=role),), **asked)  # type: ignore[arg-type]
        assert found.passed is passed


@pytest.mark.parametrize("dtype", ["int64", "bool", "int32"])
def test_integers_and_booleans_go_by_share(dtype: str) -> None:
    right = np.zeros((4, 5), dtype)
    got = right.copy()
    got[0, 0] = 1
    for least, passed in ((1.0, False), (0.9, True)):
        asked = {"tolerance": 1e-3, "min_agreement": least, "source": "test"}
        found = compare_all({"y": right}, {"y": got}, outputs=(spec("y", dtype),), **asked)  # type: ignore[arg-type]
        assert found.passed is passed
        assert found.agreement == 0.95


def test_bytes_may_be_off_by_a_step() -> None:
    right = np.full((4, 5), 200, np.uint8)
    asked = {"tolerance": 0.15, "min_agreement": 0.9, "source": "test"}
    assert compare_all({"y": right}, {"y": right + 1}, outputs=(spec("y", "uint8"),), **asked).passed  # type: ignore[arg-type]


def test_nan_in_both_in_one_place_is_equal() -> None:
    right = X.copy()
    right[0, 0], right[1, 1] = np.nan, np.inf
    for role, passed in (("state", True), ("value", True), ("scores", False)):
        found = compare_all({"y": right}, {"y": right}, outputs=(spec("y", role=role),), **ASKED)  # type: ignore[arg-type]
        assert found.passed is passed
    moved = right.copy()
    moved[0, 0], moved[0, 1] = 0, np.nan
    assert not compare_all({"y": right}, {"y": moved}, outputs=(spec("y"),), **ASKED).passed  # type: ignore[arg-type]


def test_nothing_but_nan_is_no_proof() -> None:
    right = np.full_like(X, np.nan)
    assert not compare_all({"y": right}, {"y": right}, outputs=(spec("y"),), **ASKED).passed  # type: ignore[arg-type]


def test_a_missing_output_and_another_shape_never_pass() -> None:
    for got in ({}, {"y": X[:, :2]}):
        assert not compare_all({"y": X}, got, outputs=(spec("y"),), **ASKED).passed  # type: ignore[arg-type]


def test_an_empty_output_is_equal() -> None:
    empty = np.zeros((0, 3), np.float32)
    assert compare_all({"y": empty}, {"y": empty}, outputs=(spec("y"),), **ASKED).passed  # type: ignore[arg-type]
