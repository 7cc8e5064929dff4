"""Small ONNX graphs for the graph methods: a residual network with real structure, and its samples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from bmctl.methods import MethodContext

SHAPE = (3, 8, 8)


def save_residual(path: Path, *, scale: float = 1.0) -> Path:
    """Two convolutions with a sum around the second, a pooled head: float32 [n, 3, 8, 8] to [n, 5]."""
    rng = np.random.default_rng(0)

    def weight(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32) / np.sqrt(np.prod(shape[1:])).astype(np.float32)

    constants = {
        "stem.weight": weight(16, 3, 3, 3) * scale,
        "stem.bias": weight(16),
        "block.weight": weight(16, 16, 3, 3),
        "block.bias": weight(16),
        "head.weight": weight(5, 16),
        "head.bias": weight(5),
    }
    nodes = [
        helper.make_node("Conv", ["input", "stem.weight", "stem.bias"], ["a"], name="stem", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["a"], ["b"], name="stem_relu"),
        helper.make_node("Conv", ["b", "block.weight", "block.bias"], ["c"], name="block", pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["b", "c"], ["d"], name="sum"),
        helper.make_node("Relu", ["d"], ["e"], name="block_relu"),
        helper.make_node("GlobalAveragePool", ["e"], ["f"], name="pool"),
        helper.make_node("Flatten", ["f"], ["g"], name="flatten"),
        helper.make_node("Gemm", ["g", "head.weight", "head.bias"], ["logits"], name="head", transB=1),
    ]
    return save(path, nodes, constants)


def save(path: Path, nodes: Sequence[onnx.NodeProto], constants: dict[str, np.ndarray]) -> Path:
    body = helper.make_graph(
        list(nodes),
        "graph",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ["n", *SHAPE])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", 5])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    path.write_bytes(model.SerializeToString())
    return path


def samples(num: int = 24) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((num, *SHAPE), np.float32)


def make_context(calls: Sequence[np.ndarray]) -> MethodContext:
    """What a graph method may look at.

    Args:
        calls: What the graph is fed while calibration samples are predicted, call by call.
    """
    return MethodContext(
        example={"input": torch.from_numpy(samples(2))},
        calibration=lambda: ({"input": images} for images in calls),
        calibration_record={"source": "noise", "num_samples": 24},
    )


def run(path: Path, x: np.ndarray, *, backend: str = "onnxruntime") -> np.ndarray:
    from bmctl.backends import BACKENDS

    module = BACKENDS[backend]
    with module.open(path, config=module.Config()) as runner:
        return runner.run({"input": x})["logits"]
