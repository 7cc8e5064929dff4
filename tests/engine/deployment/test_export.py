"""Packages to artifacts on a real run: what is published, proven, not built again, and refused."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.methods.graphs import make_context as make_method_context
from tests.methods.graphs import samples, save_residual
from tests.specs import classifier, image_spec

from bmctl import store
from bmctl.backends import BACKENDS, onnxruntime, openvino, tensorrt, tensorrt_rtx
from bmctl.core.onnxgraph import read_signature
from bmctl.engine.artifacts import parity
from bmctl.engine.artifacts.deployed import open_deployed, open_runners, read_sample
from bmctl.engine.artifacts.opening import open_parts
from bmctl.engine.context import StageContext
from bmctl.engine.deployment import export, reference
from bmctl.engine.parallel import Group
from bmctl.errors import (
    DependencyError,
    GateError,
    InterruptedRunError,
    PackageError,
    ResourceError,
    UsageError,
)
from bmctl.inputs.image import Spec
from bmctl.methods import ptq
from bmctl.models import build
from bmctl.package import PART, GraphFile, Manifest, ModelPackage, save_package
from bmctl.processes.signals import Stop
from bmctl.recipe import Recipe, recipe_yaml
from bmctl.schema import Signature

Events = list[Mapping[str, object]]
ORT, OV, RTX = onnxruntime.Config(), openvino.Config(), tensorrt_rtx.Config(capabilities=("sm89",))


def recipe(**changes: Any) -> Recipe:
    fields = {
        "name": "tiny",
        "model": {"name": "bmctl:mlp"},
        "data": {"source": {"kind": "bundled"}, "val": {"limit": 100}},
        "task": {"kind": "classify"},
        "export": {"axes": {"batch": {"min": 1, "opt": 2, "max": 16}}},
    }
    return Recipe.model_validate_json(json.dumps(fields | changes))


def make_context(run: Path, events: Events, **changes: Any) -> StageContext:
    group = Group(rank=0, local_rank=0, world=1, device=torch.device("cpu"), threads=1)
    return StageContext(run=run, recipe=recipe(), group=group, stop=Stop(), emit=events.append, **changes)


def save_module(run: Path) -> ModelPackage:
    torch.manual_seed(0)
    spec = image_spec("bmctl:mlp")
    manifest = Manifest(
        stage="train",
        key="0" * 64,
        **classifier(spec, class_names="abcdefghij"),
        input=Spec(size=(28, 28), channels=1, mean=(0.286,), std=(0.353,)),
    )
    return save_package(
        run / "packages" / "00-train", manifest=manifest, recipe_yaml=recipe_yaml(recipe()), model=build(spec)
    )


def save_foreign(run: Path, graph: Path) -> ModelPackage:
    """What `bmctl import model.onnx` makes: a graph without task or input."""
    manifest = Manifest(stage="import", key="0" * 64, parts={PART: read_signature(graph)})
    text, graphs = recipe_yaml(recipe()), {PART: GraphFile(graph)}
    return save_package(run / "packages" / "00-import", manifest=manifest, recipe_yaml=text, graphs=graphs)


@pytest.fixture
def events() -> Events:
    return []


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[export.Deployed], Events]:
    run = tmp_path_factory.mktemp("run")
    events: Events = []
    context = make_context(run, events)
    return run, export.export_package(context, save_module(run), backends=[ORT, OV, RTX], into=run / "deploy"), events


@pytest.fixture
def run(exported: tuple[Path, list[export.Deployed], Events], tmp_path: Path) -> Path:
    return Path(shutil.copytree(exported[0], tmp_path / "run"))


@pytest.fixture
def foreign(tmp_path: Path) -> ModelPackage:
    return save_foreign(tmp_path / "foreign", save_residual(tmp_path / "model.onnx"))


# -- what is published ------------------------------------------------------------------------------


def test_every_artifact_says_what_it_is(exported: tuple[Path, list[export.Deployed], Events]) -> None:
    run, deployed, _ = exported
    package = run / "packages" / "00-train"
    assert [one.path for one in deployed] == [run / "deploy" / n for n in ("onnxruntime", "openvino", "tensorrt_rtx")]
    for one in deployed:
        manifest = open_deployed(one.path).manifest
        assert manifest == one.manifest and one.hash == store.manifest_hash(one.path)
        part = manifest.parts[PART]
        assert set(manifest.files) == {part.artifact, export.SAMPLE}
        assert part.artifact == f"model{BACKENDS[manifest.backend].SUFFIX}" and one.artifacts[PART].is_file()
        assert manifest.package == store.manifest_hash(package)
        about = ModelPackage(package, _manifest(run)).manifest
        assert {PART: part.signature} == about.parts
        assert (manifest.input, manifest.task, manifest.facts) == (about.input, about.task, about.facts)
        assert manifest.precision == part.precision == "fp32"
        assert manifest.axes["batch"].max == 16 and manifest.machine["cores"] and part.meta["version"]
    assert not [path for path in (run / "deploy").iterdir() if path.name.startswith(".")]


def test_what_ran_is_proven_and_what_did_not_says_why(exported: tuple[Path, list[export.Deployed], Events]) -> None:
    _, (ort, ov, rtx), events = exported
    for one in (ort, ov):
        proof = one.manifest.parts[PART].parity
        assert one.manifest.status == "ran" and proof is not None and proof.passed and proof.error < proof.tolerance
        assert (proof.reference, proof.num_samples) == ("eager", reference.NUM_COMPARED)
    if not tensorrt_rtx.unavailable(RTX):
        pytest.skip("this machine runs the engine")
    part = rtx.manifest.parts[PART]
    assert (rtx.manifest.status, part.parity) == ("built, not run", None)
    assert "GPU" in rtx.manifest.reason and part.meta["capabilities"] == ["sm89"]
    assert any("built, not run" in str(event.get("text")) for event in events)


def test_the_sample_is_real_data_and_its_reference(exported: tuple[Path, list[export.Deployed], Events]) -> None:
    run, (ort, *_), _ = exported
    (call,) = read_sample(ort)
    x, y = call.feed["input"], call.outputs["logits"]
    assert x.shape == (export.NUM_KEPT, 1, 28, 28) and abs(float(x.min()) + 0.286 / 0.353) < 1e-5, "black is black"
    with ExitStack() as stack:
        eager = open_parts(ModelPackage(run / "packages" / "00-train", _manifest(run)), stack)[PART]
        np.testing.assert_allclose(y, eager.run({"input": x})["logits"], rtol=1e-4, atol=1e-5)
        built = open_runners(ort, stack)[PART]
        np.testing.assert_allclose(built.run({"input": x})["logits"], y, rtol=1e-3, atol=1e-4)


def _manifest(run: Path) -> Manifest:
    return store.read_manifest(run / "packages" / "00-train", Manifest)


def test_the_command_for_the_target_machine(run: Path, events: Events) -> None:
    spaced = run.rename(run.with_name("a run; rm"))
    package = ModelPackage(spaced / "packages" / "00-train", _manifest(spaced))
    context = make_context(spaced, events, overwrite=True)
    (one,) = export.export_package(context, package, backends=[RTX], into=spaced / "deploy")
    words = shlex.split(one.manifest.command_elsewhere)
    assert words == ["bmctl", "export", str(package.path), "--backend", "tensorrt", "-o", str(spaced)]


# -- doing it again ---------------------------------------------------------------------------------


@pytest.fixture
def again(run: Path, events: Events, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[export.Deployed]]:
    """Export the same package once more; building a graph anew is an error unless it is asked for."""
    package = ModelPackage(run / "packages" / "00-train", _manifest(run))

    def call(*backends: Any, changes: Mapping[str, Any] | None = None, **flags: Any) -> list[export.Deployed]:
        context = replace(make_context(run, events, **flags), recipe=recipe(**(changes or {})))
        return export.export_package(context, package, backends=backends, into=run / "deploy")

    return call


def test_nothing_is_built_twice(
    again: Callable[..., Any], run: Path, events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = store.manifest_hash(run / "deploy" / "onnxruntime")
    monkeypatch.setattr(reference, "export_onnx", lambda *a, **k: pytest.fail("exported again"))
    deployed = again(ORT, OV)
    assert [one.manifest.backend for one in deployed] == ["onnxruntime", "openvino"]
    assert deployed[0].hash == before and [event["event"] for event in events] == ["skip", "skip"]


@pytest.mark.parametrize(
    ("config", "changes"),
    [(onnxruntime.Config(threads=1), {}), (ORT, {"export": {"axes": {"batch": {"min": 1, "opt": 2, "max": 8}}}})],
)
def test_other_inputs_need_overwrite(again: Callable[..., Any], config: Any, changes: dict[str, Any]) -> None:
    with pytest.raises(ResourceError, match="nothing finished is overwritten"):
        again(config, changes=changes)


def test_overwrite_builds_it_anew(again: Callable[..., Any]) -> None:
    (one,) = again(onnxruntime.Config(threads=1), overwrite=True)
    assert one.manifest.config["threads"] == 1


def test_an_unproven_engine_is_proven_once_it_can_run(
    again: Callable[..., Any], run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a machine with a GPU, played by ONNX Runtime."""
    if not tensorrt_rtx.unavailable(RTX):
        pytest.skip("this machine runs the engine")
    monkeypatch.setattr(tensorrt_rtx, "unavailable", lambda config: "")
    monkeypatch.setattr(
        tensorrt_rtx, "open", lambda artifact, config, signature, meta: onnxruntime.open(
            run / "deploy" / "onnxruntime" / "model.onnx", config=ORT, signature=signature
        )
    )  # fmt: skip
    (one,) = again(RTX)
    proof = one.manifest.parts[PART].parity
    assert one.manifest.status == "ran" and proof is not None and proof.passed


