"""What all backends have in common, each row of the table in turn."""

from __future__ import annotations

import gc
import inspect
import weakref
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper
from tests.backends.conftest import SmallGraph, save_graph

from bmctl.backends import BACKENDS
from bmctl.core.onnxfile import copy_graph
from bmctl.core.onnxgraph import read_signature
from bmctl.core.runner import check_feed
from bmctl.errors import DataError, DependencyError, PackageError, UnsupportedError
from bmctl.schema import Signature, Span, TensorSpec

HERE = [name for name, module in BACKENDS.items() if not module.unavailable(module.Config())]
BUILD_HERE = [*HERE, *(name for name in ("tensorrt_rtx",) if name not in HERE)]
SPEC = TensorSpec(name="input", shape=("batch", 1, 4, 4), dtype="float32")


def build(name: str, graph: Path, *, axes: dict[str, Span], folder: Path) -> tuple[ModuleType, Path, dict[str, Any]]:
    module = BACKENDS[name]
    out = folder / f"model{module.SUFFIX}"
    return module, out, module.build(graph, config=module.Config(), signature=read_signature(graph), axes=axes, out=out)


def test_the_cpu_backends_run_on_every_machine() -> None:
    assert {"onnxruntime", "openvino"} <= set(HERE)


@pytest.mark.parametrize("name", BACKENDS)
def test_each_keeps_the_protocol(name: str) -> None:
    module = BACKENDS[name]
    assert module.Config().name == name
    assert module.SUFFIX.startswith(".")
    assert list(inspect.signature(module.unavailable).parameters) == ["config"]
    assert list(inspect.signature(module.build).parameters) == ["onnx_path", "config", "signature", "axes", "out"]
    assert list(inspect.signature(module.open).parameters) == ["artifact", "config", "signature", "meta"]
    assert inspect.getdoc(module.build) and inspect.getdoc(module.open)


