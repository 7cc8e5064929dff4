"""What axes really are: free, fixed, tied, sums, misnamed; which one holds samples; and which sizes they take."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from tests.graphs import handmade

from bmctl.engine.intake.trial import Settled, settle
from bmctl.errors import UnsupportedError, UsageError
from bmctl.schema import Span


@pytest.fixture
def settled(tmp_path: Path) -> Callable[..., Settled]:
    def run(make: Callable[[Path], None], **given: object) -> Settled:
        make(tmp_path / "g.onnx")
        return settle(tmp_path / "g.onnx", **given)  # type: ignore[arg-type]

    return run


def shapes(found: Settled) -> dict[str, tuple[int | str, ...]]:
    return {spec.name: spec.shape for spec in (*found.signature.inputs, *found.signature.outputs)}


def test_an_axis_that_works_at_one_size_is_fixed(settled: Callable[..., Settled]) -> None:
    found = settled(handmade.called_free)
    assert shapes(found) == {"x": ("batch", 6), "y": ("batch", 2)}
    assert found.axes == {}
    assert "'width' is called free, and the graph takes it at 6 only" in " ".join(found.notes)


def test_one_other_size_does_not_make_an_axis_free(tmp_path: Path) -> None:
    """Steps of two: 39 and 40 samples of sound both give the 20 frames that positions are added to."""
    text = """g (float[batch,1,frames] x) => (float[batch,1,20] y) {
        c = Conv<kernel_shape=[3], strides=[2], pads=[1,1]>(x, k)
        y = Add(c, places)
    }"""
    handmade.save(tmp_path / "g.onnx", text, k=handmade.normal(1, 1, 3), places=handmade.normal(20))
    found = settle(tmp_path / "g.onnx")
    assert shapes(found)["x"] == ("batch", 1, 40)


def test_axes_that_must_be_equal_get_one_name(settled: Callable[..., Settled]) -> None:
    found = settled(handmade.tied_axes)
    assert shapes(found) == {"x": ("batch", "a", 4), "z": ("batch", "a", 4), "y": ("batch", "a", 3)}
    assert "always of one size" in " ".join(found.notes)


def test_one_name_for_several_sizes_is_split(settled: Callable[..., Settled]) -> None:
    found = settled(handmade.lying_names)
    assert shapes(found)["x"] == ("batch", 4)
    assert shapes(found)["t"] == ("batch", 2)
    assert shapes(found)["y"][0] == "batch"


def test_a_sum_of_axes_is_called_by_its_parts(settled: Callable[..., Settled]) -> None:
    found = settled(handmade.kv_cache)
    assert shapes(found)["keys"] == ("batch", "tokens + past", 8)
    assert found.axes["past"].min == 0


def test_an_input_may_be_as_long_as_two_others(tmp_path: Path) -> None:
    text = """g (float[batch,a,4] x, float[batch,b,4] z, float[batch,c,4] m) => (float[batch,c,4] y) {
        j = Concat<axis=1>(x, z)
        y = Mul(j, m)
    }"""
    handmade.save(tmp_path / "g.onnx", text)
    found = settle(tmp_path / "g.onnx")
    assert shapes(found)["m"] == ("batch", "a + b", 4)
    assert shapes(found)["y"] == ("batch", "a + b", 4)


def test_samples_lie_where_they_are_computed_alone(settled: Callable[..., Settled]) -> None:
    found = settled(handmade.time_first)
    assert shapes(found) == {"x": ("x.0", "batch", 4), "y": ("x.0", 1, "batch", 5), "h": (1, "batch", 5)}


def test_a_first_axis_that_mixes_is_no_batch(settled: Callable[..., Settled]) -> None:
    found = settled(handmade.scan)
    assert "batch" not in found.signature.axes


def test_nothing_that_differs_in_every_call(settled: Callable[..., Settled]) -> None:
    with pytest.raises(UnsupportedError, match="another one in every call"):
        settled(handmade.random_numbers)


def test_sizes_end_where_the_graph_ends(tmp_path: Path) -> None:
    """50 positions are known: that many tokens at most."""
    text = """g (int64[batch,tokens] ids) => (float[batch,tokens,8] y) {
        w = Gather(table, ids)
        s = Shape<start=1>(ids)
        p = Slice(places, zero, s, zero)
        y = Add(w, p)
    }"""
    weights = {"table": handmade.normal(20, 8), "places": handmade.normal(50, 8), "zero": np.array([0])}
    handmade.save(tmp_path / "g.onnx", text, **weights)
    assert settle(tmp_path / "g.onnx").axes == {"tokens": Span(min=1, opt=32, max=50)}


def test_the_users_sizes_are_taken_and_tried(settled: Callable[..., Settled]) -> None:
    asked = {"height": Span(min=8, opt=16, max=24), "width": Span(min=8, opt=8, max=8)}
    found = settled(handmade.resize_to, axes=asked)
    assert found.axes == asked
    assert not any("nobody says" in text for text in found.notes)
    with pytest.raises(UsageError, match="has no free axis 'depth'"):
        settled(handmade.resize_to, axes={"depth": Span()})


def test_sizes_that_do_not_work_are_refused(tmp_path: Path) -> None:
    text = "g (float[batch,3,height,16] x) => (float[batch,2,a,b] y) { y = Conv(x, k) }"
    handmade.save(tmp_path / "g.onnx", text, k=handmade.normal(2, 3, 9, 9))
    with pytest.raises(UnsupportedError, match="does not run where 'height' is 4"):
        settle(tmp_path / "g.onnx", axes={"height": Span(min=4, opt=32, max=32)})


def test_a_sample_says_what_noise_cannot(tmp_path: Path) -> None:
    """Rows of five are taken, and the shape is an input: nobody guesses that."""
    text = "g (float[batch,30] x, int64[3] shape) => (float[p,q,2] y) { r = Reshape(x, shape)\n y = MatMul(r, w) }"
    handmade.save(tmp_path / "g.onnx", text, w=handmade.normal(5, 2))
    with pytest.raises(UnsupportedError, match="runs on no noise") as caught:
        settle(tmp_path / "g.onnx")
    assert "--sample" in caught.value.hint
    sample = {"x": np.zeros((4, 30), np.float32), "shape": np.array([4, 6, 5])}
    found = settle(tmp_path / "g.onnx", sample=sample)
    assert shapes(found)["x"][1] == 30


def test_an_operator_that_no_runtime_has(tmp_path: Path) -> None:
    handmade.save(tmp_path / "g.onnx", "g (float[batch,4] x) => (float[batch,4] y) { y = com.microsoft.Nonsense(x) }",
                  extra=handmade.MICROSOFT)  # fmt: skip
    assert onnx.load(tmp_path / "g.onnx").graph.node
    with pytest.raises(UnsupportedError, match="ONNX Runtime, which tells what"):
        settle(tmp_path / "g.onnx")