def test_a_changed_artifact_is_refused(again: Callable[..., Any], run: Path) -> None:
    path = run / "deploy" / "onnxruntime" / "model.onnx"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(PackageError, match="was changed"):
        again(ORT)
    with pytest.raises(PackageError, match="was changed"):
        open_deployed(path.parent)


# -- refusals ---------------------------------------------------------------------------------------


class Zeros:
    """A runtime that computes something else."""

    def __init__(self, signature: Signature) -> None:
        self.signature, self.bounds = signature, {}

    def run(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"logits": np.zeros((len(feed["input"]), 10), np.float32)}

    def __enter__(self) -> Zeros:
        return self

    def __exit__(self, *raised: object) -> None: ...


def test_a_wrong_artifact_is_kept_aside(again: Callable[..., Any], run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It must not be published, and what was built stays to be looked at."""
    before = store.manifest_hash(run / "deploy" / "openvino")
    monkeypatch.setattr(openvino, "open", lambda *args, signature, **kwargs: Zeros(signature))
    with pytest.raises(GateError, match="openvino computes something else than eager") as caught:
        again(OV, overwrite=True)
    assert caught.value.exit_code == 8
    rejected = run / "deploy" / "openvino.onnx.rejected"
    assert rejected.is_file() and str(rejected) in caught.value.message
    assert store.manifest_hash(run / "deploy" / "openvino") == before


def test_a_wrong_graph_is_kept_aside(run: Path, events: Events, monkeypatch: pytest.MonkeyPatch) -> None:
    package = ModelPackage(run / "packages" / "00-train", _manifest(run))
    monkeypatch.setattr("bmctl.engine.artifacts.graph.TOLERANCE", -1.0)
    with pytest.raises(GateError, match="failed its check"):
        export.export_package(make_context(run, events), package, backends=[ORT], into=run / "deploy" / "new")
    assert (run / "deploy" / "new" / "model.onnx.rejected").is_file()


def test_what_cannot_even_be_built(again: Callable[..., Any], run: Path) -> None:
    if not tensorrt.unavailable(tensorrt.Config()):
        pytest.skip("this machine has TensorRT and a GPU")
    with pytest.raises(DependencyError) as caught:
        again(tensorrt.Config())
    assert caught.value.exit_code == 6 and not (run / "deploy" / "tensorrt").exists()


def test_a_backend_named_twice(again: Callable[..., Any]) -> None:
    with pytest.raises(UsageError, match="named twice"):
        again(ORT, ORT)


def test_a_signal_stops_it(run: Path, events: Events) -> None:
    stop = Stop()
    stop.request(signal.SIGTERM)
    package = ModelPackage(run / "packages" / "00-train", _manifest(run))
    context = replace(make_context(run, events, overwrite=True), stop=stop)
    with pytest.raises(InterruptedRunError) as caught:
        export.export_package(context, package, backends=[OV], into=run / "deploy")
    assert caught.value.exit_code == 143
    assert open_deployed(run / "deploy" / "openvino")


# -- frozen packages --------------------------------------------------------------------------------


def test_a_foreign_graph_is_proven_on_noise(foreign: ModelPackage, events: Events) -> None:
    run = foreign.path.parents[1]
    context = replace(make_context(run, events), recipe=recipe(data=None, task=None))
    ort, ov = export.export_package(context, foreign, backends=[ORT, OV], into=run / "deploy")
    proof = ov.manifest.parts[PART].parity
    assert proof is not None and proof.reference.startswith("the graph on ONNX Runtime")
    assert ort.artifacts[PART].read_bytes() == foreign.graphs[PART].read_bytes()
    assert any("noise" in str(event.get("text")) for event in events)


def test_a_quantized_graph_is_proven_with_the_tolerance_of_int8(tmp_path: Path, events: Events) -> None:
    graph = save_residual(tmp_path / "model.onnx")
    ptq.apply(graph, ptq.Config(), make_method_context([samples()]), out=tmp_path / "int8.onnx")
    package = save_foreign(tmp_path / "run", tmp_path / "int8.onnx")
    context = replace(make_context(tmp_path / "run", events), recipe=recipe(data=None, task=None))
    deployed = export.export_package(context, package, backends=[ORT, OV], into=tmp_path / "run" / "deploy")
    for one in deployed:
        proof = one.manifest.parts[PART].parity
        assert one.manifest.precision == "int8" and proof is not None
        assert proof.tolerance == parity.TOLERANCE["int8"]
