"""Operators written anew for TensorRT: each against the original on ONNX Runtime, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from tests.graphs import handmade, quantized

from bmctl.backends import trt_contrib, trt_mend
from bmctl.backends.quantized_operators import DYNAMIC, STATIC, dequantized
from bmctl.backends.rewriting import Rule, Writer
from bmctl.backends.trt_mend import mend, prove
from bmctl.core.onnxgraph import read_signature
from bmctl.errors import UnsupportedError
from bmctl.schema import Span

AXES = {"batch": Span(min=1, opt=3, max=8), "tokens": Span(min=1, opt=5, max=8), "time": Span(min=1, opt=4, max=8)}


def mended(path: Path) -> tuple[onnx.ModelProto, list[str]]:
    data, done = mend(path, signature=read_signature(path), axes=AXES)
    return onnx.load_model_from_string(data), done


def error(path: Path) -> float:
    """How far the mended graph is from the original."""
    data, _ = mend(path, signature=read_signature(path), axes=AXES)
    return prove(path, data, signature=read_signature(path), axes=AXES)


@pytest.mark.parametrize(
    ("make", "most"),
    [
        (handmade.contrib_gelu, 1e-5),
        (handmade.contrib_norm, 1e-5),
        (handmade.contrib_matmul, 1e-5),
        (handmade.contrib_attention, 1e-5),
        (handmade.new_attention, 1e-5),
        (quantized.four_bits, 1e-5),
        (quantized.dynamic_matmul, 0.05),
        (quantized.dynamic_conv, 0.05),
        (quantized.dynamic_lstm, 0.15),
        (quantized.qoperator, 0.1),
        (quantized.qdq_default, 0.1),
        (quantized.qdq_unsigned, 0.1),
        (quantized.qdq_per_channel, 0.1),
        (quantized.qdq_unsigned_weights, 0.1),
    ],
)
def test_a_mended_graph_computes_the_same(make: Callable[[Path], None], most: float, tmp_path: Path) -> None:
    make(tmp_path / "g.onnx")
    model, done = mended(tmp_path / "g.onnx")
    assert {node.domain for node in model.graph.node} <= {"", "ai.onnx"}
    assert "on ONNX Runtime the mended graph is off by" in done[-1]
    assert error(tmp_path / "g.onnx") <= most


def test_what_needs_nothing_is_handed_on_byte_for_byte(tmp_path: Path) -> None:
    handmade.three_inputs(tmp_path / "g.onnx")
    data, done = mend(tmp_path / "g.onnx", signature=read_signature(tmp_path / "g.onnx"), axes=AXES)
    assert done == []
    assert data == (tmp_path / "g.onnx").read_bytes()


def test_later_tokens_are_hidden_where_attention_is_causal(tmp_path: Path) -> None:
    text = """g (float[batch,tokens,8] x) => (float[batch,tokens,8] y) {
        y = com.microsoft.Attention<num_heads=2, unidirectional=1>(x, w, b)
    }"""
    weights = {"w": handmade.normal(8, 24), "b": handmade.normal(24)}
    handmade.save(tmp_path / "g.onnx", text, extra=handmade.MICROSOFT, **weights)
    assert error(tmp_path / "g.onnx") < 1e-5


def test_keys_may_be_more_than_queries(tmp_path: Path) -> None:
    text = """g (float[batch,3,8] q, float[batch,tokens,8] k, float[batch,tokens,8] v) => (float[batch,3,8] y) {
        y = Attention<q_num_heads=2, kv_num_heads=2, is_causal=1>(q, k, v)
    }"""
    handmade.save(tmp_path / "g.onnx", text, opset=23, ir=11)
    assert error(tmp_path / "g.onnx") < 1e-5


def test_older_operator_sets(tmp_path: Path) -> None:
    """Axes as attributes, and no CastLike."""
    text = """g (float[batch,tokens,8] x) => (float[batch,tokens,8] y) {
        n = com.microsoft.SkipLayerNormalization(x, x, gamma, beta)
        y = com.microsoft.BiasGelu(n, beta)
    }"""
    weights = {"gamma": handmade.normal(8), "beta": handmade.normal(8) / 2}
    handmade.save(tmp_path / "g.onnx", text, opset=11, ir=7, extra=handmade.MICROSOFT, **weights)
    assert error(tmp_path / "g.onnx") < 1e-5


def test_what_is_not_rewritten_is_refused_by_name(tmp_path: Path) -> None:
    text = """g (float[batch,tokens,8] x, float[batch,tokens,8] z) => (float[batch,tokens,8] y, float[batch,t,1] mean) {
        y, mean = com.microsoft.SkipLayerNormalization(x, z, gamma)
    }"""
    handmade.save(tmp_path / "g.onnx", text, extra=handmade.MICROSOFT, gamma=handmade.normal(8))
    with pytest.raises(UnsupportedError, match=r"SkipLayerNormalization .* gives its mean or deviation") as caught:
        mended(tmp_path / "g.onnx")
    assert "onnxruntime" in caught.value.hint


def test_a_mending_that_is_wrong_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(write: Writer, node: onnx.NodeProto) -> str:
        write.op("Neg", node.input[0], out=node.output[0])
        return "turned round"

    rules: dict[str, Rule] = {"QuickGelu": wrong}
    monkeypatch.setattr(trt_contrib, "RULES", rules)
    text = "g (float[batch,4] x) => (float[batch,4] y) { y = com.microsoft.QuickGelu(x) }"
    handmade.save(tmp_path / "g.onnx", text, extra=handmade.MICROSOFT)
    with pytest.raises(UnsupportedError, match=r"turned round.* gives other outputs on ONNX Runtime"):
        mended(tmp_path / "g.onnx")


def test_a_mending_that_does_not_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    handmade.contrib_matmul(tmp_path / "g.onnx")
    with pytest.raises(UnsupportedError, match="does not run"):
        prove(tmp_path / "g.onnx", b"nothing", signature=read_signature(tmp_path / "g.onnx"), axes=AXES)


def test_a_graph_that_takes_no_noise_is_refused(tmp_path: Path) -> None:
    text = """g (float[batch,30] x, int64[3] shape) => (float[p,q,2] y) {
        r = Reshape(x, shape)
        m = MatMul(r, w)
        y = com.microsoft.QuickGelu(m)
    }"""
    handmade.save(tmp_path / "g.onnx", text, extra=handmade.MICROSOFT, w=handmade.normal(5, 2))
    with pytest.raises(UnsupportedError, match="takes none of the noise"):
        mended(tmp_path / "g.onnx")


def test_other_shapes_and_other_nans_are_errors() -> None:
    one = np.array([1.0, np.nan], np.float32)
    assert trt_mend._error(one, one) == 0
    assert trt_mend._error(one, np.array([np.nan, 1.0], np.float32)) == float("inf")
    assert trt_mend._error(one, one[:1]) == float("inf")
    assert trt_mend._error(np.array([1, 2]), np.array([1, 3])) == 0.5


def test_dynamic_integers_that_others_read_are_refused(tmp_path: Path) -> None:
    text = """g (float[batch,4] x) => (float[batch,4] y) {
        q, s, z = DynamicQuantizeLinear(x)
        y = Cast<to=1>(q)
    }"""
    handmade.save(tmp_path / "g.onnx", text)
    with pytest.raises(UnsupportedError, match="is read by Cast"):
        mended(tmp_path / "g.onnx")


def test_dynamic_integers_that_leave_the_graph_are_refused(tmp_path: Path) -> None:
    text = "g (float[batch,4] x) => (uint8[batch,4] q, float s, uint8 z) { q, s, z = DynamicQuantizeLinear(x) }"
    handmade.save(tmp_path / "g.onnx", text)
    with pytest.raises(UnsupportedError, match="gives what it makes to the caller"):
        mended(tmp_path / "g.onnx")


def test_integers_along_an_axis() -> None:
    values, scale = np.array([[1, 2], [3, 4]], np.int8), np.array([1.0, 10.0], np.float32)
    assert dequantized(values, scale, None, axis=1).tolist() == [[1, 20], [3, 40]]
    assert dequantized(values, scale, np.array([1, 2], np.int8), axis=0).tolist() == [[0, 1], [10, 20]]
    assert dequantized(values, scale[:1], np.array(1, np.int8), axis=0).tolist() == [[0, 1], [2, 3]]


def test_every_kind_is_told(tmp_path: Path) -> None:
    for make, what in ((quantized.dynamic_conv, DYNAMIC), (quantized.qoperator, STATIC)):
        make(tmp_path / "g.onnx")
        assert any(text.startswith(what) for text in mended(tmp_path / "g.onnx")[1])
