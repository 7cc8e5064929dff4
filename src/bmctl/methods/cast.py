"""Half precision in the graph: fp16 or bf16 weights and activations, fp32 at its inputs and outputs.

TensorRT computes what the graph says; fp16 runs on every GPU that it serves, bf16 from SM80 on. On CPUs bf16 is fast
where there is AMX or AVX512-BF16, and OpenVINO's alone: ONNX Runtime has no bf16 convolution there.

Source: Micikevicius et al. 2018, https://arxiv.org/abs/1710.03740
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bmctl.errors import UnsupportedError
from bmctl.schema import Many, StepConfig

if TYPE_CHECKING:
    import onnx

    from bmctl.methods import Meta, MethodContext

FAMILY = "cast"
LEVEL = "graph"


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
    import onnx

    from bmctl.core import halfgraph, onnxfile, onnxgraph
    from bmctl.core.onnxgraph import tidy

    precision = onnxgraph.precision_of(onnx_path)
    if precision == "int8":
        raise UnsupportedError(
            f"{onnx_path.name} is quantized: its products are in int8 already, and its scales need fp32",
            hint="cast the package before the ptq step, in place of quantizing it",
        )
    if precision != "fp32":
        raise UnsupportedError(f"{onnx_path.name} is {precision} already", hint="remove one of the two cast steps")
    model = halfgraph.prepare(onnx.load(onnx_path), config.dtype)
    onnxgraph.name_nodes(model)
    keep = set(onnxgraph.match_nodes(model, config.keep, where="cast: keep"))
    largest = _check_range(model, config, context, keep=keep)
    halved = halfgraph.halve(model, config.dtype, keep=keep)
    tidy(halved.model)
    out.write_bytes(halved.model.SerializeToString(deterministic=True))
    onnxfile.check_onnx(out)
    notes = [f"{name}: cut to fp16's largest value, {halfgraph.FP16_MAX:.0f}" for name in halved.clamped]
    if config.dtype == "bf16":
        notes.append(
            "ONNX Runtime has no bf16 convolution on CPUs: the step's metric and latency are of the same weights "
            "computed in fp32; OpenVINO and TensorRT run the graph itself"
        )
    return {"precision": config.dtype, "num_kept": halved.num_kept, "largest": largest, "notes": notes}


def _check_range(model: onnx.ModelProto, config: Config, context: MethodContext, *, keep: set[str]) -> float:
    """The largest activation on the example; past fp16's range it is refused, by the name of its node."""
    from bmctl.core import halfgraph

    held = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in held]
    if len(inputs) != 1:
        raise UnsupportedError(f"the graph has {len(inputs)} inputs; its range is checked with one")
    x: Any = context.example.numpy()
    found = halfgraph.ranges(model, {inputs[0].name: x})
    largest = max(found.values(), default=0.0)
    over = {name: value for name, value in found.items() if value > halfgraph.FP16_MAX and name not in keep}
    if config.dtype == "fp16" and over:
        name, value = max(over.items(), key=lambda item: item[1])
        raise UnsupportedError(
            f"{len(over)} nodes exceed fp16's range on real samples, such as {name!r} with {value:.3g}",
            hint=f"dtype: bf16, or keep them in fp32: keep: [{', '.join(sorted(over)[:5])}]",
        )
    return largest
