"""Training: one loop, for a first training and for the recovery after a compression step."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import nn

from bmctl.engine import loop, position, randomness
from bmctl.engine.checkpoint import Identity
from bmctl.engine.context import StageContext
from bmctl.engine.data import Split
from bmctl.engine.fitlog import FitLog
from bmctl.engine.optim import build_optimizer
from bmctl.engine.parallel import Group, check_batch
from bmctl.engine.position import Position, Setting
from bmctl.engine.precision import choose_precision
from bmctl.errors import DataError, RecipeError
from bmctl.recipe import Recipe
from bmctl.fit import Distill, Fit
from bmctl.schema import Strict
from bmctl.tasks import Evaluation

_FREE = {"keep_checkpoints", "checkpoint_every_steps", "grace_s"}
"""Settings of Fit that do not change what the steps do, and may differ when a run is resumed."""


@dataclass(frozen=True)
class FitResult:
    """What a training came to.

    Attributes:
        val: Of the weights that the model now has; None on all ranks but the first.
        steps: Optimizer steps done, over all attempts.
        best_step: After which the best validation was.
        precision: ``bf16`` or ``fp32``.
        notes: What the user was told.
    """

    val: Evaluation | None
    steps: int
    best_step: int
    precision: str
    notes: tuple[str, ...]


def fit(
    model: nn.Module,
    *,
    fit: Fit,
    train: Split,
    val: Split,
    task: ModuleType,
    task_config: Strict,
    context: StageContext,
    stage: str,
    seed: int,
    teacher: nn.Module | None = None,
    distill: Distill | None = None,
    inputs_hash: str = "",
) -> FitResult:
    """Train `model` in place; it ends in eval mode with the selected weights.

    Args:
        model: From x [B, C, H, W] to the task's outputs, on any device.
        fit: The recipe's `train` section, or a step's `recover.fit`.
        train: What the steps are made of.
        val: What weights are selected by.
        task: Module of bmctl.tasks.
        task_config: Its Config.
        context: Run, processes, signals and events of the stage.
        stage: Names checkpoints and events.
        seed: Of the order of samples, augmentation and dropout.
        teacher: Its outputs are a second target; it is put in eval mode.
        distill: How the two targets are weighed; needed with a teacher.
        inputs_hash: Of what the model was made from; a checkpoint of other inputs is not continued.

    Raises:
        RecipeError: The processes cannot share a batch evenly.
        DataError: Fewer samples than one batch, or the data is not that of the checkpoint.
        PackageError: The checkpoint is of another recipe.
        UsageError: There are checkpoints, and neither --resume nor --overwrite was given.
        DivergedError: The loss is no longer finite.
        PreemptedError: A signal came; a checkpoint was published.
    """
    group, config, asked = context.group, fit, distill if teacher is not None else None
    check_batch(group, config.batch_size)
    steps_per_epoch, num_steps = _count_steps(config, len(train))
    precision = choose_precision(config.precision, group.device)
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    model.to(group.device, memory_format=layout).train()  # type: ignore[call-overload]
    if teacher is not None:
        teacher.to(group.device, memory_format=layout).eval()  # type: ignore[call-overload]
    randomness.seed_all(seed, stage=stage, rank=group.rank)
    setting = Setting(
        context=context,
        stage=stage,
        seed=seed,
        fit=config,
        train=train,
        val=val,
        task=task,
        task_config=task_config,
        model=model,
        forward=_share(model, group),
        optimizer=build_optimizer(model, config.optimizer),
        precision=precision,
        teacher=teacher,
        distill=asked,
        identity=Identity(
            optimizer=config.optimizer.name,
            data_fingerprint=_hash([train.fingerprint, val.fingerprint]),
            settings=_settings(context.recipe, config, stage, seed, asked, inputs_hash),
        ),
        log=FitLog(context, stage, task.METRIC, config.batch_size, steps_per_epoch, num_steps),
        steps_per_epoch=steps_per_epoch,
        num_steps=num_steps,
    )
    return _run(setting)


def _run(setting: Setting) -> FitResult:
    log, precision = setting.log, setting.precision
    notes = (f"{precision.name}: {precision.reason}", *_differences(setting.model, setting.context.group))
    where = position.begin(setting)
    log.emit(
        "start",
        steps=setting.num_steps,
        epochs=-(-setting.num_steps // setting.steps_per_epoch),
        step=where.step,
        precision=precision.name,
    )
    for note in notes:
        log.note(note)
    log.open(step=where.step)
    try:
        loop.run(setting, where)
    finally:
        log.close()
    evaluation = _select(setting, where)
    assert where.best_step is not None
    log.emit(
        "done",
        steps=where.step,
        best_step=where.best_step,
        val_metric=evaluation.value if evaluation else None,
        seconds=log.train_s,
        samples_per_s=log.num_steps_here * setting.fit.batch_size / max(1e-9, log.train_s),
    )
    return FitResult(evaluation, where.step, where.best_step, precision.name, notes)


def training_key(recipe: Recipe, *, data_fingerprint: str, start: str | None = None) -> str:
    """SHA-256 of everything that a training depends on, with the hash of the package it starts from: its key."""
    fit = recipe.train
    if fit is None:
        raise RecipeError(f"recipe {recipe.name!r} has no train section", hint="add one: train: {epochs: 10}")
    return _hash(_settings(recipe, fit, "train", recipe.seed, None, start or "") | {"data": data_fingerprint})


# -- before the first step --------------------------------------------------------------------------


def _count_steps(fit: Fit, num_samples: int) -> tuple[int, int]:
    """Steps of an epoch, and of all; samples that do not fill a batch wait for the next epoch's order."""
    if num_samples < fit.batch_size:
        raise DataError(
            f"the training split has {num_samples} samples, fewer than one batch of {fit.batch_size}",
            hint=f"--set train.batch_size={max(1, num_samples // 2)}",
        )
    steps_per_epoch = num_samples // fit.batch_size
    return steps_per_epoch, min(fit.epochs * steps_per_epoch, fit.max_steps or 2**62)


