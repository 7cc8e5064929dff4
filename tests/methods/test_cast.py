"""Half precision: half the bytes, fp32 at the borders, and no value lost without a word."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from tests.methods.graphs import make_context, run, samples, save, save_residual

from bmctl.backends import BACKENDS
from bmctl.core import onnxgraph
from bmctl.engine.artifacts.graphrunner import open_graph, open_reference
from bmctl.errors import RecipeError, UnsupportedError
from bmctl.methods import cast
from bmctl.schema import Span

HALF = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
ERROR = {"fp16": 2e-3, "bf16": 3e-2}


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_residual(tmp_path_factory.mktemp("fp32") / "model.onnx")


@pytest.fixture(params=["fp16", "bf16"])
def dtype(request: pytest.FixtureRequest) -> str:
    return request.param


def apply(graph: Path, out: Path, **config: object) -> dict[str, object]:
    return cast.apply(graph, cast.Config(**config), make_context([]), out=out)


def test_weights_and_operators_are_half_and_borders_are_not(graph: Path, dtype: str, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    meta = apply(graph, out, dtype=dtype)
    model = onnx.load(out)
    assert {t.data_type for t in model.graph.initializer} == {HALF[dtype]}
    onnx.shape_inference.infer_shapes(model, strict_mode=True, check_type=True)
    assert [node.op_type for node in model.graph.node].count("Cast") == 2
    signature = onnxgraph.read_signature(out)
    borders = [(spec.name, spec.dtype) for spec in (*signature.inputs, *signature.outputs)]
    assert borders == [("input", "float32"), ("logits", "float32")]
    assert out.stat().st_size < 0.6 * graph.stat().st_size
    assert meta["precision"] == dtype == onnxgraph.precision_of(out) and meta["num_kept"] == 0


def test_close_to_fp32(graph: Path, dtype: str, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    apply(graph, out, dtype=dtype)
    want, got = run(graph, samples()), run(out, samples(), backend="openvino")
    error = np.abs(got - want).max() / np.abs(want).max()
    assert 0 < error < ERROR[dtype]


def test_bf16_without_kernels_is_computed_in_fp32(graph: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    meta = apply(graph, out, dtype="bf16")
    assert any("ONNX Runtime has no bf16 convolution" in note for note in meta["notes"])
    with pytest.raises(UnsupportedError):
        run(out, samples())
    with open_graph(out) as runner:
        got = runner.run({"input": samples()})["logits"]
    with open_reference(out, signature=onnxgraph.read_signature(out)) as (runner, words):
        np.testing.assert_allclose(runner.run({"input": samples()})["logits"], got, rtol=1e-4, atol=1e-6)
    assert "bf16 weights computed in fp32" in words
    want = run(graph, samples())
    assert 0 < np.abs(got - want).max() < ERROR["bf16"] * np.abs(want).max()


def test_tensorrt_rtx_builds_it(graph: Path, dtype: str, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    module = BACKENDS["tensorrt_rtx"]
    apply(graph, tmp_path / "out.onnx", dtype=dtype)
    config = module.Config(capabilities=("sm89",))
    signature = onnxgraph.read_signature(tmp_path / "out.onnx")
    axes = dict.fromkeys(signature.axes, Span(min=1, opt=2, max=4))
    out = tmp_path / "model.rtx.engine"
    module.build(tmp_path / "out.onnx", config=config, signature=signature, axes=axes, out=out)
    assert (tmp_path / "model.rtx.engine").stat().st_size > 1000


def test_kept_nodes_compute_in_fp32(graph: Path, tmp_path: Path) -> None:
    everything, out = tmp_path / "all.onnx", tmp_path / "out.onnx"
    apply(graph, everything)
    meta = apply(graph, out, keep=["stem*", "Gemm"])
    held = {t.name.removesuffix("__fp32"): t.data_type for t in onnx.load(out).graph.initializer}
    assert held == {
        "stem.weight": TensorProto.FLOAT, "stem.bias": TensorProto.FLOAT,
        "block.weight": TensorProto.FLOAT16, "block.bias": TensorProto.FLOAT16,
        "head.weight": TensorProto.FLOAT, "head.bias": TensorProto.FLOAT,
    }  # fmt: skip
    assert meta["num_kept"] == 3, "stem, its ReLU and the head"
    onnx.shape_inference.infer_shapes(onnx.load(out), strict_mode=True, check_type=True)
    want = run(graph, samples())
    assert np.abs(run(out, samples()) - want).max() < np.abs(run(everything, samples()) - want).max()


def test_activations_past_fp16_are_named(tmp_path: Path) -> None:
    graph, out = save_residual(tmp_path / "model.onnx", scale=60000.0), tmp_path / "out.onnx"
    with pytest.raises(UnsupportedError, match=r"exceed fp16's range on real samples, such as 'sum' with") as caught:
        apply(graph, out)
    assert "dtype: bf16" in caught.value.hint and not out.exists()
    assert apply(graph, out, dtype="bf16")["largest"] > 65504


def test_weights_past_fp16_are_refused_and_masks_are_cut(tmp_path: Path) -> None:
    def build(weight: np.ndarray) -> Path:
        nodes = [
            helper.make_node("Max", ["input", "floor"], ["a"], name="mask"),
            helper.make_node("GlobalAveragePool", ["a"], ["b"], name="pool"),
            helper.make_node("Flatten", ["b"], ["c"], name="flatten"),
            helper.make_node("MatMul", ["c", "w"], ["logits"], name="head"),
        ]
        return save(tmp_path / "model.onnx", nodes, {"floor": np.float32(-3.4e38)[None], "w": weight})

    weight = np.ones((3, 5), np.float32)
    meta = apply(build(weight), tmp_path / "out.onnx")
    assert meta["notes"] == ["floor: cut to fp16's largest value, 65504"]
    assert np.isfinite(run(tmp_path / "out.onnx", samples())).all()
    weight[0, 0] = 1e5
    with pytest.raises(UnsupportedError, match="the weight 'w' holds 1e\\+05"):
        apply(build(weight), tmp_path / "again.onnx")


def test_what_is_not_fp32_is_refused(graph: Path, tmp_path: Path) -> None:
    apply(graph, tmp_path / "half.onnx")
    with pytest.raises(UnsupportedError, match="is fp16 already"):
        apply(tmp_path / "half.onnx", tmp_path / "out.onnx")
    model = onnx.load(graph)
    model.graph.node.insert(0, helper.make_node("QuantizeLinear", ["input", "s"], ["q"]))
    (tmp_path / "int8.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(UnsupportedError, match="is quantized"):
        apply(tmp_path / "int8.onnx", tmp_path / "out.onnx")


def test_a_pattern_that_fits_nothing(graph: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cast: keep: 'fc' fits no node"):
        apply(graph, tmp_path / "out.onnx", keep=["fc"])
