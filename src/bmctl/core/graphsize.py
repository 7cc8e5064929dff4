"""Parameters and multiply-accumulates of an ONNX file, by its shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import onnx

QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")
COUNTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")

Shapes = Mapping[str, tuple[int, ...] | None]


def graph_num_params(path: Path) -> int:
    """Elements of the weights: constants that are numbers, not shapes, and not scales or zero points.

    Args:
        path: An ONNX file that was checked; only names and shapes are read, not external data.
    """
    model = onnx.load(path, load_external_data=False)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant":
            tensors.update((node.output[0], item.t) for item in node.attribute if item.name == "value")
    aside = {name for node in model.graph.node if node.op_type in QUANTIZERS for name in node.input[1:]}
    return sum(
        math.prod(tensor.dims)
        for name, tensor in tensors.items()
        if name not in aside and tensor.data_type not in (onnx.TensorProto.INT64, onnx.TensorProto.BOOL)
    )


def graph_macs(path: Path) -> int | None:
    """Multiply-accumulates of one sample: Conv, ConvTranspose, Gemm and MatMul, every free dimension set to 1.

    Args:
        path: An ONNX file that was checked; external data is not read.

    Returns:
        None where a shape cannot be inferred: a part of the sum would be no answer.
    """
    model = onnx.load(path, load_external_data=False)
    for value in model.graph.input:
        for dim in value.type.tensor_type.shape.dim:
            if not dim.HasField("dim_value"):
                dim.dim_value = 1
    for value in (*model.graph.output, *model.graph.value_info):
        value.type.tensor_type.ClearField("shape")  # as exported, for the free batch
    del model.graph.value_info[:]
    model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    shapes = _shapes(model.graph)
    counts = [_node_macs(node, shapes) for node in model.graph.node if node.op_type in COUNTED]
    return None if None in counts else sum(count for count in counts if count is not None)


def _shapes(graph: onnx.GraphProto) -> dict[str, tuple[int, ...] | None]:
    shapes: dict[str, tuple[int, ...] | None] = {}
    for value in (*graph.input, *graph.output, *graph.value_info):
        dims = value.type.tensor_type.shape.dim
        known = value.type.tensor_type.HasField("shape") and all(dim.HasField("dim_value") for dim in dims)
        shapes[value.name] = tuple(dim.dim_value for dim in dims) if known else None
    shapes |= {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    return shapes


def _node_macs(node: onnx.NodeProto, shapes: Shapes) -> int | None:
    first, second, out = shapes.get(node.input[0]), shapes.get(node.input[1]), shapes.get(node.output[0])
    if first is None or second is None or out is None:
        return None
    if node.op_type == "Conv":  # weight [O, I / groups, k...]
        return math.prod(out) * math.prod(second[1:])
    if node.op_type == "ConvTranspose":  # weight [I, O / groups, k...]
        return math.prod(first) * math.prod(second[1:])
    if node.op_type == "Gemm":
        transposed = any(item.name == "transA" and item.i for item in node.attribute)
        return math.prod(out) * first[0 if transposed else 1]
    return math.prod(out) * first[-1]
