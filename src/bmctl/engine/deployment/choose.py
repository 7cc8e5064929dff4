"""Which artifact serves a request: what was named, or the fastest one that is right on this machine."""

from __future__ import annotations

import contextlib
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from bmctl import store
from bmctl.backends import BACKENDS
from bmctl.core import onnxfile
from bmctl.core.runner import Batched, Bounds, Runner, check_feed
from bmctl.engine.artifacts import parity
from bmctl.engine.artifacts.deployed import SAMPLE, Deployed, open_deployed, open_runner
from bmctl.engine.evaluation import measure
from bmctl.errors import DataError, DependencyError, PackageError, ResourceError, UnsupportedError, UsageError
from bmctl.inputs import InputSpec
from bmctl.package import ModelPackage, find_package, load_model
from bmctl.schema import Signature

ROUNDS = 5
EAGER = "eager"
MAX_PEEK_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Chosen:
    """An open model, and what it takes to feed and to read it.

    Attributes:
        runner: To be closed by whoever asked.
        backend: A name of BACKENDS, or `eager`.
        why: How it came to be this one, for the user.
        preprocess: The training's; None where nothing is known of it.
        class_names: In the order of the logits; empty where unknown.
    """

    runner: Runner
    backend: str
    why: str
    preprocess: InputSpec | None = None
    class_names: tuple[str, ...] = ()


def open_source(source: Path, *, backend: str = "auto", batch_size: int = 64) -> Chosen:
    """Open a run, a package, a deploy directory, an .onnx or an engine.

    Args:
        source: The directory or file. A file that belongs to a package or a deploy directory is opened as that.
        backend: `auto`; a backend's name; `eager` for the package itself.
        batch_size: At which `auto` compares speeds.

    Raises:
        PackageError: Missing, corrupt, or not what was asked for.
        UsageError: No such backend.
    """
    if backend not in ("auto", EAGER, *BACKENDS):
        raise UsageError(f"no such backend: {backend}", hint=f"auto, {EAGER}, {', '.join(BACKENDS)}")
    if not source.exists():
        raise PackageError(f"there is nothing at {source}", hint="list your runs with: ls -d runs/*")
    if source.is_file() and source.suffix not in (".onnx", ".engine"):
        raise PackageError(
            f"{source} is neither an .onnx file nor an engine{store.foreign_note(source)}",
            hint=f"import it first: bmctl import {source} -o RUN",
        )
    if (source / "packages").is_dir():
        return choose_runner(source, backend=backend, batch_size=batch_size)
    home = source if source.is_dir() else source.parent
    kind = _kind(home)
    if kind == "deployed":
        return _open_artifact(home, file=source if source.is_file() else None, backend=backend)
    if kind == "package" or source.is_dir():
        return _open_package(find_package(home), file=source if source.is_file() else None, backend=backend)
    if source.suffix == ".engine":
        raise PackageError(
            f"{source} has no manifest beside it: an engine is executable code, only one that bmctl built is opened",
            hint="build it here: bmctl export RUN --tensorrt",
        )
    return _open_bare(source, backend=backend)


def choose_runner(run: Path, *, backend: str = "auto", batch_size: int = 64) -> Chosen:
    """Open one of a run's artifacts.

    `auto` takes, of RUN/deploy/* without the baseline, those built from the newest package that open on this machine
    and agree with their recorded sample; of these the fastest, in interleaved rounds on that sample, which is
    validation data. Where there is none it is the package itself.

    Raises:
        PackageError: No package, a corrupt artifact, or none of the backend that was asked for.
    """
    package = find_package(run)
    if backend == EAGER:
        return _open_package(package, backend=EAGER)
    deployed = _find_deployed(run)
    if backend == "auto":
        return _fastest(package, deployed, batch_size=batch_size)
    hint = f"bmctl export {run} --set 'export.backends=[{{name: {backend}}}]'"
    found = next((one for one in deployed if one.manifest.backend == backend), None)
    if found is None:
        names = ", ".join(one.path.name for one in deployed) or "nothing"
        raise PackageError(f"{run} has no artifact for {backend}; deployed: {names}", hint=hint)
    if found.manifest.package != package.hash:
        raise PackageError(
            f"{found.path} was not built from the newest package, {package.path.name}", hint=f"{hint} --overwrite"
        )
    return _serve(found, why=f"{backend}, as asked")


# -- a run's artifacts ------------------------------------------------------------------------------


def _find_deployed(run: Path) -> list[Deployed]:
    folder = run / "deploy"
    found = sorted(path for path in folder.iterdir() if _kind(path) == "deployed") if folder.is_dir() else []
    return [open_deployed(path) for path in found]


def _fastest(package: ModelPackage, deployed: Sequence[Deployed], *, batch_size: int) -> Chosen:
    reasons: list[str] = [] if deployed else ["nothing was deployed"]
    calls: dict[str, tuple[Runner, dict[str, np.ndarray]]] = {}
    with contextlib.ExitStack() as stack:
        for one in deployed:
            try:
                if one.manifest.package != package.hash:
                    raise PackageError(f"not built from the newest package, {package.path.name}")
                runner = stack.enter_context(_open(one))
                calls[one.path.name] = (Batched(runner), _check_sample(one, runner, batch_size=batch_size))
            except (DependencyError, PackageError, ResourceError, UnsupportedError) as error:
                reasons.append(f"{one.path.name}: {error.message}")
        times = measure.latency(
            {n: functools.partial(runner.run, feed) for n, (runner, feed) in calls.items()}, rounds=ROUNDS
        )
    if not calls:
        chosen = _open_package(package, backend="auto")
        return replace(chosen, why="; ".join([chosen.why, *reasons]))
    ranking = sorted(times, key=lambda name: times[name].p50_ms)
    timing = ", ".join(f"{name} {times[name].p50_ms:.2f} ms" for name in ranking)
    why = f"{ranking[0]}, the fastest of what is right here ({timing} per batch of {batch_size})"
    best = next(one for one in deployed if one.path.name == ranking[0])
    return _serve(best, why="; ".join([why, *reasons]))


