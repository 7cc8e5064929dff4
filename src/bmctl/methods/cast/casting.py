"""A graph cast to half precision, once its activations are known to fit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx

from bmctl.core import onnxfile, onnxgraph
from bmctl.errors import UnsupportedError
from bmctl.methods.cast import halfgraph

if TYPE_CHECKING:
    from pathlib import Path

    from bmctl.methods import Example, Meta
    from bmctl.methods.cast import Config


def cast(onnx_path: Path, config: Config, *, example: Example, out: Path) -> Meta:
    """What `cast.apply` promises."""
    precision = onnxgraph.precision_of(onnx_path)
    if precision == "int8":
        raise UnsupportedError(
            f"{onnx_path.name} is quantized: its products are in int8 already, and its scales need fp32",
            hint="cast the package before the ptq step, in place of quantizing it",
        )
    if precision != "fp32":
        raise UnsupportedError(f"{onnx_path.name} is {precision} already", hint="remove one of the two cast steps")
    model = halfgraph.raised(onnx.load(onnx_path), config.dtype)
    onnxgraph.name_nodes(model)
    keep = set(onnxgraph.match_nodes(model, config.keep, where="cast: keep"))
    largest = _check_range(model, config, example, keep=keep)
    halved = halfgraph.halve(model, config.dtype, keep=keep)
    onnxgraph.tidy(halved.model)
    out.write_bytes(halved.model.SerializeToString(deterministic=True))
    onnxfile.check_onnx(out)
    notes = [f"{name}: cut to fp16's largest value, {halfgraph.FP16_MAX:.0f}" for name in halved.clamped]
    if config.dtype == "bf16":
        notes.append(
            "ONNX Runtime has no bf16 convolution on CPUs: the step's metric and latency are of the same weights "
            "computed in fp32; OpenVINO and TensorRT run the graph itself"
        )
    return {"precision": config.dtype, "num_kept": halved.num_kept, "largest": largest, "notes": notes}


def _check_range(model: onnx.ModelProto, config: Config, example: Example, *, keep: set[str]) -> float:
    """The largest activation on the example; past fp16's range it is refused, by the name of its node."""
    found = halfgraph.ranges(model, {name: tensor.numpy() for name, tensor in example.items()})
    largest = max(found.values(), default=0.0)
    over = {name: value for name, value in found.items() if value > halfgraph.FP16_MAX and name not in keep}
    if config.dtype == "fp16" and over:
        name, value = max(over.items(), key=lambda item: item[1])
        raise UnsupportedError(
            f"{len(over)} nodes exceed fp16's range on real samples, such as {name!r} with {value:.3g}",
            hint=f"dtype: bf16, or keep them in fp32: keep: [{', '.join(sorted(over)[:5])}]",
        )
    return largest
