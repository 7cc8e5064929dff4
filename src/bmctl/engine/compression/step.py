"""One compression step: apply it, recover, evaluate, publish the package."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from bmctl.core.evaluation import Evaluation
from bmctl.engine.artifacts.graph import export_onnx
from bmctl.engine.checkpoints.consolidate import About
from bmctl.engine.context import StageContext
from bmctl.engine.evaluation import appraise, measure
from bmctl.engine.loading.arrays import array_batches
from bmctl.engine.loading.data import data_fingerprint, open_split
from bmctl.engine.parallel import settle
from bmctl.engine.training import train
from bmctl.errors import BmctlError, PackageError, RecipeError
from bmctl.fit import ModuleStepConfig
from bmctl.inputs import InputSpec, Resolved
from bmctl.methods import METHODS, Meta, MethodContext
from bmctl.package import Manifest, ModelPackage, Structure, derive, load_model, open_package, save_package
from bmctl.recipe import recipe_yaml
from bmctl.tasks import TASKS
from bmctl.weights import save_weights

CALIBRATION_BATCH = 64


@dataclass(frozen=True)
class Work:
    """One step under way.

    Attributes:
        step: The Config of one of METHODS.
        stage: Name of its package, such as ``02-ptq``.
        folder: For files on the way; kept when the step fails, as a rejected graph lies there.
        original: The run's first package, the teacher.
    """

    context: StageContext
    step: Any
    stage: str
    key: str
    parent: ModelPackage
    original: ModelPackage
    folder: Path
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Into the manifest, and said now."""
        self.notes.append(text)
        self.context.emit({"event": "note", "stage": self.stage, "text": text})


def run_step(work: Work) -> ModelPackage:
    """Do the step and publish its package; its folder is kept when it fails.

    Raises:
        BmctlError: Whatever the method, training or the disk raises.
    """
    context, stage = work.context, work.stage
    context.emit({"event": "stage", "stage": stage, "text": work.step.method})
    leading(context, lambda: _fresh(work.folder))
    if METHODS[work.step.method].LEVEL == "module":
        _module_step(work)
    else:
        leading(context, lambda: _graph_step(work))
    package = open_package(context.run / "packages" / stage)
    leading(context, lambda: shutil.rmtree(work.folder))
    context.emit({"event": "stage_done", "stage": stage, "package": str(package.path), **package.manifest.metrics})
    return package


def _module_step(work: Work) -> None:
    context, step, preprocess = work.context, work.step, work.parent.manifest.preprocess
    if step.recover is not None and not appraise.has_metric(context, preprocess):
        raise RecipeError(
            f"the step {work.stage} recovers by training, and the recipe has no data or no task",
            hint="add them, or remove `recover` from the step",
        )
    model = load_model(work.parent)
    before = copy.deepcopy(model)
    method_context = _method_context(work)
    meta = METHODS[step.method].apply(model, step, method_context)
    for text in meta.get("notes", ()):
        work.note(text)
    metrics: dict[str, Any] = {}
    if step.recover is not None:
        model, metrics = _recover(work, step, model, meta)
    model.eval()

    def publish() -> None:
        evaluation = _score(work, lambda spec: appraise.score_module(context, model, preprocess=spec))
        numbers = appraise.module_numbers(context, model, before=before, example=method_context.example)
        save_weights(model.cpu(), work.folder / "weights.safetensors")
        size = {"size_bytes": measure.size_bytes(work.folder / "weights.safetensors")}
        manifest = _manifest(work, meta, {**metrics, **_val(evaluation), **numbers, **size})
        _publish(work, manifest, evaluation, backend="eager", model=model)

    leading(context, publish)


def _recover(work: Work, step: ModuleStepConfig, model: nn.Module, meta: Meta) -> tuple[nn.Module, dict[str, Any]]:
    """Fine-tune; returns the model, and what the manifest says of it."""
    context, recover, manifest = work.context, step.recover, work.parent.manifest
    recipe = context.recipe
    assert recover is not None and manifest.preprocess is not None and recipe.task is not None
    right_after = appraise.score_module(context, model, preprocess=manifest.preprocess) if context.group.leads else None
    given = Resolved(manifest.preprocess)
    teacher = load_model(work.original).requires_grad_(False) if recover.teacher == "original" else None
    result = train.fit(
        model,
        fit=recover.fit,
        train=open_split(context.data, name="train", given=given, augment=True),
        val=open_split(context.data, name="val", given=given),
        task=TASKS[recipe.task.kind],
        task_config=recipe.task,
        context=context,
        stage=work.stage,
        seed=recipe.seed,
        teacher=teacher,
        distill=recover.distill if teacher is not None else None,
        inputs_hash=work.key,
        about=_about(work, meta),
    )
    for text in result.notes:
        work.note(text)
    return result.model, {
        "val_before_recover": appraise.metric_of(right_after) if right_after else None,
        "recover": {
            "steps": result.steps,
            "best_step": result.best_step,
            "precision": result.precision,
            "teacher": work.original.hash if teacher is not None else None,
        },
    }