@pytest.mark.parametrize("name", HERE)
@pytest.mark.parametrize("size", [1, 3, 64])
def test_outputs_are_those_of_numpy(
    name: str, size: int, small_graph: SmallGraph, axes: dict[str, Span], tmp_path: Path
) -> None:
    module, out, meta = build(name, small_graph.path, axes=axes, folder=tmp_path)
    x = np.random.default_rng(size).standard_normal((size, 1, 4, 4), np.float32)
    with module.open(out, config=module.Config(), meta=meta) as runner:
        got = runner.run({"input": x})
        assert [spec.name for spec in runner.signature.outputs] == list(got) == ["logits"]
        assert runner.signature.inputs[0].shape == ("batch", 1, 4, 4)
    assert got["logits"].dtype == np.float32
    np.testing.assert_allclose(got["logits"], small_graph.reference(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", HERE)
def test_an_output_is_the_callers_to_keep(
    name: str, small_graph: SmallGraph, axes: dict[str, Span], tmp_path: Path
) -> None:
    module, out, meta = build(name, small_graph.path, axes=axes, folder=tmp_path)
    x = np.ones((2, 1, 4, 4), np.float32)
    with module.open(out, config=module.Config(), meta=meta) as runner:
        first = runner.run({"input": x})["logits"]
        before = first.copy()
        runner.run({"input": 3 * x})
    np.testing.assert_array_equal(first, before)


BAD_FEEDS: dict[str, tuple[dict[str, Any], str]] = {
    "other name": ({"x": np.zeros((1, 1, 4, 4), np.float32)}, r"named \['x'\], expected \['input'\]"),
    "missing": ({}, r"named \[\]"),
    "one too many": ({"input": np.zeros((1, 1, 4, 4), np.float32), "y": np.zeros(1)}, r"expected \['input'\]"),
    "list": ({"input": [[0.0]]}, "is a list, expected a NumPy array"),
    "dtype": ({"input": np.zeros((1, 1, 4, 4))}, "is float64, expected float32"),
    "rank": ({"input": np.zeros((1, 4, 4), np.float32)}, r"\[1, 4, 4\], expected \[batch, 1, 4, 4\]"),
    "size": ({"input": np.zeros((1, 1, 4, 5), np.float32)}, r"\[1, 1, 4, 5\], expected \[batch, 1, 4, 4\]"),
    "empty": ({"input": np.zeros((0, 1, 4, 4), np.float32)}, "the batch is empty"),
    "nan": ({"input": np.full((1, 1, 4, 4), np.nan, np.float32)}, "nan or inf"),
    "inf": ({"input": np.array([np.inf, -np.inf] * 8, np.float32).reshape(1, 1, 4, 4)}, "nan or inf"),
}


@pytest.mark.parametrize("case", BAD_FEEDS)
@pytest.mark.parametrize("name", HERE)
def test_bad_feeds_are_refused_alike(
    name: str, case: str, small_graph: SmallGraph, axes: dict[str, Span], tmp_path: Path
) -> None:
    feed, pattern = BAD_FEEDS[case]
    module, out, meta = build(name, small_graph.path, axes=axes, folder=tmp_path)
    with (
        module.open(out, config=module.Config(), meta=meta) as runner,
        pytest.raises(DataError, match=pattern) as caught,
    ):
        runner.run(feed)
    with pytest.raises(DataError) as expected:
        check_feed(feed, inputs=[SPEC], bounds=runner.bounds)
    assert caught.value.message == expected.value.message


def test_huge_finite_values_are_not_taken_for_inf() -> None:
    x = np.full((1, 1, 4, 4), np.finfo(np.float32).max, np.float32)
    np.testing.assert_array_equal(check_feed({"input": x}, inputs=[SPEC])["input"], x)


@pytest.mark.parametrize("size", [1, 9])
def test_a_batch_outside_the_profile_is_refused(size: int) -> None:
    with pytest.raises(DataError, match=f"batch of {size} .* 2 to 8"):
        check_feed({"input": np.zeros((size, 1, 4, 4), np.float32)}, inputs=[SPEC], bounds={"batch": (2, 8)})


def test_inputs_must_agree_on_the_batch() -> None:
    other = TensorSpec(name="mask", shape=("batch", 2), dtype="bool")
    feed = {"input": np.zeros((2, 1, 4, 4), np.float32), "mask": np.zeros((3, 2), np.bool_)}
    with pytest.raises(DataError, match="the axis 'batch' is 2 in 'input' and 3 in 'mask'"):
        check_feed(feed, inputs=[SPEC, other])


def test_a_strided_array_comes_out_contiguous() -> None:
    x = np.zeros((4, 4, 1, 2), np.float32).transpose(3, 2, 0, 1)
    assert check_feed({"input": x}, inputs=[SPEC])["input"].flags.c_contiguous


@pytest.mark.parametrize("name", HERE)
def test_a_fixed_batch_is_kept(name: str, axes: dict[str, Span], tmp_path: Path) -> None:
    weights = np.ones((16, 3), np.float32)
    nodes = [
        helper.make_node("Flatten", ["input"], ["flat"]),
        helper.make_node("MatMul", ["flat", "weights"], ["logits"]),
    ]
    path = save_graph(tmp_path / "fixed.onnx", nodes, constants={"weights": weights}, batch=2)
    module, out, meta = build(name, path, axes=axes, folder=tmp_path)
    with module.open(out, config=module.Config(), meta=meta) as runner:
        assert runner.signature.inputs[0].shape == (2, 1, 4, 4)
        with pytest.raises(DataError, match=r"expected \[2, 1, 4, 4\]"):
            runner.run({"input": np.zeros((3, 1, 4, 4), np.float32)})


@pytest.mark.parametrize("name", HERE)
def test_closing_lets_go_of_everything(
    name: str, small_graph: SmallGraph, axes: dict[str, Span], tmp_path: Path
) -> None:
    module, out, meta = build(name, small_graph.path, axes=axes, folder=tmp_path)
    with module.open(out, config=module.Config(), meta=meta) as runner:
        held = [
            weakref.ref(v) for v in vars(runner).values() if type(v).__module__.startswith(("onnxruntime", "openvino"))
        ]
        assert held, "nothing was open"
    gc.collect()
    assert not any(reference() for reference in held)
    with pytest.raises(ValueError, match="closed"):
        runner.run({"input": np.zeros((1, 1, 4, 4), np.float32)})


@pytest.mark.parametrize("name", BUILD_HERE)
def test_building_twice_gives_the_same_bytes(
    name: str, small_graph: SmallGraph, axes: dict[str, Span], tmp_path: Path
) -> None:
    (tmp_path / "again").mkdir()
    _, first, meta = build(name, small_graph.path, axes=axes, folder=tmp_path)
    _, second, again = build(name, small_graph.path, axes=axes, folder=tmp_path / "again")
    assert first.read_bytes() == second.read_bytes()
    assert meta == again


@pytest.mark.parametrize("name", BUILD_HERE)
def test_building_leaves_one_file(name: str, small_graph: SmallGraph, axes: dict[str, Span], tmp_path: Path) -> None:
    _, out, _ = build(name, small_graph.path, axes=axes, folder=tmp_path)
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("name", BUILD_HERE)
def test_an_unknown_operator_is_named(name: str, axes: dict[str, Span], tmp_path: Path) -> None:
    nodes = [helper.make_node("Frobnicate", ["input"], ["logits"], name="odd", domain="com.example")]
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("input", onnx.TensorProto.FLOAT, ["n", 1, 4, 4])],
        [helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["n", 3])],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.example", 1)]
    path = tmp_path / "odd.onnx"
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    with pytest.raises(UnsupportedError, match="Frobnicate"):
        build(name, path, axes=axes, folder=tmp_path)


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_garbage_is_a_package_error(name: str, axes: dict[str, Span], tmp_path: Path) -> None:
    path = tmp_path / "garbage.onnx"
    path.write_bytes(b"\x08\x07garbage")
    module = BACKENDS[name]
    with pytest.raises(PackageError, match="not a valid ONNX graph"):
        nothing = Signature(inputs=(), outputs=())
        module.build(path, config=module.Config(), signature=nothing, axes=axes, out=tmp_path / "out.onnx")
    with pytest.raises(PackageError, match="cannot open"):
        module.open(path, config=module.Config())


def test_external_data_is_taken_in(small_graph: SmallGraph, tmp_path: Path) -> None:
    path, out = tmp_path / "outside.onnx", tmp_path / "inside" / "model.onnx"
    out.parent.mkdir()
    onnx.save(onnx.load(small_graph.path), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    copy_graph(path, out=out)
    assert list(out.parent.iterdir()) == [out]
    module = BACKENDS["onnxruntime"]
    x = np.ones((1, 1, 4, 4), np.float32)
    with module.open(out, config=module.Config()) as runner:
        np.testing.assert_allclose(runner.run({"input": x})["logits"], small_graph.reference(x), rtol=1e-4)


@pytest.mark.parametrize("name", [name for name in BACKENDS if name not in HERE])
def test_what_does_not_run_here_says_why(name: str, small_graph: SmallGraph, tmp_path: Path) -> None:
    module = BACKENDS[name]
    reason = module.unavailable(module.Config())
    assert "not installed" in reason or "no NVIDIA GPU" in reason
    with pytest.raises((DependencyError, PackageError)):
        module.open(small_graph.path, config=module.Config())
