"""From a package to artifacts: the ONNX graph, each backend's build, and the proof that it computes the same."""

from __future__ import annotations

import shlex
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

from bmctl import store
from bmctl.backends import BACKENDS
from bmctl.core import onnxfile, onnxgraph
from bmctl.core.runner import Runner
from bmctl.engine.artifacts import parity
from bmctl.engine.artifacts.deployed import SAMPLE, Deployed, DeployManifest, open_deployed
from bmctl.engine.artifacts.graph import export_onnx
from bmctl.engine.artifacts.reference import open_reference
from bmctl.engine.context import StageContext
from bmctl.engine.evaluation import measure
from bmctl.engine.evaluation.evaluate import eager_part, runner_part
from bmctl.engine.loading.arrays import array_batches
from bmctl.engine.loading.data import open_split
from bmctl.errors import GateError, ResourceError, UnsupportedError, UsageError
from bmctl.inputs import Resolved
from bmctl.package import ModelPackage, load_model
from bmctl.processes.signals import interrupted
from bmctl.schema import Signature, TensorSpec

STAGE = "export"
NUM_COMPARED = 64
NUM_KEPT = 8
"""Samples compared at once, and how many of them travel with the artifact."""


@dataclass(frozen=True)
class Source:
    """What every backend of one export is given.

    Attributes:
        graph: The checked ONNX file.
        x: float32 [NUM_COMPARED, ...], real validation samples, or noise where there are no data.
        y: The reference's outputs.
        reference: What computed them, in words.
    """

    graph: Path
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    precision: onnxgraph.Precision
    x: np.ndarray
    y: np.ndarray
    reference: str


def choose_tensorrt() -> tuple[str, str]:
    """The backend that `--tensorrt` means on this machine, and why."""
    module = BACKENDS["tensorrt"]
    reason = module.unavailable(module.Config())
    if not reason:
        return "tensorrt", "TensorRT and an NVIDIA GPU are here"
    return "tensorrt_rtx", f"{reason}; TensorRT-RTX builds anywhere, for SM75 to SM121 without SM90 and SM100"


def export_package(
    context: StageContext, package: ModelPackage, *, backends: Sequence[Any], into: Path
) -> list[Deployed]:
    """Build `package` for each backend, and prove each artifact on the spot where this machine can run it.

    Args:
        backends: Configs of BACKENDS, each backend once.
        into: RUN/deploy or RUN/deploy/baseline; each artifact gets the folder of its backend's name there. One that
            was built before from the same package and configuration is not built again.

    Raises:
        GateError: An artifact differs from its reference; it is kept as `<backend><suffix>.rejected`.
        DependencyError: A backend cannot even build here.
        UnsupportedError: An operator that the exporter or a backend does not have.
        ResourceError: Another artifact is there, and `overwrite` is not given.
    """
    names = [config.name for config in backends]
    if len(set(names)) < len(names):
        raise UsageError(f"a backend is named twice: {', '.join(names)}", hint="name each once in export.backends")
    into.mkdir(parents=True, exist_ok=True)
    found = {config.name: _finished(context, package, config, into / config.name) for config in backends}
    todo = [config for config in backends if found[config.name] is None]
    for name in (name for name in names if found[name] is not None):
        context.emit({"event": "skip", "stage": STAGE, "text": f"{into / name} is up to date"})
    if todo:
        folder = Path(tempfile.mkdtemp(prefix=".graph-", dir=into))
        try:
            _check_stop(context)
            source = _source(context, package, folder)
            for config in todo:
                _check_stop(context)
                found[config.name] = _deploy(context, package, source, config=config, target=into / config.name)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return [one for one in found.values() if one is not None]


def _check_stop(context: StageContext) -> None:
    if context.stop.requested is not None:
        raise interrupted(context.stop.requested, "stopped during export; run the same command again")


def _finished(context: StageContext, package: ModelPackage, config: Any, target: Path) -> Deployed | None:
    """The artifact of an earlier call with the same inputs; not one that can only be proven now."""
    if context.overwrite or not target.exists():
        return None
    one = open_deployed(target)
    found = (one.manifest.package, one.manifest.config, one.manifest.axes)
    if found != (package.hash, config.model_dump(mode="json"), context.recipe.export.axes):
        raise ResourceError(
            f"{target} is there, built from another package or with other settings; nothing finished is overwritten",
            hint="add --overwrite to redo it",
        )
    is_provable = one.manifest.status == "built, not run" and not BACKENDS[config.name].unavailable(config)
    return None if is_provable else one


# -- the graph and its reference --------------------------------------------------------------------


def _source(context: StageContext, package: ModelPackage, folder: Path) -> Source:
    """The package's graph, made or checked, and reference outputs on samples."""
    manifest = package.manifest
    if manifest.frozen:
        graph = package.graph
        onnxfile.check_onnx(graph)
        inputs, outputs = _specs(graph)
        x = _samples(context, package, inputs)
        with open_reference(graph) as (runner, reference):
            y = _run(runner, x)
    else:
        model = load_model(package)
        x = _samples(context, package, manifest.inputs)
        graph = folder / "model.onnx"
        names = {
            "input_name": manifest.inputs[0].name if manifest.inputs else "input",
            "output_name": manifest.outputs[0].name if manifest.outputs else "logits",
        }
        try:
            notes = export_onnx(model, example=torch.from_numpy(x[:2]), out=graph, **names)
        except GateError:
            _keep_rejected(folder / "model.onnx.rejected", folder.parent / "model.onnx.rejected")
            raise
        for text in notes:
            context.emit({"event": "note", "stage": STAGE, "text": text})
        inputs, outputs = _specs(graph)
        y, reference = eager_part(model)(x), "eager"
    inputs, outputs = _with_meaning(inputs, manifest.inputs), _with_meaning(outputs, manifest.outputs)
    return Source(graph, inputs, outputs, onnxgraph.precision_of(graph), x, y, reference)


