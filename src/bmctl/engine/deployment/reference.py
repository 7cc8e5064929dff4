"""What artifacts are judged by: a package's graphs as ONNX files, and recorded calls with what is right."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from bmctl.core import onnxfile, onnxgraph
from bmctl.core.runner import Runner
from bmctl.engine.artifacts.graph import export_onnx
from bmctl.engine.artifacts.graphrunner import open_reference
from bmctl.engine.artifacts.opening import open_model, task_of
from bmctl.engine.artifacts.recording import Call, example_of
from bmctl.engine.context import StageContext
from bmctl.engine.evaluation import feeds
from bmctl.errors import GateError
from bmctl.package import ModelPackage
from bmctl.restore import load_model
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
    calls = _calls(context, package, open_model(model, package.manifest))
    graphs = {}
    for name, part in parts_of(task_of(package.manifest.task), model, package.manifest.parts).items():
        context.stop.check("export")
        graphs[name] = folder / f"{name}.onnx"
        example = example_of(calls, name).feed
        axes = feeds.axes_of(context, package.manifest, part.signature)
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
        calls = _calls(context, package, runners)
    return Reference(package.graphs, _precisions(package.graphs), tuple(calls), words)


def _precisions(graphs: Mapping[str, Path]) -> dict[str, onnxgraph.Precision]:
    return {part: onnxgraph.precision_of(path) for part, path in graphs.items()}


def _calls(context: StageContext, package: ModelPackage, runners: Mapping[str, Runner]) -> list[Call]:
    if not feeds.has_samples(context, package):
        what = context.recipe.export.sample or "noise made from the signature: there are no data"
        text = f"parity is checked on {what}"
        context.emit({"event": "note", "stage": "export", "text": text})
    return feeds.validation_calls(context, package, runners, num_samples=NUM_COMPARED)