def _share(model: nn.Module, group: Group) -> nn.Module:
    """The model as a step calls it: gradients are averaged where there are several processes."""
    if group.world == 1:
        return model
    places = [group.device] if group.device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(model, device_ids=places, gradient_as_bucket_view=True)


def _differences(model: nn.Module, group: Group) -> list[str]:
    """What several processes do otherwise than one would."""
    if group.world == 1:
        return []
    modules = list(model.modules())
    found = []
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in modules):
        found.append("batch statistics are taken over each process's part of a batch")
    if any(isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0 for module in modules):
        found.append("dropout draws differently in each process")
    if not found:
        return []
    return [f"{group.world} processes: {' and '.join(found)}; one process would end with slightly other weights"]


def _settings(
    recipe: Recipe, fit: Fit, stage: str, seed: int, distill: Distill | None, inputs_hash: str
) -> dict[str, Any]:
    """What decides, with the data, what the steps do."""
    data = recipe.data.model_dump(mode="json", include={"preprocess", "augment"}) if recipe.data else None
    return {
        "stage": stage,
        "seed": seed,
        "model": recipe.model.model_dump(mode="json") if recipe.model else None,
        "data": data,
        "task": recipe.task.model_dump(mode="json") if recipe.task else None,
        "fit": fit.model_dump(mode="json", exclude=_FREE),
        "distill": distill.model_dump(mode="json") if distill else None,
        "inputs": inputs_hash,
    }


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# -- after the last step ----------------------------------------------------------------------------


def _select(setting: Setting, where: Position) -> Evaluation | None:
    """Give the model the weights that the recipe selects; what they are worth, on rank 0."""
    model, leads = setting.model, setting.context.group.leads
    is_last = setting.fit.select == "last" or where.best_step == where.step
    if not is_last:
        model.load_state_dict(where.best)
    model.to(memory_format=torch.contiguous_format).eval()
    if not leads:
        return None
    known = where.best_evaluation if where.best_step == where.step or not is_last else None
    return known if known is not None else loop.evaluate(setting)
