"""Which artifact serves a request: what was named, or the fastest one that is right on this machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bmctl import store
from bmctl.backends import BACKENDS, eager, onnxruntime
from bmctl.core import onnxfile
from bmctl.core.runner import Batched, Runner
from bmctl.engine.artifacts import parity
from bmctl.engine.artifacts.deployed import Deployed, DeployedPart, open_deployed, open_runners, read_sample
from bmctl.engine.artifacts.finding import kind_of
from bmctl.engine.artifacts.graphrunner import open_graph
from bmctl.engine.artifacts.opening import backend_of, open_parts
from bmctl.engine.artifacts.recording import Call, replay, stretched
from bmctl.engine.evaluation import measure
from bmctl.errors import DataError, DependencyError, PackageError, ResourceError, UnsupportedError, UsageError
from bmctl.inputs import Resolved
from bmctl.package import GRAPHS, PART, ModelPackage, find_package

ROUNDS = 5
EAGER = "eager"


@dataclass(frozen=True)
class Chosen:
    """An open model, and what it takes to feed and to read it.

    Attributes:
        runners: By part; they take any number of samples.
        stack: Closes them; for whoever asked.
        backend: A name of BACKENDS, or `eager`.
        why: How it came to be this one, for the user.
        given: How samples become what the parts take; None where nothing is known of it.
        task: Its Config as a manifest has it, and `facts` likewise; None where nothing is known.
    """

    runners: Mapping[str, Runner]
    stack: ExitStack
    backend: str
    why: str
    given: Resolved | None = None
    task: dict[str, Any] | None = None
    facts: dict[str, Any] | None = None


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
    if source.is_file() and not source.name.endswith(tuple(module.SUFFIX for module in BACKENDS.values())):
        raise PackageError(
            f"{source} is neither an .onnx file nor an engine{store.foreign_note(source)}",
            hint=f"import it first: bmctl import {source} -o RUN",
        )
    if (source / "packages").is_dir():
        return choose_runner(source, backend=backend, batch_size=batch_size)
    home = source if source.is_dir() else source.parent
    home = home.parent if home.name == GRAPHS and source.is_file() else home
    kind = kind_of(home)
    if kind == "deployed":
        return _open_artifact(home, file=source if source.is_file() else None, backend=backend)
    if kind == "package" or source.is_dir():
        return _open_package(find_package(home), file=source if source.is_file() else None, backend=backend)
    if source.suffix != onnxruntime.SUFFIX:
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
    found = sorted(path for path in folder.iterdir() if kind_of(path) == "deployed") if folder.is_dir() else []
    return [open_deployed(path) for path in found]


def _fastest(package: ModelPackage, deployed: Sequence[Deployed], *, batch_size: int) -> Chosen:
    reasons: list[str] = [] if deployed else ["nothing was deployed"]
    runs: dict[str, Callable[[], object]] = {}
    with ExitStack() as stack:
        for one in deployed:
            try:
                if one.manifest.package != package.hash:
                    raise PackageError(f"not built from the newest package, {package.path.name}")
                runners = _batched(open_runners(one, stack))
                runs[one.path.name] = _replay(runners, _checked_sample(one, runners, batch_size=batch_size))
            except (DependencyError, PackageError, ResourceError, UnsupportedError) as error:
                reasons.append(f"{one.path.name}: {error.message}")
        times = measure.latency(runs, rounds=ROUNDS)
    if not runs:
        chosen = _open_package(package, backend="auto")
        return replace(chosen, why="; ".join([chosen.why, *reasons]))
    ranking = sorted(times, key=lambda name: times[name].p50_ms)
    timing = ", ".join(f"{name} {times[name].p50_ms:.2f} ms" for name in ranking)
    why = f"{ranking[0]}, the fastest of what is right here ({timing} per batch of {batch_size})"
    best = next(one for one in deployed if one.path.name == ranking[0])
    return _serve(best, why="; ".join([why, *reasons]))


def _replay(runners: Mapping[str, Runner], calls: Sequence[Call]) -> Callable[[], object]:
    return lambda: replay(runners, calls)


def _checked_sample(one: Deployed, runners: Mapping[str, Runner], *, batch_size: int) -> list[Call]:
    """Compare the runners with the artifact's recorded calls; returns these, of `batch_size` samples each."""
    calls = read_sample(one)
    try:
        found = [_compare(one, call, runners[call.part].run(call.feed)) for call in calls]
    except DataError as error:
        raise PackageError(f"does not take its own sample: {error.message}") from error
    if not all(result.passed for result in found):
        raise PackageError(f"wrong on this machine: {parity.worst(found)}")
    return [stretched(call, batch_size) for call in calls]


