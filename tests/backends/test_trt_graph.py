"""Unsigned quantizers made signed: same range, right values, where a mere change of type would cut off."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from tests.backends.conftest import save_graph

from bmctl.backends import onnxruntime
from bmctl.backends.trt_graph import QUANTIZERS, sign_quantizers
from bmctl.errors import UnsupportedError


def run(model: onnx.ModelProto, x: np.ndarray, *, folder: Path) -> np.ndarray:
    onnx.save(model, folder / "run.onnx")
    onnx.checker.check_model(folder / "run.onnx", full_check=True)
    with onnxruntime.open(folder / "run.onnx", config=onnxruntime.Config(optimization="none")) as runner:
        return runner.run({"input": x})["logits"]


def quantized(folder: Path, *, zero: int | None, kind: type = np.uint8) -> onnx.ModelProto:
    """Q/DQ with scale 1/255, then a sum over the pixels."""
    points = [] if zero is None else ["zero"]
    constants = {"scale": np.array(1 / 255, np.float32), "weights": np.ones((16, 3), np.float32)}
    nodes = [
        helper.make_node("QuantizeLinear", ["input", "scale", *points], ["q"], name="quantize"),
        helper.make_node("DequantizeLinear", ["q", "scale", *points], ["d"], name="dequantize"),
        helper.make_node("Flatten", ["d"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weights"], ["logits"]),
    ]
    constants |= {} if zero is None else {"zero": np.array(zero, kind)}
    return onnx.load(save_graph(folder / "q.onnx", nodes, constants=constants))


@pytest.mark.parametrize("zero", [0, None])
def test_the_whole_range_stays(zero: int | None, tmp_path: Path) -> None:
    x = np.linspace(0, 1, 32, dtype=np.float32).reshape(2, 1, 4, 4)
    model = quantized(tmp_path, zero=zero)
    before = run(model, x, folder=tmp_path)
    assert sign_quantizers(model) == 2
    after = run(model, x, folder=tmp_path)
    # 16 values, each off by at most half a step of 1/127 and half a step of 1/255.
    assert np.abs(after - before).max() <= 16 * (0.5 / 127 + 0.5 / 255)


def test_a_signed_graph_is_left_alone(tmp_path: Path) -> None:
    model = quantized(tmp_path, zero=0, kind=np.int8)
    before = model.SerializeToString(deterministic=True)
    assert sign_quantizers(model) == 0
    assert model.SerializeToString(deterministic=True) == before


def test_another_zero_point_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="'quantize' is asymmetric"):
        sign_quantizers(quantized(tmp_path, zero=128))


def test_a_constant_node_as_zero_point(tmp_path: Path) -> None:
    model = quantized(tmp_path, zero=0)
    kept = [tensor for tensor in model.graph.initializer if tensor.name != "zero"]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    value = helper.make_tensor("value", TensorProto.UINT8, [], [0])
    model.graph.node.insert(0, helper.make_node("Constant", [], ["zero"], value=value))
    assert sign_quantizers(model) == 2
    run(model, np.ones((1, 1, 4, 4), np.float32), folder=tmp_path)


def test_the_quantized_cnn_keeps_its_values(int8_graph: Path, rescnn_graph: Path, tmp_path: Path) -> None:
    x = np.random.default_rng(1).standard_normal((16, 1, 28, 28), np.float32)
    exact = run(onnx.load(rescnn_graph), x, folder=tmp_path)
    scale = np.abs(exact).max()
    model = onnx.load(int8_graph)
    num_signed = sign_quantizers(model)
    assert num_signed > 0
    assert np.abs(run(model, x, folder=tmp_path) - exact).max() < 0.05 * scale
    # What TensorRT's parser makes of the unsigned graph: int8 with the same scale.
    for tensor in model.graph.initializer:
        if tensor.name.endswith(".signed"):
            array = onnx.numpy_helper.to_array(tensor) * np.float32(127 / 255)
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    assert np.abs(run(model, x, folder=tmp_path) - exact).max() > 0.05 * scale


def test_no_unsigned_quantizer_is_left(int8_graph: Path) -> None:
    model = onnx.load(int8_graph)
    sign_quantizers(model)
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    zeros = [kinds[node.input[2]] for node in model.graph.node if node.op_type in QUANTIZERS]
    assert set(zeros) == {TensorProto.INT8}
