"""Real TensorRT-RTX engines, built without a GPU."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper
from pydantic import ValidationError
from tests.backends.conftest import SmallGraph

from bmctl.backends import tensorrt, tensorrt_rtx, trt_engine
from bmctl.backends.trt_engine import Device
from bmctl.core.onnxgraph import read_signature
from bmctl.errors import DependencyError, PackageError, UnsupportedError
from bmctl.schema import Span

trt = pytest.importorskip("tensorrt_rtx", reason="the extra tensorrt-rtx is not installed")
ADA = Device(name="NVIDIA L4", capability="sm89")


def build(graph: Path, *, out: Path, axes: dict[str, Span], **config: Any) -> dict[str, Any]:
    return tensorrt_rtx.build(
        graph,
        config=tensorrt_rtx.Config.model_validate(config),
        signature=read_signature(graph),
        axes=axes,
        out=out,
    )


@pytest.fixture
def deployed(small_graph: SmallGraph, axes: dict[str, Span], tmp_path: Path) -> Path:
    """An engine with the part of a deploy manifest that speaks of it."""
    out = tmp_path / "model.rtx.engine"
    meta = build(small_graph.path, out=out, axes=axes)
    (tmp_path / "manifest.json").write_text(json.dumps({"artifact": out.name, "meta": meta}))
    return out


@pytest.mark.parametrize("kind", ["fp32", "int8"])
def test_engines_of_the_residual_cnn(
    kind: str, rescnn_graph: Path, int8_graph: Path, axes: dict[str, Span], tmp_path: Path, capfd: Any
) -> None:
    out = tmp_path / "model.rtx.engine"
    meta = build(rescnn_graph if kind == "fp32" else int8_graph, out=out, axes=axes)
    data = out.read_bytes()
    assert data[:4] == b"vtrt"
    assert len(data) > 100_000
    assert meta["sha256"] == hashlib.sha256(data).hexdigest()
    assert meta["version"] == trt.__version__
    assert meta["capabilities"] == ["sm80", "sm86", "sm89", "sm120", "sm121"]
    assert meta["profile"] == {"input": [[1, 1, 28, 28], [8, 1, 28, 28], [64, 1, 28, 28]]}
    assert bool(meta["mended"]) == (kind == "int8")
    assert kind == "fp32" or "symmetric over the same range" in meta["mended"][0]
    assert not any("UINT8" in message for message in meta["messages"])
    json.dumps(meta)
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_symmetric_int8_of_onnxruntime_builds_as_it_is(
    rescnn_graph: Path, axes: dict[str, Span], tmp_path: Path
) -> None:
    from onnxruntime import quantization

    class Samples(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            rng = np.random.default_rng(0)
            self.rows = iter([{"input": rng.standard_normal((8, 1, 28, 28), np.float32)}])

        def get_next(self) -> Any:
            return next(self.rows, None)

    path = tmp_path / "symmetric.onnx"
    quantization.quantize_static(
        rescnn_graph,
        path,
        Samples(),
        activation_type=quantization.QuantType.QInt8,
        weight_type=quantization.QuantType.QInt8,
        per_channel=True,
        extra_options={"ActivationSymmetric": True, "WeightSymmetric": True, "QuantizeBias": False},
    )
    meta = build(path, out=tmp_path / "model.rtx.engine", axes=axes)
    assert meta["mended"] == []


def test_the_profile_is_the_recipes(small_graph: SmallGraph, tmp_path: Path) -> None:
    meta = build(small_graph.path, out=tmp_path / "e", axes={"batch": Span(min=2, opt=4, max=8)}, capabilities=["sm89"])
    assert [shape[0] for shape in meta["profile"]["input"]] == [2, 4, 8]
    assert meta["capabilities"] == ["sm89"]


def test_a_profile_that_contradicts_itself_is_refused(small_graph: SmallGraph, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"sizes .*8, 1, 4, 4.*were not taken"):
        build(small_graph.path, out=tmp_path / "e", axes={"batch": Span.model_construct(min=8, opt=4, max=2)})


def test_every_free_axis_needs_its_sizes(axes: dict[str, Span], tmp_path: Path) -> None:
    graph = helper.make_graph(
        [helper.make_node("Relu", ["input"], ["logits"])],
        "graph",
        [helper.make_tensor_value_info("input", onnx.TensorProto.FLOAT, ["n", 1, "h", 4])],
        [helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["n", 1, "h", 4])],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), tmp_path / "g.onnx")
    with pytest.raises(UnsupportedError, match=r"'input' is \[batch, 1, h, 4\], and nobody says") as caught:
        build(tmp_path / "g.onnx", out=tmp_path / "e", axes=axes)
    assert "--axis h=" in caught.value.hint
    meta = build(tmp_path / "g.onnx", out=tmp_path / "e", axes=axes | {"h": Span(min=2, opt=3, max=4)})
    assert meta["profile"]["input"] == [[1, 1, 2, 4], [8, 1, 3, 4], [64, 1, 4, 4]]


def test_a_builder_error_gives_the_librarys_reason(
    small_graph: SmallGraph, axes: dict[str, Span], tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedError, match=r"matmul.*SM75.*FP32 GEMM is not supported"):
        build(small_graph.path, out=tmp_path / "e", axes=axes, capabilities=["sm75"])
    assert not (tmp_path / "e").exists()
    # The next build does not repeat what was said about this one.
    assert build(small_graph.path, out=tmp_path / "e", axes=axes)["messages"] == []


@pytest.mark.parametrize(
    ("value", "pattern"),
    [
        (["sm90"], "sm90 is not served by TensorRT-RTX .*take the backend tensorrt"),
        (["sm100"], "sm100 is not served by TensorRT-RTX .*take the backend tensorrt"),
        (["ada"], "ada is not served"),
        (["sm89", "sm89"], "named twice"),
        ([], "at least 1"),
    ],
)
def test_capabilities_that_are_not_served(value: list[str], pattern: str) -> None:
    with pytest.raises(ValidationError, match=pattern):
        tensorrt_rtx.Config.model_validate({"capabilities": value})


def test_capabilities_are_the_librarys() -> None:
    served = [name for name in trt.ComputeCapability.__members__ if name.startswith("SM")]
    assert list(tensorrt_rtx.CAPABILITIES) == [name.lower() for name in served]


# -- opening ----------------------------------------------------------------------------------------


def test_without_a_gpu_it_is_built_not_run(deployed: Path) -> None:
    if trt_engine.find_device():
        pytest.skip("there is a GPU")
    config = tensorrt_rtx.Config()
    assert "no NVIDIA GPU" in tensorrt_rtx.unavailable(config)
    with pytest.raises(DependencyError, match="built, not run") as caught:
        tensorrt_rtx.open(deployed, config=config)
    assert caught.value.exit_code == 6


def test_no_manifest_no_engine(deployed: Path) -> None:
    (deployed.parent / "manifest.json").unlink()
    with pytest.raises(PackageError, match=r"no manifest\.json") as caught:
        tensorrt_rtx.open(deployed, config=tensorrt_rtx.Config())
    assert caught.value.exit_code == 5


def test_a_manifest_of_another_file_does_not_do(deployed: Path) -> None:
    other = deployed.rename(deployed.with_name("other.rtx.engine"))
    with pytest.raises(PackageError, match="does not speak of other"):
        tensorrt_rtx.open(other, config=tensorrt_rtx.Config())


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000, '{"artifact": "model.rtx.engine"}'])
def test_a_broken_manifest(text: str, deployed: Path) -> None:
    (deployed.parent / "manifest.json").write_text(text)
    with pytest.raises(PackageError):
        tensorrt_rtx.open(deployed, config=tensorrt_rtx.Config())


@pytest.mark.parametrize("harm", ["flip", "truncate"])
def test_other_bytes_than_were_built(harm: str, deployed: Path) -> None:
    data = bytearray(deployed.read_bytes())
    data[len(data) // 2] ^= 1
    deployed.write_bytes(data if harm == "flip" else data[:-1])
    with pytest.raises(PackageError, match="the hash differs"):
        tensorrt_rtx.open(deployed, config=tensorrt_rtx.Config())


def test_check_engine(deployed: Path) -> None:
    meta = json.loads((deployed.parent / "manifest.json").read_text())["meta"]
    trt_engine.check_engine(meta, trt=trt, device=ADA)
    refused = {
        "runtime": (meta | {"runtime": "tensorrt"}, ADA),
        "version": (meta | {"version": "1.6.0.1"}, ADA),
        "no version": ({k: v for k, v in meta.items() if k != "version"}, ADA),
        "gpu": (meta, Device(name="NVIDIA H100", capability="sm90")),
        "no capabilities": (meta | {"capabilities": None}, ADA),
    }
    for bad, device in refused.values():
        with pytest.raises(PackageError) as caught:
            trt_engine.check_engine(bad, trt=trt, device=device)
        assert caught.value.exit_code == 5


def test_check_engine_of_tensorrt_wants_the_very_gpu() -> None:
    meta = {"runtime": trt.__name__, "version": trt.__version__, "gpu": {"name": "NVIDIA L4", "capability": "sm89"}}
    trt_engine.check_engine(meta, trt=trt, device=ADA)
    with pytest.raises(PackageError, match="L40S"):
        trt_engine.check_engine(meta, trt=trt, device=Device(name="NVIDIA L40S", capability="sm89"))


def test_a_gpu_that_does_not_match_is_refused_before_anything_runs(
    deployed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trt_engine, "find_device", lambda: Device(name="NVIDIA H100", capability="sm90"))
    monkeypatch.setattr("bmctl.backends.trt_runner.EngineRunner", None)
    with pytest.raises(PackageError, match="this GPU is"):
        tensorrt_rtx.open(deployed, config=tensorrt_rtx.Config())


# -- what is missing --------------------------------------------------------------------------------


@pytest.mark.parametrize(("backend", "extra"), [(tensorrt, "tensorrt"), (tensorrt_rtx, "tensorrt-rtx")])
def test_a_missing_extra_is_named(
    backend: Any, extra: str, small_graph: SmallGraph, axes: dict[str, Span], tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setitem(sys.modules, backend.__name__.rpartition(".")[2], None)
    config = backend.Config()
    assert "is not installed" in backend.unavailable(config)
    with pytest.raises(DependencyError) as caught:
        signature = read_signature(small_graph.path)
        backend.build(small_graph.path, config=config, signature=signature, axes=axes, out=tmp_path / "e")
    assert caught.value.hint == f"pip install 'bmctl[{extra}]'"


def test_tensorrt_builds_on_its_gpu_only(
    small_graph: SmallGraph, axes: dict[str, Span], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    monkeypatch.setattr(tensorrt, "find_device", lambda: None)
    assert "no NVIDIA GPU" in tensorrt.unavailable(tensorrt.Config())
    with pytest.raises(DependencyError, match="there is none here") as caught:
        signature = read_signature(small_graph.path)
        tensorrt.build(small_graph.path, config=tensorrt.Config(), signature=signature, axes=axes, out=tmp_path / "e")
    assert "tensorrt_rtx" in caught.value.hint


def test_tensorrt_records_its_gpu(
    small_graph: SmallGraph, axes: dict[str, Span], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same builder as TensorRT-RTX's, with that library standing in for one that needs the GPU."""

    def for_ada(settings: Any) -> None:
        settings.num_compute_capabilities = 1
        settings.set_compute_capability(trt.ComputeCapability.SM89, 0)

    def with_target(*args: Any, **kwargs: Any) -> dict[str, Any]:
        return trt_engine.build_engine(*args, **(kwargs | {"prepare": for_ada}))

    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    monkeypatch.setattr(tensorrt, "find_device", lambda: ADA)
    monkeypatch.setattr(tensorrt, "build_engine", with_target)
    signature = read_signature(small_graph.path)
    meta = tensorrt.build(
        small_graph.path, config=tensorrt.Config(), signature=signature, axes=axes, out=tmp_path / "model.engine"
    )
    assert meta["gpu"] == {"name": "NVIDIA L4", "capability": "sm89"}
    trt_engine.check_engine(meta, trt=trt, device=ADA)
