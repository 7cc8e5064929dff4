"""What artifacts are judged by: a package's graphs as ONNX files, and recorded calls with the outputs that are right."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from bmctl.core import onnxfile, onnxgraph
from bmctl.core.noise import noise
from bmctl.core.runner import Batched, Runner, batch_axes
from bmctl.engine.artifacts.graph import export_onnx
from bmctl.engine.artifacts.opening import open_model, task_of
from bmctl.engine.artifacts.recording import Call, of_part, recorders
from bmctl.engine.artifacts.reference import open_reference
from bmctl.engine.context import StageContext
from bmctl.engine.loading.data import array_batches, open_split
from bmctl.errors import GateError
from bmctl.inputs import Resolved
from bmctl.package import ModelPackage
from bmctl.restore import load_model
from bmctl.schema import BATCH
from bmctl.tasks import parts_of

NUM_COMPARED = 64
"""Samples whose calls are compared."""


@dataclass(frozen=True)
class Reference:
    """What every backend of one export is given.

    Attributes:
        graphs: Checked ONNX files by part.
        precisions: Of the graphs.
        calls: Recorded on real validation samples, or made of noise where there are no data; with the outputs that
            are right.
        words: What computed them.
    """

    graphs: Mapping[str, Path]
    precisions: Mapping[str, onnxgraph.Precision]
    calls: tuple[Call, ...]
    words: str


def make_reference(context: StageContext, package: ModelPackage, folder: Path) -> Reference:
    """The package's graphs, exported or checked, and reference outputs.

    Args:
        folder: Takes the files of graphs that have to be made.

    Raises:
        GateError: An exported graph computes something else than the module; it is kept beside `folder`.
        UnsupportedError: An operator that the exporter does not have.
    """
    if package.manifest.frozen:
        return _of_graphs(context, package)
    model = load_model(package)
    calls = record(context, package, open_model(model, package.manifest), num_samples=NUM_COMPARED)
    graphs = {}
    for name, part in parts_of(task_of(package.manifest.task), model, package.manifest.parts).items():
        graphs[name] = folder / f"{name}.onnx"
        example = next(of_part(calls, name)).feed
        axes = context.recipe.export.axes
        try:
            said = export_onnx(part.module, signature=part.signature, example=example, out=graphs[name], axes=axes)
        except GateError:
            rejected = folder / f"{name}.onnx.rejected"
            if rejected.exists():
                rejected.replace(folder.parent / rejected.name)
            raise
        for text in said:
            context.emit({"event": "note", "stage": "export", "text": text})
    return Reference(graphs, _precisions(graphs), tuple(calls), "eager")


def _of_graphs(context: StageContext, package: ModelPackage) -> Reference:
    with ExitStack() as stack:
        runners, words = {}, ""
        for part, path in package.graphs.items():
            onnxfile.check_onnx(path)
            opened = open_reference(path, signature=package.manifest.parts[part])
            runners[part], words = stack.enter_context(opened)
        calls = record(context, package, runners, num_samples=NUM_COMPARED)
    return Reference(package.graphs, _precisions(package.graphs), tuple(calls), words)


def _precisions(graphs: Mapping[str, Path]) -> dict[str, onnxgraph.Precision]:
    return {part: onnxgraph.precision_of(path) for part, path in graphs.items()}


# -- calls ------------------------------------------------------------------------------------------


def record(
    context: StageContext, package: ModelPackage, runners: Mapping[str, Runner], *, num_samples: int
) -> list[Call]:
    """The calls that the task makes to predict so many validation samples; of noise where there are none.

    Args:
        runners: Of the package's parts; they compute what the calls give.
        num_samples: In one batch; the samples over again where there are fewer.
    """
    listening, calls = recorders({part: Batched(runner) for part, runner in runners.items()})
    task, given = task_of(package.manifest.task), package.given
    if context.recipe.data is not None and given is not None and task is not None:
        config = task.Config.model_validate(package.manifest.task)
        facts = task.Facts.model_validate(package.manifest.facts)
        batch = validation_batch(context, given, size=num_samples)
        all(True for _ in task.predict(listening, batch, config=config, facts=facts))
        return calls
    context.emit({"event": "note", "stage": "export", "text": "no data: parity is checked on noise of the inputs"})
    for part, runner in runners.items():
        listening[part].run(noise(runner.signature, sizes_for(context, runner, num_samples=num_samples)))
    return calls


def validation_batch(context: StageContext, given: Resolved, *, size: int) -> dict[str, np.ndarray]:
    """The first `size` validation samples as the model takes them, over again where there are fewer."""
    split = open_split(context.recipe, name="val", given=given)
    batch = next(iter(array_batches(split, batch_size=size)))
    return {name: np.take(array, np.arange(size) % len(array), axis=0) for name, array in batch.items()}


def sizes_for(context: StageContext, runner: Runner, *, num_samples: int) -> dict[str, int]:
    """A size for every free axis: as many samples as the runner takes, and what the recipe says is most common."""
    _, (low, high) = batch_axes(runner)
    spans = context.recipe.export.axes
    sizes = {axis: spans[axis].opt if axis in spans else 8 for axis in runner.signature.axes}
    if BATCH in sizes:
        sizes[BATCH] = max(low, num_samples if high is None else min(num_samples, high))
    return sizes
