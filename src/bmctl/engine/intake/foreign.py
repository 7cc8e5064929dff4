"""A foreign ONNX file as a frozen package: checked, its inputs and outputs read from the graph, evaluated on data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bmctl.core import onnxfile, onnxgraph
from bmctl.engine.artifacts.samples import read_sample
from bmctl.engine.context import StageContext
from bmctl.engine.evaluation import appraise, measure
from bmctl.engine.intake.publishing import STAGE, check_data, numbered, publish
from bmctl.engine.intake.trial import Settled, settle
from bmctl.errors import DataError
from bmctl.inputs import InputSpec
from bmctl.package import Manifest, ModelPackage
from bmctl.schema import BATCH, TensorSpec


def import_graph(context: StageContext, path: Path, *, key: str, target: Path) -> ModelPackage:
    """Publish an .onnx as it is, byte for byte.

    Args:
        context: With data in its recipe, the graph must take one image and give one row of class scores.
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
    inputs, outputs = settled.signature.inputs, settled.signature.outputs
    preprocess = _preprocess(context, inputs, outputs, path=path)
    if _last(outputs):
        outputs = tuple(spec.model_copy(update={"role": "scores"}) for spec in outputs)
    class_names, recorded = check_data(context, numbered(_last(outputs)), preprocess=preprocess, source=str(path))
    notes = [f"imported from {path}", *_notes(inputs), *settled.notes]
    if preprocess is None:
        notes.append("no task and no data: only parity, latency and size are measured")
    metrics: dict[str, Any] = {
        "num_params": measure.graph_num_params(path),
        "macs": measure.graph_macs(path),
        "precision": onnxgraph.precision_of(path),
    }
    evaluation = None
    if preprocess is not None and appraise.has_metric(context, preprocess):
        evaluation = appraise.score_graph(context, path, preprocess=preprocess)
        metrics["val"] = appraise.metric_of(evaluation)
    manifest = Manifest(
        stage=STAGE,
        key=key,
        inputs=inputs,
        outputs=outputs,
        axes=settled.axes,
        preprocess=preprocess,
        class_names=class_names,
        metrics=metrics,
        notes=tuple(notes),
        **recorded,
    )
    return publish(context, manifest, evaluation, target=target, graph=path, graph_data=onnxgraph.data_files(path))


def _settled(context: StageContext, path: Path) -> Settled:
    """What the file says of its axes where the recipe has data that it must fit, else what was found by trying them."""
    if context.recipe.data is not None:
        return Settled(onnxgraph.read_signature(path), {}, "small")
    asked = context.recipe.export
    sample = read_sample(Path(asked.sample), signature=onnxgraph.read_signature(path)) if asked.sample else None
    return settle(path, axes=asked.axes, sample=sample)


def _notes(inputs: tuple[TensorSpec, ...]) -> list[str]:
    if any(BATCH in spec.shape for spec in inputs):
        return ["the graph's batch is free"]
    fixed = [f"{spec.name}: {spec.shape[0]}" for spec in inputs if spec.shape and isinstance(spec.shape[0], int)]
    return [f"the graph's batch is fixed ({', '.join(fixed)})"] if fixed else []


def _last(outputs: tuple[TensorSpec, ...]) -> int:
    """The number of classes where the graph gives one row of scores per sample, else 0."""
    shape = outputs[0].shape if len(outputs) == 1 and outputs[0].dtype.startswith("float") else ()
    return shape[1] if len(shape) == 2 and isinstance(shape[1], int) else 0


def _preprocess(
    context: StageContext, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], *, path: Path
) -> InputSpec | None:
    """From the recipe's data, at the size and channels of the graph; None without data."""
    data = context.recipe.data
    if data is None:
        return None
    from bmctl.engine.loading.data import resolve_input

    shape = inputs[0].shape if len(inputs) == 1 else ()
    if (
        len(shape) != 4
        or inputs[0].dtype != "float32"
        or (isinstance(shape[1], int) and shape[1] not in (1, 3))
        or not _last(outputs)
    ):
        raise DataError(
            f"{path} does not take one float32 [N, C, H, W] and give one [N, classes], as the recipe's images need; "
            f"it has inputs {[list(spec.shape) for spec in inputs]} and outputs {[list(s.shape) for s in outputs]}",
            hint="import it without data: only parity, latency and size are measured then",
        )
    asked = data.input
    known = {
        "channels": asked.channels or (shape[1] if isinstance(shape[1], int) else None),
        "size": asked.size or (shape[2:] if all(isinstance(size, int) for size in shape[2:]) else None),
    }
    found: InputSpec = resolve_input(context.data, asked=asked.model_copy(update=known)).spec
    wanted = (found.channels, *found.size)
    if any(isinstance(own, int) and own != got for own, got in zip(shape[1:], wanted, strict=True)):
        raise DataError(
            f"{path} takes [C, H, W] = {list(shape[1:])}; the recipe's input is {list(wanted)}",
            hint="leave data.input.size and channels out of the recipe",
        )
    return found
