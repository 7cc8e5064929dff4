"""An engine of TensorRT-RTX, built for the GPU that is here, and run on it."""

from __future__ import annotations

from pathlib import Path

import pytest

for package in ("pydantic", "onnx", "tensorrt_rtx"):
    pytest.importorskip(package)

import numpy as np
from tests.backends.conftest import make_small_graph

from bmctl.backends import tensorrt_rtx, trt_engine
from bmctl.core.onnxgraph import read_signature
from bmctl.schema import Span


@pytest.mark.gpu
def test_a_real_engine_on_a_gpu(tmp_path: Path) -> None:
    device = trt_engine.find_device()
    if device is None or device.capability not in tensorrt_rtx.CAPABILITIES:
        pytest.skip(f"TensorRT-RTX does not serve {device}")
    graph, out = make_small_graph(tmp_path / "small.onnx"), tmp_path / "model.rtx.engine"
    config = tensorrt_rtx.Config(capabilities=(device.capability,))
    axes = {"batch": Span(min=1, opt=8, max=64)}
    meta = tensorrt_rtx.build(graph.path, config=config, signature=read_signature(graph.path), axes=axes, out=out)
    x = np.random.default_rng(0).standard_normal((5, 1, 4, 4), np.float32)
    with tensorrt_rtx.open(out, config=config, meta=meta) as runner:
        np.testing.assert_allclose(runner.run({"input": x})["logits"], graph.reference(x), rtol=1e-3, atol=1e-4)
