"""From an nn.Module to one ONNX file whose batch is proven to be free.

Source: torch.onnx with dynamo=True, https://docs.pytorch.org/docs/stable/onnx_export.html
"""

from __future__ import annotations

import copy
import os
import re
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import nn

from bmctl.backends import onnxruntime
from bmctl.core import onnxgraph
from bmctl.core.quiet import listening
from bmctl.engine.artifacts import parity
from bmctl.errors import BmctlError, GateError, UnsupportedError, first_line

OPSET = 18
"""The exporter's own opset: nothing has to be converted, and every runtime and NNCF take it."""

MAX_BYTES = 2**31 - 2**20
"""protobuf's limit for one file, less room for the graph itself."""

TOLERANCE = 1e-4
"""Of fp32 ONNX Runtime against fp32 eager, as a fraction of the output's scale."""


def export_onnx(
    model: nn.Module,
    *,
    example: torch.Tensor,
    out: Path,
    input_name: str = "input",
    output_name: str = "logits",
) -> tuple[str, ...]:
    """Write `model` as ONNX with a free batch dimension, checked against eager at two batch sizes not traced.

    Args:
        model: Takes float32 [N, ...], gives one tensor [N, ...]. It is left as it is: a copy is exported, in eval
            mode, in fp32, on the CPU.
        example: float32 [2 or more, ...], preprocessed real samples.
        out: The file to write. A graph that fails the check is kept beside it as `<name>.rejected`.

    Returns:
        What the exporter had to say, one line each.

    Raises:
        UnsupportedError: An operator without ONNX form, data-dependent control flow, a fixed batch, over 2 GB.
        GateError: The graph computes something else than the model.
    """
    if example.ndim < 2 or example.shape[0] < 2:
        raise ValueError(f"example must be [2 or more, ...], got {list(example.shape)}")
    model = copy.deepcopy(model).to(device="cpu", dtype=torch.float32).eval()
    example = example.detach().to(device="cpu", dtype=torch.float32)
    _check_size(model, limit=MAX_BYTES)
    references = _references(model, example)
    notes: list[str] = []
    with listening(notes):
        proto = _convert(model, example, input_name=input_name, output_name=output_name)
    onnxgraph.tidy(proto)
    part = out.with_name(f".{out.name}.tmp-{os.getpid()}")
    try:
        part.write_bytes(proto.SerializeToString(deterministic=True))
        _check_batches(part, references, out=out, input_name=input_name)
        part.replace(out)
    finally:
        part.unlink(missing_ok=True)
    return tuple(notes)


def _check_size(model: nn.Module, *, limit: int) -> None:
    size_bytes = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    if size_bytes > limit:
        raise UnsupportedError(
            f"the model has {size_bytes / 2**30:.1f} GiB of weights; one ONNX file holds at most "
            f"{limit / 2**30:.2f} GiB, and files with external data are not written yet",
            hint="compress it with a module method first (structured, svd), or take a smaller model",
        )


def _references(model: nn.Module, example: torch.Tensor) -> list[tuple[np.ndarray, np.ndarray]]:
    """Inputs and eager outputs at two batch sizes other than the traced one: real samples with a little noise."""
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for size in (1, example.shape[0] + 3):
        x = example[torch.arange(size) % example.shape[0]]
        x = x + 0.05 * x.std() * torch.randn(x.shape, generator=generator)
        try:
            with torch.inference_mode():
                y = model(x)
        except Exception as error:  # any model of any source: its forward may raise anything
            raise UnsupportedError(
                f"{type(model).__name__} does not run on a batch of {size}: "
                f"{type(error).__name__}: {first_line(error)}",
                hint="its forward must take any batch size; look for a view or reshape with a fixed first dimension",
            ) from error
        if not isinstance(y, torch.Tensor):
            raise UnsupportedError(
                f"{type(model).__name__} returns {type(y).__name__}; one tensor of logits is exported",
                hint="wrap it in a module that returns the logits",
            )
        pairs.append((x.numpy(), y.numpy()))
    return pairs


def _convert(model: nn.Module, example: torch.Tensor, *, input_name: str, output_name: str) -> onnx.ModelProto:
    try:
        program = torch.onnx.export(
            model,
            (example,),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            input_names=[input_name],
            output_names=[output_name],
            opset_version=OPSET,
            optimize=True,
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        raise _unsupported(model, error) from error
    assert program is not None
    return program.model_proto


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


def _check_batches(path: Path, references: list[tuple[np.ndarray, np.ndarray]], *, out: Path, input_name: str) -> None:
    """Run the file on ONNX Runtime on every reference; move it to `.rejected` when one does not agree."""
    trouble = ""
    try:
        with onnxruntime.open(path, config=onnxruntime.Config(threads=torch.get_num_threads(), device="cpu")) as runner:
            for x, y in references:
                trouble = trouble or _compare(y, runner.run({input_name: x})[runner.signature.outputs[0].name])
    except BmctlError as error:
        trouble = error.message.replace(str(path), "it")
    if trouble:
        rejected = out.with_name(f"{out.name}.rejected")
        path.replace(rejected)
        raise GateError(
            f"the exported graph failed its check: {trouble}; kept as {rejected}",
            hint="a model whose forward depends on the batch size, on randomness or on values cannot be exported",
        )


def _compare(y: np.ndarray, got: np.ndarray) -> str:
    """What is wrong, or the empty string."""
    if y.shape != got.shape:
        return f"at batch {len(y)} it gives the shape {list(got.shape)}, the model {list(y.shape)}"
    result = parity.compare(y, got, tolerance=TOLERANCE, min_agreement=1.0, source="eager")
    return "" if result.passed else f"at batch {len(y)} it differs from the model: {result}"
