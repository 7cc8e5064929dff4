"""Compression steps in order: apply, recover, evaluate, publish. A finished step is not run again."""

from __future__ import annotations

import hashlib
import json
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bmctl import store
from bmctl.engine.compression.step import Work, leading, run_step
from bmctl.engine.context import StageContext
from bmctl.engine.loading.data import data_fingerprint
from bmctl.engine.parallel import agree
from bmctl.errors import PreemptedError, UnsupportedError, UsageError
from bmctl.methods import METHODS
from bmctl.package import ModelPackage, adopt, list_packages, open_package
from bmctl.processes.signals import interrupted

FORMAT = 1
"""Part of every step's key: raised when a step's results change for the same inputs."""


def run_steps(context: StageContext, *, start: ModelPackage) -> list[ModelPackage]:
    """Run the recipe's compression steps on a package, each to a package of its own under RUN/packages.

    Args:
        start: Of this run, or of another: then it is copied as this run's first package.

    Returns:
        One package per step, those that were finished before included.

    Raises:
        UnsupportedError: A module method on a frozen package; a graph quantized twice; nothing left to prune.
        UsageError: A finished step has other inputs now, and `overwrite` is not given.
        PreemptedError: Asked to stop between two steps.
    """
    first = take_in(context, start)
    original = open_package(list_packages(context.run)[0], verify=False)
    number = int(first.path.name.split("-", 1)[0])
    steps: Sequence[Any] = context.recipe.compress
    _check_chain(steps, first)
    parent, found = first, []
    for offset, step in enumerate(steps, 1):
        stage = f"{number + offset:02d}-{step.name or step.method}"
        key = step_key(context, step, parent=parent)
        package = _finished(context, stage, key)
        if package is None:
            _check_stop(context)
            work = Work(context, step, stage, key, parent, original, context.run / "work" / stage)
            package = run_step(work)
        parent = package
        found.append(package)
    return found


def step_key(context: StageContext, step: Any, *, parent: ModelPackage) -> str:
    """SHA-256 over all that a step's result depends on."""
    recipe = context.recipe
    inputs = {
        "format": FORMAT,
        "parent": parent.hash,
        "step": step.model_dump(mode="json"),
        "seed": recipe.seed,
        "data": data_fingerprint(context.data) if recipe.data is not None else None,
        "calib": recipe.data.calib.model_dump(mode="json") if recipe.data is not None else None,
        "task": recipe.task.model_dump(mode="json") if recipe.task is not None else None,
        "input": recipe.data.input.model_dump(mode="json") if recipe.data is not None else None,
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


# -- what is there already --------------------------------------------------------------------------


def take_in(context: StageContext, start: ModelPackage) -> ModelPackage:
    """`start` itself where it is of this run, else its copy as RUN/packages/00-<stage>."""
    packages = context.run / "packages"
    if start.path.parent.resolve() == packages.resolve():
        return start
    there = list_packages(context.run)
    if there and there[0].name == f"00-{start.manifest.stage}" and store.manifest_hash(there[0]) == start.hash:
        return open_package(there[0])
    if there and not context.overwrite:
        raise UsageError(
            f"{context.run} starts from another package, {there[0].name}, than {start.path}",
            hint="choose another run with -o, or start over with --overwrite",
        )
    leading(context, lambda: _copy(context, start, stale=there))
    return open_package(packages / f"00-{start.manifest.stage}")


def _copy(context: StageContext, start: ModelPackage, *, stale: Sequence[Path]) -> None:
    for path in stale:
        shutil.rmtree(path)
    adopt(start, into=context.run)


def _finished(context: StageContext, stage: str, key: str) -> ModelPackage | None:
    """The package of an earlier run of the same step; what stands in its place is removed with `overwrite` only."""
    number = int(stage.split("-", 1)[0])
    later = [path for path in list_packages(context.run) if int(path.name.split("-", 1)[0]) >= number]
    if not later:
        return None
    if context.overwrite:
        leading(context, lambda: _remove(context, later))
        return None
    if later[0].name == stage:
        package = open_package(later[0])
        if package.manifest.key == key:
            context.emit(
                {"event": "skip", "stage": stage, "text": "finished before, with the same inputs: not run again"}
            )
            return package
    raise UsageError(
        f"{later[0]} is finished, and the step {stage} of the recipe has other inputs than it had",
        hint="redo it and what follows with --overwrite, or choose another run with -o",
    )


def _remove(context: StageContext, paths: Sequence[Path]) -> None:
    for path in paths:
        shutil.rmtree(path)
        shutil.rmtree(context.run / "checkpoints" / path.name, ignore_errors=True)


def _check_chain(steps: Sequence[Any], start: ModelPackage) -> None:
    """Refuse a chain before any of it is run."""
    quantizers = {name for name, method in METHODS.items() if method.QUANTIZES}
    quantized = any(structure.step.get("method") in quantizers for structure in start.manifest.history)
    frozen, way_out = "", ""
    if start.manifest.frozen:
        frozen = f"{start.path.name} holds a graph, not weights"
        parent = f"its parent, package {start.manifest.parent[:12]}" if start.manifest.parent else "the trained model"
        way_out = f"start from {parent}"
    for step in steps:
        name, method = step.name or step.method, METHODS[step.method]
        if method.LEVEL == "module" and frozen:
            raise UnsupportedError(f"the step {name} changes a module, and {frozen}", hint=way_out)
        if method.QUANTIZES and quantized:
            raise UnsupportedError(
                f"the step {name} cannot be done: the model is already quantized",
                hint="remove one of the two steps, or start from the package before the first",
            )
        if method.LEVEL == "graph" and not frozen:
            frozen, way_out = f"the step {name} before it leaves a graph", f"move it before {name}"
        quantized = quantized or method.QUANTIZES


def _check_stop(context: StageContext) -> None:
    """Between two steps everything is published: all processes stop there when any was asked to."""
    if not agree(context.group, context.stop.requested is not None):
        return
    if context.stop.requested == signal.SIGINT:
        raise interrupted(signal.SIGINT, "stopped between two compression steps; run the same command again")
    raise PreemptedError(
        "stopped between two compression steps, all finished ones kept", hint="run the same command again"
    )
