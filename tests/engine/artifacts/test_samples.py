"""What foreign graphs are compared and timed on: the user's arrays, or noise at two sizes of every axis."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tests.graphs import handmade

from bmctl.core.onnxgraph import read_signature
from bmctl.engine.artifacts.graphrunner import open_reference
from bmctl.engine.artifacts.samples import foreign_feeds, of_batch, read_sample
from bmctl.errors import DataError, UnsupportedError
from bmctl.schema import Signature, Span, TensorSpec

PAIR = Signature(
    inputs=(
        TensorSpec(name="x", dtype="float32", shape=(1, "batch", 2)),
        TensorSpec(name="k", dtype="int64", shape=(3,)),
    ),
    outputs=(),
)


def feed(num: int) -> dict[str, np.ndarray]:
    return {"x": np.arange(2.0 * num, dtype=np.float32).reshape(1, num, 2), "k": np.arange(3)}


def test_a_sample_is_read_by_names(tmp_path: Path) -> None:
    np.savez(tmp_path / "s.npz", **feed(4))
    found = read_sample(tmp_path / "s.npz", signature=PAIR)
    np.testing.assert_array_equal(found["x"], feed(4)["x"])


@pytest.mark.parametrize(
    ("arrays", "reason"),
    [
        ({"x": feed(1)["x"]}, r"named \['x'\], expected \['k', 'x'\]"),
        ({"x": feed(1)["x"].astype(np.float64), "k": np.arange(3)}, "is float64, expected float32"),
        ({"x": feed(1)["x"], "k": np.arange(4)}, r"has the shape \[4\]"),
    ],
)
def test_a_sample_that_does_not_fit(arrays: dict[str, np.ndarray], reason: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "s.npz", **arrays)
    with pytest.raises(DataError, match=reason) as caught:
        read_sample(tmp_path / "s.npz", signature=PAIR)
    assert "x=float32[1, batch, 2]" in caught.value.hint


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not a zip", b"text"])
def test_a_sample_that_is_no_npz(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "s.npz").write_bytes(content)
    with pytest.raises(DataError, match=r"is no \.npz"):
        read_sample(tmp_path / "s.npz", signature=PAIR)


@pytest.mark.parametrize("size", [2, 4, 9])
def test_samples_over_and_over(size: int) -> None:
    found = of_batch(feed(4), signature=PAIR, size=size)
    assert found["x"].shape == (1, size, 2)
    assert found["k"].shape == (3,)
    np.testing.assert_array_equal(found["x"][0, size - 1], feed(4)["x"][0, (size - 1) % 4])


def test_a_fixed_batch_stays() -> None:
    fixed = Signature(inputs=(TensorSpec(name="x", dtype="float32", shape=(3, 2)),), outputs=())
    arrays = {"x": np.zeros((3, 2), np.float32)}
    assert of_batch(arrays, signature=fixed, size=64) is arrays


def test_noise_has_the_usual_and_the_smallest_sizes(tmp_path: Path) -> None:
    handmade.kv_cache(tmp_path / "g.onnx")
    signature = read_signature(tmp_path / "g.onnx")
    axes = {"batch": Span(), "tokens": Span(min=1, opt=5, max=9), "past": Span(min=0, opt=3, max=9)}
    with open_reference(tmp_path / "g.onnx", signature=signature) as (runner, _):
        usual, small = foreign_feeds(tmp_path / "g.onnx", runner, signature=signature, axes=axes)
        assert usual["past_keys"].shape == (8, 3, 8)
        assert small["past_keys"].shape == (1, 0, 8)
        axes["tokens"] = Span(min=0, opt=0, max=1)
        with pytest.raises(UnsupportedError, match="takes no noise where its axes are") as caught:
            foreign_feeds(tmp_path / "g.onnx", _Refusing(), signature=signature, axes=axes)  # type: ignore[arg-type]
    assert "--axis" in caught.value.hint


class _Refusing:
    def run(self, feed: object) -> None:
        raise RuntimeError("no")
