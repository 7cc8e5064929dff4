"""Quantized operators for runtimes without them: Q/DQ pairs round float ones, float weights where it is dynamic.

QLinearConv and its like become DequantizeLinear, the operator, QuantizeLinear. What is quantized anew at every call
(DynamicQuantizeLinear with MatMulInteger or ConvInteger) is computed in float: engines have no such step.

Source: https://onnx.ai/onnx/operators/ and
https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from bmctl.backends.rewriting import Rule, Writer, attribute, given
from bmctl.errors import UnsupportedError

if TYPE_CHECKING:
    import numpy as np
    import onnx

DYNAMIC = "dynamically quantized products are computed in float, with the weights that the integers stand for"
STATIC = "quantized operators are written as Q/DQ pairs round float ones"


def _refuse(node: onnx.NodeProto, why: str) -> UnsupportedError:
    return UnsupportedError(
        f"{node.op_type} {node.name!r} {why}, which is not rewritten",
        hint="quantize the float model with bmctl: bmctl quantize MODEL.onnx --method ptq",
    )


def dequantized(values: np.ndarray, scale: np.ndarray, zero: np.ndarray | None, *, axis: int) -> np.ndarray:
    """float32 of the shape of `values`; a scale or zero point of more than one number goes along `axis`."""
    import numpy as np

    shape = [1] * values.ndim
    if scale.size > 1:
        shape[axis] = scale.size
    zeros = np.zeros(1, np.int32) if zero is None else zero.astype(np.int32).reshape(-1)
    shifted = values.astype(np.int32) - (
        zeros.reshape(shape) if zeros.size == scale.size else zeros.reshape([1] * values.ndim)
    )
    return (shifted * scale.astype(np.float32).reshape(shape if scale.size > 1 else [1] * values.ndim)).astype(
        np.float32
    )


# -- static: Q/DQ pairs -----------------------------------------------------------------------------


def _opened(write: Writer, node: onnx.NodeProto, first: int, *, axis: int = 0) -> str:
    """The float that input `first` stands for; its scale and zero point follow it."""
    x, scale, zero = (given(node, first + i) for i in range(3))
    values, size = write.value(x), write.value(scale)
    if size is None:
        raise _refuse(node, "has a scale that is computed")
    if values is not None and size.size > 1 and write.opset < 13:
        return write.constant(dequantized(values, size, write.value(zero) if zero else None, axis=axis))
    extra = {"axis": axis} if size.size > 1 else {}
    return write.op("DequantizeLinear", x, scale, *([zero] if zero else []), attributes=extra)


def _closed(write: Writer, node: onnx.NodeProto, x: str, first: int) -> str:
    scale, zero = given(node, first), given(node, first + 1)
    write.op("QuantizeLinear", x, scale, *([zero] if zero else []), out=node.output[0])
    return STATIC


def _bias(write: Writer, node: onnx.NodeProto, index: int) -> str:
    """An int32 bias has the scale of the product; float32 in its place."""
    import numpy as np

    values, left, right = (write.value(given(node, i)) for i in (index, 1, 4))
    if values is None or left is None or right is None:
        raise _refuse(node, "has a bias or scale that is computed")
    scale = (left.astype(np.float32) * right.astype(np.float32)).reshape(-1)
    return write.constant((values * scale).astype(np.float32))


def _kept(node: onnx.NodeProto, *dropped: str) -> dict[str, Any]:
    from onnx import helper

    return {one.name: helper.get_attribute_value(one) for one in node.attribute if one.name not in dropped}


def _conv(write: Writer, node: onnx.NodeProto) -> str:
    sides = [_opened(write, node, 0), _opened(write, node, 3)]
    if given(node, 8):
        sides.append(_bias(write, node, 8))
    return _closed(write, node, write.op("Conv", *sides, attributes=_kept(node)), 6)


def _matmul(write: Writer, node: onnx.NodeProto) -> str:
    return _closed(write, node, write.op("MatMul", _opened(write, node, 0), _opened(write, node, 3, axis=1)), 6)


def _gemm(write: Writer, node: onnx.NodeProto) -> str:
    sides = [_opened(write, node, 0), _opened(write, node, 3, axis=0 if attribute(node, "transB", 0) else 1)]
    if given(node, 6):
        sides.append(_bias(write, node, 6))
    if given(node, 7):
        return _closed(write, node, write.op("Gemm", *sides, attributes=_kept(node)), 7)
    write.op("Gemm", *sides, out=node.output[0], attributes=_kept(node))
    return STATIC


def _pair(kind: str) -> Rule:
    def rule(write: Writer, node: onnx.NodeProto) -> str:
        return _closed(write, node, write.op(kind, _opened(write, node, 0), _opened(write, node, 3)), 6)

    return rule


def _single(kind: str) -> Rule:
    def rule(write: Writer, node: onnx.NodeProto) -> str:
        if attribute(node, "channels_last", 0):
            raise _refuse(node, "has its channels last")
        x = write.op(kind, _opened(write, node, 0), attributes=_kept(node, "channels_last", "opset"))
        return _closed(write, node, x, 3)

    return rule


def _concat(write: Writer, node: onnx.NodeProto) -> str:
    parts = [_opened(write, node, first) for first in range(2, len(node.input), 3)]
    return _closed(write, node, write.op("Concat", *parts, attributes=_kept(node)), 0)


# -- dynamic: float -----------------------------------------------------------------------------------


def _dynamic_quantizer(write: Writer, node: onnx.NodeProto) -> str:
    """Its integers become the numbers themselves, with the scale 1 and the zero point 0."""
    import numpy as np
    from onnx import numpy_helper

    readers = {one.op_type for one in write.graph.node if node.output[0] in one.input}
    if any(value.name in node.output for value in write.graph.output):
        raise _refuse(node, "gives what it makes to the caller")
    if not readers <= {"MatMulInteger", "ConvInteger"}:
        raise _refuse(node, f"is read by {', '.join(sorted(readers))}")
    write.op("Identity", node.input[0], out=node.output[0])
    for name, value in zip(node.output[1:], (np.array(1, np.float32), np.array(0, np.uint8)), strict=False):
        write.op("Constant", out=name, attributes={"value": numpy_helper.from_array(value)})
    return DYNAMIC


def _weights(
    write: Writer, node: onnx.NodeProto, *, values: int, zero: int, axis: int, scale: int | None = None
) -> np.ndarray:
    import numpy as np

    whole, zeros = write.value(given(node, values)), write.value(given(node, zero)) if given(node, zero) else None
    sizes = (
        np.ones(1 if zeros is None else zeros.size, np.float32) if scale is None else write.value(given(node, scale))
    )
    if whole is None or sizes is None or (given(node, zero) and zeros is None):
        raise _refuse(node, "has computed weights")
    return dequantized(whole, sizes, zeros, axis=axis)


def _integer_product(kind: str, *, axis: int) -> Rule:
    def rule(write: Writer, node: onnx.NodeProto) -> str:
        made = {one.output[0] for one in write.graph.node if one.op_type == "DynamicQuantizeLinear"}
        if node.input[0] not in made:
            raise _refuse(node, "multiplies integers that DynamicQuantizeLinear did not make")
        weights = write.constant(_weights(write, node, values=1, zero=3, axis=axis))
        write.op(kind, node.input[0], weights, out=node.output[0], attributes=_kept(node))
        return DYNAMIC

    return rule


def _dynamic_matmul(write: Writer, node: onnx.NodeProto) -> str:
    weights = write.constant(_weights(write, node, values=1, zero=3, scale=2, axis=-1))
    product = write.op("MatMul", node.input[0], weights, out="" if given(node, 4) else node.output[0])
    if given(node, 4):
        write.op("Add", product, node.input[4], out=node.output[0])
    return DYNAMIC


def _dynamic_lstm(write: Writer, node: onnx.NodeProto) -> str:
    import numpy as np
    from onnx import helper

    sides = []
    for values, scale, zero in ((1, 8, 9), (2, 10, 11)):
        whole, sizes, zeros = (write.value(given(node, i)) for i in (values, scale, zero))
        if whole is None or sizes is None or zeros is None:
            raise _refuse(node, "has computed weights")
        last = [size.reshape(len(whole), 1, -1).astype(np.float32) for size in (zeros, sizes)]
        floats = ((whole - last[0]) * last[1]).transpose(0, 2, 1)
        sides.append(write.constant(np.ascontiguousarray(floats.astype(np.float32))))
    names = [node.input[0], *sides, *(given(node, i) for i in range(3, 8))]
    while not names[-1]:
        names.pop()
    write.nodes.append(helper.make_node("LSTM", names, list(node.output), name=node.name, **_kept(node)))
    return DYNAMIC


def _n_bits(write: Writer, node: onnx.NodeProto) -> str:
    """Weights in blocks of four bits, low halves of bytes first, around 8."""
    import numpy as np

    bits, block, depth, width = (attribute(node, name, 0) for name in ("bits", "block_size", "K", "N"))
    packed, scales = write.value(node.input[1]), write.value(node.input[2])
    if bits != 4 or any(given(node, i) for i in (3, 4, 5)) or packed is None or scales is None:
        raise _refuse(node, "has other than four bits, zero points, or an order of its own")
    halves = np.stack([packed & 15, packed >> 4], axis=-1).reshape(width, -1, block).astype(np.float32) - 8
    weights = (halves * scales.astype(np.float32).reshape(width, -1, 1)).reshape(width, -1)[:, :depth]
    kind = scales.dtype
    write.op("MatMul", node.input[0], write.constant(np.ascontiguousarray(weights.T).astype(kind)), out=node.output[0])
    return "weights of four bits are stored in float"


CONTRIB: Mapping[str, Rule] = MappingProxyType(
    {
        "QGemm": _gemm,
        "QLinearAdd": _pair("Add"),
        "QLinearMul": _pair("Mul"),
        "QLinearSigmoid": _single("Sigmoid"),
        "QLinearLeakyRelu": _single("LeakyRelu"),
        "QLinearSoftmax": _single("Softmax"),
        "QLinearAveragePool": _single("AveragePool"),
        "QLinearGlobalAveragePool": _single("GlobalAveragePool"),
        "QLinearConcat": _concat,
    }
)
"""Static operators of com.microsoft."""
RULES: Mapping[str, Rule] = MappingProxyType(
    {
        **CONTRIB,
        "QLinearConv": _conv,
        "QLinearMatMul": _matmul,
        "DynamicQuantizeLinear": _dynamic_quantizer,
        "MatMulInteger": _integer_product("MatMul", axis=-1),
        "ConvInteger": _integer_product("Conv", axis=0),
        "DynamicQuantizeMatMul": _dynamic_matmul,
        "DynamicQuantizeLSTM": _dynamic_lstm,
        "MatMulNBits": _n_bits,
    }
)
