"""Static int8 quantization after training: ranges from calibration samples, Q/DQ pairs in the ONNX graph.

Weights and activations are symmetric, zero point 0, as TensorRT takes them. Behind a ReLU activations are unsigned:
twice the steps, and the form in which CPU runtimes compute a convolution in integers. TensorRT has signed ones only;
its build turns them (backends/trt_graph.py).

Source: https://docs.openvino.ai/2026/openvino-workflow/model-optimization-guide/quantizing-models-post-training.html
    and https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/work-quantized-types.html
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from bmctl.schema import Count, Many, StepConfig

if TYPE_CHECKING:
    from pathlib import Path

    from bmctl.methods import Meta, MethodContext

VERB = "quantize"
LEVEL = "graph"
CALIBRATES = True
QUANTIZES = True

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


def num_samples(config: Config) -> int:
    """Calibration samples that it looks at, where there are as many."""
    return config.samples or ENOUGH


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
    from bmctl.methods.ptq import quantization

    return quantization.quantize(onnx_path, config, context, wanted=num_samples(config), out=out)
