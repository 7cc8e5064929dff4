"""Half precision in ONNX graphs: its types, and a graph of it computed in fp32."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from onnx import GraphProto, ModelProto, TensorProto, numpy_helper

TYPES = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}


def widen(model: ModelProto) -> ModelProto:
    """The same weights computed in fp32: what a half precision graph is compared with where no kernel runs it."""
    halves = set(TYPES.values())
    for tensor in _all_tensors(model.graph):
        if tensor.data_type in halves:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float32), tensor.name))
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i in halves:
                attribute.i = TensorProto.FLOAT
    for value in (*model.graph.input, *model.graph.output):
        if value.type.tensor_type.elem_type in halves:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    del model.graph.value_info[:]
    return model


def _all_tensors(graph: GraphProto) -> Iterable[TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        yield from (attribute.t for attribute in node.attribute if attribute.HasField("t"))
