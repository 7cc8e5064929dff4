"""An ONNX file of unknown origin: is it whole, does it stay inside its directory, can a runtime take it?

Everything here is checked before any runtime opens the file.
Source: https://onnx.ai/onnx/repo-docs/ExternalData.html
"""

from __future__ import annotations

import math
import stat
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Literal

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper

from bmctl import store
from bmctl.errors import PackageError, RecipeError, UnsupportedError
from bmctl.schema import TensorSpec

MAX_BYTES = 2**31 - 1
MAX_DEPTH = 16
"""Subgraphs within subgraphs; real models have at most a loop within a branch."""

DOMAINS = {"", "ai.onnx", "ai.onnx.ml", "com.microsoft"}
"""Operator sets that at least one of our runtimes knows."""

QUANTIZING = {
    "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger",
    "MatMulInteger", "QGemm", "QLinearAdd", "MatMulNBits", "QAttention",
}  # fmt: skip

Precision = Literal["fp32", "fp16", "bf16", "int8"]


def check_onnx(path: Path) -> ModelProto:
    """Refuse a file that is malformed, reaches outside its directory, or that no runtime can take.

    Returns:
        The model, without its external data.

    Raises:
        PackageError: Missing, not a regular file, malformed, cyclic, or with bad external data.
        UnsupportedError: Over 2 GiB, nested too deep, or with operators of a foreign domain.
    """
    model = _parse(path)
    nodes = list(walk(model))
    _check_domains(path, model, nodes)
    _check_functions(path, model)
    has_external = _check_external(path, model)
    try:
        onnx.checker.check_model(str(path) if has_external else model)
    except (onnx.checker.ValidationError, ValueError, RuntimeError) as error:
        raise PackageError(f"{path} is not a valid ONNX model: {_first_line(error)}") from error
    if not _inputs(model) or not model.graph.output:
        raise PackageError(f"{path} has no input or no output; there is nothing to run")
    return model


def read_specs(path: Path) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Inputs and outputs of a checked file; a free dimension is None.

    Raises:
        UnsupportedError: An input or output that is no tensor, or of no known rank.
    """
    model = onnx.load(path, load_external_data=False)
    if any(not value.type.tensor_type.HasField("shape") for value in model.graph.output):
        model = onnx.shape_inference.infer_shapes(model)
    return tuple(_spec(path, v) for v in _inputs(model)), tuple(_spec(path, v) for v in model.graph.output)


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
    found = (_entries(t).get("location", "") for t in tensors(onnx.load(path, load_external_data=False)))
    return sorted({name for name in found if name})


# -- walking ----------------------------------------------------------------------------------------


def walk(model: ModelProto) -> Iterator[tuple[NodeProto, int]]:
    """Every node of the graph, its subgraphs and the model's functions, with its depth."""
    todo = [(node, 0) for node in model.graph.node]
    todo += [(node, 0) for function in model.functions for node in function.node]
    while todo:
        node, depth = todo.pop()
        yield node, depth
        for graph in _subgraphs(node):
            todo += [(inner, depth + 1) for inner in graph.node]


def tensors(model: ModelProto) -> Iterator[TensorProto]:
    """Every tensor that the model holds: initializers and attributes, sparse ones in their parts."""
    graphs = [model.graph]
    nodes = [node for node, _ in walk(model)]
    for node in nodes:
        graphs += _subgraphs(node)
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


def name_nodes(model: ModelProto) -> None:
    """Give every node of the main graph a name of its own: foreign files may have none, or one twice."""
    seen: set[str] = set()
    for i, node in enumerate(model.graph.node):
        if not node.name or node.name in seen:
            node.name = f"{node.op_type}_{i}"
        seen.add(node.name)


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


def _subgraphs(node: NodeProto) -> list[GraphProto]:
    found: list[GraphProto] = []
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH or attribute.HasField("g"):
            found.append(attribute.g)
        found.extend(attribute.graphs)
    return found


# -- checks -----------------------------------------------------------------------------------------


def _parse(path: Path) -> ModelProto:
    try:
        info = path.stat()
    except OSError as error:
        raise PackageError(f"cannot open {path}: {error.strerror}") from error
    if not stat.S_ISREG(info.st_mode):
        raise PackageError(f"{path} is not a regular file")
    if info.st_size > MAX_BYTES:
        raise UnsupportedError(
            f"{path} has {info.st_size / 2**30:.1f} GiB; an ONNX file holds at most 2",
            hint="save its weights as external data: onnx.save(model, path, save_as_external_data=True)",
        )
    if info.st_size == 0:
        raise PackageError(f"{path} is empty")
    try:
        model = onnx.load_model_from_string(path.read_bytes())
    except (DecodeError, ValueError, OSError) as error:
        note = store.foreign_note(path) or ", or it is nested too deep"
        raise PackageError(f"{path} is not an ONNX file: {_first_line(error)}{note}") from error
    if not model.HasField("graph") or not model.graph.node:
        raise PackageError(f"{path} is not an ONNX file: it holds no graph{store.foreign_note(path)}")
    return model


