"""Quantize/dequantize pairs: the one symmetric form that packages carry, and the form ONNX Runtime is fast with."""

from __future__ import annotations

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, numpy_helper

from bmctl.errors import UnsupportedError

PAIR = ("QuantizeLinear", "DequantizeLinear")
PASSING = ("MaxPool", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze")
"""Operators that keep what is not negative that way, and that runtimes move quantizers across."""


def make_signed(model: ModelProto) -> int:
    """Turn unsigned quantizers with zero point 0 into signed ones of the same range; returns how many pairs.

    A value v of [0, 255] * scale becomes one of [0, 127] * (scale * 255 / 127): the same range in half the steps.

    Raises:
        UnsupportedError: An unsigned quantizer with another zero point, or without constant scale.
    """
    held = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = [node for node in _pairs(model) if _type_of(node, held) == TensorProto.UINT8]
    points = {node.input[2] for node in nodes}
    for node in nodes:
        if node.input[1] not in held or np.any(numpy_helper.to_array(held[node.input[2]])):
            raise UnsupportedError(f"the quantizer {node.name!r} is not symmetric", hint="preset: performance")
    # NNCF gives each pair its own scale; where graphs share one between signed and unsigned it is copied first.
    for name in {node.input[1] for node in nodes}:
        array = numpy_helper.to_array(held[name])
        others = [n for n in _pairs(model) if n.input[1] == name and n.input[2] not in points]
        target = name
        if others:
            target = f"{name}_signed"
            model.graph.initializer.append(numpy_helper.from_array(array, target))
            held[target] = model.graph.initializer[-1]
            for node in nodes:
                if node.input[1] == name:
                    node.input[1] = target
        scaled = (array.astype(np.float64) * 255 / 127).astype(array.dtype)
        held[target].CopyFrom(numpy_helper.from_array(scaled, target))
    for name in points:
        shape = numpy_helper.to_array(held[name]).shape
        held[name].CopyFrom(numpy_helper.from_array(np.zeros(shape, np.int8), name))
    if nodes:
        del model.graph.value_info[:]  # it names the old types
    return sum(node.op_type == "QuantizeLinear" for node in nodes)


def unsign_after_relu(model: ModelProto) -> int:
    """Make signed quantizers behind a ReLU unsigned, with the same scale; returns how many.

    ONNX Runtime folds a ReLU into an integer convolution only where the quantizer cuts at zero, which an unsigned one
    with zero point 0 does; otherwise it computes in fp32, slower than without quantization. Values up to the calibrated
    range are the same; what lies above it is cut at twice the range in place of once.
    """
    held = {tensor.name: tensor for tensor in model.graph.initializer}
    makers = {name: node for node in model.graph.node for name in node.output}
    points = {
        node.input[2]
        for node in _pairs(model)
        if node.op_type == "QuantizeLinear"
        and _type_of(node, held) == TensorProto.INT8
        and not np.any(numpy_helper.to_array(held[node.input[2]]))
        and _is_behind_relu(node.input[0], makers)
    }
    # A zero point that anything else uses, a weight say, keeps its type.
    points -= {name for node in _pairs(model) for name in node.input[2:3] if not _belongs(node, points, makers, held)}
    for name in points:
        shape = numpy_helper.to_array(held[name]).shape
        held[name].CopyFrom(numpy_helper.from_array(np.zeros(shape, np.uint8), name))
    if points:
        del model.graph.value_info[:]
    return len(points)


def _pairs(model: ModelProto) -> list[NodeProto]:
    """The quantizers and dequantizers with a zero point."""
    return [node for node in model.graph.node if node.op_type in PAIR and len(node.input) > 2 and node.input[2]]


def _type_of(node: NodeProto, held: dict[str, TensorProto]) -> int | None:
    tensor = held.get(node.input[2])
    return tensor.data_type if tensor is not None else None


def _is_behind_relu(name: str, makers: dict[str, NodeProto]) -> bool:
    node = makers.get(name)
    while node is not None and node.op_type in PASSING:
        node = makers.get(node.input[0])
    return node is not None and node.op_type in ("Relu", "Sigmoid", "Softmax")


def _belongs(node: NodeProto, points: set[str], makers: dict[str, NodeProto], held: dict[str, TensorProto]) -> bool:
    """Whether this node would still be right were its zero point unsigned."""
    if node.input[2] not in points:
        return True
    if node.op_type == "QuantizeLinear":
        return _is_behind_relu(node.input[0], makers)
    maker = makers.get(node.input[0])
    return maker is not None and maker.op_type == "QuantizeLinear" and maker.input[2] in points
