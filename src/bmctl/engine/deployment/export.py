"""From a package to artifacts: the ONNX graph, each backend's build, and the proof that it computes the same."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from bmctl import store
from bmctl.backends import BACKENDS, sibling
from bmctl.core import owncode
from bmctl.core.runner import Batched
from bmctl.engine.artifacts import parity
from bmctl.engine.artifacts.deployed import (
    SAMPLE,
    Deployed,
    DeployedPart,
    DeployManifest,
    open_deployed,
    save_sample,
)
from bmctl.engine.artifacts.recording import Call, cut
from bmctl.engine.context import StageContext
from bmctl.engine.deployment.reference import Reference, make_reference
from bmctl.engine.evaluation import feeds, measure
from bmctl.errors import GateError, ResourceError, UsageError
from bmctl.package import ModelPackage, write_files

STAGE = "export"
NUM_KEPT = 8
"""Samples that travel with an artifact."""
COARSENESS = ("fp32", "fp16", "bf16", "int8")


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
        folder = store.hidden_sibling(into / "graph", "tmp")  # so named, a killed process's is cleared away
        folder.mkdir()
        try:
            context.stop.check(STAGE)
            reference = make_reference(context, package, folder)
            for config in todo:
                found[config.name] = _deploy(context, package, reference, config=config, target=into / config.name)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    return [one for one in found.values() if one is not None]


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


# -- one artifact -----------------------------------------------------------------------------------


def _deploy(
    context: StageContext, package: ModelPackage, reference: Reference, *, config: Any, target: Path
) -> Deployed:
    module, manifest = BACKENDS[config.name], package.manifest
    context.emit({"event": "note", "stage": STAGE, "text": f"building {target}"})
    with store.publishing(target, overwrite=context.overwrite or _is_unproven(target)) as folder:
        reason = module.unavailable(config)
        parts: dict[str, DeployedPart] = {}
        for name, graph in reference.graphs.items():
            context.stop.check(STAGE)
            artifact, signature = folder / f"{name}{module.SUFFIX}", manifest.parts[name]
            axes = feeds.axes_of(context, manifest, signature)
            meta = module.build(graph, config=config, signature=signature, axes=axes, out=artifact)
            for text in meta.get("mended", ()):
                context.emit({"event": "note", "stage": STAGE, "text": f"{config.name}: {text}"})
            one = DeployedPart(
                artifact=artifact.name,
                signature=signature,
                precision=reference.precisions[name],
                parity=None,
                meta=meta,
            )
            context.stop.check(STAGE)
            proof = None if reason else _check_parity(module, artifact, config, one, name, reference, target=target)
            parts[name] = one.model_copy(update={"parity": proof})
        save_sample(folder / SAMPLE, _kept(reference))
        write_files(folder, package.given.files if package.given else {})
        owncode.keep(manifest.model_dump_json(), folder)
        about = DeployManifest(
            backend=config.name,
            config=config.model_dump(mode="json"),
            package=package.hash,
            parts=parts,
            axes=context.recipe.export.axes,
            input=manifest.input,
            task=manifest.task,
            facts=manifest.facts,
            precision=max((part.precision for part in parts.values()), key=COARSENESS.index),
            status="built, not run" if reason else "ran",
            reason=reason,
            machine=measure.machine(),
            files=store.records(folder),
            command_elsewhere=_command_elsewhere(context, package, config),
        )
        store.write_manifest(folder, about)
    for name, part in parts.items():
        of = f"{target.name}: " + (f"{name}: " if len(parts) > 1 else "")
        text = f"{of}{part.precision}, " + (f"built, not run: {reason}" if reason else str(part.parity))
        context.emit({"event": "note", "stage": STAGE, "text": text})
    return Deployed(path=target, manifest=about)


def _is_unproven(target: Path) -> bool:
    """An artifact that was never run is not finished: proving it needs no `--overwrite`."""
    return target.exists() and open_deployed(target).manifest.status == "built, not run"


def _check_parity(
    module: ModuleType, artifact: Path, config: Any, one: DeployedPart, name: str, reference: Reference, *, target: Path
) -> parity.Parity:
    """The worst of all recorded calls of one part."""
    precision = computed_in(config, one.meta, one.precision)
    limits = {"tolerance": parity.TOLERANCE[precision], "min_agreement": parity.AGREEMENT[precision]}
    outputs = one.signature.outputs
    with module.open(artifact, config=config, signature=one.signature, meta=one.meta) as runner:
        batched = Batched(runner)
        found = [
            parity.compare_all(call.outputs, batched.run(call.feed), outputs=outputs, source=reference.words, **limits)
            for call in reference.calls
            if call.part == name
        ]
    result = parity.worst(found)
    if not result.passed:
        rejected = target.with_name(f"{target.name}{module.SUFFIX}.rejected")
        _keep_rejected(artifact, rejected)
        raise GateError(
            f"{config.name} computes something else than {reference.words}: {result}; kept as {rejected}",
            hint="export to another backend, or look for the operator that differs with the kept file",
        )
    return result


def computed_in(config: Any, meta: Mapping[str, Any], precision: str) -> str:
    """The coarsest precision that the backend computes in."""
    if precision == "fp32" and meta.get("precision") == "bf16":
        return "bf16"
    return "fp16" if precision == "fp32" and getattr(config, "tf32", False) else precision


def _kept(reference: Reference) -> Iterator[Call]:
    """The first call of each part, and of that a few samples."""
    for name in reference.graphs:
        yield cut(next(call for call in reference.calls if call.part == name), NUM_KEPT)


def _keep_rejected(source: Path, target: Path) -> None:
    if source.exists():
        source.replace(target)


def _command_elsewhere(context: StageContext, package: ModelPackage, config: Any) -> str:
    other = sibling(config.name)
    command = ["bmctl", "export", str(package.path), "--backend", other, "-o", str(context.run)]
    return shlex.join(command) if other else ""
