"""From an nn.Module to one ONNX file whose free axes are proven to be free.

Source: torch.onnx with dynamo=True, https://docs.pytorch.org/docs/stable/onnx_export.html
"""

from __future__ import annotations

import copy
import inspect
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from bmctl.backends import onnxruntime
from bmctl.core import onnxgraph
from bmctl.core.calling import call
from bmctl.core.noise import axis_size
from bmctl.core.quiet import listening
from bmctl.engine.artifacts import parity
from bmctl.errors import BmctlError, GateError, UnsupportedError, first_line
from bmctl.schema import BATCH, Signature, Span

OPSET = 18
"""The exporter's own opset: nothing has to be converted, and every runtime and NNCF take it."""

MAX_BYTES = 2**31 - 2**20
"""protobuf's limit for one file, less room for the graph itself."""

TOLERANCE = 1e-4
"""Of fp32 ONNX Runtime against fp32 eager, as a fraction of the output's scale."""

TRACED = 2
"""Samples that are traced: torch.export takes an axis of size 1 for a fixed one."""

Feed = Mapping[str, np.ndarray]

_SAME_AXIS = re.compile(r"# The axis name: (.+) will not be used, since it shares .* with another axis: \1\.")
"""What the exporter says of an axis that two inputs have, under one name."""


def export_onnx(
    model: nn.Module, *, signature: Signature, example: Feed, out: Path, axes: Mapping[str, Span] | None = None
) -> tuple[str, ...]:
    """Write `model` as ONNX with the free axes of `signature`, checked against eager at two other sizes of each.

    Args:
        model: Takes the signature's inputs by position, and gives its outputs in their order or by their names. It is
            left as it is: a copy is exported, in eval mode, in fp32, on the CPU.
        signature: Names, types and axes.
        example: An array per input: a real call, of which the first TRACED samples are traced.
        out: The file to write. A graph that fails the check is kept beside it as `<name>.rejected`.
        axes: Sizes that will be asked for; a model that takes no others is proven at these.

    Returns:
        What the exporter had to say, one line each.

    Raises:
        UnsupportedError: An operator without ONNX form, data-dependent control flow, a size that is fixed in the
            model's forward, over 2 GB.
        GateError: The graph computes something else than the model.
    """
    model = _in_fp32(copy.deepcopy(model))
    _check_size(model, limit=MAX_BYTES)
    traced = resized(example, signature, {BATCH: TRACED})
    proofs = [
        _prove(model, signature, resized(example, signature, sizes)) for sizes in _sizes(signature, example, axes)
    ]
    notes: list[str] = []
    with listening(notes):
        proto = _convert(model, signature, traced)
    onnxgraph.tidy(proto)
    part = out.with_name(f".{out.name}.tmp-{os.getpid()}")
    try:
        part.write_bytes(proto.SerializeToString(deterministic=True))
        _check_proofs(part, proofs, signature, out=out)
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)
    return tuple(note for note in notes if not _SAME_AXIS.match(note))


def resized(feed: Feed, signature: Signature, sizes: Mapping[str, int]) -> dict[str, np.ndarray]:
    """The same call at other sizes of its free axes: what is there over again, or its beginning."""
    found = {}
    for spec in signature.inputs:
        array = feed[spec.name]
        for i, axis in enumerate(spec.shape):
            if isinstance(axis, str) and axis in sizes and sizes[axis] != array.shape[i] and array.shape[i]:
                array = np.take(array, np.arange(sizes[axis]) % array.shape[i], axis=i)
        found[spec.name] = np.ascontiguousarray(array)
    return found


def _in_fp32(model: nn.Module) -> nn.Module:
    """Weights in fp32; what counts or indexes keeps its type."""
    return model.to(device="cpu", dtype=torch.float32).eval()


def _check_size(model: nn.Module, *, limit: int) -> None:
    size_bytes = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    if size_bytes > limit:
        raise UnsupportedError(
            f"the model has {size_bytes / 2**30:.1f} GiB of weights; one ONNX file holds at most "
            f"{limit / 2**30:.2f} GiB, and files with external data are not written yet",
            hint="compress it with a module method first (structured, svd), or take a smaller model",
        )


@dataclass(frozen=True)
class _Proof:
    """What eager PyTorch gives at one choice of sizes."""

    feed: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]
    words: str


