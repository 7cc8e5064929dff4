"""The stage `train`: from a recipe to the run's first package."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from bmctl.engine import effects
from bmctl.engine.checkpoints.consolidate import About
from bmctl.engine.context import StageContext
from bmctl.engine.evaluation import appraise
from bmctl.engine.loading.data import Split, array_batches, data_fingerprint, open_split
from bmctl.engine.loading.leaks import check_leaks
from bmctl.engine.loading.preprocess import resolve_preprocess
from bmctl.engine.parallel import settle
from bmctl.engine.training.identity import training_key
from bmctl.engine.training.train import FitResult, fit
from bmctl.errors import BmctlError, DataError, RecipeError, UsageError
from bmctl.models import ModelConfig, ModelSpec, build, input_defaults, resolve, spec_args
from bmctl.package import Manifest, ModelPackage, derive, load_model, open_package, save_package
from bmctl.recipe import Recipe, recipe_yaml
from bmctl.schema import BATCH, TensorSpec
from bmctl.tasks import TASKS

STAGE = "train"


def train_stage(context: StageContext, *, start: ModelPackage | None = None) -> ModelPackage | None:
    """Train the recipe's model and publish it as RUN/packages/00-train, unless that is done already.

    Args:
        start: A package of this run to train further instead; the result is published after it, as NN-train, with
            its structure: what was pruned stays pruned.

    Returns:
        The package; None on all ranks but the first.

    Raises:
        UsageError: The package there is of another recipe or other data, and `overwrite` is not given.
        UnsupportedError: `start` is frozen.
        BmctlError: What `fit` raises.
    """
    recipe = context.recipe
    if recipe.train is None or recipe.model is None or recipe.task is None or recipe.data is None:
        missing = [name for name in ("model", "data", "task", "train") if getattr(recipe, name) is None]
        raise RecipeError(f"recipe {recipe.name!r} cannot be trained: it has no {' and no '.join(missing)} section")
    number = int(start.path.name.split("-", 1)[0]) + 1 if start else 0
    stage = f"{number:02d}-{STAGE}" if start else STAGE
    target = context.run / "packages" / f"{number:02d}-{STAGE}"
    key = training_key(recipe, data_fingerprint=data_fingerprint(recipe), start=start.hash if start else None)
    done = _done(context, target, key=key)
    if done is not None:
        return done if context.group.leads else None
    preprocess = start.manifest.preprocess if start and start.manifest.preprocess else resolve_preprocess(recipe)
    train = open_split(recipe, name="train", preprocess=preprocess, augment=True)
    val = open_split(recipe, name="val", preprocess=preprocess)
    model, spec, said = _load(start, train) if start else _build(recipe, train)
    notes = (*check_leaks(recipe), *said)
    for text in notes if context.group.leads else ():
        context.emit({"event": "note", "stage": stage, "text": text})
    result = fit(
        model,
        fit=recipe.train,
        train=train,
        val=val,
        task=TASKS[recipe.task.kind],
        task_config=recipe.task,
        context=context,
        stage=stage,
        seed=recipe.seed,
        inputs_hash=start.hash if start else "",
        about=About(
            model=spec,
            preprocess=preprocess,
            class_names=train.class_names,
            task=recipe.task.model_dump(mode="json"),
            data_fingerprint=data_fingerprint(recipe),
            history=start.manifest.history if start else (),
            recipe=recipe.model_dump(mode="json"),
        ).to_json(),
    )
    error, package = None, None
    context.beat(result.steps, "finishing")
    if context.group.leads:
        try:
            package = _publish(context, result, start=start, spec=spec, val=val, target=target, key=key, notes=notes)
        except BmctlError as failed:
            error = failed
    settle(context.group, error)
    return package


def _build(recipe: Recipe, train: Split) -> tuple[nn.Module, ModelSpec, tuple[str, ...]]:
    """The recipe's model, how to build it again, and what is to be said of it."""
    assert recipe.model is not None
    spec = resolve(
        ModelSpec(
            name=recipe.model.name,
            args=spec_args(recipe.model),
            num_classes=len(train.class_names),
            channels=train.preprocess.channels,
            size=train.preprocess.size,
        )
    )
    effects.seed_all(recipe.seed, stage="build")
    model = build(spec, pretrained=recipe.model.pretrained)
    return model, spec, _new_head(recipe.model, num_classes=spec.num_classes)


