"""Models of one input and one output as ONNX files."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from bmctl.engine.artifacts.graph import export_onnx
from bmctl.schema import BATCH, Signature, TensorSpec


def signature(*shape: int | str, name: str = "input", outputs: tuple[str, ...] = ("logits",)) -> Signature:
    """One float32 input; outputs of which only the samples are known."""
    return Signature(
        inputs=(TensorSpec(name=name, dtype="float32", shape=(BATCH, *shape)),),
        outputs=tuple(TensorSpec(name=each, dtype="float32", shape=(BATCH, "n")) for each in outputs),
    )


def export(model: nn.Module, example: torch.Tensor, out: Path, **names: str) -> tuple[str, ...]:
    """What `export_onnx` had to say; `names` are those of `input` and `output`."""
    told = signature(*example.shape[1:], name=names.get("input", "input"), outputs=(names.get("output", "logits"),))
    return export_onnx(model, signature=told, example={told.inputs[0].name: example.numpy()}, out=out)
