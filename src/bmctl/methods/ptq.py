"""Static int8 quantization after training: ranges from calibration samples, Q/DQ pairs in the ONNX graph.

Weights and activations are symmetric, zero point 0, as TensorRT takes them. Behind a ReLU activations are unsigned:
twice the steps, and the form in which CPU runtimes compute a convolution in integers. TensorRT has signed ones only;
its build turns them (backends/trt_graph.py).

Source: https://docs.openvino.ai/2026/openvino-workflow/model-optimization-guide/quantizing-models-post-training.html
    and https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/work-quantized-types.html
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bmctl.errors import DataError, UnsupportedError
from bmctl.schema import Count, Many, StepConfig

if TYPE_CHECKING:
    import numpy as np
    import onnx

    from bmctl.methods import Meta, MethodContext

FAMILY = "quantize"
LEVEL = "graph"


ENOUGH = 300
"""Calibration samples, as NNCF's own default has it: more hardly move the ranges."""


class Config(StepConfig):
    """Attributes:
    samples: Calibration samples that are looked at; None takes 300 of `data.calib`, or all where there are fewer.
    preset: `performance` is symmetric throughout, for every backend; `mixed` lets activations be asymmetric,
        which is finer for activations that are not centred, and which TensorRT refuses.
    fast_bias_correction: Correct each layer's mean shift from one pass; the slow way follows the error through
        the graph and takes one pass per layer.
    ignore: Nodes that stay in fp32, by their own name, their operator or a weight of theirs, with `*` and `?`.
    """

    method: Literal["ptq"] = "ptq"
    samples: Count | None = None
    preset: Literal["performance", "mixed"] = "performance"
    fast_bias_correction: bool = True
    ignore: Many[str] = ()


def apply(onnx_path: Path, config: Config, context: MethodContext, *, out: Path) -> Meta:
    """Write the quantized graph.

    Args:
        onnx_path: A floating point graph with one input.
        context: Its calibration samples are taken one at a time, in their order.
        out: The file to write: weights as int8, so a quarter of the size.

    Returns:
        precision, num_pairs, num_ignored, nncf (version), calibration, notes.

    Raises:
        UnsupportedError: The graph is quantized already, is not fp32, or holds nothing to quantize.
        DataError: No calibration samples, too few, of another shape, or with nan or inf.
        RecipeError: A pattern of `ignore` fits no node.
    """
    import onnx

    from bmctl.core import onnxfile, onnxgraph, quiet
    from bmctl.core.onnxgraph import tidy

    precision = onnxgraph.precision_of(onnx_path)
    if precision == "int8":
        raise UnsupportedError(
            f"{onnx_path.name} is quantized already; rounding twice only loses",
            hint="quantize the package before it, or remove one of the two ptq steps",
        )
    if precision != "fp32":
        raise UnsupportedError(f"{onnx_path.name} is {precision}; int8 is made from fp32", hint="put ptq before cast")
    inputs = onnxgraph.read_signature(onnx_path).inputs
    if len(inputs) != 1:
        raise UnsupportedError(f"{onnx_path.name} has {len(inputs)} inputs; calibration samples feed one")
    samples = _samples(config, context, shape=inputs[0].shape)
    model = onnx.load(onnx_path)
    onnxgraph.name_nodes(model)
    ignored = onnxgraph.match_nodes(model, config.ignore, where="ptq: ignore")
    notes: list[str] = []
    with quiet.listening(notes):
        model, version = _quantize(model, samples, config, ignored=ignored, input_name=inputs[0].name)
    tidy(model)
    num_pairs = sum(node.op_type == "QuantizeLinear" for node in model.graph.node)
    if not num_pairs:
        raise UnsupportedError(f"{onnx_path.name} holds nothing to quantize", hint="it needs convolutions or products")
    notes += _left_over(model, ignored)
    out.write_bytes(model.SerializeToString(deterministic=True))
    onnxfile.check_onnx(out)
    return {
        "precision": "int8",
        "num_pairs": num_pairs,
        "num_ignored": len(ignored),
        "nncf": version,
        "calibration": {**context.calibration_record, "used": len(samples)},
        "notes": notes,
    }