def _samples(context: StageContext, package: ModelPackage, inputs: Sequence[TensorSpec]) -> np.ndarray:
    """float32 [NUM_COMPARED, ...]: the first validation samples, over again where there are fewer."""
    preprocess = package.manifest.preprocess
    if context.recipe.data is not None and preprocess is not None:
        split = open_split(context.data, name="val", given=Resolved(preprocess))
        x = next(iter(array_batches(split, batch_size=NUM_COMPARED)))["input"]
        return np.resize(x, (NUM_COMPARED, *x.shape[1:]))
    if len(inputs) != 1:
        raise UnsupportedError(f"{package.path} has {len(inputs)} inputs; parity is checked on graphs with one")
    context.emit({"event": "note", "stage": STAGE, "text": "no data: parity is checked on noise of the input's shape"})
    shape = [NUM_COMPARED, *(size if isinstance(size, int) else 1 for size in inputs[0].shape[1:])]
    return np.random.default_rng(0).standard_normal(shape).astype(inputs[0].dtype)


def _with_meaning(found: Sequence[TensorSpec], known: Sequence[TensorSpec]) -> tuple[TensorSpec, ...]:
    meanings = {spec.name: spec.meaning for spec in known}
    return tuple(spec.model_copy(update={"meaning": meanings.get(spec.name, "")}) for spec in found)


# -- one artifact -----------------------------------------------------------------------------------


def _deploy(context: StageContext, package: ModelPackage, source: Source, *, config: Any, target: Path) -> Deployed:
    module, axes = BACKENDS[config.name], context.recipe.export.axes
    signature = Signature(inputs=source.inputs, outputs=source.outputs)
    context.emit({"event": "note", "stage": STAGE, "text": f"building {target}"})
    with store.publishing(target, overwrite=context.overwrite or _is_unproven(target)) as folder:
        artifact = folder / f"model{module.SUFFIX}"
        meta = module.build(source.graph, config=config, signature=signature, axes=axes, out=artifact)
        reason = module.unavailable(config)
        result = None if reason else _check_parity(module, artifact, config, meta, source, target=target)
        _save_sample(folder / SAMPLE, source)
        manifest = DeployManifest(
            backend=config.name,
            config=config.model_dump(mode="json"),
            package=package.hash,
            artifact=artifact.name,
            axes=axes,
            inputs=source.inputs,
            outputs=source.outputs,
            preprocess=package.manifest.preprocess,
            class_names=package.manifest.class_names,
            task=package.manifest.task,
            precision=source.precision,
            status="built, not run" if reason else "ran",
            reason=reason,
            parity=result,
            meta=meta,
            machine=measure.machine(),
            files=store.records(folder),
            command_elsewhere=_command_elsewhere(context, package, config),
        )
        store.write_manifest(folder, manifest)
    text = f"{target.name}: {source.precision}, " + (f"built, not run: {reason}" if reason else str(result))
    context.emit({"event": "note", "stage": STAGE, "text": text})
    return Deployed(path=target, manifest=manifest)


def _is_unproven(target: Path) -> bool:
    """An artifact that was never run is not finished: proving it needs no `--overwrite`."""
    return target.exists() and open_deployed(target).manifest.status == "built, not run"


def _check_parity(
    module: ModuleType, artifact: Path, config: Any, meta: dict[str, Any], source: Source, *, target: Path
) -> parity.Parity:
    precision = _computed_in(config, meta, source.precision)
    signature = Signature(inputs=source.inputs, outputs=source.outputs)
    with module.open(artifact, config=config, signature=signature, meta=meta) as runner:
        got = _run(runner, source.x)
    result = parity.compare(
        source.y,
        got,
        tolerance=parity.TOLERANCE[precision],
        min_agreement=parity.AGREEMENT[precision],
        source=source.reference,
    )
    if not result.passed:
        rejected = target.with_name(f"{target.name}{module.SUFFIX}.rejected")
        _keep_rejected(artifact, rejected)
        raise GateError(
            f"{config.name} computes something else than {source.reference}: {result}; kept as {rejected}",
            hint="export to another backend, or look for the operator that differs with the kept file",
        )
    return result


def _computed_in(config: Any, meta: dict[str, Any], precision: onnxgraph.Precision) -> onnxgraph.Precision:
    """The coarsest precision that the backend computes in."""
    if precision == "fp32" and meta.get("precision") == "bf16":
        return "bf16"
    return "fp16" if precision == "fp32" and getattr(config, "tf32", False) else precision


def _run(runner: Runner, x: np.ndarray) -> np.ndarray:
    """The outputs of all samples, in batches that the runner takes."""
    return runner_part(runner)(x)


def _specs(graph: Path) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    found = onnxgraph.read_signature(graph)
    return found.inputs, found.outputs


def _save_sample(path: Path, source: Source) -> None:
    arrays = {source.inputs[0].name: source.x[:NUM_KEPT], source.outputs[0].name: source.y[:NUM_KEPT]}
    save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, path)


def _keep_rejected(source: Path, target: Path) -> None:
    if source.exists():
        source.replace(target)


def _command_elsewhere(context: StageContext, package: ModelPackage, config: Any) -> str:
    if config.name != "tensorrt_rtx":
        return ""
    return shlex.join(["bmctl", "export", str(package.path), "--backend", "tensorrt", "-o", str(context.run)])