def _check_sample(one: Deployed, runner: Runner, *, batch_size: int) -> dict[str, np.ndarray]:
    """Compare the runner with the artifact's recorded sample; returns a batch of `batch_size` made of it."""
    source, target = runner.signature.inputs[0].name, runner.signature.outputs[0].name
    try:
        sample = load_file(one.path / SAMPLE)
        got = Batched(runner).run({source: sample[source]})[target]
        result = _compare(one, sample[target], got)
    except (KeyError, ValueError, OSError, SafetensorError) as error:
        raise PackageError(f"its {SAMPLE} does not hold its inputs and outputs: {error}") from error
    except DataError as error:
        raise PackageError(f"does not take its own sample: {error.message}") from error
    if not result.passed:
        raise PackageError(f"wrong on this machine: {result}")
    return {source: np.resize(sample[source], (batch_size, *sample[source].shape[1:]))}


def _compare(one: Deployed, reference: np.ndarray, got: np.ndarray) -> parity.Parity:
    """By the measure that it was proven with; one that never ran yet, by the precision of its graph."""
    manifest = one.manifest
    if manifest.parity is not None:
        limits = manifest.parity.tolerance, manifest.parity.min_agreement
    else:
        rounded = "fp16" if manifest.precision == "fp32" and manifest.config.get("tf32") else manifest.precision
        limits = parity.TOLERANCE[rounded], parity.AGREEMENT[rounded]
    tolerance, min_agreement = limits
    return parity.compare(reference, got, tolerance=tolerance, min_agreement=min_agreement, source="its sample")


def _open(one: Deployed) -> Runner:
    if one.artifact.suffix == ".onnx":
        onnxfile.check_onnx(one.artifact)  # its hash says that it is what the manifest names, not who wrote both
    return open_runner(one)


def _serve(one: Deployed, *, why: str) -> Chosen:
    manifest = one.manifest
    return Chosen(_open(one), manifest.backend, why, manifest.preprocess, tuple(manifest.class_names))


# -- single sources ---------------------------------------------------------------------------------


def _kind(folder: Path) -> str:
    """What a directory's manifest speaks of: `deployed`, `package` or nothing that is known here."""
    path = folder / store.MANIFEST
    if not path.is_file() or path.stat().st_size > MAX_PEEK_BYTES:
        return ""
    try:
        manifest = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise PackageError(f"{path} is not JSON: {error}", hint="restore the directory, or make it again") from error
    keys = set(manifest) if isinstance(manifest, dict) else set()
    return "deployed" if "artifact" in keys else "package" if "stage" in keys else ""


def _open_artifact(home: Path, *, file: Path | None, backend: str) -> Chosen:
    one = open_deployed(home)
    if file is not None and file.name != one.manifest.artifact:
        raise PackageError(f"{file} is not what {home / store.MANIFEST} speaks of: {one.manifest.artifact}")
    if backend not in ("auto", one.manifest.backend):
        raise UsageError(f"{home} is for {one.manifest.backend}, not for {backend}", hint="leave --backend out")
    return _serve(one, why=f"{one.manifest.backend}: what {home} was built for")


def _open_package(package: ModelPackage, *, file: Path | None = None, backend: str) -> Chosen:
    """A module runs eagerly, a frozen package's graph on ONNX Runtime."""
    manifest = package.manifest
    if file is not None and file.name != package.graph.name:
        raise PackageError(f"{file} is not part of the package {package.path}")
    own = "onnxruntime" if manifest.frozen else EAGER
    if backend not in ("auto", own):
        raise UsageError(
            f"the package {package.path} itself runs on {own}, not on {backend}",
            hint=f"bmctl export {package.path} -o RUN, then bmctl infer RUN --backend {backend}",
        )
    runner = _open_graph(package.graph) if manifest.frozen else EagerRunner(package)
    why = f"{own}: the package {package.path.name} itself"
    return Chosen(runner, own, why, manifest.preprocess, tuple(manifest.class_names))


def _open_bare(path: Path, *, backend: str) -> Chosen:
    """An .onnx file of which nothing else is known."""
    name = "onnxruntime" if backend == "auto" else backend
    if name not in ("onnxruntime", "openvino"):
        raise UsageError(f"an .onnx file does not run on {name}", hint=f"bmctl import {path} -o RUN; bmctl export RUN")
    return Chosen(_open_graph(path, backend=name), name, f"{name}: {path.name} has no manifest beside it")


def _open_graph(path: Path, *, backend: str = "onnxruntime") -> Runner:
    onnxfile.check_onnx(path)
    module = BACKENDS[backend]
    runner: Runner = module.open(path, config=module.Config())
    return runner


class EagerRunner:
    """A package's module in fp32, on the GPU where there is one; see core.runner.Runner."""

    def __init__(self, package: ModelPackage) -> None:
        import torch

        from bmctl.engine.evaluation.evaluate import eager_part

        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._part = eager_part(load_model(package), device)
        self.signature = Signature(inputs=package.manifest.inputs, outputs=package.manifest.outputs)
        self.bounds: dict[str, Bounds] = {}

    def run(self, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """One batch."""
        checked = check_feed(feed, inputs=self.signature.inputs)
        return {self.signature.outputs[0].name: self._part(checked[self.signature.inputs[0].name])}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._part = lambda x: x[:0]
