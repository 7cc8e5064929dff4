"""A graph, calibration samples, and what NNCF makes of them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime

from bmctl.core import onnxfile, onnxgraph, quiet
from bmctl.core.runner import check_feed, rows
from bmctl.errors import BmctlError, DataError, UnsupportedError
from bmctl.schema import BATCH, Signature

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from bmctl.methods import Meta, MethodContext
    from bmctl.methods.ptq import Config


def quantize(onnx_path: Path, config: Config, context: MethodContext, *, wanted: int, out: Path) -> Meta:
    """What `ptq.apply` promises, with `wanted` calibration samples or all where there are fewer."""
    precision = onnxgraph.precision_of(onnx_path)
    if precision == "int8":
        raise UnsupportedError(
            f"{onnx_path.name} is quantized already; rounding twice only loses",
            hint="quantize the package before it, or remove one of the two ptq steps",
        )
    if precision != "fp32":
        raise UnsupportedError(f"{onnx_path.name} is {precision}; int8 is made from fp32", hint="put ptq before cast")
    samples = _samples(config, context, onnxgraph.read_signature(onnx_path), wanted=wanted)
    model = onnx.load(onnx_path)
    onnxgraph.name_nodes(model)
    onnxgraph.fold_transposes(model)
    ignored = onnxgraph.match_nodes(model, config.ignore, where="ptq: ignore")
    notes: list[str] = []
    with quiet.listening(notes):
        model, version = _quantize(model, samples, config, ignored=ignored, check=context.check)
    onnxgraph.tidy(model)
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
    floats = {t.name for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT}
    products = [node for node in model.graph.node if node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul")]
    left = [node.name for node in products if floats & set(node.input[:2]) and node.name not in ignored]
    if not left:
        return []
    return [
        f"{len(left)} of {len(products)} products stay in fp32, such as {left[0]}: "
        "NNCF leaves out what loses much accuracy and saves little, such as squeeze-and-excitation"
    ]


def _samples(
    config: Config, context: MethodContext, signature: Signature, *, wanted: int
) -> list[dict[str, np.ndarray]]:
    """One sample each: the first `wanted`, checked."""
    axes = {spec.name: spec.shape.index(BATCH) for spec in signature.inputs if BATCH in spec.shape}
    found: list[dict[str, np.ndarray]] = []
    for feed in context.calibration():
        num = max((array.shape[axes[name]] for name, array in feed.items() if name in axes), default=1)
        try:
            checked = check_feed(feed, inputs=signature.inputs)
        except DataError as error:
            raise DataError(
                f"calibration samples {len(found)} to {len(found) + num - 1}: {error.message}",
                hint="look at the data and at data.input",
            ) from error
        for i in range(num):
            sample = {name: rows(array, axes.get(name), i, i + 1) for name, array in checked.items()}
            found.append({name: np.ascontiguousarray(array) for name, array in sample.items()})
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
    model: onnx.ModelProto,
    samples: list[dict[str, np.ndarray]],
    config: Config,
    *,
    ignored: list[str],
    check: Callable[[], None],
) -> tuple[onnx.ModelProto, str]:
    """NNCF's result with int8 weights, and NNCF's version."""

    def taken(sample: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        check()  # NNCF asks for every sample several times, and looks at no signal meanwhile
        return sample

    quiet.switch_off_telemetry()
    with quiet.listening([]):  # torch remarks on compilers and CUDA when NNCF loads its extensions
        import nncf

        importlib.import_module("torch.utils.cpp_extension")
    onnxruntime.set_default_logger_severity(4)
    try:
        quantized: Any = nncf.quantize(
            model,
            nncf.Dataset(samples, taken),
            preset=nncf.QuantizationPreset(config.preset),
            subset_size=len(samples),
            fast_bias_correction=config.fast_bias_correction,
            model_type=nncf.ModelType.TRANSFORMER if _has_attention(model) else None,
            ignored_scope=nncf.IgnoredScope(names=ignored) if ignored else None,
        )
    except BmctlError:
        raise
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
