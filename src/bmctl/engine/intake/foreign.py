"""A foreign ONNX file as a frozen package: checked, its inputs and outputs read from the graph, evaluated on data."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from bmctl.core import onnxfile, onnxgraph
from bmctl.core.runner import shown
from bmctl.engine.artifacts.samples import read_sample
from bmctl.engine.context import StageContext
from bmctl.engine.evaluation import appraise, measure
from bmctl.engine.intake.publishing import STAGE, publish, recorded
from bmctl.engine.intake.trial import Settled, settle
from bmctl.engine.loading.data import open_split, resolve_input
from bmctl.errors import DataError
from bmctl.inputs import INPUTS, Resolved, specs
from bmctl.package import PART, GraphFile, Manifest, ModelPackage
from bmctl.schema import BATCH, Signature, TensorSpec
from bmctl.tasks import TASKS


def import_graph(context: StageContext, path: Path, *, key: str, target: Path) -> ModelPackage:
    """Publish an .onnx as it is, byte for byte.

    Args:
        context: With data in its recipe, the graph must take what the input makes, and give what the task needs.
        path: The file; its external data lies beside it.
        key: Of the stage.
        target: RUN/packages/00-import.

    Raises:
        PackageError: Malformed, or its external data is not what and where it should be.
        UnsupportedError: Its inputs and outputs are not tensors of known types.
        DataError: It does not fit the recipe's data.
    """
    onnxfile.check_onnx(path)
    settled = _settled(context, path)
    given = _input(context, settled.signature, path=path)
    notes = [f"imported from {path}", *_notes(settled.signature.inputs), *settled.notes]
    metrics: dict[str, Any] = {
        "num_params": measure.graph_num_params(path),
        "macs": measure.graph_macs(path),
        "precision": onnxgraph.precision_of(path),
    }
    known: dict[str, Any] = {"parts": {PART: _with_scores(settled.signature)}}
    if given is None:
        notes.append("no task and no data: only parity, latency and size are measured")
    else:
        signature, facts = _held_against_data(context, settled.signature, given, path=path)
        known = {"parts": {PART: signature}, "input": given.spec, "facts": facts, **recorded(context)}
    manifest = Manifest(stage=STAGE, key=key, axes=settled.axes, notes=tuple(notes), **known)
    evaluation = None
    if given is not None:
        evaluation = appraise.score_graphs(context, {PART: path}, manifest, given)
        metrics["val"] = appraise.metric_of(evaluation)
    manifest = manifest.model_copy(update={"metrics": metrics})
    graphs = {PART: GraphFile(path, onnxgraph.data_files(path))}
    return publish(context, manifest, evaluation, target=target, graphs=graphs, files=given.files if given else None)


def _settled(context: StageContext, path: Path) -> Settled:
    """What the file says of its axes where the recipe has data that it must fit, else what was found by trying them."""
    if context.recipe.data is not None:
        return Settled(onnxgraph.read_signature(path), {}, "small")
    asked = context.recipe.export
    sample = read_sample(Path(asked.sample), signature=onnxgraph.read_signature(path)) if asked.sample else None
    return settle(path, axes=asked.axes, sample=sample, check=partial(context.stop.check, "the import"))


def _notes(inputs: tuple[TensorSpec, ...]) -> list[str]:
    if any(BATCH in spec.shape for spec in inputs):
        return ["the graph's batch is free"]
    fixed = [f"{spec.name}: {spec.shape[0]}" for spec in inputs if spec.shape and isinstance(spec.shape[0], int)]
    return [f"the graph's batch is fixed ({', '.join(fixed)})"] if fixed else []


def _with_scores(signature: Signature) -> Signature:
    """A row of numbers per sample, and nothing else, is taken for scores: their largest is compared as well."""
    outputs = signature.outputs
    is_row = len(outputs) == 1 and outputs[0].dtype.startswith("float") and len(outputs[0].shape) == 2
    if not is_row or not isinstance(outputs[0].shape[1], int):
        return signature
    return signature.model_copy(update={"outputs": (outputs[0].model_copy(update={"role": "scores"}),)})


def _input(context: StageContext, signature: Signature, *, path: Path) -> Resolved | None:
    """How the recipe's samples become what the graph takes; None without data.

    Raises:
        DataError: They do not.
    """
    if context.recipe.data is None:
        return None
    asked = INPUTS[context.data.section.input.kind].fitted(context.data.section.input, signature.inputs)
    given = resolve_input(context.data, asked=asked)
    if not _fits(specs(given), signature.inputs):
        wanted, got = _words(specs(given)), _words(signature.inputs)
        raise DataError(
            f"{path} takes {got}; the recipe's input gives {wanted}",
            hint="import it without data: only parity, latency and size are measured then",
        )
    return given


def _held_against_data(
    context: StageContext, signature: Signature, given: Resolved, *, path: Path
) -> tuple[Signature, dict[str, Any]]:
    """The graph's signature with the roles that the task knows, and the task's facts.

    Raises:
        DataError: The graph gives something else than the task needs.
    """
    split = open_split(context.data, name="val", given=given)
    task: Any = TASKS[split.task.kind]
    wanted = task.signatures(specs(given), split.facts)
    if list(wanted) != [PART] or not _fits(wanted[PART].outputs, signature.outputs):
        needs = "; ".join(f"{part}: {_words(each.outputs)}" for part, each in wanted.items())
        raise DataError(
            f"{path} gives {_words(signature.outputs)}; the task {split.task.kind!r} on these data needs {needs}",
            hint="import it without data: only parity, latency and size are measured then",
        )
    outputs = tuple(
        own.model_copy(update={"role": want.role, "meaning": want.meaning})
        for own, want in zip(signature.outputs, wanted[PART].outputs, strict=True)
    )
    return signature.model_copy(update={"outputs": outputs}), split.facts.model_dump(mode="json")


def _fits(wanted: Sequence[TensorSpec], found: Sequence[TensorSpec]) -> bool:
    """By position: names are the graph's own affair."""
    if len(wanted) != len(found):
        return False
    for want, got in zip(wanted, found, strict=True):
        if want.dtype != got.dtype or len(want.shape) != len(got.shape):
            return False
        sizes = zip(want.shape[1:], got.shape[1:], strict=True)
        if any(isinstance(a, int) and isinstance(b, int) and a != b for a, b in sizes):
            return False
    return True


def _words(found: Sequence[TensorSpec]) -> str:
    return ", ".join(f"{spec.name!r} {spec.dtype} {shown(spec)}" for spec in found)
