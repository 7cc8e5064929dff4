"""Noise from a signature: repeatable, of the right types, and in range where the graph says what the range is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from tests.graphs import handmade

from bmctl.core.noise import STYLES, Feed, axis_size, complete_axes, fitting, index_limits, noise
from bmctl.errors import DataError
from bmctl.schema import Signature, Span, TensorSpec


def signed(*specs: TensorSpec) -> Signature:
    return Signature(inputs=specs, outputs=())


IDS = TensorSpec(name="ids", dtype="int64", shape=("batch", "tokens"))
MASK = TensorSpec(name="attention_mask", dtype="int64", shape=("batch", "past + tokens"))
SIZES = {"batch": 4, "tokens": 6, "past": 2}


def test_the_same_seed_gives_the_same_arrays() -> None:
    x = TensorSpec(name="x", dtype="float32", shape=("batch", 3))
    one, same, other = (noise(signed(x), sizes=SIZES, seed=seed)["x"] for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, other)
    assert one.shape == (4, 3)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int8", "uint8", "int32", "int64", "bool"])
def test_every_type_is_drawn(dtype: str) -> None:
    spec = TensorSpec(name="x", dtype=dtype, shape=("batch", 40))
    array = noise(signed(spec), sizes={"batch": 8})["x"]
    assert array.dtype == np.dtype(dtype)
    assert len(np.unique(array)) > 1
    assert array.dtype.kind == "f" or array.min() >= 0


def test_what_indexes_a_table_stays_in_it() -> None:
    ids = noise(signed(IDS), sizes={"batch": 100, "tokens": 10}, limits={"ids": 7})["ids"]
    assert ids.min() == 0
    assert ids.max() == 6


def test_masks_hold_ones_and_then_zeros() -> None:
    mask = noise(signed(IDS, MASK), sizes=SIZES)["attention_mask"]
    assert mask.shape == (4, 8)
    assert mask[0].all()
    assert (mask[:, 0] == 1).all()
    assert (np.diff(mask, axis=1) <= 0).all()
    assert mask.min() == 0


def test_an_axis_may_be_empty() -> None:
    past = TensorSpec(name="keys", dtype="float32", shape=("batch", "past", 8))
    assert noise(signed(past), sizes={"batch": 2, "past": 0})["keys"].shape == (2, 0, 8)


def test_an_axis_that_nobody_knows() -> None:
    with pytest.raises(DataError, match="how large the axis 'tokens' is"):
        noise(signed(IDS), sizes={"batch": 2})
    assert axis_size("past + 1", {"past": 4}) == 5


def test_sums_follow_their_parts() -> None:
    axes = {"past": Span(min=0, opt=4, max=8), "tokens": Span(min=1, opt=2, max=3)}
    assert complete_axes(signed(IDS, MASK), axes)["past + tokens"] == Span(min=1, opt=6, max=11)


def test_tables_are_found_in_the_graph(tmp_path: Path) -> None:
    handmade.gathers(tmp_path / "g.onnx")
    model = onnx.load(tmp_path / "g.onnx")
    assert index_limits(model) == {"user": 50, "item": 7}
    model.graph.initializer.pop()  # the table of items is computed now
    assert index_limits(model) == {"user": 50}


def test_styles_are_tried_in_turn() -> None:
    x = TensorSpec(name="x", dtype="float32", shape=("batch", 12))
    shape = TensorSpec(name="shape", dtype="int64", shape=(2,))

    def reshapes(feed: Feed) -> None:
        feed["x"].reshape(feed["shape"])

    style, feed = fitting(reshapes, signed(x, shape), sizes={"batch": 3}, limits={})
    assert style == "shape"
    assert feed["shape"].tolist() == [3, 12]


def test_the_first_error_is_raised_where_nothing_fits() -> None:
    calls = []

    def never(feed: Feed) -> None:
        calls.append(feed)
        raise RuntimeError(f"call {len(calls)}")

    with pytest.raises(RuntimeError, match="call 1"):
        fitting(never, signed(IDS), sizes=SIZES, limits={})
    assert 1 < len(calls) <= len(STYLES)
