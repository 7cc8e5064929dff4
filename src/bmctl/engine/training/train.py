"""Training: one loop, for a first training and for the recovery after a compression step."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from copy import copy
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import nn

from bmctl.core.evaluation import Evaluation
from bmctl.engine.computing.recompute import keep_activations
from bmctl.engine.context import StageContext
from bmctl.engine.loading.split import Split
from bmctl.engine.parallel import agree
from bmctl.engine.sharding.communication import Clock
from bmctl.engine.sharding.shared import SharedModel
from bmctl.engine.training import loop
from bmctl.engine.training.checkpointing import find_start, go_on
from bmctl.engine.training.differences import differences
from bmctl.engine.training.feed import open_feed
from bmctl.engine.training.setup import set_up
from bmctl.engine.training.training import Position, Training, start
from bmctl.engine.training.validation import evaluate
from bmctl.errors import DivergedError
from bmctl.fit import Distill, Fit
from bmctl.schema import Strict


@dataclass(frozen=True)
class FitResult:
    """What a training came to.

    Attributes:
        model: With the selected weights, whole and in eval mode: the model that was given, or where its parameters
            were sharded another one like it.
        val: Of these weights; None on all ranks but the first.
        steps: Optimizer steps done, over all attempts.
        best_step: After which the best evaluation was.
        precision: ``fp32``, ``tf32``, ``bf16`` or ``fp16``.
        batch_size: Samples of a step, over all processes.
        notes: What the user was told that bears on the weights.
    """

    model: nn.Module
    val: Evaluation | None
    steps: int
    best_step: int
    precision: str
    batch_size: int
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
    about: Mapping[str, Any] | None = None,
) -> FitResult:
    """Train `model`; go on with the model of the result.

    Args:
        model: Takes, by position, the fields of a batch that the input gives; on any device.
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
        about: What a checkpoint says of the model, so that a package can be made of it.

    Raises:
        RecipeError: The processes cannot share a batch evenly.
        DataError: Fewer samples than one batch, or the data is not that of the checkpoint.
        PackageError: The checkpoint is of another recipe.
        UsageError: There are checkpoints, and neither --resume nor --overwrite was given.
        DivergedError: The loss is no longer finite.
        PreemptedError: A signal came; a checkpoint was published.
    """
    asked = distill if teacher is not None else None
    training = Training(
        model, fit, train, val, task, task_config, context, stage, seed, teacher, asked, inputs_hash, about or {}
    )
    with ExitStack() as undo:
        found = find_start(context, stage=stage, fit=fit, model=model, note=partial(_say, training))
        set_up(training, found, undo)
        notes = _told(training)
        pin, workers = context.group.device.type == "cuda", training.num_workers
        with open_feed(training, batch_size=training.batch_size, num_workers=workers, pin=pin) as training.feed:
            where = start(training) if found is None else go_on(training, found)
            why = _run(training, where)
        context.stop.kept = "the checkpoint of the last step"
        context.beat(where.step, "finishing")
        kept, evaluation = _select(training, where)
    assert where.best_step is not None
    precision, ended = training.precision.name, (why,) if why != "done" else ()
    return FitResult(kept, evaluation, where.step, where.best_step, precision, training.batch_size, (*notes, *ended))


def _say(training: Training, text: str) -> None:
    if training.context.group.leads:
        training.context.emit({"event": "note", "stage": training.stage, "text": text})


def _told(training: Training) -> tuple[str, ...]:
    """Say what was settled; returns what bears on the weights."""
    precision, rest = training.precision, differences(training.model, training.context.group, training.fit)
    notes = (f"{precision.name}: {precision.reason}", *training.notes, *rest)
    for text in (*notes, *training.remarks):
        _say(training, text)
    return notes


def _run(training: Training, where: Position) -> str:
    log = training.log
    log.emit(
        "start",
        steps=training.num_steps,
        epochs=-(-training.num_steps // training.steps_per_epoch),
        step=where.step,
        precision=training.precision.name,
    )
    log.open(step=where.step)
    try:
        why = loop.run(training, where)
    except Exception as error:
        # Divergence is agreed upon: all ranks are here, and what is being saved is from before it.
        if training.context.group.world == 1 or isinstance(error, DivergedError):
            training.saver.finish()
        raise
    finally:
        training.saver.abandon()
    if why != "done":
        log.note(why)
    assert where.best_step is not None
    log.done(where.step, best_step=where.best_step, val_metric=where.best_value, parts=training.watch.overall())
    return why


def _select(training: Training, where: Position) -> tuple[nn.Module, Evaluation | None]:
    """A model with the weights that the recipe selects; what they are worth, on rank 0."""
    model, fit = training.model, training.fit
    is_last = fit.select == "last" or where.best_step == where.step
    if not is_last:
        model.load_state_dict(where.best)
    elif training.average is not None:
        model.load_state_dict(training.average.tensors())
    chosen = copy(training)
    chosen.average = None  # what is kept of it is in the model now
    whole = training.shared.whole_model()
    keep_activations(whole)
    whole.to(memory_format=torch.contiguous_format).eval()
    known = where.best_evaluation if where.best_step == where.step or not is_last else None
    if training.shared.strategy == "fsdp":
        chosen, known = _made_whole(chosen, whole), None
    if known is None:
        known = evaluate(chosen, step=where.step)
    return whole, known if training.context.group.leads else None


def _made_whole(training: Training, whole: nn.Module) -> Training:
    """To evaluate in fp32: parts are gathered, and compute, in the format that they were trained in."""
    group, made = training.context.group, copy(training)
    fits = True
    try:
        whole.to(group.device)
    except torch.OutOfMemoryError:
        fits = False
    if agree(group, not fits):
        whole.to("cpu")
        training.log.note(f"no GPU holds the whole model: the last evaluation is in {training.precision.name}")
        return training
    made.model = whole
    made.shared = SharedModel(
        whole,
        forward=whole,
        takes=training.takes,
        gives=training.gives,
        group=group,
        strategy="ddp",
        reason="",
        clock=Clock(group.device),
    )
    return made
