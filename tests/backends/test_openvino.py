"""OpenVINO alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tests.backends.conftest import SmallGraph

from bmctl.backends import openvino as backend
from bmctl.core.onnxgraph import read_signature
from bmctl.schema import Span

WATCHED = """
import json, os, sys
seen = []
def watch(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "urllib.Request"):
        seen.append([event, str(args)])
    # OpenVINO itself may start helpers; telemetry sends from a process or thread of its own.
    if event in ("subprocess.Popen", "os.fork", "os.posix_spawn"):
        seen.append([event, str(args)])
sys.addaudithook(watch)
from pathlib import Path
from bmctl.backends import openvino as backend
graph, out = Path(sys.argv[1]), Path(sys.argv[2])
from bmctl.core.onnxgraph import read_signature
backend.build(graph, config=backend.Config(), signature=read_signature(graph), axes={}, out=out)
with backend.open(out, config=backend.Config()):
    pass
telemetry = sorted(name for name in sys.modules if name.startswith("openvino_telemetry") and sys.modules[name])
print(json.dumps({"seen": seen, "telemetry": telemetry}))
"""


def test_nothing_is_sent_and_nothing_written_at_home(small_graph: SmallGraph, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    # CI switches OpenVINO's telemetry off by itself: here it must not be taken for one.
    ours = {name: value for name, value in os.environ.items() if name not in ("CI", "TF_BUILD", "JENKINS_URL")}
    done = subprocess.run(
        [sys.executable, "-c", WATCHED, str(small_graph.path), str(tmp_path / "model.onnx")],
        env=ours | {"HOME": str(home), "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == {"seen": [], "telemetry": []}
    assert list(home.rglob("*")) == []


def test_fp32_is_fp32_unless_asked_otherwise(rescnn_graph: Path) -> None:
    """By default OpenVINO would compute this graph in bf16 on a CPU with AMX."""
    with backend.open(rescnn_graph, config=backend.Config()) as runner:
        assert runner.precision == "f32"


def test_bf16_where_the_cpu_has_it(rescnn_graph: Path) -> None:
    config = backend.Config(precision="bf16")
    if reason := backend.unavailable(config):
        pytest.skip(reason)
    x = np.random.default_rng(0).standard_normal((4, 1, 28, 28), np.float32)
    with backend.open(rescnn_graph, config=backend.Config()) as runner:
        exact = runner.run({"input": x})["logits"]
    with backend.open(rescnn_graph, config=config) as runner:
        assert runner.precision == "bf16"
        rounded = runner.run({"input": x})["logits"]
    assert not np.array_equal(exact, rounded)
    np.testing.assert_allclose(rounded, exact, atol=0.05 * np.abs(exact).max())


@pytest.mark.parametrize("size", [1, 2, 7])
def test_throughput_splits_and_joins_the_batch(size: int, small_graph: SmallGraph) -> None:
    x = np.random.default_rng(size).standard_normal((size, 1, 4, 4), np.float32)
    with backend.open(small_graph.path, config=backend.Config(hint="throughput", threads=2)) as runner:
        if len(runner._requests) == 1:
            pytest.skip("one stream only")
        assert len(runner._split({"input": x})) == min(size, len(runner._requests))
        np.testing.assert_allclose(runner.run({"input": x})["logits"], small_graph.reference(x), rtol=1e-4, atol=1e-5)


def test_int8_agrees_with_onnxruntime(int8_graph: Path) -> None:
    from bmctl.backends import onnxruntime
    from bmctl.engine.artifacts import parity

    x = np.random.default_rng(0).standard_normal((16, 1, 28, 28), np.float32)
    with onnxruntime.open(int8_graph, config=onnxruntime.Config()) as runner:
        reference = runner.run({"input": x})["logits"]
    with backend.open(int8_graph, config=backend.Config()) as runner:
        got = runner.run({"input": x})["logits"]
    tolerance, agreement = parity.TOLERANCE["int8"], parity.AGREEMENT["int8"]
    assert parity.compare(reference, got, tolerance=tolerance, min_agreement=agreement, source="ort").passed


def test_the_artifact_is_the_graph_byte_for_byte(
    small_graph: SmallGraph, axes: dict[str, Span], tmp_path: Path
) -> None:
    out = tmp_path / "model.onnx"
    meta = backend.build(
        small_graph.path, config=backend.Config(), signature=read_signature(small_graph.path), axes=axes, out=out
    )
    assert out.read_bytes() == small_graph.path.read_bytes()
    assert meta["precision"] == "f32"
