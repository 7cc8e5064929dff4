"""The stage `train`: from a recipe to the run's first package."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from bmctl.engine import effects
from bmctl.engine.checkpoints.consolidate import About
from bmctl.engine.context import StageContext
from bmctl.engine.evaluation import appraise
from bmctl.engine.loading.arrays import array_batches
from bmctl.engine.loading.data import data_fingerprint, open_split, resolve_input
from bmctl.engine.loading.leaks import check_leaks
from bmctl.engine.loading.split import Split
from bmctl.engine.modelspec import model_spec, signatures
from bmctl.engine.parallel import settle
from bmctl.engine.training.identity import training_key
from bmctl.engine.training.train import FitResult, fit
from bmctl.errors import BmctlError, DataError, RecipeError, UsageError
from bmctl.models import ModelConfig, ModelSpec, build, published
from bmctl.package import Manifest, ModelPackage, derive, open_package, save_package
from bmctl.recipe import recipe_yaml
from bmctl.restore import load_model
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
    data = context.data
    key = training_key(recipe, data_fingerprint=data_fingerprint(data), start=start.hash if start else None)
    done = _done(context, target, key=key)
    if done is not None:
        return done if context.group.leads else None
    given = start.given if start and start.given else resolve_input(data)
    train = open_split(data, name="train", given=given, augment=True)
    val = open_split(data, name="val", given=given)
    model, about, said = _load(context, start, train) if start else _build(context, train)
    notes = (*check_leaks(data), *said)
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
        about=about.to_json(),
    )
    error, package = None, None
    context.beat(result.steps, "finishing")
    if context.group.leads:
        try:
            package = _publish(context, result, about, start=start, val=val, target=target, key=key, notes=notes)
        except BmctlError as failed:
            error = failed
    settle(context.group, error)
    return package


def _build(context: StageContext, train: Split) -> tuple[nn.Module, About, tuple[str, ...]]:
    """The recipe's model, how to build it again, and what is to be said of it."""
    recipe = context.recipe
    assert recipe.model is not None
    spec = model_spec(recipe.model, given=train.given, task=train.task, facts=train.facts)
    effects.seed_all(recipe.seed, stage="build")
    model = build(spec, pretrained=recipe.model.pretrained)
    return model, _about(context, spec, model, train), _new_head(recipe.model, spec)


def _load(context: StageContext, start: ModelPackage, train: Split) -> tuple[nn.Module, About, tuple[str, ...]]:
    """The package's model, for which the data must tell the same."""
    spec = start.manifest.model
    model = load_model(start)
    assert spec is not None and train.task is not None
    told = TASKS[train.task.kind].told(train.facts)
    for name, found in told.items():
        if spec.told.get(name) != found:
            raise DataError(
                f"{start.path} tells {spec.told.get(name)} {name.removeprefix('num_').replace('_', ' ')} apart, "
                f"the training data have {found}",
                hint="train the recipe's own model, which fits: bmctl train --recipe RECIPE",
            )
    about = _about(context, spec, model, train)
    return model, about.model_copy(update={"history": start.manifest.history}), ()


def _about(context: StageContext, spec: ModelSpec, model: nn.Module, train: Split) -> About:
    recipe, given = context.recipe, train.given
    return About(
        model=spec,
        parts=signatures(model, given=given, task=train.task, facts=train.facts),
        input=given.spec,
        files={name: content.decode() for name, content in given.files.items()},
        task=train.task.model_dump(mode="json"),
        facts=train.facts.model_dump(mode="json"),
        data_fingerprint=data_fingerprint(context.data),
        recipe=recipe.model_dump(mode="json"),
    )


def _new_head(config: ModelConfig, spec: ModelSpec) -> tuple[str, ...]:
    """What is to be said when published weights do not bring the last layer."""
    known, num_classes = published(config) if config.pretrained else None, spec.told.get("num_classes")
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
    about: About,
    *,
    start: ModelPackage | None,
    val: Split,
    target: Path,
    key: str,
    notes: tuple[str, ...],
) -> ModelPackage:
    model, evaluation, recipe = result.model, result.val, context.recipe
    assert evaluation is not None
    batch = next(array_batches(val, batch_size=2))
    example = {spec.name: torch.from_numpy(batch[spec.name]) for spec in about.model.given}
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
        model=about.model,
        parts=about.parts,
        input=about.input,
        task=about.task,
        facts=about.facts,
        metrics=metrics,
        data_fingerprint=about.data_fingerprint,
        notes=all_notes,
    )
    if start:
        further = derive(start, stage=STAGE, key=key, metrics=metrics, notes=all_notes)
        fresh = further.model_copy(update={"task": fresh.task, "data_fingerprint": fresh.data_fingerprint})
    package = save_package(
        target,
        manifest=fresh,
        recipe_yaml=recipe_yaml(recipe),
        model=model,
        files=about.given.files,
        overwrite=context.overwrite,
    )
    appraise.file_score(context, package, evaluation, backend="eager")
    context.emit({"event": "stage_done", "stage": STAGE, "package": str(target), **package.manifest.metrics})
    return package