def _about(work: Work, meta: Meta) -> dict[str, Any]:
    """What checkpoints of the recovery say of the model, which went through this step already."""
    manifest, recipe = work.parent.manifest, work.context.recipe
    assert manifest.model is not None and manifest.preprocess is not None and recipe.task is not None
    about = About(
        model=manifest.model,
        preprocess=manifest.preprocess,
        class_names=manifest.class_names,
        task=recipe.task.model_dump(mode="json"),
        data_fingerprint=data_fingerprint(work.context.data),
        history=(*manifest.history, Structure(step=work.step.model_dump(mode="json"), meta=meta)),
        recipe=recipe.model_dump(mode="json"),
    )
    return about.to_json()


def _graph_step(work: Work) -> None:
    context, step, manifest = work.context, work.step, work.parent.manifest
    method_context = _method_context(work)
    if manifest.frozen:
        before = work.parent.graph
    else:
        before = work.folder / "parent.onnx"
        names = {
            "input_name": manifest.inputs[0].name if manifest.inputs else "input",
            "output_name": manifest.outputs[0].name if manifest.outputs else "logits",
        }
        for text in export_onnx(load_model(work.parent), example=method_context.example, out=before, **names):
            work.note(text)
    graph = work.folder / "model.onnx"
    meta = METHODS[step.method].apply(before, step, method_context, out=graph)
    for text in meta.get("notes", ()):
        work.note(text)
    evaluation = _score(work, lambda spec: appraise.score_graph(context, graph, preprocess=spec))
    numbers = appraise.graph_numbers(graph, before=before, example=method_context.example)
    quantizes = METHODS[step.method].FAMILY == "quantize"
    precision = {"precision": meta.get("precision", "int8" if quantizes else "fp32")}
    calibration = meta.get("calibration", manifest.calibration)
    fields = _manifest(work, meta, {**_val(evaluation), **numbers, **precision}, calibration=calibration)
    _publish(work, fields, evaluation, backend="onnxruntime", graph=graph)


def _score(work: Work, score: Callable[[InputSpec], Evaluation]) -> Evaluation | None:
    preprocess = work.parent.manifest.preprocess
    if preprocess is not None and appraise.has_metric(work.context, preprocess):
        return score(preprocess)
    work.note("no task and no data: only size, parameters, MACs and latency are measured")
    return None


def _val(evaluation: Evaluation | None) -> dict[str, Any]:
    return {} if evaluation is None else {"val": appraise.metric_of(evaluation)}


def _manifest(
    work: Work, meta: Meta, metrics: Mapping[str, Any], *, calibration: Mapping[str, Any] | None = None
) -> Manifest:
    return derive(
        work.parent,
        stage=work.step.name or work.step.method,
        key=work.key,
        structure=Structure(step=work.step.model_dump(mode="json"), meta=meta),
        metrics=metrics,
        calibration=calibration,
        notes=work.notes,
    )


def _publish(
    work: Work,
    manifest: Manifest,
    evaluation: Evaluation | None,
    *,
    backend: str,
    model: nn.Module | None = None,
    graph: Path | None = None,
) -> None:
    target = work.context.run / "packages" / work.stage
    package = save_package(
        target, manifest=manifest, recipe_yaml=recipe_yaml(work.context.recipe), model=model, graph=graph
    )
    appraise.file_score(work.context, package, evaluation, backend=backend)


def _fresh(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


# -- what a method may look at ----------------------------------------------------------------------


def _method_context(work: Work) -> MethodContext:
    """Real samples where there are data, else noise of the model's input shape, and a note that says so."""
    recipe, manifest = work.context.recipe, work.parent.manifest
    preprocess = manifest.preprocess
    if recipe.data is None or preprocess is None:
        if not manifest.inputs:
            raise PackageError(f"{work.parent.path} records no inputs, and there are no data to try it on")
        work.note("no data: the step looks at noise of the input's shape")
        shape = [dim if isinstance(dim, int) else 1 for dim in manifest.inputs[0].shape[1:]]
        noise = torch.from_numpy(np.random.default_rng(0).standard_normal((2, *shape), dtype=np.float32))
        return MethodContext(example=noise, calibration=lambda: iter(()), calibration_record={})
    split = open_split(work.context.data, name="calib", given=Resolved(preprocess))
    example = torch.from_numpy(next(iter(array_batches(split, batch_size=2)))["input"])

    def calibration() -> Iterator[np.ndarray]:
        for batch in array_batches(split, batch_size=CALIBRATION_BATCH):
            yield batch["input"]

    record = {
        "source": recipe.data.model_dump(mode="json", include={"source"})["source"],
        "split": recipe.data.calib.split,
        "num_samples": len(split),
        "fingerprint": data_fingerprint(work.context.data),
    }
    return MethodContext(example=example, calibration=calibration, calibration_record=record)


# -- several processes ------------------------------------------------------------------------------


def leading(context: StageContext, act: Callable[[], None]) -> None:
    """Rank 0 acts; its error, if it is the user's, is everyone's."""
    error: BmctlError | None = None
    if context.group.leads:
        try:
            act()
        except BmctlError as caught:
            error = caught
    settle(context.group, error)
