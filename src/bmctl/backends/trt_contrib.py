"""Operators of com.microsoft, and attention, in the standard's own simpler ones: TensorRT has no plug-ins for them.

Source: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from bmctl.backends.rewriting import Rule, Writer, attribute, given, wanted
from bmctl.errors import UnsupportedError

if TYPE_CHECKING:
    import onnx


def _refuse(node: onnx.NodeProto, why: str) -> UnsupportedError:
    return UnsupportedError(
        f"{node.domain or 'onnx'}::{node.op_type} {node.name!r} {why}, which is not rewritten for TensorRT",
        hint="export the model without that operator, or keep it on onnxruntime",
    )


def _number(write: Writer, like: str, value: float) -> str:
    """A constant of the type of `like`."""
    import numpy as np

    number = write.constant(np.array(value, np.float32))
    return write.op("CastLike", number, like) if write.opset >= 15 else number


def _like(write: Writer, x: str, like: str) -> str:
    return write.op("CastLike", x, like) if write.opset >= 15 else write.op("Cast", x, attributes={"to": 1})


def _said(node: onnx.NodeProto) -> str:
    return f"{node.op_type} is written in standard operators"


# -- activations ------------------------------------------------------------------------------------


def _gelu(write: Writer, node: onnx.NodeProto) -> str:
    x = node.input[0]
    if given(node, 1):
        x = write.op("Add", x, node.input[1])
    inner = write.op("Erf", write.op("Div", x, _number(write, x, math.sqrt(2))))
    grown = write.op("Add", inner, _number(write, x, 1))
    write.op("Mul", write.op("Mul", x, _number(write, x, 0.5)), grown, out=node.output[0])
    return _said(node)


def _standard_gelu(write: Writer, node: onnx.NodeProto) -> str:
    return _gelu(write, node) if node.domain == "com.microsoft" else ""


def _fast_gelu(write: Writer, node: onnx.NodeProto) -> str:
    x = node.input[0]
    if given(node, 1):
        x = write.op("Add", x, node.input[1])
    cubed = write.op("Mul", write.op("Mul", x, x), x)
    inner = write.op("Add", x, write.op("Mul", cubed, _number(write, x, 0.044715)))
    bent = write.op("Tanh", write.op("Mul", inner, _number(write, x, math.sqrt(2 / math.pi))))
    half = write.op("Mul", x, _number(write, x, 0.5))
    write.op("Mul", half, write.op("Add", bent, _number(write, x, 1)), out=node.output[0])
    return _said(node)


def _quick_gelu(write: Writer, node: onnx.NodeProto) -> str:
    x = node.input[0]
    steep = write.op("Mul", x, _number(write, x, attribute(node, "alpha", 1.702)))
    write.op("Mul", x, write.op("Sigmoid", steep), out=node.output[0])
    return _said(node)


# -- products and norms ------------------------------------------------------------------------------


def _fused_matmul(write: Writer, node: onnx.NodeProto) -> str:
    if any(attribute(node, name, 0) for name in ("transBatchA", "transBatchB")):
        raise _refuse(node, "transposes batches")
    sides = []
    for side, name in zip(node.input[:2], ("transA", "transB"), strict=True):
        if attribute(node, name, 0):
            rank = write.ranks.get(side)
            if rank is None:
                raise _refuse(node, "transposes a tensor of unknown rank")
            turned = [*range(rank - 2), rank - 1, rank - 2]
            side = write.op("Transpose", side, attributes={"perm": turned})
        sides.append(side)
    product = write.op("MatMul", *sides)
    write.op("Mul", product, _number(write, product, attribute(node, "alpha", 1.0)), out=node.output[0])
    return _said(node)


def _normalized(write: Writer, x: str, node: onnx.NodeProto, *, gamma: str, beta: str, centred: bool, out: str) -> None:
    epsilon = attribute(node, "epsilon", 1e-12 if centred else 1e-5)
    if centred:
        x = write.op("Sub", x, write.axes("ReduceMean", x, [-1], keepdims=True))
    spread = write.axes("ReduceMean", write.op("Mul", x, x), [-1], keepdims=True)
    scaled = write.op("Div", x, write.op("Sqrt", write.op("Add", spread, _number(write, x, epsilon))))
    last = write.op("Mul", scaled, gamma, out="" if beta else out)
    if beta:
        write.op("Add", last, beta, out=out)


def _skip_norm(write: Writer, node: onnx.NodeProto) -> str:
    """Outputs: the norm, mean, deviation, and the sum that was normalised."""
    if wanted(node, 1) or wanted(node, 2):
        raise _refuse(node, "gives its mean or deviation")
    centred = node.op_type == "SkipLayerNormalization"
    beta, bias = (given(node, 3), given(node, 4)) if centred else ("", given(node, 3))
    total = write.op("Add", node.input[0], node.input[1], out="" if bias else wanted(node, 3))
    if bias:
        total = write.op("Add", total, bias, out=wanted(node, 3))
    _normalized(write, total, node, gamma=node.input[2], beta=beta, centred=centred, out=node.output[0])
    return _said(node)


def _rms_norm(write: Writer, node: onnx.NodeProto) -> str:
    if wanted(node, 1) or attribute(node, "axis", -1) != -1:
        raise _refuse(node, "gives its deviation or works on another axis than the last")
    _normalized(write, node.input[0], node, gamma=node.input[1], beta="", centred=False, out=node.output[0])
    return _said(node)


# -- attention --------------------------------------------------------------------------------------


def _attention(write: Writer, node: onnx.NodeProto) -> str:
    """com.microsoft's, with its projections, or the standard's of operator set 23."""
    if node.domain != "com.microsoft":
        return _standard_attention(write, node)
    if any(given(node, i) for i in (4, 5, 6)) or wanted(node, 1) or attribute(node, "qkv_hidden_sizes", None):
        raise _refuse(node, "has a past, a bias of its own, or heads of several sizes")
    heads = attribute(node, "num_heads", 1)
    projected = write.op("MatMul", node.input[0], node.input[1])
    if given(node, 2):
        projected = write.op("Add", projected, node.input[2])
    parts = [_part(write, projected, node, index) for index in range(3)]
    mask = _key_mask(write, node, given(node, 3), like=projected)
    if attribute(node, "unidirectional", 0):
        mask = _causal(write, node.input[0], node.input[0], like=projected, mask=mask)
    q, k, v = (_heads(write, one, heads) for one in parts)
    _attend(
        write,
        q,
        k,
        v,
        mask=mask,
        scale=attribute(node, "scale", 0.0),
        width=_width(write, node) // heads,
        out=node.output[0],
    )
    return _said(node)


def _width(write: Writer, node: onnx.NodeProto) -> int:
    weights = write.value(node.input[1])
    if weights is None:
        raise _refuse(node, "has computed weights")
    return int(weights.shape[1]) // 3


def _part(write: Writer, x: str, node: onnx.NodeProto, index: int) -> str:
    """One third of the last axis: Slice with axes as inputs is older than Split with sizes as one."""
    width = _width(write, node)
    low, high, axis = (_ints(write, [n]) for n in (index * width, (index + 1) * width, -1))
    return write.op("Slice", x, low, high, axis)


def _ints(write: Writer, values: list[int]) -> str:
    import numpy as np

    return write.constant(np.array(values, np.int64))


def _heads(write: Writer, x: str, heads: int) -> str:
    """[batch, tokens, heads * d] to [batch, heads, tokens, d]."""
    split = write.op("Reshape", x, _ints(write, [0, 0, heads, -1]))
    return write.op("Transpose", split, attributes={"perm": [0, 2, 1, 3]})


def _key_mask(write: Writer, node: onnx.NodeProto, mask: str, *, like: str) -> str:
    """[batch, keys] of ones and zeros to what is added to scores [batch, 1, 1, keys]."""
    if not mask:
        return ""
    if write.ranks.get(mask) != 2:
        raise _refuse(node, "has a mask that is not [batch, tokens]")
    wide = write.axes("Unsqueeze", mask, [1, 2])
    lost = write.op("Sub", _number(write, like, 1), _like(write, wide, like))
    return write.op("Mul", lost, _number(write, like, attribute(node, "mask_filter_value", -10000.0)))


def _causal(write: Writer, x: str, keys: str, *, like: str, mask: str) -> str:
    """Adds a triangle that hides later tokens from earlier ones; both are [batch, tokens, ...]."""
    import numpy as np
    from onnx import numpy_helper

    sides = [write.op("Slice", write.op("Shape", one), _ints(write, [1]), _ints(write, [2])) for one in (x, keys)]
    square = write.op("Concat", *sides, attributes={"axis": 0})
    lowest = numpy_helper.from_array(np.array([-1e4], np.float32))
    full = write.op("ConstantOfShape", square, attributes={"value": lowest})
    hidden = _like(write, write.op("Trilu", full, write.constant(np.array(1, np.int64))), like)
    return write.op("Add", hidden, mask) if mask else hidden


def _attend(write: Writer, q: str, k: str, v: str, *, mask: str, scale: float, width: int, out: str) -> None:
    keys = write.op("Transpose", k, attributes={"perm": [0, 1, 3, 2]})
    scores = write.op("MatMul", q, keys)
    scores = write.op("Mul", scores, _number(write, scores, scale or 1 / math.sqrt(width)))
    if mask:
        scores = write.op("Add", scores, mask)
    mixed = write.op("MatMul", write.op("Softmax", scores, attributes={"axis": -1}), v)
    together = write.op("Transpose", mixed, attributes={"perm": [0, 2, 1, 3]})
    write.op("Reshape", together, _ints(write, [0, 0, -1]), out=out)


def _standard_attention(write: Writer, node: onnx.NodeProto) -> str:
    """Three-dimensional, without a past: TensorRT-RTX has kernels for some types and sizes only."""
    heads, others = attribute(node, "q_num_heads", 0), attribute(node, "kv_num_heads", 0)
    simple = heads and heads == others and not any(given(node, i) for i in range(3, len(node.input)))
    width = write.sizes.get(node.input[0], (0,))[-1]
    if not simple or not width or attribute(node, "softcap", 0.0) or any(wanted(node, i) for i in (1, 2, 3)):
        return ""  # left to TensorRT, which may have a kernel
    mask = ""
    if attribute(node, "is_causal", 0):
        mask = _causal(write, node.input[0], node.input[1], like=node.input[0], mask="")
    q, k, v = (_heads(write, one, heads) for one in node.input[:3])
    _attend(write, q, k, v, mask=mask, scale=attribute(node, "scale", 0.0), width=width // heads, out=node.output[0])
    return _said(node)


RULES: Mapping[str, Rule] = MappingProxyType(
    {
        "Gelu": _standard_gelu,
        "BiasGelu": _gelu,
        "FastGelu": _fast_gelu,
        "QuickGelu": _quick_gelu,
        "FusedMatMul": _fused_matmul,
        "SkipLayerNormalization": _skip_norm,
        "SkipSimplifiedLayerNormalization": _skip_norm,
        "SimplifiedLayerNormalization": _rms_norm,
        "Attention": _attention,
    }
)
