"""Quantizers made symmetric: same range, right values, where a mere change of type would cut off."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from tests.backends.conftest import save_graph

from bmctl.backends import onnxruntime
from bmctl.backends.trt_graph import BIASES, EXACT, INPUTS, QUANTIZERS, SYMMETRIC, WEIGHTS, mend_quantizers
from bmctl.errors import UnsupportedError


def run(model: onnx.ModelProto, x: np.ndarray, *, folder: Path) -> np.ndarray:
    onnx.save(model, folder / "run.onnx")
    onnx.checker.check_model(folder / "run.onnx", full_check=True)
    with onnxruntime.open(folder / "run.onnx", config=onnxruntime.Config(optimization="none")) as runner:
        return runner.run({"input": x})["logits"]


def quantized(
    folder: Path, *, zero: int | None, kind: type = np.uint8, scale: float = 1 / 255, computed: bool = False
) -> onnx.ModelProto:
    """Q/DQ, then a sum over the pixels."""
    points = [] if zero is None else ["zero"]
    constants = {"scale": np.array(scale, np.float32), "weights": np.ones((16, 3), np.float32)}
    nodes = [
        helper.make_node("QuantizeLinear", ["input", "s" if computed else "scale", *points], ["q"], name="quantize"),
        helper.make_node("DequantizeLinear", ["q", "s" if computed else "scale", *points], ["d"], name="dequantize"),
        helper.make_node("Flatten", ["d"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weights"], ["logits"]),
    ]
    if computed:
        nodes.insert(0, helper.make_node("Abs", ["scale"], ["s"]))
    constants |= {} if zero is None else {"zero": np.array(zero, kind)}
    return onnx.load(save_graph(folder / "q.onnx", nodes, constants=constants))


@pytest.mark.parametrize("zero", [0, None])
def test_the_whole_range_stays(zero: int | None, tmp_path: Path) -> None:
    x = np.linspace(0, 1, 32, dtype=np.float32).reshape(2, 1, 4, 4)
    model = quantized(tmp_path, zero=zero)
    before = run(model, x, folder=tmp_path)
    assert mend_quantizers(model) == [f"{SYMMETRIC} (2 times)"]
    after = run(model, x, folder=tmp_path)
    # 16 values, each off by at most half a step of 1/127 and half a step of 1/255.
    assert np.abs(after - before).max() <= 16 * (0.5 / 127 + 0.5 / 255)


@pytest.mark.parametrize(("zero", "kind"), [(0, np.uint8), (-128, np.int8), (None, np.uint8)])
def test_what_a_quantizer_cut_off_below_zero_stays_cut_off(zero: int | None, kind: type, tmp_path: Path) -> None:
    """ONNX Runtime's tools drop a ReLU where the quantizer behind it does the same."""
    x = np.linspace(-1, 1, 32, dtype=np.float32).reshape(2, 1, 4, 4)
    model = quantized(tmp_path, zero=zero, kind=kind)
    before = run(model, x, folder=tmp_path)
    mend_quantizers(model)
    assert np.abs(run(model, x, folder=tmp_path) - before).max() <= 16 * (0.5 / 127 + 0.5 / 255)


@pytest.mark.parametrize(("zero", "kind"), [(100, np.uint8), (200, np.uint8), (-20, np.int8), (60, np.int8)])
def test_other_zero_points_keep_the_range(zero: int, kind: type, tmp_path: Path) -> None:
    info = np.iinfo(kind)
    low, high = (info.min - zero) / 100, (info.max - zero) / 100
    x = np.linspace(low, high, 32, dtype=np.float32).reshape(2, 1, 4, 4)
    model = quantized(tmp_path, zero=zero, kind=kind, scale=0.01)
    before = run(model, x, folder=tmp_path)
    assert mend_quantizers(model) == [f"{SYMMETRIC} (2 times)"]
    step = max(-low, high) / 127
    assert np.abs(run(model, x, folder=tmp_path) - before).max() <= 16 * (0.5 * step + 0.5 * 0.01) * 1.01


def test_a_zero_point_in_the_middle_changes_nothing(tmp_path: Path) -> None:
    x = np.linspace(-0.5, 0.49, 32, dtype=np.float32).reshape(2, 1, 4, 4)
    model = quantized(tmp_path, zero=128)
    before = run(model, x, folder=tmp_path)
    assert mend_quantizers(model) == [f"{EXACT} (2 times)"]
    np.testing.assert_array_equal(run(model, x, folder=tmp_path), before)


def test_a_signed_graph_is_left_alone(tmp_path: Path) -> None:
    model = quantized(tmp_path, zero=0, kind=np.int8)
    before = model.SerializeToString(deterministic=True)
    assert mend_quantizers(model) == []
    assert model.SerializeToString(deterministic=True) == before


def test_a_computed_scale_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="'quantize' has a scale that is computed") as caught:
        mend_quantizers(quantized(tmp_path, zero=100, computed=True))
    assert "bmctl quantize" in caught.value.hint


