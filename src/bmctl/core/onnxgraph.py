"""What an ONNX graph says of itself: signature, precision, nodes, tensors. core.onnxfile checks files before."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from bmctl.errors import PackageError, RecipeError, UnsupportedError, first_line
from bmctl.schema import BATCH, Signature, TensorSpec

QUANTIZING = {
    "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger",
    "MatMulInteger", "MatMulIntegerToFloat", "QGemm", "QLinearAdd", "MatMulNBits", "QAttention",
    "DynamicQuantizeMatMul", "DynamicQuantizeLSTM",
}  # fmt: skip

Precision = Literal["fp32", "fp16", "bf16", "int8"]


def read_signature(path: Path) -> Signature:
    """Inputs and outputs of a checked file, with its own names of free axes where it has some.

    An axis without a name is `batch` where it is the first of an input or output, else it is called by its tensor and
    number, such as ``image.2``. The file's own name of the first axis of its first free input becomes `batch`. What a
    file says is not always so: engine.intake.trial tries it.

    Raises:
        PackageError: It is no ONNX file.
        UnsupportedError: An input or output that is no tensor, of no known rank, or of a type that NumPy has not.
    """
    try:
        model = onnx.load(path, load_external_data=False)
    except (DecodeError, OSError) as error:
        raise PackageError(f"cannot open {path}: {first_line(error)}") from error
    if any(not value.type.tensor_type.HasField("shape") for value in model.graph.output):
        model = onnx.shape_inference.infer_shapes(model)
    fed = [_spec(path, value, what="input") for value in inputs(model)]
    given = [_spec(path, value, what="output") for value in model.graph.output]
    named = {axis for spec in fed for axis in spec.shape if isinstance(axis, str)}
    first = next((spec.shape[0] for spec in fed if spec.shape and isinstance(spec.shape[0], str)), BATCH)
    if BATCH in named or not _means_batch(str(first)):
        first = BATCH
    return Signature(
        inputs=tuple(_renamed(spec, first, BATCH) for spec in fed),
        outputs=tuple(_renamed(spec, first, BATCH) for spec in given),
    )


def _means_batch(axis: str) -> bool:
    """Whether the first axis of an input holds samples: recurrent networks may have time there."""
    return not any(word in axis.lower() for word in ("seq", "time", "token", "len", "frame", "step"))


def _renamed(spec: TensorSpec, old: object, new: str) -> TensorSpec:
    return spec.model_copy(update={"shape": tuple(new if axis == old else axis for axis in spec.shape)})


def is_quantized(path: Path) -> bool:
    """Whether any operator of the graph works on integers that stand for real numbers."""
    return any(node.op_type in QUANTIZING for node, _ in walk(onnx.load(path, load_external_data=False)))


def precision_of(path: Path) -> Precision:
    """int8 for a quantized graph, else the type of most of its weights' bytes."""
    if is_quantized(path):
        return "int8"
    names: dict[int, Precision] = {TensorProto.FLOAT16: "fp16", TensorProto.BFLOAT16: "bf16"}
    size: dict[Precision, int] = {"fp32": 0, "fp16": 0, "bf16": 0}
    for tensor in tensors(onnx.load(path, load_external_data=False)):
        if tensor.data_type in (TensorProto.FLOAT, *names):
            size[names.get(tensor.data_type, "fp32")] += math.prod(tensor.dims)
    return max(size, key=lambda name: size[name])


def data_files(path: Path) -> list[str]:
    """Names of a checked file's external data files, relative to its directory."""
    found = (entries(t).get("location", "") for t in tensors(onnx.load(path, load_external_data=False)))
    return sorted({name for name in found if name})


# -- walking ----------------------------------------------------------------------------------------


def walk(model: ModelProto) -> Iterator[tuple[NodeProto, int]]:
    """Every node of the graph, its subgraphs and the model's functions, with its depth."""
    todo = [(node, 0) for node in model.graph.node]
    todo += [(node, 0) for function in model.functions for node in function.node]
    while todo:
        node, depth = todo.pop()
        yield node, depth
        for graph in subgraphs(node):
            todo += [(inner, depth + 1) for inner in graph.node]


def tensors(model: ModelProto) -> Iterator[TensorProto]:
    """Every tensor that the model holds: initializers and attributes, sparse ones in their parts."""
    graphs = [model.graph]
    nodes = [node for node, _ in walk(model)]
    for node in nodes:
        graphs += subgraphs(node)
        for attribute in node.attribute:
            yield from attribute.tensors
            if attribute.HasField("t"):
                yield attribute.t
            sparse = [
                *attribute.sparse_tensors,
                *([attribute.sparse_tensor] if attribute.HasField("sparse_tensor") else []),
            ]
            for one in sparse:
                yield from (one.values, one.indices)
    for graph in graphs:
        yield from graph.initializer
        for one in graph.sparse_initializer:
            yield from (one.values, one.indices)


def subgraphs(node: NodeProto) -> list[GraphProto]:
    """The graphs that a node holds: branches and loop bodies."""
    found: list[GraphProto] = []
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH or attribute.HasField("g"):
            found.append(attribute.g)
        found.extend(attribute.graphs)
    return found


def inputs(model: ModelProto) -> list[onnx.ValueInfoProto]:
    """What must be fed. Before IR version 4 initializers are listed among the inputs as well."""
    held = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in held]


def entries(tensor: TensorProto) -> dict[str, str]:
    """Where a tensor's external data lies: location, offset, length."""
    return {entry.key: entry.value for entry in tensor.external_data}


