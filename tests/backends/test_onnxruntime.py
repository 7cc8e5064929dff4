"""ONNX Runtime alone."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError
from tests.backends.conftest import SmallGraph

from bmctl.backends import onnxruntime as backend
from bmctl.core.onnxgraph import read_signature
from bmctl.errors import DependencyError
from bmctl.schema import Span


@pytest.mark.parametrize("level", ["none", "basic", "extended", "all"])
def test_every_level_computes_the_same(level: str, small_graph: SmallGraph) -> None:
    x = np.random.default_rng(0).standard_normal((3, 1, 4, 4), np.float32)
    config = backend.Config.model_validate({"optimization": level, "threads": 1})
    with backend.open(small_graph.path, config=config) as runner:
        np.testing.assert_allclose(runner.run({"input": x})["logits"], small_graph.reference(x), rtol=1e-4, atol=1e-5)


def test_threads_are_what_was_asked(small_graph: SmallGraph) -> None:
    for config, want in ((backend.Config(threads=1), 1), (backend.Config(), len(os.sched_getaffinity(0)))):
        with backend.open(small_graph.path, config=config) as runner:
            assert runner._session.get_session_options().intra_op_num_threads == want


def test_cuda_asked_for_and_not_there(small_graph: SmallGraph) -> None:
    config = backend.Config(device="cuda")
    if not backend.unavailable(config):
        pytest.skip("this onnxruntime has CUDA")
    with pytest.raises(DependencyError, match="no CUDA provider"):
        backend.open(small_graph.path, config=config)


def test_the_artifact_is_the_graph_byte_for_byte(
    small_graph: SmallGraph, axes: dict[str, Span], tmp_path: Path
) -> None:
    out = tmp_path / "model.onnx"
    meta = backend.build(
        small_graph.path, config=backend.Config(), signature=read_signature(small_graph.path), axes=axes, out=out
    )
    assert out.read_bytes() == small_graph.path.read_bytes()
    assert meta["providers"][-1] == "CPUExecutionProvider"


def test_nothing_reaches_stderr(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "garbage.onnx"
    path.write_bytes(b"\x08\x07garbage")
    with pytest.raises(Exception, match="cannot open"):
        backend.open(path, config=backend.Config())
    assert capfd.readouterr().err == ""


def test_unknown_keys_are_refused() -> None:
    with pytest.raises(ValidationError, match="precision"):
        backend.Config.model_validate({"precision": "int8"})


def test_nothing_is_written_at_home(tmp_path: Path) -> None:
    """ONNX Runtime's telemetry puts an identifier there as soon as it is loaded, unless it was told before."""
    ours = {name: value for name, value in os.environ.items() if name not in ("ORT_DISABLE_TELEMETRY", "CI")}
    paths = {"HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run(
        [sys.executable, "-c", "import bmctl.cli, onnxruntime"], env=ours | paths, capture_output=True, check=True
    )
    assert list(tmp_path.rglob("*")) == []
