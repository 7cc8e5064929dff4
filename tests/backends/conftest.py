"""Graphs that every backend gets: a small one with a NumPy twin, and the residual CNN in fp32 and int8."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from bmctl.schema import Span


@dataclass(frozen=True)
class SmallGraph:
    """ReLU of x + bias, flattened, times weights: float32 [n, 1, 4, 4] to [n, 3]."""

    path: Path
    bias: np.ndarray
    weights: np.ndarray

    def reference(self, x: np.ndarray) -> np.ndarray:
        return np.maximum(x + self.bias, 0).reshape(len(x), -1) @ self.weights


def save_graph(
    path: Path, nodes: list[onnx.NodeProto], *, constants: dict[str, np.ndarray], batch: object = "n"
) -> Path:
    """One input `input` [batch, 1, 4, 4], one output `logits` [batch, 3]."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, [batch, 1, 4, 4])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, 3])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    return path


def make_small_graph(path: Path) -> SmallGraph:
    rng = np.random.default_rng(0)
    bias = rng.standard_normal((1, 1, 4, 4), np.float32)
    weights = rng.standard_normal((16, 3), np.float32)
    nodes = [
        helper.make_node("Add", ["input", "bias"], ["moved"], name="add"),
        helper.make_node("Relu", ["moved"], ["cut"], name="relu"),
        helper.make_node("Flatten", ["cut"], ["flat"], name="flatten"),
        helper.make_node("MatMul", ["flat", "weights"], ["logits"], name="matmul"),
    ]
    save_graph(path, nodes, constants={"bias": bias, "weights": weights})
    return SmallGraph(path=path, bias=bias, weights=weights)


@pytest.fixture(scope="session")
def small_graph(tmp_path_factory: pytest.TempPathFactory) -> SmallGraph:
    return make_small_graph(tmp_path_factory.mktemp("small") / "small.onnx")


@pytest.fixture(scope="session")
def rescnn_graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bmctl's residual CNN, untrained, with batch statistics that are not the initial ones; fp32 [n, 1, 28, 28]."""
    import torch
    from tests.specs import image_spec, signature_of

    from bmctl.engine.artifacts.graph import export_onnx
    from bmctl.models import build

    torch.manual_seed(0)
    spec = image_spec("bmctl:rescnn")
    model = build(spec)
    x = torch.randn(16, 1, 28, 28)
    model.train()(x)
    path = tmp_path_factory.mktemp("rescnn") / "fp32.onnx"
    export_onnx(model.eval(), signature=signature_of(spec), example={"input": x.numpy()}, out=path)
    return path


@pytest.fixture(scope="session")
def int8_graph(rescnn_graph: Path) -> Path:
    """`rescnn_graph` as NNCF quantizes it: Q/DQ, unsigned behind ReLU."""
    from bmctl.core import quiet

    quiet.switch_off_telemetry()
    import nncf

    logging.getLogger("nncf").setLevel(logging.ERROR)
    rng = np.random.default_rng(0)
    samples = [{"input": rng.standard_normal((8, 1, 28, 28), np.float32)} for _ in range(4)]
    quantized = nncf.quantize(
        onnx.load(rescnn_graph),
        nncf.Dataset(samples),
        subset_size=4,
        preset=nncf.QuantizationPreset.PERFORMANCE,
    )
    path = rescnn_graph.with_name("int8.onnx")
    onnx.save(quantized, path)
    return path


@pytest.fixture
def axes() -> dict[str, Span]:
    return {"batch": Span(min=1, opt=8, max=64)}