KINDS = {
    "sequence_type": "a sequence",
    "map_type": "a map",
    "optional_type": "optional",
    "sparse_tensor_type": "sparse",
}
NUMPY = {
    TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BOOL,
    TensorProto.INT8, TensorProto.INT16, TensorProto.INT32, TensorProto.INT64,
    TensorProto.UINT8, TensorProto.UINT16, TensorProto.UINT32, TensorProto.UINT64,
}  # fmt: skip
"""What inputs and outputs may be: NumPy has it of its own."""
WAY_OUT = "cut the graph before or after it: onnx.utils.extract_model(IN, OUT, input_names, output_names)"


def _spec(path: Path, value: onnx.ValueInfoProto, *, what: str) -> TensorSpec:
    kind = value.type.tensor_type
    where = f"{path}: the {what} {value.name!r}"
    if not value.type.HasField("tensor_type"):
        named = KINDS.get(value.type.WhichOneof("value") or "", "of no known type")
        raise UnsupportedError(f"{where} is {named}; only tensors are taken", hint=WAY_OUT)
    if kind.elem_type == TensorProto.STRING:
        raise UnsupportedError(f"{where} holds strings; only numbers and booleans are taken", hint=WAY_OUT)
    if not kind.HasField("shape"):
        raise UnsupportedError(f"{where} is not a tensor of known rank", hint="export the model with a shape for it")
    if kind.elem_type not in NUMPY:
        known = dict(zip(TensorProto.DataType.values(), TensorProto.DataType.keys(), strict=True))
        name = known.get(kind.elem_type, f"type {kind.elem_type}").lower()
        hint = f"export it with a float32 {what}, and a cast where the graph needs {name}"
        raise UnsupportedError(f"{where} is {name}, which NumPy arrays cannot hold", hint=hint)
    dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type).name
    sizes = [dim.dim_value if dim.HasField("dim_value") else 0 for dim in kind.shape.dim]
    names = [dim.dim_param or (f"{value.name}.{i}" if i else BATCH) for i, dim in enumerate(kind.shape.dim)]
    shape = tuple(size if size > 0 else name for size, name in zip(sizes, names, strict=True))
    return TensorSpec(name=value.name, shape=shape, dtype=dtype)


# -- naming and cleaning ----------------------------------------------------------------------------


def name_nodes(model: ModelProto) -> None:
    """Give every node of the main graph a name of its own: foreign files may have none, or one twice."""
    seen: set[str] = set()
    for i, node in enumerate(model.graph.node):
        if not node.name or node.name in seen:
            node.name = f"{node.op_type}_{i}"
        seen.add(node.name)


def fold_transposes(model: ModelProto) -> None:
    """Store what the main graph turns before it multiplies by it as it is multiplied: a table that makes both
    embeddings and scores is stored twice then, and can be quantized for the one and left alone for the other.
    """
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    turned: set[str] = set()
    for node in [node for node in model.graph.node if node.op_type == "Transpose" and node.input[0] in stored]:
        array = numpy_helper.to_array(stored[node.input[0]])
        axes = next((list(attribute.ints) for attribute in node.attribute if attribute.name == "perm"), None)
        folded = np.ascontiguousarray(array.transpose(axes))
        model.graph.initializer.append(numpy_helper.from_array(folded, node.output[0]))
        turned.add(node.input[0])
        model.graph.node.remove(node)
    used = {name for node, _ in walk(model) for name in node.input} | {value.name for value in model.graph.output}
    for name in turned - used:
        model.graph.initializer.remove(stored[name])


def match_nodes(model: ModelProto, patterns: Sequence[str], *, where: str) -> list[str]:
    """Names of the nodes that any pattern fits: by name, operator, or the name of a weight.

    Args:
        patterns: With `*` and `?`, such as ``Conv``, ``node_Conv_133`` or ``stem.*``.
        where: Names the setting in the error.

    Raises:
        RecipeError: A pattern fits nothing.
    """
    held = {tensor.name for tensor in model.graph.initializer}
    found: list[str] = []
    for pattern in patterns:
        fits = [
            node.name
            for node in model.graph.node
            if any(fnmatchcase(text, pattern) for text in (node.name, node.op_type, *(held & set(node.input))))
        ]
        if not fits:
            known = ", ".join(sorted({node.op_type for node in model.graph.node}))
            raise RecipeError(f"{where}: {pattern!r} fits no node of the graph", hint=f"operators here: {known}")
        found += [name for name in fits if name not in found]
    return found


def tidy(proto: onnx.ModelProto) -> None:
    """Drop what says how and where the graph was made: stack traces, source paths, exporter notes, doc strings."""
    graphs = [proto.graph]
    proto.ClearField("metadata_props")
    proto.ClearField("doc_string")
    while graphs:
        graph = graphs.pop()
        for field in (graph, *graph.node, *graph.initializer, *graph.value_info, *graph.input, *graph.output):
            field.ClearField("metadata_props")
            field.ClearField("doc_string")
        for attribute in (attribute for node in graph.node for attribute in node.attribute):
            attribute.ClearField("doc_string")
            graphs += [attribute.g, *attribute.graphs] if attribute.HasField("g") else attribute.graphs
    for function in proto.functions:
        function.ClearField("metadata_props")
        function.ClearField("doc_string")
        for node in function.node:
            node.ClearField("metadata_props")
            node.ClearField("doc_string")
