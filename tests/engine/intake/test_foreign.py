"""Import of ONNX files: read from the graph, evaluated where there are data, refused where they do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tests.engine.intake.imports import DATA, WITH_DATA, make_context

from bmctl import package
from bmctl.engine.intake.importing import import_stage
from bmctl.errors import DataError, PackageError, UnsupportedError
from bmctl.restore import load_model


def write_graph(
    path: Path,
    *,
    batch: int | str = "n",
    size: tuple[Any, Any] = (28, 28),
    num_classes: int = 10,
    channels: int = 1,
    external: bool = False,
) -> None:
    """Mean over pixels, then a linear layer."""
    w_CK = np.random.default_rng(0).standard_normal((channels, num_classes)).astype(np.float32)
    nodes = [
        helper.make_node("ReduceMean", ["x", "axes"], ["m"], keepdims=0),
        helper.make_node("MatMul", ["m", "w"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, channels, *size])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, num_classes])],
        [numpy_helper.from_array(np.array([2, 3]), "axes"), numpy_helper.from_array(w_CK, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, path, save_as_external_data=external, location="weights.bin", size_threshold=0)


def test_an_onnx_file_becomes_a_frozen_package(tmp_path: Path) -> None:
    write_graph(tmp_path / "m.onnx")
    context = make_context(tmp_path)
    found = package.open_package(import_stage(context, str(tmp_path / "m.onnx")).path)
    manifest = found.manifest
    assert manifest.frozen
    assert manifest.model is None
    assert found.graphs["model"].read_bytes() == (tmp_path / "m.onnx").read_bytes()
    (x,), (y,) = manifest.parts["model"].inputs, manifest.parts["model"].outputs
    assert (x.name, x.shape, x.dtype) == ("x", ("batch", 1, 28, 28), "float32")
    assert (y.name, y.shape, y.role) == ("y", ("batch", 10), "scores")
    assert (manifest.task, manifest.facts, manifest.input) == (None, None, None)
    assert "the graph's batch is free" in manifest.notes
    assert any("only parity, latency and size" in note for note in manifest.notes)
    with pytest.raises(UnsupportedError):
        load_model(found)
    again = make_context(tmp_path)
    assert import_stage(again, str(tmp_path / "m.onnx")).hash == found.hash


def test_a_fixed_batch_is_recorded(tmp_path: Path) -> None:
    write_graph(tmp_path / "m.onnx", batch=3)
    manifest = import_stage(make_context(tmp_path, **WITH_DATA), str(tmp_path / "m.onnx")).manifest
    assert manifest.parts["model"].inputs[0].shape == (3, 1, 28, 28)
    assert "the graph's batch is fixed (x: 3)" in manifest.notes
    assert manifest.metrics["val"]["num_samples"] == 100


def test_external_data_comes_along(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    write_graph(tmp_path / "here" / "m.onnx", external=True)
    found = package.open_package(import_stage(make_context(tmp_path), str(tmp_path / "here" / "m.onnx")).path)
    assert (found.path / "graphs" / "weights.bin").read_bytes() == (tmp_path / "here" / "weights.bin").read_bytes()
    assert set(found.manifest.files) == {"graphs/model.onnx", "graphs/weights.bin", "recipe.yaml"}
    onnx.checker.check_model(str(found.graphs["model"]))


def test_an_onnx_file_is_evaluated_on_data(tmp_path: Path) -> None:
    write_graph(tmp_path / "m.onnx", size=("h", "w"))
    manifest = import_stage(make_context(tmp_path, **WITH_DATA), str(tmp_path / "m.onnx")).manifest
    assert manifest.input is not None
    assert tuple(manifest.input.size) == (28, 28)
    assert manifest.metrics["val"]["metric"] == "accuracy"
    assert manifest.data_fingerprint
    assert manifest.facts is not None
    assert not manifest.facts["class_names"][0].startswith("class_")


@pytest.mark.parametrize(
    ("graph", "pattern"),
    [
        ({"num_classes": 7}, r"gives 'y' float32 \[batch, 7\]; .* needs .* \[batch, 10\]"),
        ({"channels": 2}, r"takes 'x' float32 \[batch, 2, 28, 28\]; .* gives .* \[batch, 1, 28, 28\]"),
    ],
)
def test_an_onnx_file_that_does_not_fit_the_data(tmp_path: Path, graph: dict[str, Any], pattern: str) -> None:
    write_graph(tmp_path / "m.onnx", **graph)
    with pytest.raises(DataError, match=pattern):
        import_stage(make_context(tmp_path, **WITH_DATA), str(tmp_path / "m.onnx"))


def test_an_onnx_file_at_another_size_than_the_recipe(tmp_path: Path) -> None:
    write_graph(tmp_path / "m.onnx", size=(32, 32))
    manifest = import_stage(make_context(tmp_path, "a", **WITH_DATA), str(tmp_path / "m.onnx")).manifest
    assert manifest.input is not None
    assert tuple(manifest.input.size) == (32, 32)
    data = {**DATA, "input": {"size": 28}}
    with pytest.raises(DataError, match=r"takes 'x' float32 \[batch, 1, 32, 32\]; .* gives .*1, 28, 28\]"):
        import_stage(make_context(tmp_path, "b", **{**WITH_DATA, "data": data}), str(tmp_path / "m.onnx"))


@pytest.mark.parametrize("content", [b"", b"garbage", b"version https://git-lfs.github.com/spec/v1\n"])
def test_what_is_no_onnx_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(PackageError) as caught:
        import_stage(make_context(tmp_path), str(tmp_path / "m.onnx"))
    assert caught.value.exit_code == 5
