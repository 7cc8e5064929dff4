"""Quantized graphs as ONNX Runtime's tools make them by default: unsigned, with int32 biases, dynamic, by operator."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from tests.graphs.handmade import normal, save


class Noise:
    """Calibration data for a graph of one input `x`."""

    def __init__(self, *shape: int, low: float = 0.0) -> None:
        rng = np.random.default_rng(0)
        self.left: Iterator[dict[str, np.ndarray]] = iter(
            [{"x": rng.standard_normal(shape).astype(np.float32) + np.float32(low)} for _ in range(8)]
        )

    def get_next(self) -> dict[str, np.ndarray] | None:
        return next(self.left, None)


def network(path: Path) -> None:
    """Convolutions with and without ReLU, and a fully connected layer."""
    save(
        path,
        """g (float[batch,3,8,8] x) => (float[batch,4] y) {
            c = Conv<pads=[1,1,1,1]>(x, k, b)
            r = Relu(c)
            d = Conv<strides=[2,2]>(r, l, e)
            s = HardSwish(d)
            p = GlobalAveragePool(s)
            f = Flatten(p)
            y = Gemm<transB=1>(f, w, v)
        }""",
        k=normal(8, 3, 3, 3) / 5, b=normal(8), l=normal(8, 8, 3, 3) / 8, e=normal(8) / 2, w=normal(4, 8), v=normal(4),
    )  # fmt: skip


def _static(path: Path, **asked: Any) -> None:
    from onnxruntime.quantization import quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    logging.disable(logging.WARNING)
    try:
        source = path.with_suffix(".fp32.onnx")
        network(source)
        quant_pre_process(source, source, skip_symbolic_shape=True)
        quantize_static(source, path, Noise(4, 3, 8, 8, low=0.5), **asked)
    finally:
        logging.disable(logging.NOTSET)
        source.unlink(missing_ok=True)


def _types() -> Any:
    from onnxruntime.quantization import QuantFormat, QuantType

    return QuantFormat, QuantType


def qdq_symmetric(path: Path) -> None:
    """int8 around zero for activations and weights, biases in float: what TensorRT takes as it is."""
    _static(path, activation_type=_types()[1].QInt8,
            extra_options={"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False})  # fmt: skip


def qdq_default(path: Path) -> None:
    """quantize_static's defaults: int8 activations around a zero point, biases in int32."""
    _static(path)


def qdq_unsigned(path: Path) -> None:
    """uint8 activations around a zero point."""
    _static(path, activation_type=_types()[1].QUInt8)


def qdq_per_channel(path: Path) -> None:
    """A scale for each output channel, unsigned activations, int32 biases."""
    _static(path, per_channel=True)


def qdq_unsigned_weights(path: Path) -> None:
    """Weights in uint8 around a zero point."""
    _static(path, activation_type=_types()[1].QUInt8, weight_type=_types()[1].QUInt8)


def qoperator(path: Path) -> None:
    """QLinearConv and its like: no Q/DQ pairs at all."""
    _static(path, quant_format=_types()[0].QOperator)


def _dynamic(path: Path, text: str, operators: list[str], **weights: np.ndarray) -> None:
    from onnxruntime.quantization import quantize_dynamic

    logging.disable(logging.WARNING)
    try:
        source = path.with_suffix(".fp32.onnx")
        save(source, text, **weights)
        quantize_dynamic(source, path, op_types_to_quantize=operators)
    finally:
        logging.disable(logging.NOTSET)
        source.unlink(missing_ok=True)


def dynamic_matmul(path: Path) -> None:
    """DynamicQuantizeLinear and MatMulInteger."""
    _dynamic(path, """g (float[batch,tokens,16] x) => (float[batch,tokens,4] y) {
        m = MatMul(x, w)
        t = Tanh(m)
        y = MatMul(t, v)
    }""", ["MatMul"], w=normal(16, 8) / 4, v=normal(8, 4))  # fmt: skip


def dynamic_conv(path: Path) -> None:
    """DynamicQuantizeLinear and ConvInteger."""
    _dynamic(path, """g (float[batch,3,8,8] x) => (float[batch,6,8,8] y) {
        c = Conv<pads=[1,1,1,1]>(x, k, b)
        y = Relu(c)
    }""", ["Conv"], k=normal(6, 3, 3, 3), b=normal(6))  # fmt: skip


def dynamic_lstm(path: Path) -> None:
    """DynamicQuantizeLSTM of com.microsoft."""
    _dynamic(path, "g (float[time,batch,6] x) => (float[time,1,batch,8] y) { y = LSTM<hidden_size=8>(x, w, r) }",
             ["LSTM"], w=normal(1, 32, 6), r=normal(1, 32, 8))  # fmt: skip


def four_bits(path: Path) -> None:
    """MatMulNBits of com.microsoft: weights in blocks of four bits."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    logging.disable(logging.WARNING)
    try:
        save(path, "g (float[batch,64] x) => (float[batch,16] y) { y = MatMul(x, w) }", w=normal(64, 16))
        quantizer = MatMulNBitsQuantizer(onnx.load(path), block_size=32, is_symmetric=True)
        quantizer.process()
        onnx.save(quantizer.model.model, path)
    finally:
        logging.disable(logging.NOTSET)
