"""The stage `train`: from a recipe to the run's first package."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from bmctl import inputs
from bmctl.engine import randomness
from bmctl.engine.checkpoints.consolidate import About
from bmctl.engine.context import StageContext
from bmctl.engine.evaluation import appraise
from bmctl.engine.loading.arrays import array_batches
from bmctl.engine.loading.data import data_fingerprint, open_split, resolve_input
from bmctl.engine.loading.leaks import check_leaks
from bmctl.engine.loading.split import Split
from bmctl.engine.parallel import settle
from bmctl.engine.training.train import FitResult, fit, training_key
from bmctl.errors import BmctlError, DataError, RecipeError, UsageError
from bmctl.inputs import Resolved
from bmctl.models import ModelConfig, ModelSpec, build, published, resolve, spec_args
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
    key = training_key(recipe, data_fingerprint=data_fingerprint(context.data), start=start.hash if start else None)
    done = _done(context, target, key=key)
    if done is not None:
        return done if context.group.leads else None
    told = start.manifest.preprocess if start else None
    given = Resolved(told) if told is not None else resolve_input(context.data)
    train = open_split(context.data, name="train", given=given, augment=True)
    val = open_split(context.data, name="val", given=given)
    model, spec, said = _load(start, train) if start else _build(recipe, train)
    notes = (*check_leaks(context.data), *said)
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
            preprocess=given.spec,
            class_names=train.facts.class_names,
            task=recipe.task.model_dump(mode="json"),
            data_fingerprint=data_fingerprint(context.data),
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
    assert recipe.model is not None and recipe.task is not None
    spec = resolve(
        ModelSpec(
            name=recipe.model.name,
            args=spec_args(recipe.model),
            given=train.specs,
            told={**inputs.told(train.given), **TASKS[recipe.task.kind].told(train.facts)},
        )
    )
    randomness.seed_all(recipe.seed, stage="build")
    model = build(spec, pretrained=recipe.model.pretrained)
    return model, spec, _new_head(recipe.model, num_classes=len(train.facts.class_names))


def _load(start: ModelPackage, train: Split) -> tuple[nn.Module, ModelSpec, tuple[str, ...]]:
    """The package's model, of which the data must know as many classes."""
    model, spec = load_model(start), start.manifest.model
    assert spec is not None
    known, found = spec.told["num_classes"], len(train.facts.class_names)
    if known != found:
        raise DataError(
            f"{start.path} tells {known} classes apart, the training data have {found}",
            hint="train the recipe's own model, whose last layer fits: bmctl train --recipe RECIPE",
        )
    return model, spec, ()


def _new_head(config: ModelConfig, *, num_classes: int) -> tuple[str, ...]:
    """What is to be said when published weights do not bring the last layer."""
    known = published(config) if config.pretrained else None
    if known is None or known.num_classes == num_classes:
        return ()
    if known.num_classes is None:
        return (f"{config.name}: it brings no classifier, one is trained for {num_classes} classes",)
    told = f"its last layer tells {known.num_classes} classes apart"
    return (f"{config.name}: {told}, a new one is trained for {num_classes}",)


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
    model, evaluation, preprocess, recipe = result.model, result.val, val.given.spec, context.recipe
    assert evaluation is not None and recipe.task is not None
    example = torch.from_numpy(next(array_batches(val, batch_size=2))["input"])
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
        outputs=(
            TensorSpec(
                name="logits", shape=(BATCH, len(val.facts.class_names)), dtype="float32", meaning="class scores"
            ),
        ),
        preprocess=preprocess,
        class_names=val.facts.class_names,
        task=recipe.task.model_dump(mode="json"),
        metrics=metrics,
        data_fingerprint=data_fingerprint(context.data),
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