def _sizes(signature: Signature, example: Feed, axes: Mapping[str, Span] | None) -> list[dict[str, int]]:
    """Two sizes of every free axis other than the traced one: a smaller and a larger, all of them at once.

    An axis called ``past + tokens`` is as long as both.
    """
    traced = {
        axis: example[spec.name].shape[i]
        for spec in signature.inputs
        for i, axis in enumerate(spec.shape)
        if isinstance(axis, str)
    }
    low, high = {}, {}
    for axis, size in traced.items():
        if "+" in axis:
            continue
        if axis == BATCH:
            low[axis], high[axis] = 1, TRACED + 3
            continue
        span = (axes or {}).get(axis)
        asked = [span.min, span.opt, span.max] if span else [max(1, size // 2), size + 3]
        others = [each for each in asked if each != size] or [size]
        low[axis], high[axis] = others[0], others[-1]
    return [{axis: axis_size(axis, sizes) for axis in traced} for sizes in (low, high)]


def _prove(model: nn.Module, signature: Signature, feed: dict[str, np.ndarray]) -> _Proof:
    shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in feed.items())
    first = next(iter(feed.values()))
    words = f"a batch of {len(first)}" if signature.axes == (BATCH,) else shapes
    try:
        with torch.inference_mode():
            fields = [torch.from_numpy(array) for array in feed.values()]
            outputs = call(model, fields, gives=[spec.name for spec in signature.outputs])
    except UnsupportedError as error:
        raise UnsupportedError(f"{type(model).__name__}: {error.message}", hint=error.hint) from error
    except Exception as error:  # any model of any source: its forward may raise anything
        raise UnsupportedError(
            f"{type(model).__name__} does not run on {words}: {type(error).__name__}: {first_line(error)}",
            hint="its forward must take any size of its free axes; look for a view or reshape with fixed dimensions",
        ) from error
    return _Proof(feed, {name: tensor.numpy() for name, tensor in outputs.items()}, words)


def _convert(model: nn.Module, signature: Signature, example: Feed) -> onnx.ModelProto:
    free = [{i: axis for i, axis in enumerate(spec.shape) if isinstance(axis, str)} for spec in signature.inputs]
    try:
        program = torch.onnx.export(
            model,
            tuple(torch.from_numpy(example[spec.name]) for spec in signature.inputs),
            dynamo=True,
            dynamic_shapes=_by_position(model, free),
            input_names=[spec.name for spec in signature.inputs],
            output_names=[spec.name for spec in signature.outputs],
            opset_version=OPSET,
            optimize=True,
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        raise _unsupported(model, error) from error
    assert program is not None
    return program.model_proto


def _by_position(model: nn.Module, free: list[dict[int, str]]) -> tuple[Any, ...]:
    """As the forward takes them: as a dict its keys would have to be the forward's own argument names."""
    kinds = [one.kind for one in inspect.signature(model.forward).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL not in kinds:
        return tuple(free)
    named = kinds.index(inspect.Parameter.VAR_POSITIONAL)
    return (*free[:named], tuple(free[named:]))


def _unsupported(model: nn.Module, error: BaseException) -> UnsupportedError:
    """One line out of the exporter's many: which operator or which line of which module."""
    name = type(model).__name__
    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__) is not None and cause not in causes:
        causes.append(cause)
    text = "\n".join(str(cause) for cause in causes)
    if operator := re.search(r"No ONNX function found for <\w+\(op='([\w.]+)'", text):
        return UnsupportedError(
            f"{name} uses the operator {operator[1]}, which has no ONNX form",
            hint="replace it in the model's forward; --debug shows where it is called",
        )
    where = re.findall(r'File "[^"]*?([^"/]+)", line (\d+), in (\w+)', str(causes[-1]))
    at = f" at {where[-1][0]}:{where[-1][1]} in {where[-1][2]}" if where else ""
    if "DataDependent" in text or "data-dependent" in text:
        return UnsupportedError(
            f"{name} decides by the values of its input{at}: such control flow has no fixed graph",
            hint="replace the branch by torch.where or torch.cond",
        )
    return UnsupportedError(
        f"{name} cannot be exported to ONNX{at}: {type(causes[-1]).__name__}: {first_line(causes[-1])}",
        hint="run again with --debug for the exporter's own report",
    )


def _check_proofs(path: Path, proofs: Sequence[_Proof], signature: Signature, *, out: Path) -> None:
    """Run the file on ONNX Runtime at every size; move it to `.rejected` when one does not agree."""
    trouble = ""
    try:
        config = onnxruntime.Config(threads=torch.get_num_threads(), device="cpu")
        with onnxruntime.open(path, config=config, signature=signature) as runner:
            for proof in proofs:
                trouble = trouble or _compare(proof, runner.run(proof.feed), signature)
    except BmctlError as error:
        trouble = error.message.replace(str(path), "it")
    if trouble:
        rejected = out.with_name(f"{out.name}.rejected")
        path.replace(rejected)
        raise GateError(
            f"the exported graph failed its check: {trouble}; kept as {rejected}",
            hint="a model whose forward depends on the batch size, on randomness or on values cannot be exported",
        )


def _compare(proof: _Proof, got: Feed, signature: Signature) -> str:
    """What is wrong, or the empty string."""
    for spec in signature.outputs:
        want = proof.outputs[spec.name]
        if want.shape != got[spec.name].shape:
            shapes = f"{list(got[spec.name].shape)}, the model {list(want.shape)}"
            return f"at {proof.words} it gives {spec.name!r} the shape {shapes}"
        result = parity.compare(want, got[spec.name], tolerance=TOLERANCE, min_agreement=1.0, source="eager")
        if not result.passed:
            return f"at {proof.words} it differs from the model: {result}"
    return ""
