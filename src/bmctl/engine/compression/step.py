"""One compression step: apply it, recover, evaluate, publish the package."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bmctl.core.evaluation import Evaluation
from bmctl.core.runner import Runner
from bmctl.engine.artifacts.graph import export_onnx
from bmctl.engine.artifacts.opening import open_model, open_parts, task_of
from bmctl.engine.artifacts.recording import example_of, of_part
from bmctl.engine.checkpoints.consolidate import About
from bmctl.engine.context import StageContext
from bmctl.engine.evaluation import appraise, feeds, measure
from bmctl.engine.loading.data import data_fingerprint, open_split
from bmctl.engine.parallel import settle
from bmctl.engine.training import train
from bmctl.errors import BmctlError, RecipeError
from bmctl.fit import ModuleStepConfig
from bmctl.inputs import Resolved
from bmctl.methods import METHODS, Meta, MethodContext
from bmctl.package import PART, GraphFile, Manifest, ModelPackage, Structure, derive, open_package, save_package
from bmctl.recipe import recipe_yaml
from bmctl.restore import load_model
from bmctl.tasks import TASKS, parts_of
from bmctl.weights import save_weights


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

    def check(self) -> None:
        """A border: nothing of the step is published yet."""
        self.context.stop.check(f"the step {self.stage}")


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
    context, step, manifest, given = work.context, work.step, work.parent.manifest, work.parent.given
    if step.recover is not None and not appraise.has_metric(context, given):
        raise RecipeError(
            f"the step {work.stage} recovers by training, and the recipe has no data or no task",
            hint="add them, or remove `recover` from the step",
        )
    model = load_model(work.parent)
    before = copy.deepcopy(model)
    example = _example(work)
    look = MethodContext(example, lambda: iter(()), {}, check=work.check)
    meta = METHODS[step.method].apply(model, step, look)
    for text in meta.get("notes", ()):
        work.note(text)
    metrics: dict[str, Any] = {}
    if step.recover is not None:
        model, metrics = _recover(work, step, model, meta)
    if hasattr(METHODS[step.method], "finish"):
        meta = METHODS[step.method].finish(model, step, meta)
    model.eval()

    def publish() -> None:
        evaluation = _score(work, lambda given: appraise.score_module(context, model, manifest, given))
        numbers = appraise.module_numbers(context, model, before=before, example=example)
        save_weights(model.cpu(), work.folder / "weights.safetensors")
        size = {"size_bytes": measure.size_bytes(work.folder / "weights.safetensors")}
        fields = _manifest(work, meta, {**metrics, **_val(evaluation), **numbers, **size})
        _publish(work, fields, evaluation, backend="eager", model=model)

    leading(context, publish)


def _recover(work: Work, step: ModuleStepConfig, model: nn.Module, meta: Meta) -> tuple[nn.Module, dict[str, Any]]:
    """Fine-tune; returns the model, and what the manifest says of it."""
    context, recover, manifest, given = work.context, step.recover, work.parent.manifest, work.parent.given
    recipe = context.recipe
    assert recover is not None and given is not None and recipe.task is not None
    right_after = appraise.score_module(context, model, manifest, given) if context.group.leads else None
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
    given = work.parent.given
    assert manifest.model is not None and given is not None and recipe.task is not None
    about = About(
        model=manifest.model,
        parts=manifest.parts,
        input=given.spec,
        files={name: content.decode() for name, content in given.files.items()},
        facts=manifest.facts,
        task=recipe.task.model_dump(mode="json"),
        data_fingerprint=data_fingerprint(work.context.data),
        history=(*manifest.history, Structure(step=work.step.model_dump(mode="json"), meta=meta)),
        recipe=recipe.model_dump(mode="json"),
    )
    return about.to_json()


def _graph_step(work: Work) -> None:
    """The method on every graph of the model, each with what it is fed on calibration samples."""
    context, step, manifest = work.context, work.step, work.parent.manifest
    method = METHODS[step.method]
    with ExitStack() as stack:
        runners, before = _parent_graphs(work, stack)
        graphs, metas = {}, {}
        for part, path in before.items():
            graphs[part] = work.folder / f"{part}.onnx"
            metas[part] = method.apply(path, step, _look(work, runners, part), out=graphs[part])
            for text in metas[part].get("notes", ()):
                work.note(text)
        example = feeds.example_calls(context, work.parent, runners)
    meta = metas[PART] if list(metas) == [PART] else {"parts": metas}
    evaluation = _score(work, lambda given: appraise.score_graphs(context, graphs, manifest, given))
    numbers = appraise.graph_numbers(context, graphs, before=before, calls=example, manifest=manifest)
    first = next(iter(metas.values()))
    precision = {"precision": first["precision"]}
    calibration = first.get("calibration", manifest.calibration)
    fields = _manifest(work, meta, {**_val(evaluation), **numbers, **precision}, calibration=calibration)
    files = {part: GraphFile(path) for part, path in graphs.items()}
    _publish(work, fields, evaluation, backend="onnxruntime", graphs=files)


def _parent_graphs(work: Work, stack: ExitStack) -> tuple[dict[str, Runner], dict[str, Path]]:
    """The parent as runners and as ONNX files, made where it is a module."""
    parent, manifest = work.parent, work.parent.manifest
    if manifest.frozen:
        return open_parts(parent, stack), parent.graphs
    model = load_model(parent)
    runners, files = open_model(model, manifest), {}
    calls = feeds.example_calls(work.context, parent, runners)
    for name, part in parts_of(task_of(manifest.task), model, manifest.parts).items():
        files[name] = work.folder / f"{name}-parent.onnx"
        example = example_of(calls, name).feed
        axes = feeds.axes_of(work.context, manifest, part.signature)
        for text in export_onnx(part.module, signature=part.signature, example=example, out=files[name], axes=axes):
            work.note(text)
    return runners, files


def _look(work: Work, runners: Mapping[str, Runner], part: str) -> MethodContext:
    """What a method may look at for one graph: what it is fed on real samples, or noise, and a note that says so."""
    context, parent = work.context, work.parent
    calls = feeds.example_calls(context, parent, runners)
    example = {name: torch.from_numpy(array) for name, array in next(of_part(calls, part)).feed.items()}
    if not feeds.has_samples(context, parent):
        work.note("no data: the step looks at noise of the inputs' shapes")
        return MethodContext(example, lambda: iter(()), {}, check=work.check)
    return MethodContext(
        example=example,
        calibration=lambda: (call.feed for call in feeds.calibration_calls(context, parent, runners, part=part)),
        calibration_record=feeds.calibration_record(context, parent),
        check=work.check,
    )


def _score(work: Work, score: Callable[[Resolved], Evaluation]) -> Evaluation | None:
    given = work.parent.given
    if given is not None and appraise.has_metric(work.context, given):
        return score(given)
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
    graphs: Mapping[str, GraphFile] | None = None,
) -> None:
    target = work.context.run / "packages" / work.stage
    given = work.parent.given
    package = save_package(
        target,
        manifest=manifest,
        recipe_yaml=recipe_yaml(work.context.recipe),
        model=model,
        graphs=graphs,
        files=given.files if given is not None else None,
    )
    appraise.file_score(work.context, package, evaluation, backend=backend)


def _fresh(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _example(work: Work) -> dict[str, torch.Tensor]:
    """Two real samples as the model takes them, or noise, and a note that says so."""
    if not feeds.has_samples(work.context, work.parent):
        work.note("no data: the step looks at noise of the inputs' shapes")
    return feeds.example_fields(work.context, work.parent)


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