def _left_over(model: onnx.ModelProto, ignored: list[str]) -> list[str]:
    """A note about products whose weights stay in fp32 though nobody asked for it."""
    import onnx

    floats = {t.name for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT}
    products = [node for node in model.graph.node if node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul")]
    left = [node.name for node in products if floats & set(node.input[:2]) and node.name not in ignored]
    if not left:
        return []
    return [
        f"{len(left)} of {len(products)} products stay in fp32, such as {left[0]}: "
        "NNCF leaves out what loses much accuracy and saves little, such as squeeze-and-excitation"
    ]


def _samples(config: Config, context: MethodContext, *, shape: tuple[int | str, ...]) -> list[np.ndarray]:
    """float32 [1, ...] each: the first `config.samples`, checked."""
    import numpy as np

    wanted = config.samples or ENOUGH
    found: list[np.ndarray] = []
    for batch in context.calibration():
        want = [size if isinstance(size, int) else "n" for size in shape]
        fixed = [(w, g) for w, g in zip(shape[1:], batch.shape[1:], strict=False) if isinstance(w, int)]
        if batch.ndim != len(shape) or any(w != g for w, g in fixed):
            raise DataError(f"calibration samples have the shape {list(batch.shape)}, the model takes {want}")
        if not np.isfinite(batch).all():
            raise DataError(
                f"calibration samples {len(found)} to {len(found) + len(batch) - 1} hold nan or inf",
                hint="look at the data and at data.input.std",
            )
        found += [np.ascontiguousarray(sample[None], dtype=np.float32) for sample in batch]
        if len(found) >= wanted:
            return found[:wanted]
    if not found:
        raise DataError(
            "quantizing needs calibration samples, and there are none",
            hint="name data in the recipe: data.source and data.calib",
        )
    if config.samples is not None:
        raise DataError(
            f"samples is {config.samples}, and the calibration data has {len(found)}",
            hint=f"samples: {len(found)}, or a larger data.calib.limit",
        )
    return found


def _quantize(
    model: onnx.ModelProto, samples: list[np.ndarray], config: Config, *, ignored: list[str], input_name: str
) -> tuple[onnx.ModelProto, str]:
    """NNCF's result with int8 weights, and NNCF's version."""
    from bmctl.core import quiet

    quiet.switch_off_telemetry()
    with quiet.listening([]):  # torch remarks on compilers and CUDA when NNCF loads its extensions
        import nncf

        importlib.import_module("torch.utils.cpp_extension")
    import onnxruntime

    onnxruntime.set_default_logger_severity(4)
    try:
        quantized: Any = nncf.quantize(
            model,
            nncf.Dataset([{input_name: sample} for sample in samples]),
            preset=nncf.QuantizationPreset(config.preset),
            subset_size=len(samples),
            fast_bias_correction=config.fast_bias_correction,
            model_type=nncf.ModelType.TRANSFORMER if _has_attention(model) else None,
            ignored_scope=nncf.IgnoredScope(names=ignored) if ignored else None,
        )
    except Exception as error:  # NNCF lets through whatever ONNX Runtime and its own passes raise
        raise UnsupportedError(
            f"NNCF {nncf.__version__} cannot quantize this graph: {' '.join(str(error).split())[:300]}",
            hint="leave the node that it names in floating point: ignore: [NAME]",
        ) from error
    return quantized, nncf.__version__


def _has_attention(model: onnx.ModelProto) -> bool:
    """A softmax that feeds a matrix product: NNCF then smooths activations and spares the softmax."""
    weights = {name for node in model.graph.node if node.op_type == "Softmax" for name in node.output}
    return any(node.op_type == "MatMul" and weights & set(node.input) for node in model.graph.node)
