"""An ONNX file of unknown origin: is it whole, does it stay inside its directory, can a runtime take it?

Everything here is checked before any runtime opens the file.
Source: https://onnx.ai/onnx/repo-docs/ExternalData.html
"""

from __future__ import annotations

import math
import shutil
import stat
from pathlib import Path

import onnx
import onnx.inliner
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import ModelProto, NodeProto, TensorProto, helper

from bmctl import store
from bmctl.core import onnxgraph
from bmctl.errors import PackageError, UnsupportedError, first_line

MAX_BYTES = 2**31 - 1
MAX_DEPTH = 16
"""Subgraphs within subgraphs; real models have at most a loop within a branch."""

MAX_OPSET = 26
"""The newest operator set that ONNX Runtime reads."""

DOMAINS = {"", "ai.onnx", "ai.onnx.ml", "com.microsoft"}
"""Operator sets that at least one of our runtimes knows."""


def check_onnx(path: Path) -> ModelProto:
    """Refuse a file that is malformed, reaches outside its directory, or that no runtime can take.

    Returns:
        The model, without its external data.

    Raises:
        PackageError: Missing, not a regular file, malformed, cyclic, or with bad external data.
        UnsupportedError: Over 2 GiB, nested too deep, or with operators of a foreign domain or of an opset to come.
    """
    model = _parse(path)
    nodes = list(onnxgraph.walk(model))
    _check_domains(path, model, nodes)
    _check_functions(path, model)
    has_external = _check_external(path, model)
    try:
        onnx.checker.check_model(str(path) if has_external else model)
    except (onnx.checker.ValidationError, ValueError, RuntimeError) as error:
        raise PackageError(f"{path} is not a valid ONNX model: {first_line(error)}") from error
    if not onnxgraph.inputs(model) or not model.graph.output:
        raise PackageError(f"{path} has no input or no output; there is nothing to run")
    return model


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
        raise PackageError(f"{path} is not an ONNX file: {first_line(error)}{note}") from error
    if not model.HasField("graph") or not model.graph.node:
        raise PackageError(f"{path} is not an ONNX file: it holds no graph{store.foreign_note(path)}")
    return model


def _check_domains(path: Path, model: ModelProto, nodes: list[tuple[NodeProto, int]]) -> None:
    opset = max((one.version for one in model.opset_import if one.domain in ("", "ai.onnx")), default=1)
    if opset > MAX_OPSET:
        raise UnsupportedError(
            f"{path} has operators of opset {opset}; runtimes read up to {MAX_OPSET}",
            hint=f"export the model again with opset_version={MAX_OPSET}",
        )
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
            calls = [(node.domain, node.op_type) for node, _ in onnxgraph.walk(inner)]
            size[key] = 1 + sum(expand(call, depth + 1) if call in bodies else 1 for call in calls)
            open_calls.discard(key)
        return size[key]

    for key in bodies:
        if expand(key, 0) > 10**6:
            raise UnsupportedError(f"{path}: the function {key[1]!r} expands to more than a million nodes")


def _check_external(path: Path, model: ModelProto) -> bool:
    """Whether there is external data; all of it lies in regular files below the model's directory."""
    found = False
    for tensor in onnxgraph.tensors(model):
        if tensor.data_location != TensorProto.EXTERNAL and not tensor.external_data:
            continue
        found = True
        entries = onnxgraph.entries(tensor)
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


def _num_bytes(tensor: TensorProto) -> int:
    try:
        bits = 4 if tensor.data_type in (TensorProto.INT4, TensorProto.UINT4) else 0
        bits = bits or 8 * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    except (KeyError, TypeError):
        bits = 8  # the checker says what is wrong with it
    return -(-math.prod(tensor.dims) * bits // 8)


def taken_in(path: Path) -> bytes | None:
    """The graph with its external data in it; None where it has none, or with it is over 2 GiB.

    ONNX Runtime infers shapes from small tensors, such as the axes of a reduction, in the file alone.
    """
    try:
        if not onnxgraph.data_files(path):
            return None
        model = onnx.load(path)
    except (DecodeError, OSError):
        return None  # whoever opens it says why
    return model.SerializeToString() if model.ByteSize() <= MAX_BYTES else None


def inline_functions(path: Path) -> bool:
    """Write out the functions of a graph of one file, in place; whether it had any."""
    model = onnx.load(path)
    if not model.functions:
        return False
    onnx.save(onnx.inliner.inline_local_functions(model), path)
    return True


def copy_graph(onnx_path: Path, *, out: Path) -> None:
    """Copy a checked ONNX graph to one file: byte for byte, or with external data taken in.

    Raises:
        PackageError: It is not a valid ONNX file.
        UnsupportedError: With its external data it is over protobuf's 2 GiB.
    """
    try:
        onnx.checker.check_model(onnx_path)
        model = onnx.load(onnx_path, load_external_data=False)
    except (onnx.checker.ValidationError, ValueError, OSError, RuntimeError) as error:
        raise PackageError(f"{onnx_path} is not a valid ONNX graph: {first_line(error)}") from error
    external = [tensor for tensor in model.graph.initializer if tensor.data_location == onnx.TensorProto.EXTERNAL]
    if not external:
        shutil.copyfile(onnx_path, out)
        return
    model = onnx.load(onnx_path)
    if model.ByteSize() > 2**31 - 1:
        raise UnsupportedError(
            f"{onnx_path} holds {model.ByteSize() / 2**30:.1f} GiB; one file takes 2 GiB",
            hint="make it smaller first, with `bmctl quantize` or `bmctl compress`",
        )
    onnx.save(model, out)
