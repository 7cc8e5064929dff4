"""Unsigned quantizers as TensorRT needs them: signed, over the same range.

NNCF and ONNX Runtime quantize what a ReLU gives as uint8 with zero point 0. TensorRT's parser reads these as int8 *with
the same scale* and only warns: every activation above half of the calibrated range would be cut off.

Source: importQuantizeLinear in https://github.com/onnx/onnx-tensorrt/blob/main/onnxOpImporters.cpp
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bmctl.errors import UnsupportedError

if TYPE_CHECKING:
    import numpy as np
    import onnx

QUANTIZERS = ("QuantizeLinear", "DequantizeLinear")


def sign_quantizers(model: onnx.ModelProto) -> int:
    """Give every uint8 quantizer with zero point 0 the type int8 and 255/127 of its scale, in place.

    The range stays, with half as many steps: 127 above zero in place of 255. CPU runtimes keep the unsigned graph.

    Args:
        model: With its initializers at hand.

    Returns:
        How many quantizers were changed.

    Raises:
        UnsupportedError: An unsigned quantizer has another zero point, or one that is computed, or quantizes weights.
    """
    import numpy as np
    from onnx import numpy_helper

    graph = model.graph
    constants = _constants(graph)
    changed: set[str] = set()
    added: dict[str, np.ndarray] = {}
    num_changed = 0
    for node in graph.node:
        if node.op_type not in QUANTIZERS or not _is_unsigned(node, constants, changed=changed):
            continue
        x, scale = node.input[:2]
        zero = [name for name in node.input[2:] if name]
        fits = (
            scale in constants and x not in constants and all(z in constants and not constants[z].any() for z in zero)
        )
        if not fits:
            raise UnsupportedError(
                f"{node.op_type} {node.name!r} is asymmetric (uint8 around a zero point other than 0); TensorRT takes "
                "symmetric quantization only",
                hint="quantize symmetrically: bmctl quantize --method ptq",
            )
        added[f"{scale}.signed"] = (constants[scale] * np.float32(255 / 127)).astype(constants[scale].dtype)
        added[f"{scale}.zero"] = np.zeros(constants[scale].shape, np.int8)
        node.input[1:] = [f"{scale}.signed", f"{scale}.zero"]
        if node.op_type == "QuantizeLinear":
            kept = [attribute for attribute in node.attribute if attribute.name != "output_dtype"]
            del node.attribute[:]
            node.attribute.extend(kept)
            changed |= set(node.output)
        num_changed += 1
    graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in added.items())
    # Their recorded types are no longer true; whoever reads the graph infers them again.
    infos = [info for info in graph.value_info if info.name not in changed]
    del graph.value_info[:]
    graph.value_info.extend(infos)
    return num_changed


def _constants(graph: onnx.GraphProto) -> dict[str, np.ndarray]:
    """Initializers and the outputs of Constant nodes that quantizers read, by name."""
    from onnx import numpy_helper

    wanted = {name for node in graph.node if node.op_type in QUANTIZERS for name in node.input}
    found = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer if tensor.name in wanted}
    for node in graph.node:
        if node.op_type == "Constant" and node.output[0] in wanted:
            for attribute in node.attribute:
                if attribute.name == "value":
                    found[node.output[0]] = numpy_helper.to_array(attribute.t)
    return found


def _is_unsigned(node: onnx.NodeProto, constants: dict[str, np.ndarray], *, changed: set[str]) -> bool:
    """By its zero point; without one QuantizeLinear gives `output_dtype`, by default uint8, and its reader follows."""
    import numpy as np
    import onnx

    if len(node.input) > 2 and node.input[2]:
        return node.input[2] in constants and constants[node.input[2]].dtype == np.uint8
    if node.op_type == "DequantizeLinear":
        return node.input[0] in changed
    kinds = [attribute.i for attribute in node.attribute if attribute.name == "output_dtype"]
    return (kinds or [0])[0] in (0, onnx.TensorProto.UINT8)
