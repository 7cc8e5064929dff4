"""Half precision in the graph: fp16 or bf16 weights and activations, fp32 at its inputs and outputs.

TensorRT computes what the graph says; fp16 runs on every GPU that it serves, bf16 from SM80 on. On CPUs bf16 is fast
where there is AMX or AVX512-BF16, and OpenVINO's alone: ONNX Runtime has no bf16 convolution there.

Source: Micikevicius et al. 2018, https://arxiv.org/abs/1710.03740
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from bmctl.schema import Many, StepConfig

if TYPE_CHECKING:
    from pathlib import Path

    from bmctl.methods import Meta, MethodContext

VERB = "quantize"
LEVEL = "graph"
CALIBRATES = False
QUANTIZES = False


class Config(StepConfig):
    """Attributes:
    dtype: fp16 has three more bits of precision, bf16 the range of fp32.
    keep: Nodes that stay in fp32, by their own name, their operator or a weight of theirs, with `*` and `?`.
    """

    method: Literal["cast"] = "cast"
    dtype: Literal["fp16", "bf16"] = "fp16"
    keep: Many[str] = ()


def apply(onnx_path: Path, config: Config, context: MethodContext, *, out: Path) -> Meta:
    """Write the cast graph.

    Args:
        onnx_path: An fp32 graph with one input.
        context: Its example shows how large activations are.
        out: The file to write: half the size.

    Returns:
        precision, num_kept (nodes in fp32), largest (activation on the example), notes.

    Raises:
        UnsupportedError: The graph is not fp32, or its weights or activations do not fit into fp16.
        RecipeError: A pattern of `keep` fits no node.
    """
    from bmctl.methods.cast import casting

    return casting.cast(onnx_path, config, example=context.example, out=out)