def _check_domains(path: Path, model: ModelProto, nodes: list[tuple[NodeProto, int]]) -> None:
    local = {(function.domain, function.name) for function in model.functions}
    for node, depth in nodes:
        if depth > MAX_DEPTH:
            raise UnsupportedError(f"{path} has graphs nested deeper than {MAX_DEPTH}, in node {node.name!r}")
        if node.domain not in DOMAINS and (node.domain, node.op_type) not in local:
            raise UnsupportedError(
                f"{path}: node {node.name!r} is a {node.domain}::{node.op_type}, which no runtime here has",
                hint="export the model again without custom operators",
            )


def _check_functions(path: Path, model: ModelProto) -> None:
    """Runtimes inline local functions: one that calls itself never ends, and a chain of doublings takes all memory."""
    bodies = {(function.domain, function.name): function for function in model.functions}
    size: dict[tuple[str, str], int] = {}
    open_calls: set[tuple[str, str]] = set()

    def expand(key: tuple[str, str], depth: int) -> int:
        if key in open_calls or depth > MAX_DEPTH:
            raise PackageError(f"{path}: the function {key[1]!r} calls itself, or functions are nested too deep")
        if key not in size:
            open_calls.add(key)
            inner = ModelProto(functions=[bodies[key]])
            calls = [(node.domain, node.op_type) for node, _ in walk(inner)]
            size[key] = 1 + sum(expand(call, depth + 1) if call in bodies else 1 for call in calls)
            open_calls.discard(key)
        return size[key]

    for key in bodies:
        if expand(key, 0) > 10**6:
            raise UnsupportedError(f"{path}: the function {key[1]!r} expands to more than a million nodes")


def _check_external(path: Path, model: ModelProto) -> bool:
    """Whether there is external data; all of it lies in regular files below the model's directory."""
    found = False
    for tensor in tensors(model):
        if tensor.data_location != TensorProto.EXTERNAL and not tensor.external_data:
            continue
        found = True
        entries = _entries(tensor)
        file = _inside(path, entries.get("location", ""), tensor.name)
        try:
            offset, length = int(entries.get("offset", 0)), int(entries.get("length", -1))
        except ValueError as error:
            raise PackageError(f"{path}: tensor {tensor.name!r} has an offset or length that is no number") from error
        size, needed = file.lstat().st_size, _num_bytes(tensor)
        length = size - offset if "length" not in entries else length
        if offset < 0 or length < 0 or offset + length > size or length < needed:
            raise PackageError(
                f"{path}: tensor {tensor.name!r} needs {needed} bytes at {offset} of {file.name}, which has {size}",
                hint="copy the model again, with all of its data files",
            )
    return found


def _inside(path: Path, location: str, tensor: str) -> Path:
    """The external file, after every part of its path was seen to be a real directory or file."""
    if not location:
        raise PackageError(f"{path}: tensor {tensor!r} has external data and names no file")
    store.check_name(location, where=path)
    file = path.parent
    for part in location.split("/"):
        file = file / part
        try:
            mode = file.lstat().st_mode
        except OSError as error:
            raise PackageError(
                f"{path}: its data file {location} is missing", hint="copy it beside the model, under the same name"
            ) from error
        if stat.S_ISLNK(mode):
            raise PackageError(f"{path}: its data file {location} is a symbolic link, or lies behind one")
    if not stat.S_ISREG(mode):
        raise PackageError(f"{path}: its data file {location} is not a regular file")
    return file


def _entries(tensor: TensorProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}


def _num_bytes(tensor: TensorProto) -> int:
    try:
        bits = 4 if tensor.data_type in (TensorProto.INT4, TensorProto.UINT4) else 0
        bits = bits or 8 * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    except (KeyError, TypeError):
        bits = 8  # the checker says what is wrong with it
    return -(-math.prod(tensor.dims) * bits // 8)


def _inputs(model: ModelProto) -> list[onnx.ValueInfoProto]:
    """Before IR version 4 initializers are listed among the inputs as well."""
    held = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in held]


def _spec(path: Path, value: onnx.ValueInfoProto) -> TensorSpec:
    kind = value.type.tensor_type
    if not value.type.HasField("tensor_type") or not kind.HasField("shape"):
        raise UnsupportedError(f"{path}: {value.name!r} is not a tensor of known rank")
    try:
        dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type).name
    except KeyError as error:
        raise UnsupportedError(f"{path}: {value.name!r} has the unknown type {kind.elem_type}") from error
    shape = tuple(dim.dim_value if dim.HasField("dim_value") and dim.dim_value > 0 else None for dim in kind.shape.dim)
    return TensorSpec(name=value.name, shape=shape, dtype=dtype)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
