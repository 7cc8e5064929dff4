"""Where a training loop stands, in memory and in its checkpoints."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from bmctl.engine import checkpoint, randomness
from bmctl.engine.checkpoint import Identity, Snapshot, State, Tensors
from bmctl.engine.context import StageContext
from bmctl.engine.fitlog import FitLog
from bmctl.engine.optim import load_optimizer, optimizer_tensors
from bmctl.engine.parallel import gather, settle
from bmctl.engine.precision import Precision
from bmctl.errors import BmctlError, DivergedError, PackageError, UsageError
from bmctl.fit import Distill, Fit
from bmctl.schema import Strict
from bmctl.tasks import Evaluation

if TYPE_CHECKING:
    from bmctl.engine.data import Split


@dataclass(frozen=True)
class Setting:
    """What one training is made of; nothing here changes while it runs, but for weights and optimizer state.

    Attributes:
        forward: The model as it is called in a step: wrapped where there are several processes.
        steps_per_epoch: Whole global batches in the training data.
        num_steps: At which the training ends.
    """

    context: StageContext
    stage: str
    seed: int
    fit: Fit
    train: Split
    val: Split
    task: ModuleType
    task_config: Strict
    model: nn.Module
    forward: nn.Module
    optimizer: torch.optim.Optimizer
    precision: Precision
    teacher: nn.Module | None
    distill: Distill | None
    identity: Identity
    log: FitLog
    steps_per_epoch: int
    num_steps: int


@dataclass
class Position:
    """Where the loop stands; `checkpoint.State` is its form on disk.

    Attributes:
        loss_sum: Sum over the batches of this epoch of the mean loss, on this rank; likewise score_sum.
        best: Weights of the best validation so far.
        best_evaluation: Its result, where it was made by this process.
        saved_step: The step of the newest checkpoint.
    """

    loss_sum: torch.Tensor
    score_sum: torch.Tensor
    step: int = 0
    validated_step: int = 0
    best_step: int | None = None
    best_value: float | None = None
    best: Tensors = field(default_factory=dict)
    best_evaluation: Evaluation | None = None
    saved_step: int | None = None


def start(setting: Setting) -> Position:
    """The position before the first step."""
    zeros = [torch.zeros((), device=setting.context.group.device) for _ in range(2)]
    return Position(loss_sum=zeros[0], score_sum=zeros[1])


def begin(setting: Setting) -> Position:
    """Where to start: at the first step, or at the newest checkpoint that verifies.

    Raises:
        UsageError: There are checkpoints, and neither --resume nor --overwrite was given.
        PackageError: The checkpoint is of another recipe.
        DataError: The data is not that of the checkpoint.
        ResourceError: No room or no right to write checkpoints.
    """
    context, group = setting.context, setting.context.group
    folder = checkpoint.folder_of(context.run, setting.stage)
    error, path = None, None
    if group.leads:
        try:
            path = _prepare_folder(setting)
        except BmctlError as failed:
            error = failed
    settle(group, error)
    step = gather(group, {"step": int(path.name.removeprefix("step-")) if path else None})[0]["step"]
    if step is None:
        return start(setting)
    path = checkpoint.path_of(folder, step)
    error, where = None, None
    try:
        found, manifest = checkpoint.load(path)
        checkpoint.check_identity(path, manifest.identity, setting.identity)
        where = go_on(setting, found)
    except BmctlError as failed:
        error = failed
    settle(group, error)
    assert where is not None
    setting.log.note(f"going on from step {step} of {setting.num_steps}")
    then, now = (manifest.world, manifest.threads, manifest.device), (group.world, group.threads, group.device.type)
    if then != now:
        words = "{} processes with {} threads on {}"
        setting.log.note(
            f"begun by {words.format(*then)}, going on by {words.format(*now)}: "
            "the same samples in every step, but not the same weights bit for bit"
        )
    return where


def _prepare_folder(setting: Setting) -> Path | None:
    """On rank 0: the checkpoint to go on from; room and rights for new ones are checked."""
    context = setting.context
    folder = checkpoint.folder_of(context.run, setting.stage)
    steps = checkpoint.steps_in(folder)
    if steps and context.overwrite and not context.resume:
        checkpoint.discard(folder)
    elif steps and not context.resume:
        raise UsageError(
            f"{folder} holds checkpoints of an earlier attempt, up to step {steps[-1]}",
            hint="add --resume to go on, or --overwrite to start again",
        )
    checkpoint.check_room(folder, setting.model)
    if not context.resume:
        return None
    path = checkpoint.find_newest(folder, note=setting.log.note)
    if path is None:
        setting.log.note("there is no checkpoint to go on from: starting at the first step")
    return path


def diverged(setting: Setting, position: Position) -> DivergedError:
    return DivergedError(
        f"{setting.stage}: the loss is no longer finite at step {position.step} of {setting.num_steps}",
        hint="lower the learning rate: --set train.optimizer.lr=..., or lengthen train.schedule.warmup",
    )


def save(setting: Setting, position: Position) -> None:
    """Publish a checkpoint of this position, unless there is one."""
    if position.saved_step == position.step:
        return
    group = setting.context.group
    generators = gather(group, randomness.random_state(group.device))
    error = None
    if group.leads:
        try:
            _publish(setting, position, generators)
        except BmctlError as failed:
            error = failed
    settle(group, error)
    position.saved_step = position.step


def _publish(setting: Setting, position: Position, generators: list[dict[str, Any]]) -> None:
    group = setting.context.group
    epoch, done = divmod(position.step, setting.steps_per_epoch)
    state = State(
        step=position.step,
        validated_step=position.validated_step,
        best_step=position.best_step,
        best_value=position.best_value,
        loss_sum=_finite(float(position.loss_sum), setting, position),
        score_sum=float(position.score_sum),
        seed=setting.seed,
        epoch=epoch,
        num_seen=done * setting.fit.batch_size,
        random=tuple(generators),
    )
    is_best = position.best_step == position.step
    snapshot = Snapshot(
        model=dict(setting.model.state_dict()),
        optimizer=optimizer_tensors(setting.optimizer, setting.model),
        best={} if is_best or setting.fit.select == "last" else position.best,
        state=state,
    )
    checkpoint.save(
        checkpoint.folder_of(setting.context.run, setting.stage),
        snapshot,
        step=position.step,
        keep=setting.fit.keep_checkpoints,
        note=setting.log.note,
        fields={
            "stage": setting.stage,
            "best_step": position.best_step,
            "num_steps": setting.num_steps,
            "identity": setting.identity,
            "world": group.world,
            "threads": group.threads,
            "device": group.device.type,
        },
    )


def _finite(value: float, setting: Setting, position: Position) -> float:
    if not math.isfinite(value):
        raise diverged(setting, position)
    return value


def go_on(setting: Setting, found: Snapshot) -> Position:
    """Put model, optimizer and generators back to where a checkpoint left them.

    Raises:
        PackageError: It does not fit this model.
    """
    state, group = found.state, setting.context.group
    try:
        setting.model.load_state_dict(found.model, strict=True)
        load_optimizer(setting.optimizer, setting.model, found.optimizer)
        if group.rank < len(state.random):
            randomness.set_random_state(state.random[group.rank], group.device)
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        raise PackageError(f"the checkpoint of step {state.step} does not fit this model: {error}") from error
    position = start(setting)
    position.step, position.validated_step, position.saved_step = state.step, state.validated_step, state.step
    position.best_step, position.best_value = state.best_step, state.best_value
    position.loss_sum.fill_(state.loss_sum)
    position.score_sum.fill_(state.score_sum)
    position.best = found.best
    if state.best_step == state.step:
        position.best = {name: tensor.detach().clone() for name, tensor in setting.model.state_dict().items()}
    return position
