"""ONNX files of unknown origin: what is refused, before any runtime sees it, and what is read of the rest."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from bmctl.core import onnxfile, onnxgraph
from bmctl.errors import BmctlError, PackageError, UnsupportedError

OPSET = [helper.make_opsetid("", 18)]


def value(name: str, kind: int = TensorProto.FLOAT, shape: list[object] | None = None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, ["n", 4] if shape is None else shape)


def linear(weight: np.ndarray | None = None) -> onnx.ModelProto:
    weight = np.ones((4, 3), np.float32) if weight is None else weight
    nodes = [helper.make_node("MatMul", ["input", "w"], ["logits"], name="product")]
    body = helper.make_graph(
        nodes, "g", [value("input")], [value("logits", shape=["n", 3])], [numpy_helper.from_array(weight, "w")]
    )
    return helper.make_model(body, opset_imports=OPSET, ir_version=10)


def save(path: Path, model: onnx.ModelProto) -> Path:
    path.write_bytes(model.SerializeToString())
    return path


def external(folder: Path, **changes: str) -> Path:
    """The same model with its weight in `weights.bin`, and entries changed or, when empty, removed."""
    model = linear()
    data = numpy_helper.to_array(model.graph.initializer[0]).tobytes()
    (folder / "weights.bin").write_bytes(b"\0" * 16 + data)
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, text in ({"location": "weights.bin", "offset": "16", "length": str(len(data))} | changes).items():
        if text:
            tensor.external_data.add(key=key, value=text)
    return save(folder / "model.onnx", model)


def test_a_sound_file_is_read(tmp_path: Path) -> None:
    path = save(tmp_path / "model.onnx", linear())
    onnxfile.check_onnx(path)
    found = onnxgraph.read_signature(path)
    assert [(s.name, s.shape, s.dtype) for s in (*found.inputs, *found.outputs)] == [
        ("input", ("batch", 4), "float32"),
        ("logits", ("batch", 3), "float32"),
    ]
    assert onnxgraph.precision_of(path) == "fp32" and not onnxgraph.is_quantized(path)
    assert onnxgraph.data_files(path) == []


def test_external_data_inside_the_directory_is_taken(tmp_path: Path) -> None:
    path = external(tmp_path)
    onnxfile.check_onnx(path)
    assert onnxgraph.data_files(path) == ["weights.bin"]


@pytest.mark.parametrize(
    ("changes", "pattern"),
    [
        ({"location": "../weights.bin"}, "cannot belong"),
        ({"location": "/etc/passwd"}, "cannot belong"),
        ({"location": "..\\weights.bin"}, "cannot belong"),
        ({"location": "other.bin"}, "other.bin is missing"),
        ({"location": ""}, "names no file"),
        ({"location": "folder"}, "not a regular file"),
        ({"location": "link.bin"}, "symbolic link"),
        ({"location": "linked/weights.bin"}, "symbolic link"),
        ({"location": "pipe"}, "not a regular file"),
        ({"offset": "20"}, "which has 64"),
        ({"offset": "-16"}, "which has 64"),
        ({"offset": "a"}, "no number"),
        ({"length": "40"}, "needs 48 bytes"),
        ({"length": "", "offset": "32"}, "needs 48 bytes"),
        ({"length": str(2**70)}, "which has 64"),
    ],
)
def test_bad_external_data(tmp_path: Path, changes: dict[str, str], pattern: str) -> None:
    inside = tmp_path / "model"
    inside.mkdir()
    (inside / "folder").mkdir()
    (inside / "link.bin").symlink_to(inside / "weights.bin")
    (inside / "linked").symlink_to(tmp_path)
    os.mkfifo(inside / "pipe")
    (tmp_path / "weights.bin").write_bytes(b"\0" * 64)
    path = external(inside, **changes)
    with pytest.raises(PackageError, match=pattern):
        onnxfile.check_onnx(path)


def cyclic() -> onnx.ModelProto:
    nodes = [helper.make_node("Add", ["input", "b"], ["a"]), helper.make_node("Add", ["a", "input"], ["b"])]
    body = helper.make_graph(nodes, "g", [value("input")], [value("b")])
    return helper.make_model(body, opset_imports=OPSET, ir_version=10)


def nested(depth: int) -> onnx.ModelProto:
    inner = helper.make_graph([helper.make_node("Identity", ["input"], ["y0"])], "g0", [], [value("y0")])
    for i in range(1, depth):
        node = helper.make_node("If", ["c"], [f"y{i}"], then_branch=inner, else_branch=inner if depth < 10 else None)
        inner = helper.make_graph([node], f"g{i}", [], [value(f"y{i}")])
    top = helper.make_node("If", ["c"], ["logits"], then_branch=inner, else_branch=inner)
    body = helper.make_graph([top], "g", [value("input"), value("c", TensorProto.BOOL, [])], [value("logits")])
    return helper.make_model(body, opset_imports=OPSET, ir_version=10)


def custom(domain: str) -> onnx.ModelProto:
    model = linear()
    model.graph.node[0].domain = domain
    model.graph.node[0].op_type = "Secret"
    model.opset_import.append(helper.make_opsetid(domain, 1))
    return model


def recursive() -> onnx.ModelProto:
    model = custom("mine")
    body = [helper.make_node("Secret", ["a", "b"], ["y"], domain="mine")]
    model.functions.append(helper.make_function("mine", "Secret", ["a", "b"], ["y"], body, OPSET))
    return model


def unknown_operator() -> onnx.ModelProto:
    model = linear()
    model.graph.node[0].op_type = "NoSuchOperator"
    return model


def short_weight() -> onnx.ModelProto:
    model = linear()
    model.graph.initializer[0].raw_data = b"\0" * 4
    return model


def no_output() -> onnx.ModelProto:
    model = linear()
    del model.graph.output[:]
    return model


@pytest.mark.parametrize(
    ("make", "error", "pattern"),
    [
        (cyclic, PackageError, "not a valid ONNX model"),
        (unknown_operator, PackageError, "NoSuchOperator"),
        (short_weight, PackageError, "not a valid ONNX model"),
        (no_output, PackageError, "no input or no output"),
        (recursive, PackageError, "calls itself"),
        (lambda: nested(20), UnsupportedError, "nested deeper than 16"),
        (lambda: custom("vendor.ops"), UnsupportedError, "vendor.ops::Secret"),
        (onnx.ModelProto, PackageError, "is empty"),
    ],
)
def test_bad_models(tmp_path: Path, make: Callable[[], onnx.ModelProto], error: type[BmctlError], pattern: str) -> None:
    path = save(tmp_path / "model.onnx", make())
    with pytest.raises(error, match=pattern):
        onnxfile.check_onnx(path)


def test_a_moderate_depth_is_fine(tmp_path: Path) -> None:
    onnxfile.check_onnx(save(tmp_path / "model.onnx", nested(3)))


@pytest.mark.parametrize(
    ("data", "pattern"),
    [
        (b"", "is empty"),
        (b"\xff" * 1000, "not an ONNX file"),
        (b"<!DOCTYPE html><html></html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        (os.urandom(4096), "ONNX"),
    ],
)
def test_no_onnx_at_all(tmp_path: Path, data: bytes, pattern: str) -> None:
    (tmp_path / "model.onnx").write_bytes(data)
    with pytest.raises(PackageError, match=pattern):
        onnxfile.check_onnx(tmp_path / "model.onnx")


def test_no_file(tmp_path: Path) -> None:
    for path in (tmp_path / "none.onnx", tmp_path):
        with pytest.raises(PackageError, match=r"cannot open|not a regular file"):
            onnxfile.check_onnx(path)
    os.mkfifo(tmp_path / "pipe.onnx")
    with pytest.raises(PackageError, match="not a regular file"):
        onnxfile.check_onnx(tmp_path / "pipe.onnx")


def test_a_thousand_graphs_deep(tmp_path: Path) -> None:
    """Written by hand: the library itself does not copy such a message."""

    def wrap(field: int, data: bytes) -> bytes:
        size, length = len(data), b""
        while size > 127:
            size, length = size >> 7, length + bytes([size & 127 | 128])
        return bytes([field << 3 | 2]) + length + bytes([size]) + data

    graph = b""
    for _ in range(1000):
        graph = wrap(1, wrap(5, wrap(6, graph)))  # node, its attribute, the attribute's graph
    (tmp_path / "model.onnx").write_bytes(wrap(7, graph))
    with pytest.raises(PackageError, match=r"not an ONNX file.*nested too deep"):
        onnxfile.check_onnx(tmp_path / "model.onnx")


@pytest.mark.parametrize("cut", [0.2, 0.5, 0.9])
def test_a_truncated_file(tmp_path: Path, cut: float) -> None:
    data = linear().SerializeToString()
    (tmp_path / "model.onnx").write_bytes(data[: int(cut * len(data))])
    with pytest.raises(PackageError):
        onnxfile.check_onnx(tmp_path / "model.onnx")


def test_too_large_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path / "model.onnx", linear())
    monkeypatch.setattr(onnxfile, "MAX_BYTES", 10)
    with pytest.raises(UnsupportedError, match="at most 2"):
        onnxfile.check_onnx(path)


def test_precision_is_that_of_the_weights(tmp_path: Path) -> None:
    for kind, name in ((np.float16, "fp16"), (onnx.helper.tensor_dtype_to_np_dtype(TensorProto.BFLOAT16), "bf16")):
        path = save(tmp_path / "model.onnx", linear(np.ones((4, 3)).astype(kind)))
        assert onnxgraph.precision_of(path) == name
    quantized = linear()
    quantized.graph.node.insert(0, helper.make_node("QuantizeLinear", ["input", "s"], ["q"]))
    assert onnxgraph.precision_of(save(tmp_path / "model.onnx", quantized)) == "int8"


def test_nodes_are_found_by_name_operator_and_weight(tmp_path: Path) -> None:
    from bmctl.errors import RecipeError

    model = linear()
    for pattern in ("product", "pro*", "MatMul", "w"):
        assert onnxgraph.match_nodes(model, [pattern], where="x") == ["product"]
    with pytest.raises(RecipeError, match="'Conv' fits no node") as caught:
        onnxgraph.match_nodes(model, ["Conv"], where="ptq: ignore")
    assert "MatMul" in caught.value.hint
