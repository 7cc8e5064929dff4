"""An fp32 ONNX graph in half precision: inputs and outputs stay fp32, casts stand where precisions meet.

Names: a value `x` of the graph becomes half precision under its own name; where fp32 is needed it is `x__fp32`.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, inliner, numpy_helper, version_converter

from bmctl.core.halftypes import TYPES
from bmctl.errors import UnsupportedError

FP16_MAX = 65504.0
BF16_OPSET = 22
"""The first operator set in which convolution and pooling take bf16."""

KEPT = {"Resize", "Upsample", "Range", "RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike"}
"""Operators with sizes, seeds or type attributes among their floats: they stay in fp32."""

STRINGS = {"fp16": "tensor(float16)", "bf16": "tensor(bfloat16)"}


@dataclass(frozen=True)
class Halved:
    """The graph, how many of its nodes stay in fp32, and constants that were cut to the largest fp16 value."""

    model: ModelProto
    num_kept: int
    clamped: tuple[str, ...]


def raised(model: ModelProto, dtype: str) -> ModelProto:
    """Inline local functions, and raise the operator set to one that knows the type.

    Raises:
        UnsupportedError: Control flow, or an operator without a newer form.
    """
    if model.functions:
        model = inliner.inline_local_functions(model)
    for node in model.graph.node:
        if any(a.HasField("g") or a.graphs for a in node.attribute):
            raise UnsupportedError(
                f"{node.op_type} {node.name!r} holds a graph of its own: casting it is not supported"
            )
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    if dtype == "bf16" and opset < BF16_OPSET:
        try:
            model = version_converter.convert_version(model, BF16_OPSET)
        except RuntimeError as error:
            line = " ".join(str(error).split())[:200]
            raise UnsupportedError(
                f"bf16 needs ONNX operator set {BF16_OPSET}, and the graph has no such form: {line}", hint="dtype: fp16"
            ) from error
    return model


def halve(model: ModelProto, dtype: str, *, keep: Collection[str]) -> Halved:
    """Rewrite `raised` fp32 graph.

    Args:
        dtype: ``fp16`` or ``bf16``.
        keep: Names of nodes that stay in fp32.

    Raises:
        UnsupportedError: A weight beyond fp16's range, or an operator whose types are not known.
    """
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    floats = _float_names(graph)
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)
    kept = [
        node.name in keep or node.op_type in KEPT or not _takes(node, STRINGS[dtype], floats, opset=opset)
        for node in model.graph.node
    ]
    writer = _Writer(model.graph, TYPES[dtype], floats)
    for value in model.graph.input:
        writer.enter(value.name)
    for node, is_kept in zip(model.graph.node, kept, strict=True):
        writer.keep(node) if is_kept else writer.convert(node)
    for value in model.graph.output:
        writer.leave(value.name)
    _replace(model.graph, writer)
    return Halved(model=model, num_kept=sum(kept), clamped=tuple(writer.clamped))


class _Writer:
    """The new nodes and initializers of one graph, in order."""

    def __init__(self, graph: GraphProto, to: int, floats: set[str]) -> None:
        self.to = to
        self.floats = floats
        self.held = {tensor.name: tensor for tensor in graph.initializer}
        self.inputs = {value.name for value in graph.input}
        self.outputs = {value.name for value in graph.output}
        self.nodes: list[NodeProto] = []
        self.tensors: dict[str, TensorProto] = {n: t for n, t in self.held.items() if n not in floats}
        self.wide: set[str] = set()
        self.clamped: list[str] = []

    def enter(self, name: str) -> None:
        if name in self.floats and name not in self.held:
            self._cast(name, self._half(name), self.to)

    def leave(self, name: str) -> None:
        if name in self.floats and name not in self.wide:
            self._cast(self._half(name), name, TensorProto.FLOAT)

    def convert(self, node: NodeProto) -> None:
        """A node in half precision: its float inputs, outputs and attributes."""
        new = NodeProto()
        new.CopyFrom(node)
        for i, name in enumerate(node.input):
            if name in self.floats:
                self._hold(name)
                new.input[i] = self._half(name)
        for i, name in enumerate(node.output):
            if name in self.floats:
                new.output[i] = self._half(name)
        self._convert_attributes(new)
        self.nodes.append(new)

    def keep(self, node: NodeProto) -> None:
        """A node in fp32, between casts."""
        new = NodeProto()
        new.CopyFrom(node)
        for i, name in enumerate(node.input):
            if name in self.floats:
                new.input[i] = self._widen(name)
        outputs = [name for name in node.output if name in self.floats]
        for i, name in enumerate(node.output):
            if name in self.floats:
                new.output[i] = self._wide(name)
                self.wide.add(name)
        self.nodes.append(new)
        for name in outputs:
            self._cast(self._wide(name), self._half(name), self.to)

    def _half(self, name: str) -> str:
        """Graph inputs and outputs keep their names in fp32."""
        return f"{name}__half" if name in self.inputs | self.outputs else name

    def _wide(self, name: str) -> str:
        return name if name in self.inputs | self.outputs else f"{name}__fp32"

    def _widen(self, name: str) -> str:
        """The fp32 form of a value, made when it is first needed."""
        if name in self.held:
            self.tensors[self._wide(name)] = _renamed(self.held[name], self._wide(name))
        elif name not in self.wide and name not in self.inputs:
            self._cast(self._half(name), self._wide(name), TensorProto.FLOAT)
            self.wide.add(name)
        return self._wide(name)

    def _hold(self, name: str) -> None:
        half = self._half(name)
        if name in self.held and half not in self.tensors:
            self.tensors[half] = self._to_half(self.held[name], half)

    def _cast(self, source: str, target: str, to: int) -> None:
        self.nodes.append(helper.make_node("Cast", [source], [target], name=f"cast_{target}", to=to))

    def _convert_attributes(self, node: NodeProto) -> None:
        for attribute in node.attribute:
            if attribute.HasField("t") and attribute.t.data_type == TensorProto.FLOAT:
                attribute.t.CopyFrom(self._to_half(attribute.t, attribute.t.name or node.name))
            elif node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.FLOAT:
                attribute.i = self.to
            elif node.op_type == "Constant" and attribute.name in ("value_float", "value_floats"):
                many = attribute.name == "value_floats"
                array = np.array(list(attribute.floats) if many else attribute.f, np.float32)
                tensor = self._to_half(numpy_helper.from_array(array), node.name)
                attribute.CopyFrom(helper.make_attribute("value", tensor))

    def _to_half(self, tensor: TensorProto, name: str) -> TensorProto:
        array = numpy_helper.to_array(tensor)
        if self.to == TensorProto.BFLOAT16:
            return numpy_helper.from_array(array.astype(ml_dtypes.bfloat16), name)
        large = np.abs(array) > FP16_MAX
        if large.any():
            # One number far outside is a mask's "minus infinity": the largest value does as well.
            if array.size > 1 and not np.all(large | (array == 0)):
                top = float(np.abs(array).max())
                raise UnsupportedError(
                    f"the weight {name!r} holds {top:.3g}; fp16 ends at {FP16_MAX:.0f}", hint="dtype: bf16"
                )
            self.clamped.append(name)
            array = np.clip(array, -FP16_MAX, FP16_MAX)
        return numpy_helper.from_array(array.astype(np.float16), name)


def _replace(graph: GraphProto, writer: _Writer) -> None:
    used = {name for node in writer.nodes for name in node.input} | writer.outputs
    nodes = [n for n in writer.nodes if n.op_type != "Cast" or set(n.output) & used]
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend(nodes)
    graph.initializer.extend(tensor for name, tensor in writer.tensors.items() if name in used)
    # Files of IR version 3 list initializers among the inputs; there the type would be wrong now.
    for value in [v for v in graph.input if v.name in writer.held]:
        graph.input.remove(value)


def _float_names(graph: GraphProto) -> set[str]:
    """Every fp32 value of the graph."""
    values = (*graph.input, *graph.output, *graph.value_info)
    names = {v.name for v in values if v.type.tensor_type.elem_type == TensorProto.FLOAT}
    known = {v.name for v in values} | {t.name for t in graph.initializer}
    for node in graph.node:
        if missing := [name for name in node.output if name and name not in known]:
            raise UnsupportedError(f"the type of {missing[0]!r}, made by {node.op_type} {node.name!r}, is not known")
    return names | {t.name for t in graph.initializer if t.data_type == TensorProto.FLOAT}


def _takes(node: NodeProto, kind: str, floats: set[str], *, opset: int) -> bool:
    """Whether the operator's schema allows `kind` wherever this node has fp32."""
    try:
        schema = onnx.defs.get_schema(node.op_type, opset, node.domain)
    except onnx.defs.SchemaError:
        return False
    allowed = {c.type_param_str: set(c.allowed_type_strs) for c in schema.type_constraints}
    for names, formal in ((node.input, schema.inputs), (node.output, schema.outputs)):
        for i, name in enumerate(names):
            if name in floats:
                text = formal[min(i, len(formal) - 1)].type_str
                if kind not in allowed.get(text, {text}):
                    return False
    return True


def _renamed(tensor: TensorProto, name: str) -> TensorProto:
    new = TensorProto()
    new.CopyFrom(tensor)
    new.name = name
    return new


def ranges(model: ModelProto, feed: dict[str, np.ndarray]) -> dict[str, float]:
    """Largest |value| of every fp32 activation on `feed`, by the name of the node that makes it."""
    probe = ModelProto()
    probe.CopyFrom(onnx.shape_inference.infer_shapes(model))
    makers = {name: node.name or node.op_type for node in probe.graph.node for name in node.output if name}
    shown = {value.name for value in probe.graph.output}
    kinds = {v.name: v for v in probe.graph.value_info if v.type.tensor_type.elem_type == TensorProto.FLOAT}
    probe.graph.output.extend(v for name, v in kinds.items() if name in makers and name not in shown)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(probe.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in probe.graph.output]
    arrays = dict(zip(names, session.run(names, feed), strict=True))
    found = {
        makers[name]: float(np.abs(array).max(initial=0.0))
        for name, array in arrays.items()
        if name in makers and array.dtype == np.float32
    }
    return {name: value if math.isfinite(value) else math.inf for name, value in found.items()}