def _load(start: ModelPackage, train: Split) -> tuple[nn.Module, ModelSpec, tuple[str, ...]]:
    """The package's model, of which the data must know as many classes."""
    model, spec = load_model(start), start.manifest.model
    assert spec is not None
    if spec.num_classes != len(train.class_names):
        raise DataError(
            f"{start.path} tells {spec.num_classes} classes apart, the training data have {len(train.class_names)}",
            hint="train the recipe's own model, whose last layer fits: bmctl train --recipe RECIPE",
        )
    return model, spec, ()


def _new_head(config: ModelConfig, *, num_classes: int) -> tuple[str, ...]:
    """What is to be said when published weights do not bring the last layer."""
    published = input_defaults(config).num_classes if config.pretrained else None
    if published in (None, num_classes):
        return ()
    return (f"{config.name}: its last layer tells {published} classes apart, a new one is trained for {num_classes}",)


def _done(context: StageContext, target: Path, *, key: str) -> ModelPackage | None:
    if not target.exists() or context.overwrite:
        return None
    package = open_package(target)
    if package.manifest.key != key:
        raise UsageError(
            f"{target} was trained with another recipe or on other data",
            hint="train into another run with -o RUN, or add --overwrite to redo it",
        )
    if context.group.leads:
        if context.profile:
            text = "--profile: nothing was trained, so nothing is traced; add --overwrite"
            context.emit({"event": "note", "stage": STAGE, "text": text})
        context.emit({"event": "skip", "stage": STAGE, "text": f"{target} is there, of the same recipe and data"})
    return package


def _publish(
    context: StageContext,
    result: FitResult,
    *,
    start: ModelPackage | None,
    spec: ModelSpec,
    val: Split,
    target: Path,
    key: str,
    notes: tuple[str, ...],
) -> ModelPackage:
    model, evaluation, preprocess, recipe = result.model, result.val, val.preprocess, context.recipe
    assert evaluation is not None and recipe.task is not None
    example = torch.from_numpy(next(array_batches(val, batch_size=2))[0])
    numbers = appraise.module_numbers(context, model, before=None, example=example)
    metrics = {
        "val": appraise.metric_of(evaluation),
        "train": {
            "steps": result.steps,
            "best_step": result.best_step,
            "precision": result.precision,
            "batch_size": result.batch_size,
        },
        **numbers,
    }
    all_notes = (*notes, *result.notes)
    fresh = Manifest(
        stage=STAGE,
        key=key,
        model=spec,
        inputs=val.specs,
        outputs=(TensorSpec(name="logits", shape=(BATCH, spec.num_classes), dtype="float32", meaning="class scores"),),
        preprocess=preprocess,
        class_names=val.class_names,
        task=recipe.task.model_dump(mode="json"),
        metrics=metrics,
        data_fingerprint=data_fingerprint(recipe),
        notes=all_notes,
    )
    if start:
        further = derive(start, stage=STAGE, key=key, metrics=metrics, notes=all_notes)
        fresh = further.model_copy(update={"task": fresh.task, "data_fingerprint": fresh.data_fingerprint})
    package = save_package(
        target, manifest=fresh, recipe_yaml=recipe_yaml(recipe), model=model, overwrite=context.overwrite
    )
    appraise.file_score(context, package, evaluation, backend="eager")
    context.emit({"event": "stage_done", "stage": STAGE, "package": str(target), **package.manifest.metrics})
    return package