def _compare(one: Deployed, call: Call, got: Mapping[str, Any]) -> parity.Parity:
    """By the measure that it was proven with; one that never ran yet, by the precision of its graph."""
    part: DeployedPart = one.manifest.parts[call.part]
    if part.parity is not None:
        limits = part.parity.tolerance, part.parity.min_agreement
    else:
        rounded = "fp16" if part.precision == "fp32" and one.manifest.config.get("tf32") else part.precision
        limits = parity.TOLERANCE[rounded], parity.AGREEMENT[rounded]
    return parity.compare_all(
        call.outputs,
        got,
        outputs=part.signature.outputs,
        tolerance=limits[0],
        min_agreement=limits[1],
        source="its sample",
    )


def _serve(one: Deployed, *, why: str) -> Chosen:
    stack, manifest = ExitStack(), one.manifest
    runners = _batched(_opened(one, stack))
    return Chosen(runners, stack, manifest.backend, why, one.given, manifest.task, manifest.facts)


def _opened(source: ModelPackage | Deployed, stack: ExitStack) -> dict[str, Runner]:
    """Its parts; what was opened is closed again where another fails."""
    try:
        return open_parts(source, stack, device=eager.choose_device(eager.Config()))
    except BaseException:
        stack.close()
        raise


def _batched(runners: Mapping[str, Runner]) -> dict[str, Runner]:
    return {part: Batched(runner) for part, runner in runners.items()}


# -- single sources ---------------------------------------------------------------------------------


def _open_artifact(home: Path, *, file: Path | None, backend: str) -> Chosen:
    one = open_deployed(home)
    names = [path.name for path in one.artifacts.values()]
    if file is not None and file.name not in names:
        raise PackageError(f"{file} is not what {home / store.MANIFEST} speaks of: {', '.join(names)}")
    if backend not in ("auto", one.manifest.backend):
        raise UsageError(f"{home} is for {one.manifest.backend}, not for {backend}", hint="leave --backend out")
    return _serve(one, why=f"{one.manifest.backend}: what {home} was built for")


def _open_package(package: ModelPackage, *, file: Path | None = None, backend: str) -> Chosen:
    """A module runs eagerly, a frozen package's graphs on ONNX Runtime."""
    manifest = package.manifest
    if file is not None and file not in package.graphs.values():
        raise PackageError(f"{file} is not part of the package {package.path}")
    own = backend_of(package)
    if backend not in ("auto", own):
        raise UsageError(
            f"the package {package.path} itself runs on {own}, not on {backend}",
            hint=f"bmctl export {package.path} -o RUN, then bmctl infer RUN --backend {backend}",
        )
    stack = ExitStack()
    runners = _batched(_opened(package, stack))
    why = f"{own}: the package {package.path.name} itself"
    return Chosen(runners, stack, own, why, package.given, manifest.task, manifest.facts)


def _open_bare(path: Path, *, backend: str) -> Chosen:
    """An .onnx file of which nothing else is known."""
    name = "onnxruntime" if backend == "auto" else backend
    if name == EAGER or BACKENDS[name].SUFFIX != onnxruntime.SUFFIX:
        raise UsageError(f"an .onnx file does not run on {name}", hint=f"bmctl import {path} -o RUN; bmctl export RUN")
    onnxfile.check_onnx(path)
    stack, module = ExitStack(), BACKENDS[name]
    opened = open_graph(path) if name == "onnxruntime" else module.open(path, config=module.Config())
    runners = _batched({PART: stack.enter_context(opened)})
    return Chosen(runners, stack, name, f"{name}: {path.name} has no manifest beside it")
