"""Quantizers as TensorRT needs them: int8, symmetric, with biases in float.

NNCF and ONNX Runtime quantize what a ReLU gives as uint8 with zero point 0. TensorRT's parser reads these as int8 *with
the same scale* and only warns: every activation above half of the calibrated range would be cut off. Other zero points
and int32 biases, which ONNX Runtime's tools make by default, it refuses.

Source: importQuantizeLinear in https://github.com/onnx/onnx-tensorrt/blob/main/onnxOpImporters.cpp
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bmctl.backends.quantized_operators import dequantized
from bmctl.backends.rewriting import Writer, attribute, given, rewrite
from bmctl.errors import UnsupportedError

if TYPE_CHECKING:
    import numpy as np
    import onnx

QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")
MOVING = {"Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "Identity", "Slice", "Gather", "MaxPool"}
"""What may stand between a quantizer and its reader: it hands integers on as they are."""
POSITIVE = {"Relu", "Sigmoid", "Softmax", "HardSigmoid", "Clip", "Exp", "Abs"}

BIASES = "int32 biases are stored in float"
SYMMETRIC = "quantizers are int8 and symmetric over the same range"
EXACT = "unsigned quantizers are int8, with the same steps"
WEIGHTS = "weights are quantized again, symmetrically"
INPUTS = "quantized inputs are turned to float by arithmetic"


def mend_quantizers(model: onnx.ModelProto) -> list[str]:
    """Make every quantizer int8 around zero, and every int32 bias float, in place.

    Activations keep their range, with fewer steps of it; around a zero point of 128 nothing changes but the type. CPU
    runtimes keep the graph as it is.

    Args:
        model: With its initializers at hand.

    Returns:
        What was done, in words.

    Raises:
        UnsupportedError: A scale or zero point is computed, or its integers are read by something that needs them.
    """
    import numpy as np

    changed: set[str] = set()
    producers = {name: node for node in model.graph.node for name in node.output}
    outputs = {value.name for value in model.graph.output}
    fed = {value.name for value in model.graph.input}

    def quantize(write: Writer, node: onnx.NodeProto) -> str:
        scale, zero, kind = _numbers(write, node, changed=changed)
        if kind is None or scale is None:
            return ""
        _check_readers(model, node, outputs=outputs)
        sizes, what = _symmetric(scale, zero)
        x = node.input[0]
        if (zero == np.iinfo(zero.dtype).min).all() and not _is_positive(producers, x):
            x = write.op("Relu", x)  # quantizers were left to cut off what is negative
        changed.update(_handed_on(model, node.output[0]))
        _write(write, node, x, sizes)
        return what

    def dequantize(write: Writer, node: onnx.NodeProto) -> str:
        values = write.value(node.input[0])
        if values is not None and str(values.dtype) == "int32":
            return _float_bias(write, node, values)
        scale, zero, kind = _numbers(write, node, changed=changed)
        if kind is None or scale is None:
            return ""
        if values is not None:
            return _signed_weights(write, node, values, scale, zero)
        if node.input[0] in fed:
            return _by_arithmetic(write, node, zero)
        sizes, what = _symmetric(scale, zero)
        _write(write, node, node.input[0], sizes)
        return what

    return rewrite(model, {"QuantizeLinear": quantize, "DequantizeLinear": dequantize})


def _numbers(
    write: Writer, node: onnx.NodeProto, *, changed: set[str]
) -> tuple[np.ndarray | None, np.ndarray, str | None]:
    """Scale, zero point and type of what TensorRT does not take as it is; no type for what it does."""
    import numpy as np
    import onnx

    scale = write.value(given(node, 1))
    zero = write.value(given(node, 2)) if given(node, 2) else None
    if given(node, 2) and zero is None:
        raise _refuse(node, "has a zero point that is computed")
    if zero is None:
        asked = attribute(node, "output_dtype", 0)
        values = write.value(node.input[0])
        unsigned = (
            asked in (0, onnx.TensorProto.UINT8)
            if node.op_type == "QuantizeLinear"
            else node.input[0] in changed or (values is not None and values.dtype == np.uint8)
        )
        zero = np.zeros(1, np.uint8 if unsigned else np.int8)
    if zero.dtype not in (np.uint8, np.int8) or (zero.dtype == np.int8 and not zero.any()):
        return scale, zero, None
    if scale is None:
        raise _refuse(node, "has a scale that is computed")
    if attribute(node, "block_size", 0):
        raise _refuse(node, "is unsigned or asymmetric in blocks")
    return scale, zero, str(zero.dtype)


def _symmetric(scale: np.ndarray, zero: np.ndarray) -> tuple[np.ndarray, str]:
    """The scale of int8 around zero that holds the same range."""
    import numpy as np

    info = np.iinfo(zero.dtype)
    if zero.dtype == np.uint8 and (zero == 128).all():
        return scale, EXACT
    zeros = zero.astype(np.float32).reshape(scale.shape if zero.size == scale.size else -1)
    reach = np.maximum(np.abs(info.min - zeros), np.abs(info.max - zeros))
    return (scale.astype(np.float32) * reach / np.float32(127)).astype(scale.dtype).reshape(scale.shape), SYMMETRIC


def _write(write: Writer, node: onnx.NodeProto, x: str, scale: np.ndarray) -> None:
    import numpy as np

    axis = {"axis": attribute(node, "axis", 1)} if scale.size > 1 else {}
    sizes = write.constant(scale, stem=f"{node.input[1]}.signed")
    zero = write.constant(np.zeros(scale.shape, np.int8), stem=f"{node.input[1]}.zero")
    write.op(node.op_type, x, sizes, zero, out=node.output[0], attributes=axis)


def _float_bias(write: Writer, node: onnx.NodeProto, values: np.ndarray) -> str:
    from onnx import numpy_helper

    scale, zero = write.value(node.input[1]), write.value(given(node, 2)) if given(node, 2) else None
    if scale is None:
        raise _refuse(node, "has a scale that is computed")
    floats = dequantized(values, scale, zero, axis=attribute(node, "axis", 1) if values.ndim > 1 else 0)
    value = numpy_helper.from_array(floats.astype(scale.dtype))
    write.op("Constant", out=node.output[0], attributes={"value": value})
    return BIASES


def _signed_weights(
    write: Writer, node: onnx.NodeProto, values: np.ndarray, scale: np.ndarray, zero: np.ndarray
) -> str:
    """Exactly where the shifted integers fit int8, else rounded anew."""
    import numpy as np

    axis = attribute(node, "axis", 1)
    ones = np.ones(scale.shape, np.float32)
    shifted = dequantized(values, ones, zero, axis=axis)
    what = EXACT
    if shifted.min(initial=0) < -128 or shifted.max(initial=0) > 127:
        rest = tuple(i for i in range(values.ndim) if scale.size == 1 or i != axis % values.ndim)
        top = np.abs(shifted).max(axis=rest, keepdims=True)
        shifted = np.round(shifted * (127 / np.maximum(top, 1)))
        scale = (scale.astype(np.float32) * np.maximum(top, 1).reshape(scale.shape) / 127).astype(scale.dtype)
        what = WEIGHTS
    _write(write, node, write.constant(shifted.astype(np.int8), stem=node.input[0]), scale)
    return what


def _by_arithmetic(write: Writer, node: onnx.NodeProto, zero: np.ndarray) -> str:
    """What a caller hands in quantized keeps its type: cast, shift, scale."""
    import numpy as np
    import onnx

    if zero.size > 1:
        raise _refuse(node, "reads an input that is quantized by channel")
    wide = write.op("Cast", node.input[0], attributes={"to": onnx.TensorProto.FLOAT})
    shifted = write.op("Sub", wide, write.constant(zero.astype(np.float32).reshape(())))
    write.op("Mul", shifted, node.input[1], out=node.output[0])
    return INPUTS


def _handed_on(model: onnx.ModelProto, name: str) -> set[str]:
    """The tensors that hold the same integers."""
    found = {name}
    for node in model.graph.node:
        if node.op_type in MOVING and node.input[0] in found:
            found.add(node.output[0])
    return found


def _check_readers(model: onnx.ModelProto, node: onnx.NodeProto, *, outputs: set[str]) -> None:
    held = _handed_on(model, node.output[0])
    readers = {one.op_type for one in model.graph.node if held.intersection(one.input)} - MOVING
    if held & outputs or not readers <= {"DequantizeLinear"}:
        where = "the caller" if held & outputs else ", ".join(sorted(readers - {"DequantizeLinear"}))
        raise _refuse(node, f"is asymmetric or unsigned, and its integers go to {where}")


def _is_positive(producers: dict[str, onnx.NodeProto], name: str) -> bool:
    """Whether a tensor cannot be negative, as far as what made it says."""
    node = producers.get(name)
    while node is not None and node.op_type in MOVING | {*QUANTIZERS, "AveragePool", "GlobalAveragePool"}:
        node = producers.get(node.input[0])
    return node is not None and node.op_type in POSITIVE


def _refuse(node: onnx.NodeProto, why: str) -> UnsupportedError:
    return UnsupportedError(
        f"{node.op_type} {node.name!r} {why}; TensorRT takes symmetric int8 only",
        hint="quantize the float model symmetrically: bmctl quantize --method ptq",
    )
