"""A graph of a fixed batch, from the file to predictions: everything happens at that batch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from tests.bad_input import fixtures

from bmctl.cli import main

BATCH = 3


def write_graph(path: Path) -> None:
    """input [3, 1, 8, 8] to scores of two classes [3, 2]; 4 or 8 samples of data do not divide by it."""
    rng = np.random.default_rng(0)
    weights = numpy_helper.from_array(rng.standard_normal((64, 2)).astype(np.float32), "w")
    shape = numpy_helper.from_array(np.array([BATCH, 64]), "shape")
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Reshape", ["input", "shape"], ["flat"]), helper.make_node("MatMul", ["flat", "w"], ["y"])],
        "g",
        [value("input", onnx.TensorProto.FLOAT, [BATCH, 1, 8, 8])],
        [value("y", onnx.TensorProto.FLOAT, [BATCH, 2])],
        [weights, shape],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    path.write_bytes(model.SerializeToString())


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    fixtures.folder(tmp_path, cache=tmp_path)
    write_graph(tmp_path / "m.onnx")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def measured(run: Path) -> dict[str, object]:
    return json.loads((run / "measurements.json").read_text())


def test_with_data(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import", "m.onnx", "-r", "r.yaml", "-o", "run", "-q"]) == 0
    assert main(["export", "run", "-q"]) == 0
    assert measured(here / "run")["batch_size"] == BATCH
    for source in ("run", "run/deploy/onnxruntime"):
        capsys.readouterr()
        assert main(["evaluate", source, "--split", "test", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["num_samples"] == 8
        assert main(["infer", "data/test/a", "-m", source, "-q"]) == 0
        assert len(capsys.readouterr().out.splitlines()) == 4


@pytest.mark.slow
def test_quantized(here: Path) -> None:
    assert main(["import", "m.onnx", "-r", "r.yaml", "-o", "run", "-q"]) == 0
    assert main(["quantize", "run", "-q"]) == 0
    assert main(["export", "run", "--backend", "onnxruntime", "--backend", "openvino", "-q"]) == 0
    assert measured(here / "run")["batch_size"] == BATCH


def test_without_data(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "m.onnx", "-o", "run", "--backend", "onnxruntime", "-q"]) == 0
    assert measured(here / "run")["batch_size"] == BATCH
    np.savez("x.npz", input=np.zeros((BATCH, 1, 8, 8), np.float32))
    assert main(["infer", "x.npz", "-m", "run", "-q"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == BATCH
    assert main(["export", "run", "-q"]) == 0, "the run knows its backend"