def test_integers_that_leave_the_graph_are_refused(tmp_path: Path) -> None:
    model = quantized(tmp_path, zero=100)
    model.graph.output.append(helper.make_tensor_value_info("q", TensorProto.UINT8, ["n", 1, 4, 4]))
    with pytest.raises(
        UnsupportedError, match="'quantize' is asymmetric or unsigned, and its integers go to the caller"
    ):
        mend_quantizers(model)


def test_a_constant_node_as_zero_point(tmp_path: Path) -> None:
    model = quantized(tmp_path, zero=0)
    kept = [tensor for tensor in model.graph.initializer if tensor.name != "zero"]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    value = helper.make_tensor("value", TensorProto.UINT8, [], [0])
    model.graph.node.insert(0, helper.make_node("Constant", [], ["zero"], value=value))
    assert mend_quantizers(model) == [f"{SYMMETRIC} (2 times)"]
    run(model, np.ones((1, 1, 4, 4), np.float32), folder=tmp_path)


def weighted(folder: Path, *, weights: np.ndarray, zero: np.ndarray, bias: bool = False) -> onnx.ModelProto:
    """Dequantized weights [16, 3] by column, and an int32 bias."""
    constants = {"w": weights, "scale": np.array([0.01, 0.02, 0.03], np.float32), "zero": zero,
                 "b": np.array([100, -50, 7], np.int32)}  # fmt: skip
    nodes = [
        helper.make_node("Flatten", ["input"], ["flat"]),
        helper.make_node("DequantizeLinear", ["w", "scale", "zero"], ["wf"], name="weights", axis=1),
        helper.make_node("MatMul", ["flat", "wf"], ["m" if bias else "logits"]),
    ]
    if bias:
        nodes += [
            helper.make_node("DequantizeLinear", ["b", "scale"], ["bf"], name="bias", axis=0),
            helper.make_node("Add", ["m", "bf"], ["logits"]),
        ]
    else:
        constants.pop("b")
    return onnx.load(save_graph(folder / "w.onnx", nodes, constants=constants))


X = np.random.default_rng(0).standard_normal((4, 1, 4, 4)).astype(np.float32)


def test_int32_biases_become_floats(tmp_path: Path) -> None:
    weights = np.random.default_rng(1).integers(-127, 127, (16, 3)).astype(np.int8)
    model = weighted(tmp_path, weights=weights, zero=np.zeros(3, np.int8), bias=True)
    before = run(model, X, folder=tmp_path)
    assert mend_quantizers(model) == [BIASES]
    np.testing.assert_allclose(run(model, X, folder=tmp_path), before, rtol=1e-5, atol=1e-5)


def test_unsigned_weights_are_shifted_or_rounded_anew(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    for low, high, zero, what in ((30, 250, 128, EXACT), (0, 255, 100, WEIGHTS)):
        weights = rng.integers(low, high, (16, 3)).astype(np.uint8)
        model = weighted(tmp_path, weights=weights, zero=np.full(3, zero, np.uint8))
        before = run(model, X, folder=tmp_path)
        assert mend_quantizers(model) == [what]
        off = np.abs(run(model, X, folder=tmp_path) - before).max(axis=0) / np.abs(before).max()
        assert off.max() <= (1e-6 if what == EXACT else 0.02)


def test_a_quantized_input_keeps_its_type(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("DequantizeLinear", ["input", "scale", "zero"], ["d"], name="first"),
        helper.make_node("Flatten", ["d"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weights"], ["logits"]),
    ]
    constants = {"scale": np.array(0.02, np.float32), "zero": np.array(90, np.uint8),
                 "weights": np.ones((16, 3), np.float32)}  # fmt: skip
    path = save_graph(tmp_path / "q.onnx", nodes, constants=constants)
    model = onnx.load(path)
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8
    x = np.random.default_rng(0).integers(0, 255, (2, 1, 4, 4)).astype(np.uint8)
    before = run(model, x, folder=tmp_path)
    assert mend_quantizers(model) == [INPUTS]
    np.testing.assert_allclose(run(model, x, folder=tmp_path), before, rtol=1e-5)


def test_the_quantized_cnn_keeps_its_values(int8_graph: Path, rescnn_graph: Path, tmp_path: Path) -> None:
    x = np.random.default_rng(1).standard_normal((16, 1, 28, 28), np.float32)
    exact = run(onnx.load(rescnn_graph), x, folder=tmp_path)
    scale = np.abs(exact).max()
    model = onnx.load(int8_graph)
    assert SYMMETRIC in mend_quantizers(model)[0]
    assert np.abs(run(model, x, folder=tmp_path) - exact).max() < 0.05 * scale
    # What TensorRT's parser makes of the unsigned graph: int8 with the same scale.
    for tensor in model.graph.initializer:
        if ".signed" in tensor.name:
            array = onnx.numpy_helper.to_array(tensor) * np.float32(127 / 255)
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    assert np.abs(run(model, x, folder=tmp_path) - exact).max() > 0.05 * scale


def test_no_unsigned_quantizer_is_left(int8_graph: Path) -> None:
    model = onnx.load(int8_graph)
    mend_quantizers(model)
    kinds = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    zeros = [kinds[node.input[2]] for node in model.graph.node if node.op_type in QUANTIZERS]
    assert set(zeros) == {TensorProto.INT8}
